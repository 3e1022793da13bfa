"""The pool of workers: grows while units wait, shrinks when none do, never waits for what may not come.

    UnitsQueue ──> at most two units in each living actor ──> run_unit ──> store: part, then commit
       ^                │ the actor died                          │
       └── once more ───┤                       UnitResult <──────┘  (small)
                        └ twice: suspect, see isolation

An actor is asked for, and gets units only once it said that it is ready: a machine that the cluster
never grants, or grants late, holds nothing back. What is asked for at once is bounded by what lives,
so that a pool doubles, and a request that cannot be met stays one.

``max_task_retries=0``: Ray would repeat a unit that kills its worker for ever. ``max_restarts=0``: a
dead actor is replaced, not restarted, because calls that reach a restarting one fail as if they had
killed it, and would be blamed. An error can be reported although the commit was published; running
the unit again is harmless, see :mod:`dicmh_ray.pipeline`.

A worker that was told to stop, or whose node is about to be taken away, gets no further units; what
it loses is nobody's fault and is run again.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import (
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from dicmh_ray.errors import DicmhError, JobError, JobStoppedError
from dicmh_ray.pipeline import JobMonitor, UnitResult
from dicmh_ray.pipeline.stopping import StopNotice
from dicmh_ray.pipeline.units_queue import UnitsQueue
from dicmh_ray.ray_plugin.actors import UnitReader, UnitWorker, WorkerFacts
from dicmh_ray.ray_plugin.cluster import (
    Layout,
    current_node_id,
    draining_nodes,
    machines,
)
from dicmh_ray.ray_plugin.feeding import ReaderDiedError, ReaderFeed
from dicmh_ray.ray_plugin.options import RayOptions
from dicmh_ray.source import Unit

_log = logging.getLogger(__name__)

WORKER_DIED = (RayActorError, WorkerCrashedError, OutOfMemoryError)

UNITS_PER_WORKER = 2
"""One runs, one waits, so that the actor never waits for the driver."""

CRASHES_TO_SUSPECT = 2
"""Deaths of its worker after which a unit is searched for the image that kills."""

FAILED_STARTS = 3
"""Workers in a row that die before they are ready: then no more are asked for than live."""

CLUSTER_SECONDS = 2.0
"""Between two looks at the cluster: machines that came, machines about to go."""

NO_ROOM_SECONDS = 60.0
"""Without a living worker, until it is said that the cluster has no room."""


class _Slot:
    """An actor and its calls, oldest first: the order in which the actor runs them."""

    def __init__(self, actor: Any, beginning: Any) -> None:
        self.actor = actor
        self.beginning = beginning
        """The call that says that it is ready; None afterwards."""

        self.facts: WorkerFacts | None = None
        self.calls: list[tuple[Any, Unit]] = []
        self.is_leaving = False
        """It was told to stop, or its machine goes: it gets no further units."""

        self.reader: Any = None
        self.reader_beginning: Any = None

    @property
    def is_ready(self) -> bool:
        """Whether units can wait in it."""
        return self.facts is not None and not self.is_leaving

    def feed(self) -> ReaderFeed | None:
        """Where its pictures come from, when a reader is there."""
        if self.reader is None or self.reader_beginning is not None:
            return None
        return ReaderFeed(self.reader)

    def kill(self) -> None:
        """End the actor and its reader."""
        ray.kill(self.actor)
        self.kill_reader()

    def kill_reader(self) -> None:
        """End the reader; the next units are read by the worker itself."""
        if self.reader is not None:
            ray.kill(self.reader)
        self.reader = self.reader_beginning = None


class WorkerPool:
    """Feeds units to actors until each is committed, given up, or suspected of killing workers.

    Args:
        job_ref: the job in Ray's object store.
        layout: what an actor claims.
        options: bounds.
        monitor: told what comes of each unit.
        notice: whether this driver was told to stop.
    """

    def __init__(
        self,
        job_ref: Any,
        layout: Layout,
        options: RayOptions,
        monitor: JobMonitor,
        notice: StopNotice,
    ) -> None:
        self._job_ref, self._layout, self._options = job_ref, layout, options
        self._monitor, self._notice = monitor, notice
        self._slots: list[_Slot] = []
        self._queue = UnitsQueue()
        self._crashes: Counter[str] = Counter()
        self._suspects: list[Unit] = []
        self._ceiling = 1
        self._failed_starts = 0
        self._is_capped = False
        self._looked = self._alive_at = time.monotonic()

    def run(self, units: Sequence[Unit]) -> list[Unit]:
        """Run all units; returns the suspects. The actors are gone afterwards, in any case.

        Raises:
            JobStoppedError: the driver was told to stop.
            JobError: workers die while they load the codec.
            DicmhError: see :meth:`JobMonitor.wants_retry` and :meth:`JobMonitor.done`.
        """
        for unit in units:
            self._queue.put(unit)
        self._look_at_cluster(is_due=True)
        self._start_first()
        try:
            while len(self._queue) or self._in_flight:
                self._look_at_cluster()
                if self._notice.is_given:
                    self._wind_down()
                else:
                    self._scale()
                    self._submit()
                self._wait()
                self._monitor.show()
            return self._suspects
        finally:
            for slot in self._slots:
                slot.kill()

    @property
    def _in_flight(self) -> int:
        return sum(len(slot.calls) for slot in self._slots)

    def _start_first(self) -> None:
        """Ask for the workers that the caller wants at once, or that fit."""
        wanted = self._options.min_workers
        if wanted is None:
            wanted = max(1, self._layout.worker.fitting(machines()))
        for _ in range(min(wanted, self._wanted())):
            self._start()

    def _wanted(self) -> int:
        """Workers that have something to do, within the bounds."""
        busy = len(self._queue) + self._in_flight
        return min(busy, self._ceiling, self._options.max_concurrency or busy)

    def _start(self) -> None:
        actor = self._layout.worker.start(UnitWorker, self._job_ref)
        beginning = actor.begin.remote(current_node_id, self._options.grace_s)
        self._slots.append(_Slot(actor, beginning))

    def _scale(self) -> None:
        """Ask for more workers while units wait, and let those go that have nothing to do."""
        staying = [slot for slot in self._slots if not slot.is_leaving]
        ready = [slot for slot in staying if slot.is_ready]
        starting = [slot for slot in staying if slot.beginning is not None]
        wanted = self._wanted()
        # Those that start first: a request that was not met yet is a machine that nobody needs.
        for slot in [*starting, *ready][: max(0, len(staying) - wanted)]:
            if not slot.calls:
                self._let_go(slot)
        room = max(1, len(ready)) - len(starting)
        for _ in range(min(wanted - len(staying), room)):
            self._start()
        now = time.monotonic()
        if ready or not starting:
            self._alive_at = now
        elif now - self._alive_at > NO_ROOM_SECONDS:
            self._alive_at = now
            _log.warning(
                "no worker could start for %.0f s: the cluster has no room for %g CPUs and %g GPUs",
                NO_ROOM_SECONDS, self._layout.worker.cpus, self._layout.worker.gpus,
            )  # fmt: skip

    def _submit(self) -> None:
        ready = [slot for slot in self._slots if slot.is_ready]
        free = (self._options.max_concurrency or len(self._queue) + self._in_flight) - (
            self._in_flight
        )
        for depth in range(UNITS_PER_WORKER):
            for slot in ready:
                if len(slot.calls) != depth or free <= 0:
                    continue
                # At the end a unit waits for whoever is free first, not behind another one.
                if depth and len(self._queue) <= len(ready):
                    return
                unit = self._queue.take()
                if unit is None:
                    return
                free -= 1
                self._monitor.first_unit()
                call = slot.actor.run_unit.remote(unit, frozenset(), slot.feed())
                slot.calls.append((call, unit))

    def _wait(self) -> None:
        """Wait for something to happen, at most a second, and settle it."""
        places: dict[Any, _Slot] = {}
        for slot in self._slots:
            for ref in (slot.beginning, slot.reader_beginning, *(ref for ref, _ in slot.calls)):
                if ref is not None:
                    places[ref] = slot
        if not places:
            time.sleep(min(1.0, max(0.01, self._queue.wait_s())))
            return
        ready, _ = ray.wait(list(places), num_returns=1, timeout=1.0)
        for ref in ready:
            slot = places[ref]
            if ref == slot.beginning:
                self._begun(slot)
            elif ref == slot.reader_beginning:
                self._reader_begun(slot)
            else:
                self._collect(slot, ref)

    def _begun(self, slot: _Slot) -> None:
        """A worker is ready, or will never be."""
        try:
            slot.facts = ray.get(slot.beginning)
        except WORKER_DIED as exc:
            _log.warning("a worker died before it was ready: %s", exc)
            self._slots.remove(slot)
            slot.kill()
            if not _was_preempted(exc):
                self._start_failed()
            return
        except RayTaskError as exc:
            raise cause_of(exc) from exc
        slot.beginning = None
        self._failed_starts = 0
        report = self._monitor.report
        report.workers = max(report.workers, sum(slot.is_ready for slot in self._slots))
        if slot.facts is not None:
            report.codec_load_seconds = max(
                report.codec_load_seconds or 0.0, slot.facts.load_seconds
            )
        readers = sum(slot.reader is not None for slot in self._slots)
        if self._layout.reader is not None and readers < self._layout.max_readers:
            slot.reader = self._layout.reader.start(UnitReader, self._job_ref)
            slot.reader_beginning = slot.reader.begin.remote()

    def _start_failed(self) -> None:
        self._failed_starts += 1
        if self._failed_starts < FAILED_STARTS:
            return
        alive = sum(slot.is_ready for slot in self._slots)
        if not alive:
            raise JobError("workers die while they load the codec")
        # More would die of the same, most likely of memory; those that live go on.
        self._ceiling, self._is_capped, self._failed_starts = alive, True, 0
        _log.warning("workers die while they start: going on with %d", alive)

    def _reader_begun(self, slot: _Slot) -> None:
        try:
            ray.get(slot.reader_beginning)
        except WORKER_DIED as exc:
            _log.warning("a reader died before it was ready: %s", exc)
            slot.kill_reader()
        slot.reader_beginning = None

    def _collect(self, slot: _Slot, ref: Any) -> None:
        """Settle a call that ended."""
        position = next(i for i, (call, _) in enumerate(slot.calls) if call == ref)
        unit = slot.calls[position][1]
        try:
            result: UnitResult = ray.get(ref)
        except WORKER_DIED as exc:
            self._bury(slot, exc)
        except TaskCancelledError:
            del slot.calls[position]
            self._queue.put_first(unit)
        except RayTaskError as exc:
            del slot.calls[position]
            self._failed(slot, unit, cause_of(exc))
        else:
            del slot.calls[position]
            self._monitor.done(unit, result)
            if result.by_another:
                self._queue.mix()
        if slot.is_leaving and not slot.calls and slot in self._slots:
            self._let_go(slot)

    def _failed(self, slot: _Slot, unit: Unit, cause: Exception) -> None:
        """A unit's run ended in an error, with its worker alive."""
        if isinstance(cause, JobStoppedError):
            self._leave(slot, "was told to stop")
            self._queue.put_first(unit)
        elif isinstance(cause, ReaderDiedError):
            _log.warning("%s", cause)
            slot.kill_reader()
            self._blame(unit, was_preempted=cause.was_preempted)
        elif self._monitor.wants_retry(unit, cause):
            self._queue.put(unit, delay_s=self._monitor.retry_delay_s(unit))

    def _bury(self, slot: _Slot, exc: Exception) -> None:
        """Settle the calls of an actor that died: the oldest unfinished one was running."""
        _log.warning("a worker died: %s", exc)
        slot.kill()  # it may only be out of reach; its calls must end either way
        self._slots.remove(slot)
        calls, slot.calls = slot.calls, []
        is_innocent = slot.is_leaving or _was_preempted(exc)
        is_culprit_known = False
        for ref, unit in calls:
            try:
                result = ray.get(ref)
            except (*WORKER_DIED, TaskCancelledError):
                if is_culprit_known:
                    self._queue.put_first(unit)
                    continue
                is_culprit_known = True
                self._monitor.crashed(unit)
                self._blame(unit, was_preempted=is_innocent)
            except RayTaskError as task_error:
                self._failed(slot, unit, cause_of(task_error))
            else:
                self._monitor.done(unit, result)

    def _blame(self, unit: Unit, *, was_preempted: bool) -> None:
        """A process died while it had this unit: run it again, or set it aside."""
        self._crashes[unit.name] += not was_preempted
        if self._crashes[unit.name] < CRASHES_TO_SUSPECT:
            self._queue.put(unit)
        else:
            self._suspects.append(unit)

    def _look_at_cluster(self, *, is_due: bool = False) -> None:
        """Machines that came make room for more workers; workers of those that go get no units."""
        now = time.monotonic()
        if not is_due and now - self._looked < CLUSTER_SECONDS:
            return
        self._looked = now
        if not self._is_capped:
            fitting = max(1, self._layout.worker.fitting(machines()))
            self._ceiling = self._options.workers or fitting
        leaving = draining_nodes()
        for slot in list(self._slots):
            if slot.facts and slot.facts.node_id in leaving and not slot.is_leaving:
                self._leave(slot, "is on a machine that is being taken away")

    def _leave(self, slot: _Slot, why: str) -> None:
        """Give a worker no further units; what waits in it is for others."""
        if slot.is_leaving:
            return
        if slot.facts is not None:
            _log.warning("worker %s:%d %s", slot.facts.host, slot.facts.pid, why)
        slot.is_leaving = True
        for ref, _ in slot.calls[1:]:
            ray.cancel(ref)
        if not slot.calls:
            self._let_go(slot)

    def _let_go(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        slot.kill()

    def _wind_down(self) -> None:
        """Told to stop: nothing new; raise once nothing runs, or when the time is over."""
        for slot in list(self._slots):
            if slot.calls:
                self._leave(slot, "ends its unit: the job was told to stop")
            else:
                self._let_go(slot)
        if not self._in_flight and not len(self._queue):
            return
        if not self._in_flight or self._notice.is_over:
            raise JobStoppedError(len(self._queue) + self._in_flight + len(self._suspects))


def _was_preempted(exc: Exception) -> bool:
    """Whether an actor died because its machine was taken away with notice."""
    return isinstance(exc, RayActorError) and exc.preempted


def cause_of(exc: RayTaskError) -> Exception:
    """The error as the worker raised it; raises it here when it is neither ours nor the store's."""
    cause = getattr(exc, "cause", None) or exc
    if not isinstance(cause, (DicmhError, OSError)):
        raise exc
    return cause
