"""Decode Diff-ICMH's streams where they were not encoded: ``python jobs/icmh_determinism.py CHECKPOINT PHOTOS``.

Each crop is encoded once, by this process, with the exact coder and with the official one, whose scales
are floats. Then both streams are decoded under every setting that changes how sums are rounded: threads,
batch, memory layout, kernels, number format, and, in processes of their own, older instructions. An exact
stream fails when anything but the very latent comes back; a float one when it is refused or any value of
the latent is off by more than half a step. The bytes of both are compared, too, and what rounding the
networks to integers costs by itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dicmh_ray.bench import describe_environment
from dicmh_ray.codec.checkpoint import read_checkpoint
from dicmh_ray.codec.icmh.exact import ExactEntropyModel
from dicmh_ray.codec.icmh.exact_model import ExactModel
from dicmh_ray.codec.icmh.lfgcm import LatentCoder
from dicmh_ray.codec.icmh.official_coder import OfficialCoder
from dicmh_ray.codec.icmh.parts import load_arrays, load_machine_parts
from dicmh_ray.errors import BitstreamError, SourceImageError
from dicmh_ray.source import load_pixels

LEVELS = {
    "as encoded": {},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "SSE4": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
"""Instructions that a process may use, by the variables that say so."""

HALF_STEP = 0.5
COLUMNS = ("decodes", "exact failed", "float failed")

Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is checked."""

    checkpoint: str
    photographs: str
    images: int
    height: int
    width: int
    levels: tuple[str, ...]
    settings: tuple[str, ...]


@dataclass(kw_only=True, slots=True)
class Sizes:
    """Bytes of all crops together."""

    crops: int = 0
    pixels: int = 0
    exact: int = 0
    floats: int = 0
    estimate: float = 0.0
    """The rate that training minimises, rounded latents."""

    float_parameters: float = 0.0
    """The exact coder's frozen tables, chosen by the float networks."""


def main() -> None:
    """Encode, decode in a child for each set of instructions, print; 1 if an exact stream failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="directory of a Diff-ICMH checkpoint")
    parser.add_argument("photographs", help="folder of pictures, searched recursively")
    parser.add_argument("--images", type=int, default=200, help="crops")
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", metavar="FILE", help="where to write the figures as well")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    child, output = given.pop("child"), given.pop("json")
    options = Options(**given | {name: tuple(given[name]) for name in ("levels", "settings")})
    if child is not None:
        sys.stdout.write(json.dumps(decode_streams(options, Path(child))))
        return
    with tempfile.TemporaryDirectory(prefix="dicmh-determinism-") as name:
        sizes = encode_crops(options, Path(name))
        found = {level: run_child(Path(name), LEVELS[level]) for level in options.levels}
    print_result(sizes, found)
    if output is not None:
        result = {"options": asdict(options), "sizes": asdict(sizes), "settings": found}
        Path(output).write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(any(row[1] for settings in found.values() for row in settings.values()))


def crops(options: Options) -> Iterator[Array]:
    """Crops of photographs in the order of their paths, uint8 ``[H, W, 3]``; again from the first if needed."""
    chance = np.random.default_rng(4)
    paths = sorted(path for path in Path(options.photographs).rglob("*") if path.is_file())
    count = 0
    while True:
        before = count
        for path in paths:
            try:
                image = load_pixels(path.read_bytes()).image
            except SourceImageError:
                continue
            rows, columns = image.shape[0] - options.height, image.shape[1] - options.width
            if rows < 0 or columns < 0:
                continue
            top, left = int(chance.integers(rows + 1)), int(chance.integers(columns + 1))
            yield image[top : top + options.height, left : left + options.width]
            count += 1
            if count == options.images:
                return
        if count == before:
            sys.exit(
                f"{options.photographs}: no picture of {options.width}x{options.height} or more"
            )


@torch.no_grad()
def encode_crops(options: Options, folder: Path) -> Sizes:
    """One file a crop: both streams, and what they must decode to."""
    checkpoint = read_checkpoint(options.checkpoint)
    parts, arrays = load_machine_parts(checkpoint), load_arrays(checkpoint)
    model, exact = ExactModel.from_arrays(arrays), ExactEntropyModel.from_arrays(arrays)
    coder = parts.latent_coder
    coder.update_tables()
    official = OfficialCoder(coder)
    sizes = Sizes()
    for number, image in enumerate(crops(options)):
        x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
        ref = parts.vae.encode(x * 2 - 1)
        y, z = coder.analyse(x, ref)
        ours = exact.encode(y[0].numpy(), z[0].numpy())
        theirs = official.encode(y, z)
        np.savez(
            folder / f"{number:06}.npz",
            payload=np.frombuffer(ours.payload, np.uint8),
            symbol_crc=ours.symbol_crc,
            y_string=np.frombuffer(theirs.y_string, np.uint8),
            z_string=np.frombuffer(theirs.z_string, np.uint8),
            z_shape=z.shape[2:],
            y_hat=theirs.y_hat[0].numpy(),
        )
        sizes.crops += 1
        sizes.pixels += options.height * options.width
        sizes.exact += len(ours.payload)
        sizes.floats += len(theirs.y_string) + len(theirs.z_string)
        sizes.estimate += float(coder(x, ref).rounded_bits) / 8
        sizes.float_parameters += bits_of_float_parameters(coder, model, y, z) / 8
    return sizes


def bits_of_float_parameters(coder: LatentCoder, model: ExactModel, y: Tensor, z: Tensor) -> float:
    """What the frozen tables would take if the float networks chose among them."""
    (scales, means), _ = coder.round_y(y, coder.round_z(z))
    thresholds = np.ldexp(model.scale_thresholds.astype(np.float64), -12)
    tables = np.searchsorted(thresholds, scales.double().numpy())
    steps = torch.round(z - coder.medians()[:, None, None]).long().numpy()
    channels = np.broadcast_to(np.arange(z.shape[1])[:, None, None], steps.shape)
    bits = 0.0
    for frozen, own, symbols in (
        (model.y_tables, tables, torch.round(y - means).long().numpy()),
        (model.z_tables, channels, steps),
    ):
        starts = np.cumsum(frozen.sizes) - frozen.sizes
        codes, escape = symbols - frozen.lowest[own], frozen.sizes[own] - 1
        escapes = (codes < 0) | (codes >= escape)
        entries = frozen.frequencies[starts[own] + np.where(escapes, escape, codes)]
        bits += float((24 - np.log2(entries)).sum()) + 16 * int(np.count_nonzero(escapes))
    return bits


def run_child(folder: Path, variables: dict[str, str]) -> dict[str, list[int]]:
    """This file again, in a process that may use other instructions."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", str(folder)]
    result = subprocess.run(
        command, env=os.environ | variables, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, list[int]] = json.loads(result.stdout)
    return found


@torch.no_grad()
def decode_streams(options: Options, folder: Path) -> dict[str, list[int]]:
    """A child: for each setting the number of decodes, exact and float failures.

    Exact streams are decoded by the float64 engine, in the first setting by the int64 engine as well.
    """
    checkpoint = read_checkpoint(options.checkpoint)
    arrays, coder = load_arrays(checkpoint), load_machine_parts(checkpoint).latent_coder
    exact = ExactEntropyModel.from_arrays(arrays)
    reference = ExactEntropyModel.from_arrays(arrays, engine="int64")
    coder.update_tables()
    official = OfficialCoder(coder)
    found = {}
    for name in options.settings:
        counts = [0, 0, 0]
        engines = [exact, reference] if name == options.settings[0] else [exact]
        with SETTINGS[name](coder):
            for path in sorted(folder.glob("*.npz")):
                with np.load(path) as stored:
                    stream = dict(stored)
                counts[0] += 1
                counts[1] += any(exact_fails(engine, stream) for engine in engines)
                counts[2] += float_fails(official, stream)
        found[name] = counts
    return found


def exact_fails(exact: ExactEntropyModel, stream: dict[str, npt.NDArray[Any]]) -> bool:
    """Whether an exact stream does not give the very symbols."""
    rows, columns = (4 * int(side) for side in stream["z_shape"])
    try:
        decoded = exact.decode(stream["payload"].tobytes(), (rows, columns))
    except BitstreamError:
        return True
    return decoded.symbol_crc != int(stream["symbol_crc"])


def float_fails(official: OfficialCoder, stream: dict[str, npt.NDArray[Any]]) -> bool:
    """Whether an official stream is refused or gives another latent."""
    y_string, z_string = stream["y_string"].tobytes(), stream["z_string"].tobytes()
    try:
        decoded = official.decode(y_string, z_string, [int(side) for side in stream["z_shape"]])
    except BitstreamError:
        return True
    off = np.abs(decoded.y_hat[0].double().numpy() - stream["y_hat"])
    return not bool((off <= HALF_STEP).all())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def batch_of_two(coder: LatentCoder) -> Iterator[None]:
    """Every network of the entropy model sees its input twice."""
    modules: list[nn.Module] = [coder.hyper_dec, *coder.channel_context[1:], *coder.local_context]
    modules += [*coder.entropy_parameters_anchor, *coder.entropy_parameters_nonanchor]
    with ExitStack() as stack:
        for module in modules:
            before = module.register_forward_pre_hook(lambda _m, args: (torch.cat([args[0]] * 2),))
            after = module.register_forward_hook(lambda _m, _args, out: out[:1])
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


@contextmanager
def channels_last(coder: LatentCoder) -> Iterator[None]:
    """The networks in another memory layout."""
    coder.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        coder.to(memory_format=torch.contiguous_format)


@contextmanager
def no_onednn() -> Iterator[None]:
    """torch's own kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of TF32 whenever these flags are set
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@contextmanager
def double(coder: LatentCoder) -> Iterator[None]:
    """More exact than the encoder."""
    torch.set_default_dtype(torch.float64)
    coder.double()
    try:
        yield
    finally:
        coder.float()
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[LatentCoder], AbstractContextManager[Any]]] = {
    "as encoded": lambda _: nullcontext(),
    "1 thread": lambda _: threads(1),
    "2 threads": lambda _: threads(2),
    "batch of two": batch_of_two,
    "channels_last": channels_last,
    "oneDNN off": lambda _: no_onednn(),
    "float64": double,
    "bf16 autocast": lambda _: torch.autocast("cpu", torch.bfloat16),
}


def print_result(sizes: Sizes, found: dict[str, dict[str, list[int]]]) -> None:
    """The tables."""
    command = f"python jobs/{' '.join([Path(__file__).name, *sys.argv[1:]])}"
    for line in describe_environment(command).lines():
        print(line)
    print(f"\n{'instructions':14}{'setting':16}" + "".join(f"{name:>14}" for name in COLUMNS))
    totals = [0, 0, 0]
    for level, settings in found.items():
        for setting, row in settings.items():
            print(f"{level:14}{setting:16}" + "".join(f"{count:14}" for count in row))
            totals = [total + count for total, count in zip(totals, row, strict=True)]
    print(f"{'in all':30}" + "".join(f"{count:14}" for count in totals))
    print(f"\n{sizes.crops} crops{'':12}{'bytes':>12}{'bpp':>9}{'against float':>16}")
    for name, count in (
        ("float path", sizes.floats),
        ("exact", sizes.exact),
        ("estimate", sizes.estimate),
        ("exact tables, float networks", sizes.float_parameters),
    ):
        bpp, change = 8 * count / sizes.pixels, count / sizes.floats - 1
        print(f"{name:29}{count:12.0f}{bpp:9.4f}{change:+16.2%}")
    rounding = sizes.exact / sizes.float_parameters - 1
    print(f"networks rounded to integers cost {rounding:+.3%}")


if __name__ == "__main__":
    main()
