"""Rate and distortion of a codec on a set of pictures, shared out to workers on Ray.

    python jobs/evaluate_rd.py pictures/ -o report/ --ray-address auto
    python jobs/evaluate_rd.py pictures/ -o report/ --nets nets/ --workers 8

The same line without ``--ray-address`` starts a Ray of this machine; with ``--local`` it runs in this
process, as ``dicmh bench rd`` does. Each worker has one core, a codec of its own, and one picture at a
time; on several machines all must see the pictures, the nets and the checkpoint under the same paths. The report
has the same figures wherever it is made; only its seconds depend on the machines. Writes the report to
``-o`` and prints the mean of each method and setting as one JSON line. Exit 0: done, 1: an error.
"""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dicmh_ray.bench import (
    BenchOptions,
    FeatureJudge,
    Gauge,
    RdReport,
    evaluate_rd,
    find_nets,
    write_report,
)
from dicmh_ray.bench.rd import Measurement, rd_report, sweep
from dicmh_ray.bench.subject import find_images, for_each_picture, set_name
from dicmh_ray.cli.measuring import teachers_of
from dicmh_ray.codec import ImageCodec, load_codec, read_checkpoint
from dicmh_ray.errors import DicmhError
from dicmh_ray.ray_plugin import RayOptions

_log = logging.getLogger("evaluate_rd")

MakeCodec = Callable[[], ImageCodec]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The job."""

    pictures: Sequence[str]
    output: Path
    checkpoint: str
    device: str
    nets: Path | None
    limit: int | None
    local: bool
    ray_address: str | None
    workers: int | None

    def make_codec(self) -> ImageCodec:
        """On one thread: a worker has one core."""
        return load_codec(self.checkpoint, device=self.device, threads=1)

    def bench(self) -> BenchOptions:
        """What is compared."""
        teachers = teachers_of(read_checkpoint(self.checkpoint))
        return BenchOptions(max_images=self.limit, threads=1, teachers=teachers)


class Sweeper:
    """A worker: measures one picture after the other."""

    def __init__(self, make_codec: MakeCodec, nets: Path | None, options: BenchOptions) -> None:
        self._make_codec, self._nets, self._options = make_codec, nets, options
        self._gauge: Gauge | None = None

    def measure(
        self, name: str, path: Path
    ) -> tuple[list[tuple[Measurement, ...]], tuple[tuple[str, str], ...]]:
        """The picture's sweep, or why there is none. The first call loads codec and nets."""
        if self._gauge is None:
            self._codec = self._make_codec()
            self._gauge = gauge_of(self._codec, self._nets)
        gauge = self._gauge
        return for_each_picture(
            [(name, path)],
            self._codec,
            lambda subject: sweep(subject, gauge.look_at(subject), self._options),
            peers=self._options.peers,
            threads=1,
        )


def gauge_of(codec: ImageCodec, nets: Path | None) -> Gauge:
    """With every net of the folder that has taps."""
    specs = () if nets is None else find_nets(nets)
    return Gauge(codec, judges=[FeatureJudge(spec) for spec in specs if spec.taps])


def evaluate_on_ray(
    pictures: Sequence[str],
    make_codec: MakeCodec,
    *,
    nets: Path | None,
    options: BenchOptions,
    ray_options: RayOptions,
    command: str = "",
) -> RdReport:
    """What :func:`dicmh_ray.bench.evaluate_rd` gives, measured by actors.

    Raises:
        SourceNotFoundError: a source is no image and holds none.
        SourceFormatError: there is no picture that every method can code.
        JobError: a worker died.
    """
    # The first of them says how ray reads its environment.
    from dicmh_ray.ray_plugin.cluster import ActorSize, connected, machines  # isort: skip
    from ray.util import ActorPool

    images = [(name, path.resolve()) for name, path in find_images(pictures)[: options.max_images]]
    size = ActorSize(cpus=1, gpus=0)
    found: list[tuple[Measurement, ...]] = []
    skipped: list[tuple[str, str]] = []
    with connected(ray_options):
        count = min(len(images), ray_options.workers or max(1, size.fitting(machines())))
        actors = [size.start(Sweeper, make_codec, nets, options) for _ in range(count)]
        pool: Any = ActorPool(actors)
        results = pool.map(lambda actor, image: actor.measure.remote(*image), images)
        for number, (sweeps, left_out) in enumerate(results, start=1):
            found += sweeps
            skipped += left_out
            _log.info("%d of %d pictures", number, len(images))
    codec = make_codec()
    return rd_report(
        found,
        tuple(skipped),
        codec,
        options,
        gauge_of(codec, nets),
        pictures=set_name(pictures),
        command=command,
    )


def parse(arguments: Sequence[str]) -> Options:
    """The command line as options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pictures", nargs="+", metavar="PICTURES", help="files and folders")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--nets", type=Path, help="folder of nets whose features are compared")
    parser.add_argument("--limit", type=int, help="the first so many pictures")
    parser.add_argument("--local", action="store_true", help="in this process, without Ray")
    parser.add_argument("--ray-address", help="auto, ray://host:10001; default: a local Ray")
    parser.add_argument("--workers", type=int, help="default: one a CPU")
    return Options(**vars(parser.parse_args(arguments)))


def run(options: Options, command: str = "") -> RdReport:
    """Measure to the end."""
    if options.local:
        codec = options.make_codec()
        return evaluate_rd(
            options.pictures,
            codec,
            options=options.bench(),
            gauge=gauge_of(codec, options.nets),
            command=command,
        )
    return evaluate_on_ray(
        options.pictures,
        options.make_codec,
        nets=None if options.nets is None else options.nets.resolve(),
        options=options.bench(),
        ray_options=RayOptions(address=options.ray_address, workers=options.workers),
        command=command,
    )


def main() -> int:
    """Measure, write the report, print the means, return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        options = parse(sys.argv[1:])
        report = run(options, shlex.join(["python", *sys.argv]))
        write_report(report, options.output)
    except (DicmhError, OSError, ValueError) as exc:
        _log.error("%s", exc)
        return 1
    points = [asdict(replace(point, metrics=dict(point.metrics))) for point in report.points]
    print(json.dumps({"pictures": report.num_images, "points": points}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
