"""Body of ``dicmh compress``."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import typer
from rich.console import Console

from dicmh_ray.cli.compress_arguments import CompressArguments
from dicmh_ray.cli.dry_running import run_dry
from dicmh_ray.cli.output import (
    bytes_text,
    number_text,
    print_facts,
    print_json,
    storage_options,
    tell,
    told_in_one_line,
    usage_checked,
)
from dicmh_ray.cli.progress import JobDisplay
from dicmh_ray.cli.reporting import write_job_page
from dicmh_ray.errors import DicmhError, JobStoppedError
from dicmh_ray.pipeline import EncodeOptions, EncodePolicy, JobObserver, JobReport
from dicmh_ray.pipeline.encode import FAILURE_CAUSES
from dicmh_ray.pipeline.event_log import JsonEventLog
from dicmh_ray.pipeline.metrics import MetricsObserver, TextfileSink
from dicmh_ray.ray_plugin import compress

STANDARD_ERROR = "-"
"""In the place of a file name."""


def run_compress(arguments: CompressArguments, *, dry_run: bool, as_json: bool) -> None:
    """Run the job, or say what it would be."""
    with usage_checked():
        policy = EncodePolicy(**arguments.policy)
        source_options = arguments.source_options()
        ray_options = arguments.ray_options()
        budget = failure_budget(arguments.failure_budget)
    with told_in_one_line():
        tagger = arguments.tagger.spec(arguments.checkpoint) if arguments.tagger else None
    if dry_run:
        run_dry(arguments, policy, source_options, tagger, as_json=as_json)
        return
    display = JobDisplay(
        Console(stderr=True, markup=False, highlight=False),
        is_quiet=arguments.log_json == STANDARD_ERROR,
    )
    with told_in_one_line(), ExitStack() as stack:
        observers = observers_of(arguments, stack)
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
                    observers=observers,
                    source_options=source_options,
                    encode_options=EncodeOptions(
                        device=arguments.device, threads=arguments.threads
                    ),
                    tagger=tagger,
                    ray_options=ray_options,
                    storage_options=storage_options(arguments.storage_options, arguments.archive),
                )
        except BaseException as exc:
            if display.last is not None:
                print_report(display.last, as_json=as_json)
                write_report(arguments, display.last, error=exc)
                # That it was told to stop says so itself.
                if display.last.manifest is None and not isinstance(exc, JobStoppedError):
                    tell("what is committed stays; the same command goes on from there")
            raise
    print_report(report, as_json=as_json)
    write_report(arguments, report)


def observers_of(arguments: CompressArguments, stack: ExitStack) -> list[JobObserver]:
    """Logs and metrics, as the command line asks for them; files are closed with the stack."""
    observers: list[JobObserver] = []
    if arguments.log_json is not None:
        stream: TextIO = sys.stderr
        if arguments.log_json != STANDARD_ERROR:
            file = Path(arguments.log_json).open("a", encoding="utf-8")  # noqa: SIM115  the stack's
            stream = stack.enter_context(file)
        observers.append(JsonEventLog(stream))
    if arguments.metrics_file is not None:
        sink = TextfileSink(path=arguments.metrics_file)
        sink.write()  # later a job would go on without
        observers.append(MetricsObserver(sink))
    return observers


def write_report(
    arguments: CompressArguments, report: JobReport, error: BaseException | None = None
) -> None:
    """Write the page, or the JSON, that was asked for. That it cannot be written is told."""
    path = arguments.report
    if path is None:
        return
    try:
        if path.suffix == ".json":
            path.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        else:
            options = storage_options(arguments.storage_options, arguments.archive)
            write_job_page(path, report, options, error=error)
    except (DicmhError, OSError) as exc:
        tell(f"error: the report is not written: {exc}")


def failure_budget(text: str) -> float:
    """A whole number is a count of images, anything else a share."""
    try:
        budget: float = int(text) if text.isdigit() else float(text)
    except ValueError as exc:
        raise typer.BadParameter(f"--failure-budget {text!r}: wanted a number") from exc
    if not isinstance(budget, int) and not 0 <= budget <= 1:
        raise typer.BadParameter(f"--failure-budget {text}: a share is between 0 and 1")
    return budget


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
