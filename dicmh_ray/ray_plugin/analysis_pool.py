"""Actors that look at units of an archive.

    units ──> one in each actor ──> Analysis.run_unit ──> store: results, put if absent
               │ the actor died: its unit is run again, up to three times

A unit that was looked at twice has its results once, so that any doubt is met by running it again.
"""

import dataclasses
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

# Before ray is imported, which reads what this sets in the environment.
from dicmh_ray.ray_plugin.cluster import Layout, connected, machines  # isort: skip

import ray
from ray.exceptions import RayTaskError

from dicmh_ray.analysis.run import Analysis, AnalysisReport, Progress, UnitOutcome, begin
from dicmh_ray.archive import Commit
from dicmh_ray.errors import JobError, JobStoppedError, StoreUnavailableError
from dicmh_ray.pipeline.stopping import StopNotice, listening_for_stop
from dicmh_ray.ray_plugin.options import RayOptions
from dicmh_ray.ray_plugin.pool import WORKER_DIED, cause_of

_log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Of a unit whose worker dies, or whose store does not answer."""


class AnalysisWorker:
    """Looks at units, one at a time. The task is set up by the first call, whose error has a type."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._is_ready = False

    def run_unit(self, commit: Commit) -> UnitOutcome:
        """See :meth:`Analysis.run_unit`."""
        if not self._is_ready:
            self._analysis.setup()
            self._is_ready = True
        return self._analysis.run_unit(commit)


def analyze_on_ray(
    analysis: Analysis,
    todo: Sequence[Commit],
    report: AnalysisReport,
    options: RayOptions,
    progress: Progress | None = None,
) -> AnalysisReport:
    """Look at the units on a Ray cluster. What appeared stays, whatever is raised.

    Raises:
        JobStoppedError: told to stop (SIGTERM).
        JobError: units could not be looked at: their workers die, or their objects cannot be read.
        DicmhError: what the task needs is not there, or it fails on too many rows.
    """
    started = time.perf_counter()
    report.runtime = "ray"
    begin(analysis)
    if not todo:
        return report
    with connected(options), listening_for_stop(grace_s=options.grace_s) as notice:
        given = analysis.options
        layout = Layout.of(options, given.device, given.threads, len(todo))
        threads = None if layout.on_gpu else int(layout.worker.cpus)
        analysis = dataclasses.replace(
            analysis, options=dataclasses.replace(given, threads=given.threads or threads)
        )
        pool = _Pool(ray.put(analysis), layout, options, notice)
        for outcome in pool.run(todo):
            report.add(outcome)
            report.workers = max(report.workers, pool.num_actors)
            report.seconds = time.perf_counter() - started
            if progress is not None:
                progress(report)
    return report


class _Pool:
    """As many actors as there is room and work for, each with one unit."""

    def __init__(
        self, analysis_ref: Any, layout: Layout, options: RayOptions, notice: StopNotice
    ) -> None:
        self._analysis_ref, self._layout = analysis_ref, layout
        self._options, self._notice = options, notice
        self._calls: dict[Any, tuple[Any, Commit]] = {}
        self._free: list[Any] = []

    @property
    def num_actors(self) -> int:
        """That live."""
        return len(self._calls) + len(self._free)

    def run(self, units: Sequence[Commit]) -> Any:
        """Yield what comes of each unit, in the order in which they end."""
        queue = deque(units)
        attempts: Counter[str] = Counter()
        lost: dict[str, str] = {}
        try:
            while queue or self._calls:
                if self._notice.is_given:
                    queue.clear()
                    if self._notice.is_over or not self._calls:
                        raise JobStoppedError(len(self._calls))
                while queue and self._submit(queue[0]):
                    queue.popleft()
                if not queue:
                    self._let_free_go()
                ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=1.0)
                for ref in ready:
                    actor, commit = self._calls.pop(ref)
                    reason = None
                    try:
                        outcome = ray.get(ref)
                    except WORKER_DIED as exc:
                        ray.kill(actor)
                        reason = f"its worker died: {exc}".splitlines()[0]
                    except RayTaskError as exc:
                        self._free.append(actor)
                        cause = cause_of(exc)
                        if not isinstance(cause, (OSError, StoreUnavailableError)):
                            raise cause from exc
                        reason = str(cause)
                    else:
                        self._free.append(actor)
                        yield outcome
                    if reason is not None:
                        _log.warning("unit %s: %s", commit.unit, reason)
                        attempts[commit.unit] += 1
                        if attempts[commit.unit] < MAX_ATTEMPTS:
                            queue.append(commit)
                        else:
                            lost[commit.unit] = reason
            if lost:
                unit, reason = next(iter(lost.items()))
                raise JobError(f"{len(lost)} units have no results: {unit}: {reason}")
        finally:
            for actor, _ in self._calls.values():
                ray.kill(actor)
            self._let_free_go()

    def _let_free_go(self) -> None:
        """End those with nothing to do: others, which have a unit, may wait for their room."""
        for actor in self._free:
            ray.kill(actor)
        self._free.clear()

    def _submit(self, commit: Commit) -> bool:
        """Give a unit to an actor, a new one if there is room. False when all are busy."""
        if not self._free:
            most = self._options.workers or max(1, self._layout.worker.fitting(machines()))
            bound = self._options.max_concurrency or most
            if self.num_actors >= min(most, bound):
                return False
            self._free.append(self._layout.worker.start(AnalysisWorker, self._analysis_ref))
        actor = self._free.pop()
        self._calls[actor.run_unit.remote(commit)] = (actor, commit)
        return True
