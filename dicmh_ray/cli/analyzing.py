"""Bodies of ``dicmh analyze`` and ``dicmh fit-head``."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from dicmh_ray.analysis import (
    AnalysisOptions,
    AnalysisReport,
    Survey,
    TaskOptions,
    fit_head,
    forecast,
    load_task,
    plan_analysis,
    read_survey,
)
from dicmh_ray.archive import open_snapshot
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
from dicmh_ray.ray_plugin import RayOptions
from dicmh_ray.ray_plugin.analysis import analyze
from dicmh_ray.views import open_archive


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalyzeArguments:
    """What the command was told."""

    archive: str
    task: str
    task_options: Mapping[str, Any]
    where: str | None
    runtime: str
    ray_address: str | None
    workers: int | None
    options: Mapping[str, Any]
    version: int | None
    storage_options: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class FitArguments:
    """What the command was told."""

    archive: str
    output: Path
    label: str
    states: int | None
    where: str | None
    left_out: float
    epochs: int
    seed: int
    version: int | None
    device: str
    storage_options: Sequence[str]


def run_analyze(arguments: AnalyzeArguments, *, dry_run: bool, as_json: bool) -> None:
    """Run the task, and say where its results lie."""
    storage = storage_options(arguments.storage_options, arguments.archive)
    if ":" in arguments.task and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` would; Ray hands it to its workers
    with told_in_one_line():
        with usage_checked():
            options = AnalysisOptions(**arguments.options)
            ray_options = RayOptions(address=arguments.ray_address, workers=arguments.workers)
            task = load_task(
                arguments.task, TaskOptions(**arguments.task_options), storage_options=storage
            )
        snapshot = open_snapshot(
            arguments.archive, version=arguments.version, storage_options=storage
        )
        if dry_run:
            needed = task.needs() if isinstance(task, Survey) else task
            if needed is None:
                _print_survey_plan(task.name, as_json=as_json)
                return
            with usage_checked():
                analysis, todo, report = plan_analysis(
                    snapshot, needed, where=arguments.where, options=options
                )
            _print_forecast(asdict(forecast(analysis, todo, report)), as_json=as_json)
            return
        with usage_checked():
            done = analyze(
                snapshot,
                task,
                where=arguments.where,
                runtime=cast("Literal['ray', 'local']", arguments.runtime),
                options=options,
                ray_options=ray_options,
                progress=_tell,
            )
        tables = {}
        if isinstance(task, Survey):
            found = read_survey(snapshot, done.results)
            tables = {name: len(table) for name, table in found.items()}
    facts_of_run = None if done.report is None else done.report.to_dict()
    place = f"{snapshot.uri}/analysis/{done.results}"
    if as_json:
        print_json({"results": done.results, "at": place, "tables": tables, "report": facts_of_run})
        return
    facts = [("at", place), *((f"rows of {name}", str(rows)) for name, rows in tables.items())]
    if done.report is not None:
        facts += _facts(done.report)
    print_facts(done.results, facts)


def run_fit_head(arguments: FitArguments, *, as_json: bool) -> None:
    """Fit a head, write it, and say how it does."""
    storage = storage_options(arguments.storage_options, arguments.archive)
    with told_in_one_line():
        archive = open_archive(
            arguments.archive,
            version=arguments.version,
            device=arguments.device,
            storage_options=storage,
        )
        with usage_checked():
            head, report = fit_head(
                archive,
                label=arguments.label,
                states=arguments.states,
                where=arguments.where,
                left_out=arguments.left_out,
                epochs=arguments.epochs,
                seed=arguments.seed,
            )
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_bytes(head.to_bytes())
    if as_json:
        print_json({"head": str(arguments.output), **report.to_dict()})
        return
    print_facts(
        str(arguments.output),
        [
            ("classes", str(len(report.classes))),
            ("fitted to", f"{report.fitted_to} pictures"),
            ("left out", f"{report.left_out} pictures"),
            ("accuracy on them", number_text(report.accuracy, ".3f")),
            ("most frequent class", number_text(report.chance, ".3f")),
        ],
    )


def _tell(report: AnalysisReport) -> None:
    done = report.units_done + report.units_resumed
    rate = report.rows / report.seconds if report.seconds else 0.0
    tell(
        f"{done} of {report.units_total} units, {report.rows} rows, {rate:.1f} rows/s, "
        f"{report.errors} errors"
    )


def _facts(report: AnalysisReport) -> list[tuple[str, str]]:
    return [
        ("units", f"{report.units_done} done, {report.units_resumed} before"),
        ("rows", f"{report.rows} in {report.seconds:.1f} s"),
        *((cause, str(count)) for cause, count in sorted(report.causes.items())),
    ]


def _print_forecast(facts: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(dict(facts))
        return
    print_facts(
        facts["results"],
        [
            ("units", f"{facts['units']} to do, {facts['units_resumed']} before"),
            ("rows", str(facts["rows"])),
            ("bitstreams to read", bytes_text(facts["bytes_to_read"])),
            ("originals to read", str(facts["originals"])),
        ],
    )


def _print_survey_plan(name: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"results": name, "units": 0, "rows": 0, "bytes_to_read": 0, "originals": 0})
        return
    print_facts(name, [("reads", "the index alone")])
