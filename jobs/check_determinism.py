"""Encode under every setting, decode under every other: ``python jobs/check_determinism.py``.

Settings of a process (which instructions torch, oneDNN, OpenBLAS and numpy may use) are given to
child processes by environment variables; those inside a process (threads, memory format, oneDNN,
autocast around the caller, default dtype, batch) are switched between calls. Every stream, of the
tiny test checkpoint and of the shipped one, must give the same symbols in every state under all of
them. How many encoders' latents differ before they are rounded is printed, too: it says that the
networks' results did differ in their last bits, and that the check means something.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dicmh_ray import load_codec
from dicmh_ray.bench import describe_environment
from dicmh_ray.codec.layered_codec import LayeredCodec
from dicmh_ray.errors import BitstreamError

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "golden" / "checkpoint"
SETTINGS = (
    "1 thread",
    "2 threads",
    "one image a call",
    "NCHW",
    "oneDNN off",
    "bf16 autocast",
    "float64 default",
)
SOURCES: Final = (
    ("skimage.data", "astronaut.png"),
    ("skimage.data", "chelsea.png"),
    ("skimage.data", "coffee.png"),
    ("skimage.data", "camera.png"),
    ("sklearn.datasets.images", "china.jpg"),
    ("sklearn.datasets.images", "flower.jpg"),
)
SIZES = ((96, 128), (160, 112), (65, 97))

Array = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How much is checked."""

    tiny_images: int
    default_images: int


def main() -> None:
    """Encode in one child for each instruction set, then decode in one for each; compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny-images", type=int, default=5, help="with the test checkpoint")
    parser.add_argument("--default-images", type=int, default=1, help="with the shipped one")
    parser.add_argument("--child", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    child = given.pop("child")
    options = Options(**given)
    if child is not None:
        step, folder = child
        (encode_streams if step == "encode" else decode_streams)(options, Path(folder))
        return
    levels = instruction_levels()
    with tempfile.TemporaryDirectory(prefix="dicmh-determinism-") as name:
        folder = Path(name)
        for level, variables in levels.items():
            run_child("encode", folder / slug(level), variables)
        found = {
            level: json.loads(run_child("decode", folder, variables))
            for level, variables in levels.items()
        }
        differing = count_differing(folder)
    sys.exit(1 if print_result(found, differing) else 0)


def instruction_levels() -> dict[str, dict[str, str]]:
    """Environment variables that hold a process to older instructions."""
    umath: Any = sys.modules["numpy.core._multiarray_umath"]
    usable = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]
    avx512 = [name for name in usable if name.startswith("AVX512")]
    return {
        "native": {},
        "AVX2": {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "OPENBLAS_CORETYPE": "Haswell",
            "NPY_DISABLE_CPU_FEATURES": " ".join(avx512),
        },
        "SSE4": {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "OPENBLAS_CORETYPE": "Nehalem",
            "NPY_DISABLE_CPU_FEATURES": " ".join(usable),
        },
    }


def run_child(step: str, folder: Path, variables: dict[str, str]) -> str:
    """This file again, in a process of its own."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--child", step, str(folder)]
    given = {name: value for name, value in variables.items() if value}
    return subprocess.run(
        command, env=os.environ | given, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def encode_streams(options: Options, folder: Path) -> None:
    """A child: every picture under every setting, one file each."""
    for checkpoint, codec, count in codecs(options):
        images = pictures(count)
        for setting in SETTINGS:
            streams = under(codec, setting, encode, images)
            latents = under(codec, setting, float_latents, images)
            for number, (data, latent) in enumerate(zip(streams, latents, strict=True)):
                name = f"{checkpoint}.{number}.{slug(setting)}"
                (folder / name).write_bytes(data)
                (folder / f"latent.{name}").write_bytes(latent)


def float_latents(codec: LayeredCodec, images: list[Array], is_single: bool) -> list[bytes]:
    """Digest of each picture's latent as the network gives it, before rounding."""
    del is_single
    digests = []
    for image in images:
        height, width = image.shape[:2]
        padded = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), "edge")
        latent = codec._run(
            lambda x: codec._network.encode(x.permute(0, 3, 1, 2).float()), padded[None]
        )
        digests.append(hashlib.sha256(latent.tobytes()).digest())
    return digests


def encode(codec: LayeredCodec, images: list[Array], is_single: bool) -> list[bytes]:
    """All in one call, or one by one."""
    groups = [[image] for image in images] if is_single else [images]
    return [
        data
        for group in groups
        for data in codec.encode(group, tags=[()] * len(group), exif_orientations=[1] * len(group))
    ]


def decode_streams(options: Options, folder: Path) -> None:
    """A child: every stream under every setting; prints a digest of the latents of each."""
    digests: dict[str, dict[str, str]] = {}
    for checkpoint, codec, _ in codecs(options):
        paths = sorted(folder.glob(f"*/{checkpoint}.*"))
        streams = [path.read_bytes() for path in paths]
        for setting in SETTINGS:
            found = under(codec, setting, decode, streams)
            for path, digest in zip(paths, found, strict=True):
                digests.setdefault(f"{path.parent.name}/{path.name}", {})[setting] = digest
    sys.stdout.write(json.dumps(digests))


def decode(codec: LayeredCodec, streams: list[bytes], is_single: bool) -> list[str]:
    """SHA-256 over the latents of all states of each stream, or the error's name."""
    groups = [[data] for data in streams] if is_single else [streams]
    hashes = []
    for group in groups:
        try:
            states = [codec.decode_latent(group, states=k + 1) for k in range(codec.num_states)]
        except BitstreamError as exc:
            hashes += [f"{type(exc).__name__}: {exc}"] * len(group)
            continue
        for number in range(len(group)):
            digest = hashlib.sha256()
            for latents in states:
                digest.update(np.ascontiguousarray(latents[number]).tobytes())
            hashes.append(digest.hexdigest())
    return hashes


def under(
    codec: LayeredCodec,
    setting: str,
    action: Callable[[LayeredCodec, list[Any], bool], T],
    data: list[Any],
) -> T:
    """Run an action under a setting of this process, and restore it."""
    threads = torch.get_num_threads()
    layout = torch.contiguous_format if setting == "NCHW" else torch.channels_last
    codec._network.to(memory_format=layout)
    try:
        torch.set_num_threads(1 if setting == "1 thread" else 2)
        torch.set_default_dtype(torch.float64 if setting == "float64 default" else torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of TF32 whenever these flags are set
            with (
                torch.backends.mkldnn.flags(enabled=setting != "oneDNN off"),
                torch.autocast("cpu", torch.bfloat16, enabled=setting == "bf16 autocast"),
            ):
                return action(codec, data, setting == "one image a call")
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        codec._network.to(memory_format=torch.channels_last)


def codecs(options: Options) -> Iterator[tuple[str, LayeredCodec, int]]:
    """Name, codec and number of pictures of each checkpoint."""
    chosen: list[tuple[str, str | Path, int]] = [
        ("tiny", TINY, options.tiny_images),
        ("default", "default", options.default_images),
    ]
    for name, checkpoint, count in chosen:
        if count:
            codec = load_codec(checkpoint, device="cpu")
            if not isinstance(codec, LayeredCodec):
                raise TypeError(f"{checkpoint} is no layered codec")
            yield name, codec, count


def pictures(count: int) -> list[Array]:
    """Crops of photographs that come with installed packages, uint8 ``[H, W, 3]``."""
    chance = np.random.default_rng(3)
    found = []
    for number in range(count):
        package, file = SOURCES[number % len(SOURCES)]
        whole = Image.open(io.BytesIO(files(package).joinpath(file).read_bytes())).convert("RGB")
        height, width = SIZES[number % len(SIZES)]
        top = int(chance.integers(whole.height - height))
        left = int(chance.integers(whole.width - width))
        found.append(np.asarray(whole.crop((left, top, left + width, top + height))))
    return found


def slug(name: str) -> str:
    """Fit for a file name."""
    return name.replace(" ", "-")


def count_differing(folder: Path) -> Counter[str]:
    """What differs from what the native encoder wrote with 2 threads, and of how many."""
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*/*")):
        what = "latent" if path.name.startswith("latent.") else "stream"
        first = path.name.rpartition(".")[0] + "." + slug("2 threads")
        counts[what] += path.read_bytes() != (folder / "native" / first).read_bytes()
        counts[f"{what} in all"] += 1
    return counts


def print_result(found: dict[str, dict[str, dict[str, str]]], differing: Counter[str]) -> int:
    """The table, and how many decodes did not give the symbols that the others gave."""
    command = f"python jobs/{' '.join([Path(__file__).name, *sys.argv[1:]])}"
    for line in describe_environment(command).lines():
        print(line)
    reference = {
        stream: Counter(found["native"][stream].values()).most_common(1)[0][0]
        for stream in found["native"]
    }
    decodes = mismatches = 0
    print(f"\n{'decoded under':14}{'setting':20}{'decodes':>8}{'mismatches':>12}")
    for level, streams in found.items():
        for setting in SETTINGS:
            wrong = [s for s, digests in streams.items() if digests[setting] != reference[s]]
            print(f"{level:14}{setting:20}{len(streams):8}{len(wrong):12}")
            for stream in wrong[:3]:
                print(f"    {stream}: {streams[stream][setting]}")
            decodes += len(streams)
            mismatches += len(wrong)
    for what in ("latent", "stream"):
        print(
            f"{differing[what]} of {differing[f'{what} in all']} {what}s differ from those of the "
            "native encoder with 2 threads"
        )
    print(f"{decodes} decodes of all states, {mismatches} mismatches")
    return mismatches


if __name__ == "__main__":
    main()
