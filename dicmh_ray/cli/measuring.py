"""Bodies of the ``dicmh bench`` commands and of ``dicmh version``."""

import dataclasses
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dicmh_ray import __version__
from dicmh_ray.bench import (
    BenchOptions,
    EqualReport,
    FeatureJudge,
    Gauge,
    Lpips,
    NetSpec,
    NetTask,
    RdReport,
    equal_tables,
    evaluate_all,
    evaluate_rd,
    evaluate_tasks,
    find_nets,
    load_task,
    net_from_argument,
    tables,
    write_report,
)
from dicmh_ray.bench.subject import Progress as PictureProgress
from dicmh_ray.cli.output import (
    print_facts,
    print_json,
    print_table,
    say,
    tell,
    told_in_one_line,
    usage_checked,
)
from dicmh_ray.codec import Checkpoint, ImageCodec, load_codec, read_checkpoint
from dicmh_ray.errors import WeightsError

LIBRARIES = (
    "numpy",
    "pyarrow",
    "pillow",
    "fsspec",
    "s3fs",
    "torch",
    "constriction",
    "safetensors",
    "diffusers",
    "compressai",
    "ray",
)

SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchArguments:
    """What every ``bench`` command was given."""

    pictures: list[Path]
    output: Path | None
    checkpoint: str
    device: str
    views: list[str]
    nets: Path | None
    features: list[str]
    lpips: Path | None
    limit: int | None
    threads: int
    as_json: bool

    def options(self) -> BenchOptions:
        """Of the evaluation. Raises a usage error if they contradict each other."""
        with usage_checked():
            return BenchOptions(
                views=tuple(dict.fromkeys(self.views)) or ("machine",),
                max_images=self.limit,
                threads=self.threads,
                teachers=teachers_of(read_checkpoint(self.checkpoint)),
            )

    def specs(self) -> tuple[NetSpec, ...]:
        """The nets of the folder. Raises NetError."""
        return () if self.nets is None else find_nets(self.nets)

    def codec(self) -> ImageCodec:
        """On one thread of its own where several pictures are measured at once."""
        threads = None if self.threads == 1 else 1
        return load_codec(self.checkpoint, device=self.device, threads=threads)

    def gauge(self, codec: ImageCodec) -> Gauge:
        """With every net that has taps. Raises NetError."""
        specs = [*self.specs(), *map(net_from_argument, self.features)]
        return Gauge(
            codec,
            judges=[FeatureJudge(spec) for spec in specs if spec.taps],
            lpips=None if self.lpips is None else Lpips(self.lpips),
        )

    def tasks(self) -> list[NetTask]:
        """Of every net that has one. Raises NetError."""
        return [load_task(spec) for spec in self.specs() if spec.task != "none"]


def run_bench_rd(arguments: BenchArguments) -> None:
    """Measure, print the tables, write the report."""
    with told_in_one_line(), picture_progress() as progress:
        codec = arguments.codec()
        report = evaluate_rd(
            arguments.pictures,
            codec,
            options=arguments.options(),
            gauge=arguments.gauge(codec),
            command=command_line(),
            progress=progress,
        )
    with told_in_one_line():
        _show([report], as_json=arguments.as_json)
        if arguments.output is not None:
            _tell_written(write_report(report, arguments.output))


def run_bench_tasks(arguments: BenchArguments) -> None:
    """Score at equal bytes, print the tables, write the report."""
    with told_in_one_line(), picture_progress() as progress:
        codec = arguments.codec()
        report = evaluate_tasks(
            arguments.pictures,
            codec,
            arguments.tasks(),
            options=arguments.options(),
            gauge=arguments.gauge(codec),
            command=command_line(),
            progress=progress,
        )
    with told_in_one_line():
        _show([report], as_json=arguments.as_json)
        if arguments.output is not None:
            _tell_written(write_report(report, arguments.output))


def run_bench_all(arguments: BenchArguments, *, rd_limit: int | None, pages: int) -> None:
    """Everything in one pass."""
    with told_in_one_line(), picture_progress() as progress:
        codec = arguments.codec()
        campaign = evaluate_all(
            arguments.pictures,
            codec,
            arguments.tasks(),
            options=arguments.options(),
            gauge=arguments.gauge(codec),
            rd_images=rd_limit,
            command=command_line(),
            progress=progress,
        )
    with told_in_one_line():
        _show([campaign.rd, campaign.equal], as_json=arguments.as_json)
        if arguments.output is not None:
            _tell_written(campaign.write(arguments.output, pages=pages))


def command_line() -> str:
    """What the user typed, for reports."""
    return " ".join(["dicmh", *sys.argv[1:]])


def teachers_of(checkpoint: Checkpoint) -> frozenset[str]:
    """SHA-256 of the nets whose features trained a checkpoint, as its provenance tells."""
    return frozenset(str(one["sha256"]) for one in checkpoint.teachers if "sha256" in one)


@contextmanager
def picture_progress() -> Iterator[PictureProgress]:
    """A bar on a terminal, a line at most every ten seconds elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_progress()
        return
    with Progress(
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    ) as bar:
        task = bar.add_task("loading", total=None)

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, total=total, completed=done, description=f"{done}/{total} {name}")

        yield show


def _line_progress() -> PictureProgress:
    next_line = 0.0

    def show(done: int, total: int, name: str) -> None:
        nonlocal next_line
        if done == total or time.monotonic() >= next_line:
            next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            tell(f"{done}/{total} {name}")

    return show


def _show(reports: Sequence[RdReport | EqualReport], *, as_json: bool) -> None:
    if as_json:
        parts = [dataclasses.asdict(report) for report in reports]
        print_json(parts[0] if len(parts) == 1 else dict(zip(("rd", "equal"), parts, strict=True)))
        return
    for name, reason in reports[0].skipped:
        tell(f"left out: {name}: {reason}")
    for report in reports:
        for table in tables(report) if isinstance(report, RdReport) else equal_tables(report):
            say(table.title)
            print_table(table.columns, table.rows)


def _tell_written(paths: Sequence[Path]) -> None:
    for path in paths:
        tell(f"wrote {path}")


def run_version(*, as_json: bool) -> None:
    """Print versions without loading the libraries."""
    try:
        codec_id: str | None = read_checkpoint().codec_id
    except WeightsError:
        codec_id = None
    versions = {"dicmh_ray": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = installed_version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    if as_json:
        print_json({"default_codec_id": codec_id, **versions})
        return
    facts = [*versions.items(), ("default checkpoint", codec_id or "none in this installation")]
    print_facts("dicmh", facts)
