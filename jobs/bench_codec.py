"""Where the layered codec's time goes: ``python jobs/bench_codec.py PICTURE ...``.

Each picture is scaled and cut to 768 x 512, encoded, verified and decoded in this process. Stages:

    encode   = analysis network + symbols -> bytes (all states) + verification
    verify   = bytes -> symbols, as every encode does before it returns a stream
    decode   = bytes -> symbols + synthesis network, in the machine's native precision

Last, it says how far pictures decoded in that precision are from those decoded in float32.

The time of a picture is the best of the rounds, a figure is the median of the pictures, in
milliseconds of processor time (all threads together: what stays comparable on a busy machine) and
of wall time. For the cost of one core: ``OPENBLAS_NUM_THREADS=1`` and ``--threads 1``.

With ``--workers N`` it measures instead what a job gets from so many cores: N processes of one
thread each encode, then decode, at the same time, and their pictures a second are added up.
"""

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from PIL import Image, ImageOps

from dicmh_ray import load_codec
from dicmh_ray.bench import describe_environment
from dicmh_ray.bitstream import parse_bitstream
from dicmh_ray.codec.checkpoint import read_checkpoint
from dicmh_ray.codec.contexts import Symbols
from dicmh_ray.codec.symbols import SymbolCoder, as_rounded
from dicmh_ray.codec.tables import ContextTables

WIDTH, HEIGHT, CELL = 768, 512, 16

WORKER_SECONDS = 20.0
"""Wall time for which workers encode, and again decode."""


@dataclass(frozen=True, slots=True)
class Times:
    """Of one stage."""

    cpu_ms: float
    wall_ms: float

    def __sub__(self, other: "Times") -> "Times":
        return Times(self.cpu_ms - other.cpu_ms, self.wall_ms - other.wall_ms)


def best(rounds: int, function: Callable[[], object]) -> Times:
    """The least times of some calls."""
    taken = []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        taken.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu_s, wall_s = zip(*taken, strict=True)
    return Times(1000 * min(cpu_s), 1000 * min(wall_s))


def load_picture(path: Path) -> npt.NDArray[np.uint8]:
    """RGB, uint8 ``[512, 768, 3]``."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (WIDTH, HEIGHT)))


def measure(pictures: list[Path], checkpoint: str, rounds: int, threads: int) -> dict[str, Times]:
    """Median times of every stage."""
    codec = load_codec(checkpoint, device="cpu", threads=threads)
    # One that has not just verified the streams, and must decode their symbols.
    fresh = load_codec(checkpoint, device="cpu", threads=threads)
    exact = load_codec(checkpoint, device="cpu", threads=threads, precision="float32")
    name = "tables.safetensors"
    tables = safetensors.numpy.load(read_checkpoint(checkpoint).files[name])
    coder = SymbolCoder(ContextTables.from_arrays(tables, name))
    cells = (HEIGHT // CELL, WIDTH // CELL)

    def decode_symbols(payloads: list[bytes]) -> Symbols:
        symbols = coder.decode(0, None, cells, payloads[0]).symbols
        for state, payload in enumerate(payloads[1:], 1):
            symbols = coder.decode(state, symbols, cells, payload).symbols
        return symbols

    stages: dict[str, list[Times]] = {}
    for path in pictures:
        image = load_picture(path)
        encode = functools.partial(codec.encode, [image], tags=[()], exif_orientations=[1])
        stream = encode()[0]
        payloads = [state.payload for state in parse_bitstream(stream).states]
        symbols = decode_symbols(payloads)
        times = {
            "encode": best(rounds, encode),
            "encode: symbols -> bytes": best(
                rounds, functools.partial(coder.encode, as_rounded(symbols))
            ),
            "verify": best(rounds, functools.partial(decode_symbols, payloads)),
            "decode": best(rounds, functools.partial(fresh.decode, [stream])),
            "decode in float32": best(rounds, functools.partial(exact.decode, [stream])),
        }
        times["encode: network, rest"] = (
            times["encode"] - times["encode: symbols -> bytes"] - times["verify"]
        )
        times["decode: bytes -> symbols"] = times["verify"]
        times["decode: network, rest"] = times["decode"] - times["verify"]
        for stage, taken in times.items():
            stages.setdefault(stage, []).append(taken)
    return {
        stage: Times(
            statistics.median(t.cpu_ms for t in taken), statistics.median(t.wall_ms for t in taken)
        )
        for stage, taken in sorted(stages.items())
    }


@dataclass(frozen=True, slots=True)
class Difference:
    """Between pictures decoded in native precision and in float32, over all samples."""

    one_level_apart: float
    """Share of the samples."""

    further_apart: float
    """Share of the samples."""

    psnr_gain: float
    """Mean over the pictures of their PSNR in native precision less that in float32, dB."""


def precision_difference(pictures: list[Path], checkpoint: str, threads: int) -> Difference:
    """What native precision changes."""
    native = load_codec(checkpoint, device="cpu", threads=threads)
    exact = load_codec(checkpoint, device="cpu", threads=threads, precision="float32")
    differences, gains = [], []
    for image in map(load_picture, pictures):
        streams = native.encode([image], tags=[()], exif_orientations=[1])
        decoded = [codec.decode(streams)[0] for codec in (native, exact)]
        differences.append(np.abs(decoded[0].astype(np.int16) - decoded[1]))
        quality = native.measure([image, image], decoded)
        gains.append(quality[0].psnr - quality[1].psnr)
    levels = np.concatenate([d.ravel() for d in differences])
    return Difference(
        one_level_apart=float((levels == 1).mean()),
        further_apart=float((levels > 1).mean()),
        psnr_gain=statistics.fmean(gains),
    )


def throughput(pictures: list[Path], checkpoint: str, workers: int) -> dict[str, float]:
    """Pictures a second that some processes of one thread each encode, and decode, together."""
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[variable] = "1"  # read by the workers' libraries when they are loaded
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    with context.Pool(workers, _begin, (barrier,)) as pool:
        rates = pool.map(functools.partial(_work, checkpoint), [pictures] * workers, chunksize=1)
    return {stage: sum(rate[stage] for rate in rates) for stage in ("encode", "decode")}


_together: Barrier


def _begin(barrier: Barrier) -> None:
    global _together
    _together = barrier


def _work(checkpoint: str, paths: list[Path]) -> dict[str, float]:
    codec = load_codec(checkpoint, device="cpu", threads=1)
    images = [load_picture(path) for path in paths]
    streams = [codec.encode([i], tags=[()], exif_orientations=[1])[0] for i in images]
    codec.decode(streams[:1])

    def rate(function: Callable[[int], object]) -> float:
        _together.wait()
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < WORKER_SECONDS:
            function(done % len(images))
            done += 1
        return done / (time.perf_counter() - started)

    return {
        "encode": rate(lambda i: codec.encode([images[i]], tags=[()], exif_orientations=[1])),
        "decode": rate(lambda i: codec.decode([streams[i]])),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("--checkpoint", default="default", help="of the layered codec")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the networks")
    parser.add_argument("--workers", type=int, help="processes at the same time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    environment = describe_environment(f"python {' '.join(sys.argv)}")
    if options.workers:
        rates = throughput(options.pictures, options.checkpoint, options.workers)
        if options.json:
            print(json.dumps({"environment": asdict(environment), "images/s": rates}, indent=2))
            return
        print("\n".join(environment.lines()))
        for stage, total in rates.items():
            print(f"{stage}: {total:.1f} images/s by {options.workers} processes together")
        return
    stages = measure(options.pictures, options.checkpoint, options.rounds, options.threads)
    difference = precision_difference(options.pictures, options.checkpoint, options.threads)
    if options.json:
        found = {stage: asdict(times) for stage, times in stages.items()}
        facts = {"stages": found, "native precision": asdict(difference)}
        print(json.dumps({"environment": asdict(environment)} | facts, indent=2))
        return
    print("\n".join(environment.lines()))
    print(f"\n{'':28} {'CPU ms':>8} {'wall ms':>8} {'images/s/core':>14} {'images/s':>9}")
    for stage, times in stages.items():
        speeds = f"{1000 / times.cpu_ms:14.1f} {1000 / times.wall_ms:9.1f}"
        print(f"{stage:28} {times.cpu_ms:8.1f} {times.wall_ms:8.1f} {speeds}")
    print(
        f"\nnative precision against float32: {difference.one_level_apart:.1%} of the samples are one"
        f" level apart, {difference.further_apart:.3%} further; PSNR {difference.psnr_gain:+.4f} dB"
    )


if __name__ == "__main__":
    main()
