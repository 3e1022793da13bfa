"""The search for images that kill the process that encodes them.

At the end of a job, when the pool has given its resources back, units whose worker died twice are
bisected by position in throw-away actors. An image on which a worker dies twice, alone, is
quarantined: its bytes are kept, its pixels are never looked at again.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray
from ray.exceptions import RayTaskError

from dicmh_ray.errors import JobError, JobStoppedError
from dicmh_ray.pipeline import JobMonitor, UnitResult
from dicmh_ray.pipeline.monitor import FATAL_ERRORS, MAX_ATTEMPTS
from dicmh_ray.pipeline.stopping import StopNotice
from dicmh_ray.ray_plugin.actors import UnitWorker
from dicmh_ray.ray_plugin.cluster import ActorSize
from dicmh_ray.ray_plugin.pool import WORKER_DIED, cause_of
from dicmh_ray.source import Unit

_log = logging.getLogger(__name__)


def isolate_all(
    suspects: Sequence[Unit],
    job_ref: Any,
    size: ActorSize,
    at_once: int,
    monitor: JobMonitor,
    notice: StopNotice,
) -> None:
    """Find the images that kill workers, quarantine them, commit their units.

    Args:
        suspects: the units.
        job_ref: the job in Ray's object store.
        size: what an actor claims.
        at_once: units that are searched at the same time.
        monitor: told what comes of each unit.
        notice: whether this driver was told to stop.

    Raises:
        JobStoppedError: the driver was told to stop.
        DicmhError: as for any unit.
    """
    searches = [_Isolation(unit, job_ref, size, notice) for unit in suspects]
    with ThreadPoolExecutor(min(at_once, len(suspects))) as threads:
        running = {threads.submit(search.run): search for search in searches}
        waiting = set(running)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1.0, return_when="FIRST_COMPLETED")
                for future in done:
                    result, unit = future.result(), running[future].unit
                    if result is None:
                        monitor.give_up(unit, reason=running[future].failure)
                    else:
                        monitor.done(unit, result)
                monitor.show()
                if notice.is_over:
                    raise JobStoppedError(len(waiting))
        finally:
            for search in searches:
                search.abandon()


class _Isolation:
    """The search of one unit, in actors that may die."""

    def __init__(self, unit: Unit, job_ref: Any, size: ActorSize, notice: StopNotice) -> None:
        self.unit = unit
        self._job_ref, self._size, self._notice = job_ref, size, notice
        self._actor: Any = None
        self._is_abandoned = False
        self.failure = "workers die in it, and no image of it was found that kills them"
        """Why the unit is given up, when it is."""

        self._changing = threading.Lock()

    def run(self) -> UnitResult | None:
        """Bisect, then run the unit with the found images quarantined; None when that fails too.

        Raises:
            JobError: not even loading the codec is survived.
            JobStoppedError: the job was told to stop.
        """
        try:
            return self._run()
        except RayTaskError as exc:
            cause = cause_of(exc)
            if isinstance(cause, (*FATAL_ERRORS, JobStoppedError)):
                raise cause from exc
            self.failure = f"{type(cause).__name__}: {cause}"
            return None
        finally:
            self._end_actor()

    def abandon(self) -> None:
        """End the search from another thread; harmless when it has ended."""
        self._is_abandoned = True
        self._end_actor()

    def _run(self) -> UnitResult | None:
        if not self._survives("load"):
            raise JobError("workers die while they load the codec")
        num_images = self._count()
        if num_images is None:
            return None
        killers = frozenset(self._killers(0, num_images))
        _log.warning("unit %s: images %s kill workers", self.unit.name, sorted(killers))
        for _ in range(MAX_ATTEMPTS):
            try:
                result: UnitResult = ray.get(self._living().run_unit.remote(self.unit, killers))
            except WORKER_DIED:
                self._end_actor()
            else:
                return result
        return None

    def _killers(self, start: int, stop: int) -> Iterator[int]:
        """Positions of the images whose encoding kills a worker, also when they are alone."""
        if start == stop or self._survives("rehearse", self.unit, start, stop):
            return
        if stop - start == 1:
            # Once more: the first death may have been anybody's (memory, a lost machine).
            if not self._survives("rehearse", self.unit, start, stop):
                yield start
            return
        middle = (start + stop) // 2
        yield from self._killers(start, middle)
        yield from self._killers(middle, stop)

    def _count(self) -> int | None:
        for _ in range(MAX_ATTEMPTS):
            try:
                return int(ray.get(self._living().count_images.remote(self.unit)))
            except WORKER_DIED:
                self._end_actor()
        return None

    def _survives(self, method: str, *args: Any) -> bool:
        """Whether a call ends with the worker alive; one death more is forgiven to ``load``."""
        for _ in range(2 if method == "load" else 1):
            try:
                ray.get(getattr(self._living(), method).remote(*args))
            except WORKER_DIED:
                self._end_actor()
            else:
                return True
        return False

    def _living(self) -> Any:
        """An actor; raises JobStoppedError instead of starting what nobody will wait for."""
        with self._changing:
            if self._is_abandoned or self._notice.is_given:
                raise JobStoppedError(1)
            if self._actor is None:
                self._actor = self._size.start(UnitWorker, self._job_ref)
            return self._actor

    def _end_actor(self) -> None:
        with self._changing:
            if self._actor is not None:
                ray.kill(self._actor)
            self._actor = None
