"""What Ray costs: images for each second of processor time, on Ray and in a bare loop.

    python jobs/bench_pipeline.py 'shards/*.tar'

The bare loop reads, decodes, encodes and measures the same images in one process with one thread,
and writes nothing. The Ray path does all a job does: the same, and Parquet parts, hashes, commits.
Start-up (processes, imports, loading the codec) is left out on both sides; the driver's processor
time while the job runs is charged to Ray. Processor time, not wall time, because that is what
stays comparable on a machine that has other work.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dicmh_ray import EncodePolicy, SourceOptions, compress, load_codec
from dicmh_ray.bench import describe_environment
from dicmh_ray.pipeline import EncodeOptions, encode_images
from dicmh_ray.ray_plugin import RayOptions
from dicmh_ray.source import plan_units, read_unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """What one way of running came to."""

    name: str
    images: int
    cpu_seconds: float
    wall_seconds: float

    @property
    def per_core(self) -> float:
        """Images for each second of one busy core."""
        return self.images / self.cpu_seconds


def bare_loop(sources: Sequence[str], num_images: int | None) -> Rate:
    """A loop in this process."""
    codec = load_codec(device="cpu", threads=1)
    options = SourceOptions()
    units = plan_units(sources, options=options)
    images = itertools.chain.from_iterable(read_unit(unit, options=options) for unit in units)
    wall, cpu = time.perf_counter(), time.process_time()
    rows = encode_images(itertools.islice(images, num_images), codec, EncodePolicy())
    count = sum(1 for _ in rows)
    return Rate(
        name="bare loop",
        images=count,
        cpu_seconds=time.process_time() - cpu,
        wall_seconds=time.perf_counter() - wall,
    )


def on_ray(sources: Sequence[str], workers: int | None) -> Rate:
    """A job on a local Ray, into a folder that is thrown away."""
    with tempfile.TemporaryDirectory(prefix="dicmh-bench-") as folder:
        cpu = time.process_time()
        report = compress(
            sources,
            f"{folder}/archive",
            encode_options=EncodeOptions(device="cpu", threads=1),
            ray_options=RayOptions(workers=workers),
            failure_budget=1.0,
        )
        driver = time.process_time() - cpu
    return Rate(
        name=f"Ray, {report.workers} workers",
        images=report.tally.images,
        cpu_seconds=report.cpu_seconds + driver,
        wall_seconds=report.seconds,
    )


def main() -> int:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description="Images per busy core: Ray against a bare loop.")
    parser.add_argument("sources", nargs="+", metavar="SRC")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--loop-images", type=int, help="of the bare loop; default: all")
    options = parser.parse_args()
    loop = bare_loop(options.sources, options.loop_images)
    ray = on_ray(options.sources, options.workers)
    print("\n".join(describe_environment(" ".join(sys.argv)).lines()))
    print(f"\n{'':20} {'images':>8} {'CPU s':>9} {'wall s':>9} {'images/s/core':>14} {'ratio':>7}")
    for rate in (loop, ray):
        print(
            f"{rate.name:20} {rate.images:8} {rate.cpu_seconds:9.1f} {rate.wall_seconds:9.1f} "
            f"{rate.per_core:14.2f} {rate.per_core / loop.per_core:7.2f}"
        )
    print("wall seconds of Ray include the start of its workers")
    return 0 if ray.per_core >= 0.9 * loop.per_core else 1


if __name__ == "__main__":
    sys.exit(main())
