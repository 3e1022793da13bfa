"""Body of ``dicmh compress``."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import typer
from rich.console import Console

from dicmh_ray.archive import open_snapshot
from dicmh_ray.cli.output import (
    bytes_text,
    number_text,
    print_facts,
    print_json,
    print_table,
    say,
    storage_options,
    tell,
    told_in_one_line,
    usage_checked,
)
from dicmh_ray.cli.progress import JobDisplay
from dicmh_ray.cli.tagger_options import TaggerArguments
from dicmh_ray.errors import ArchiveNotFoundError
from dicmh_ray.pipeline import EncodeOptions, EncodePolicy, JobReport
from dicmh_ray.pipeline.encode import FAILURE_CAUSES
from dicmh_ray.pipeline.job import plan_append
from dicmh_ray.ray_plugin import RayOptions, compress
from dicmh_ray.source import SourceOptions, plan_units

DRY_RUN_UNITS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressArguments:
    """The command line of ``compress``, not yet checked."""

    sources: Sequence[str]
    archive: str
    runtime: Any
    policy: dict[str, Any]
    source: dict[str, Any]
    checkpoint: str
    device: str
    threads: int | None
    workers: int | None
    ray_address: str | None
    resume: bool
    failure_budget: str
    storage_options: Sequence[str]
    tagger: TaggerArguments | None = None
    append: bool = False

    def source_options(self) -> SourceOptions:
        """How sources are read."""
        source = {**self.source, "tag_fields": tuple(self.source["tag_fields"])}
        remote = storage_options(self.storage_options, *self.sources)
        return SourceOptions(**source, storage_options=remote)


def run_compress(arguments: CompressArguments, *, dry_run: bool, as_json: bool) -> None:
    """Run the job, or say what it would be."""
    with usage_checked():
        policy = EncodePolicy(**arguments.policy)
        source_options = arguments.source_options()
        ray_options = RayOptions(address=arguments.ray_address, workers=arguments.workers)
        budget = failure_budget(arguments.failure_budget)
    with told_in_one_line():
        tagger = arguments.tagger.spec(arguments.checkpoint) if arguments.tagger else None
    if dry_run:
        with told_in_one_line():
            _print_plan(arguments, source_options, as_json=as_json)
        return
    display = JobDisplay(Console(stderr=True, markup=False, highlight=False))
    with told_in_one_line():
        try:
            with display:
                report = compress(
                    arguments.sources,
                    arguments.archive,
                    codec=arguments.checkpoint,
                    policy=policy,
                    runtime=arguments.runtime,
                    resume=arguments.resume,
                    append=arguments.append,
                    failure_budget=budget,
                    progress=display,
                    source_options=source_options,
                    encode_options=EncodeOptions(
                        device=arguments.device, threads=arguments.threads
                    ),
                    tagger=tagger,
                    ray_options=ray_options,
                    storage_options=storage_options(arguments.storage_options, arguments.archive),
                )
        except BaseException:
            if display.last is not None:
                print_report(display.last, as_json=as_json)
                if display.last.manifest is None:
                    tell("what is committed stays; the same command goes on from there")
            raise
    print_report(report, as_json=as_json)


def failure_budget(text: str) -> float:
    """A whole number is a count of images, anything else a share."""
    try:
        budget: float = int(text) if text.isdigit() else float(text)
    except ValueError as exc:
        raise typer.BadParameter(f"--failure-budget {text!r}: wanted a number") from exc
    if not isinstance(budget, int) and not 0 <= budget <= 1:
        raise typer.BadParameter(f"--failure-budget {text}: a share is between 0 and 1")
    return budget


def _print_plan(
    arguments: CompressArguments, source_options: SourceOptions, *, as_json: bool
) -> None:
    remote = storage_options(arguments.storage_options, arguments.archive)
    committed = 0
    if arguments.append:
        base = open_snapshot(arguments.archive, storage_options=remote)
        units = plan_append(arguments.sources, base, source_options)
    else:
        units = plan_units(arguments.sources, options=source_options)
        with contextlib.suppress(ArchiveNotFoundError):
            committed = len(open_snapshot(arguments.archive, storage_options=remote).commits)
    total = sum(unit.num_bytes for unit in units)
    if as_json:
        listed = [asdict(unit) for unit in units]
        print_json({"units": listed, "num_bytes": total, "committed": committed})
        return
    rows = []
    for unit in units[:DRY_RUN_UNITS]:
        where = unit.uri if isinstance(unit.uri, str) else f"{len(unit.uri)} files: {unit.uri[0]}"
        if unit.start is not None:
            where += f" row groups {unit.start} to {unit.stop}"
        rows.append((unit.name, unit.kind, where, bytes_text(unit.num_bytes)))
    print_table(("unit", "kind", "source", "bytes"), rows)
    if len(units) > DRY_RUN_UNITS:
        say(f"... and {len(units) - DRY_RUN_UNITS} more")
    say(f"{len(units)} units, {bytes_text(total)}; {committed} are committed already")


def print_report(report: JobReport, *, as_json: bool) -> None:
    """Print what a job came to."""
    if as_json:
        print_json(report.to_dict())
        return
    tally = report.tally
    ratio = tally.bytes_in / tally.bytes_out if tally.bytes_out else None
    facts = [
        ("units", f"{report.units_done} done, {report.units_resumed} were done before"),
        ("images", f"{tally.images} in {report.seconds:.1f} s, {report.images_per_s:.1f}/s"),
        ("ok", str(tally.ok)),
        ("kept original", str(tally.kept_original)),
        ("failed", str(tally.failed)),
        ("bytes in", bytes_text(tally.bytes_in)),
        ("bytes out", f"{bytes_text(tally.bytes_out)} ({number_text(ratio, '.2f')} : 1)"),
        ("rate", number_text(report.mean_bpp, ".3f", " bpp")),
        ("PSNR", number_text(report.mean_psnr, ".2f", " dB")),
    ]
    for cause, count in sorted(tally.causes.items()):
        facts.append((cause, f"{count}{' (failure)' if cause in FAILURE_CAUSES else ''}"))
    if report.units_failed:
        facts.append(("units given up", ", ".join(report.units_failed[:10])))
    if report.manifest is not None:
        facts.append(("archive version", str(report.manifest)))
    title = f"{report.archive} ({'complete' if report.manifest else 'unfinished'})"
    print_facts(title, facts)
