"""Analyse an archive, on Ray or in this process. Imports ray only when Ray is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dicmh_ray.analysis import (
    AnalysisOptions,
    AnalysisReport,
    Survey,
    Task,
    analyze_local,
    plan_analysis,
    run_survey,
)
from dicmh_ray.analysis.run import Analysis, Progress
from dicmh_ray.archive import Commit, Snapshot, open_snapshot
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import CodecMismatchError, MissingExtraError
from dicmh_ray.ray_plugin.options import RayOptions

Runtime = Literal["ray", "local"]


@dataclass(frozen=True, kw_only=True)
class Analyzed:
    """What there is now."""

    results: str
    """Name of the results' folder: what :func:`dicmh_ray.analysis.read_results` or
    :func:`dicmh_ray.analysis.read_survey` reads."""

    report: AnalysisReport | None
    """Of the task that ran; None of a survey of the index alone."""


def analyze(
    archive: str | Snapshot,
    task: Task | Survey,
    *,
    where: str | None = None,
    runtime: Runtime = "local",
    options: AnalysisOptions | None = None,
    ray_options: RayOptions | None = None,
    codec: ImageCodec | None = None,
    progress: Progress | None = None,
    version: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Analyzed:
    """Run a task over an archive; or a survey, and the task that it needs before.

    Units that have results are skipped: after a crash, a kill or Ctrl-C the same call goes on, and on
    an archive that has grown it looks at what is new. Two calls at once are safe.

    Args:
        archive: its address, or a snapshot of it.
        task: one of :mod:`dicmh_ray.analysis`, or one's own.
        where: filter; other rows have no results.
        runtime: ``ray`` for actors on every GPU or CPU, ``local`` for a loop in this process.
        options: device, threads, batches, failure budget.
        ray_options: which cluster, how many workers.
        codec: decodes the streams; None loads the archive's where a view needs it.
        progress: called with the live report after each unit.
        version: of the archive; None is the newest, or the commits of an unfinished one.
        storage_options: for the archive's store.

    Raises:
        ValueError: the task is not as documented, or ``runtime`` is neither.
        FailureBudgetError: the task fails on too many rows of a unit.
        JobError: some units could not be looked at; the others have results.
        DicmhError: what the task needs is not there.
    """
    if runtime not in ("local", "ray"):
        raise ValueError(f"runtime is {runtime!r}, wanted 'ray' or 'local'")
    snapshot = (
        archive
        if isinstance(archive, Snapshot)
        else open_snapshot(archive, version=version, storage_options=storage_options)
    )
    if codec is not None and codec.codec_id != snapshot.codec_id:
        raise CodecMismatchError(snapshot.codec_id, codec.codec_id)
    needed = task.needs() if isinstance(task, Survey) else task
    report = None
    results = ""
    if needed is not None:
        analysis, todo, report = plan_analysis(
            snapshot, needed, where=where, options=options, codec=codec
        )
        results = report.task
        if runtime == "local":
            analyze_local(analysis, todo, report, progress)
        else:
            _analyze_on_ray(analysis, todo, report, ray_options or RayOptions(), progress)
    if isinstance(task, Survey):
        results = run_survey(task, snapshot, where=where)
    return Analyzed(results=results, report=report)


def _analyze_on_ray(
    analysis: Analysis,
    todo: list[Commit],
    report: AnalysisReport,
    options: RayOptions,
    progress: Progress | None,
) -> None:
    try:
        from dicmh_ray.ray_plugin.analysis_pool import analyze_on_ray
    except ModuleNotFoundError as exc:
        if exc.name != "ray":
            raise
        raise MissingExtraError("ray", "ray") from exc
    analyze_on_ray(analysis, todo, report, options, progress)
