"""A job on Ray: one actor for each GPU or CPU, one unit for each call, nothing retried behind our back.

    driver: plan, attempts, budget, progress          actor: UnitWorker (codec loaded once)
      pending ──> at most two units in each actor ──> run_unit ──> store: part, then commit
         ^               │ the actor died                             │
         └── once more ──┤                            UnitResult <────┘  (small)
                         └ twice: suspect ──> isolate the image in throw-away actors, at the end

``max_task_retries=0``: Ray would repeat a unit that kills its worker for ever. ``max_restarts=0``: a
dead actor is replaced, not restarted, because calls that reach a restarting one fail as if they had
killed it, and would be blamed. An error can be reported although the commit was published; running
the unit again is harmless, see :mod:`dicmh_ray.pipeline`.
"""

import dataclasses
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

# Read by ray when it is imported: no usage reports, and a cluster that only its owner can talk to.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
from ray.exceptions import (
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from dicmh_ray.errors import DicmhError, JobError
from dicmh_ray.pipeline import Job, JobMonitor, JobReport, UnitResult
from dicmh_ray.pipeline.monitor import FATAL_ERRORS, MAX_ATTEMPTS
from dicmh_ray.ray_plugin.actors import UnitWorker
from dicmh_ray.ray_plugin.options import RayOptions
from dicmh_ray.source import Unit

_log = logging.getLogger(__name__)

WORKER_DIED = (RayActorError, WorkerCrashedError, OutOfMemoryError)

UNITS_IN_FLIGHT = 2
"""For each actor: one runs, one waits, so that the actor never waits for the driver."""

CRASHES_TO_SUSPECT = 2
"""Deaths of its worker after which a unit is searched for the image that kills."""


def compress_on_ray(
    job: Job, units: Sequence[Unit], monitor: JobMonitor, options: RayOptions
) -> JobReport:
    """Run the units on a Ray cluster. Committed work stays, whatever is raised.

    Raises:
        DicmhError: see :meth:`JobMonitor.finish` and :meth:`JobMonitor.wants_retry`.
        JobError: workers die while they load the codec.
    """
    monitor.report.runtime = "ray"
    if not units:
        return monitor.finish(job)
    with connected(options):
        resources = _Resources.of_cluster(options)
        job = resources.fit(job)
        # Put once: a job may carry a checkpoint, and every worker reads the same copy.
        job_ref = ray.put(job)
        num_workers = min(options.workers or resources.num_workers, len(units))
        monitor.report.workers = num_workers
        suspects = _Pool(job_ref, resources, num_workers, monitor).run(units)
        if suspects:
            _isolate_all(suspects, job_ref, resources, num_workers, monitor)
    return monitor.finish(job)


@contextmanager
def connected(options: RayOptions) -> Iterator[bool]:
    """A connection to Ray: the process's own, a running cluster's, or a local one of our own.

    Yields whether it is a local one that ends with the context.
    """
    if ray.is_initialized():
        yield False
        return
    address = options.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    else:
        start_local_ray(options.local_cpus)
    try:
        yield not address
    finally:
        ray.shutdown()


def start_local_ray(num_cpus: int | None = None) -> None:
    """Start a Ray of this machine alone; ``ray.shutdown`` stops it.

    Ray gives its own processes 30 s to appear. A machine that is busy, as those that compress are,
    can need longer; another attempt then finds its files in memory.
    """
    for attempts_left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except Exception as exc:  # the class that Ray raises here
            ray.shutdown()
            if attempts_left == 0 or "timed out during startup" not in str(exc):
                raise
            _log.warning("Ray did not start in time, trying again")
        else:
            return


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Resources:
    """What one worker takes, and how many fit."""

    num_workers: int
    num_cpus: float
    num_gpus: float

    @classmethod
    def of_cluster(cls, options: RayOptions) -> "_Resources":
        total = dict(ray.cluster_resources())  # type: ignore[no-untyped-call]
        gpus = total.get("GPU", 0.0)
        if gpus:
            # No CPU is claimed: loading pictures uses what is there, and a claim can starve others.
            count = int(gpus / options.gpus_per_worker)
            return cls(num_workers=max(1, count), num_cpus=0, num_gpus=options.gpus_per_worker)
        return cls(num_workers=max(1, int(total.get("CPU", 1))), num_cpus=1, num_gpus=0)

    def fit(self, job: Job) -> Job:
        """The job with the options that suit these workers, where the caller left them open."""
        on_gpu = self.num_gpus > 0
        given = job.encode_options
        encode_options = dataclasses.replace(
            given,
            threads=given.threads if given.threads is not None or on_gpu else 1,
            batch_pixels=given.batch_pixels or (2**24 if on_gpu else 2**20),
            load_threads=given.load_threads if given.load_threads is not None else 4 * on_gpu,
        )
        return dataclasses.replace(job, encode_options=encode_options)

    def start(self, job_ref: Any) -> Any:
        """One more actor; Ray starts its process when there is room for it."""
        remote = ray.remote(UnitWorker).options(
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            max_restarts=0,
            max_task_retries=0,
        )
        return remote.remote(job_ref)


class _Slot:
    """An actor and its calls, oldest first: the order in which the actor runs them."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.calls: list[tuple[Any, Unit]] = []


class _Pool:
    """Feeds units to actors until each is committed, given up, or suspected of killing workers."""

    def __init__(
        self, job_ref: Any, resources: _Resources, num_workers: int, monitor: JobMonitor
    ) -> None:
        self._job_ref, self._resources, self._monitor = job_ref, resources, monitor
        self._slots = [_Slot(resources.start(job_ref)) for _ in range(num_workers)]
        self._pending: deque[Unit] = deque()
        self._crashes: Counter[str] = Counter()
        self._suspects: list[Unit] = []

    def run(self, units: Sequence[Unit]) -> list[Unit]:
        """Run all units; returns the suspects. The actors are gone afterwards, in any case."""
        self._pending.extend(units)
        try:
            while True:
                self._submit()
                waiting = {ref: slot for slot in self._slots for ref, _ in slot.calls}
                if not waiting:
                    return self._suspects
                ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
                for ref in ready:
                    self._collect(waiting[ref], ref)
                self._monitor.show()
        finally:
            for slot in self._slots:
                ray.kill(slot.actor)

    def _submit(self) -> None:
        for depth in range(UNITS_IN_FLIGHT):
            for slot in self._slots:
                if self._pending and len(slot.calls) == depth:
                    unit = self._pending.popleft()
                    slot.calls.append((slot.actor.run_unit.remote(unit), unit))

    def _collect(self, slot: _Slot, ref: Any) -> None:
        position = next(i for i, (call, _) in enumerate(slot.calls) if call == ref)
        unit = slot.calls[position][1]
        try:
            result: UnitResult = ray.get(ref)
        except WORKER_DIED as exc:
            _log.warning("a worker died: %s", exc)
            self._bury(slot)
        except RayTaskError as exc:
            del slot.calls[position]
            if self._monitor.wants_retry(unit, _cause(exc)):
                self._pending.append(unit)
        else:
            del slot.calls[position]
            self._monitor.done(unit, result)

    def _bury(self, slot: _Slot) -> None:
        """Replace an actor that died, and settle its calls: the oldest unfinished one was running."""
        ray.kill(slot.actor)  # it may only be out of reach; its calls must end either way
        calls, slot.calls = slot.calls, []
        slot.actor = self._resources.start(self._job_ref)
        is_culprit_known = False
        for ref, unit in calls:
            try:
                result = ray.get(ref)
            except WORKER_DIED:
                if is_culprit_known:
                    self._pending.appendleft(unit)
                    continue
                is_culprit_known = True
                self._crashes[unit.name] += 1
                if self._crashes[unit.name] < CRASHES_TO_SUSPECT:
                    self._pending.append(unit)
                else:
                    self._suspects.append(unit)
            except RayTaskError as exc:
                if self._monitor.wants_retry(unit, _cause(exc)):
                    self._pending.append(unit)
            else:
                self._monitor.done(unit, result)


def _isolate_all(
    suspects: Sequence[Unit],
    job_ref: Any,
    resources: _Resources,
    num_workers: int,
    monitor: JobMonitor,
) -> None:
    """Find the images that kill workers, quarantine them, commit their units.

    At the end of a job, when the pool has given its resources back, as many units at a time as it
    had workers.
    """
    with ThreadPoolExecutor(min(num_workers, len(suspects))) as threads:
        searches = [
            (unit, threads.submit(_Isolation(unit, job_ref, resources).run)) for unit in suspects
        ]
        for unit, search in searches:
            result = search.result()
            if result is None:
                monitor.give_up(unit)
            else:
                monitor.done(unit, result)


class _Isolation:
    """The search of one unit, in actors that may die."""

    def __init__(self, unit: Unit, job_ref: Any, resources: _Resources) -> None:
        self._unit, self._job_ref, self._resources = unit, job_ref, resources
        self._actor: Any = None

    def run(self) -> UnitResult | None:
        """Bisect, then run the unit with the found images quarantined; None when that fails too.

        Raises:
            JobError: not even loading the codec is survived.
        """
        try:
            return self._run()
        except RayTaskError as exc:
            cause = _cause(exc)
            if isinstance(cause, FATAL_ERRORS):
                raise cause from exc
            _log.warning("unit %s is given up: %s", self._unit.name, cause)
            return None
        finally:
            if self._actor is not None:
                ray.kill(self._actor)

    def _run(self) -> UnitResult | None:
        if not self._survives("load"):
            raise JobError("workers die while they load the codec")
        num_images = self._count()
        if num_images is None:
            return None
        killers = frozenset(self._killers(0, num_images))
        _log.warning("unit %s: images %s kill workers", self._unit.name, sorted(killers))
        for _ in range(MAX_ATTEMPTS):
            try:
                result: UnitResult = ray.get(self._living().run_unit.remote(self._unit, killers))
            except WORKER_DIED:
                self._actor = None
            else:
                return result
        return None

    def _killers(self, start: int, stop: int) -> Iterator[int]:
        """Positions of the images whose encoding kills a worker, also when they are alone."""
        if start == stop or self._survives("rehearse", self._unit, start, stop):
            return
        if stop - start == 1:
            # Once more: the first death may have been anybody's (memory, a lost machine).
            if not self._survives("rehearse", self._unit, start, stop):
                yield start
            return
        middle = (start + stop) // 2
        yield from self._killers(start, middle)
        yield from self._killers(middle, stop)

    def _count(self) -> int | None:
        for _ in range(MAX_ATTEMPTS):
            try:
                return int(ray.get(self._living().count_images.remote(self._unit)))
            except WORKER_DIED:
                self._actor = None
        return None

    def _survives(self, method: str, *args: Any) -> bool:
        """Whether a call ends with the worker alive; one death more is forgiven to ``load``."""
        for _ in range(2 if method == "load" else 1):
            try:
                ray.get(getattr(self._living(), method).remote(*args))
            except WORKER_DIED:
                self._actor = None
            else:
                return True
        return False

    def _living(self) -> Any:
        if self._actor is None:
            self._actor = self._resources.start(self._job_ref)
        return self._actor


def _cause(exc: RayTaskError) -> Exception:
    """The error as the worker raised it; raises it here when it is neither ours nor the store's."""
    cause = getattr(exc, "cause", None) or exc
    if not isinstance(cause, (DicmhError, OSError)):
        raise exc
    return cause
