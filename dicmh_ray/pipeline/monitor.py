"""The driver's side of a job, the same for every runtime: counts, attempts, budget, progress."""

import errno
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from dicmh_ray.archive import EncodedImage, Manifest
from dicmh_ray.errors import (
    CodecMismatchError,
    FailureBudgetError,
    JobError,
    MissingExtraError,
    PlanConflictError,
    SourceChangedError,
    StoreAccessError,
    StoreUnavailableError,
    TaggerError,
    WeightsError,
)
from dicmh_ray.pipeline.observer import JobObserver, Progress
from dicmh_ray.pipeline.report import JobReport, UnitResult
from dicmh_ray.pipeline.units_queue import retry_delay_s
from dicmh_ray.source import Unit

_log = logging.getLogger(__name__)

FATAL_ERRORS = (
    CodecMismatchError, MissingExtraError, PlanConflictError, TaggerError, WeightsError
)  # fmt: skip
"""Errors that no other unit and no second attempt will be free of: the job stops at once."""

PERMANENT_ERRORS = (SourceChangedError,)
"""Errors that every attempt at the same unit will meet: it is given up at once."""

STORE_ERRORS = (StoreAccessError, StoreUnavailableError)
FULL_STORE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Errors, and numbers of OSErrors, that are the archive's store's: sources are only read."""

MAX_ATTEMPTS = 3
"""Calls of one unit that may end in an error before the job gives it up."""

BUDGET_GRACE_IMAGES = 100
"""A failure budget that is a fraction is not judged on fewer images than these until the end."""

REASONS_TOLD = 3
"""Units that were given up, of which the job's error says why."""

ETA_WINDOW_UNITS = 64
"""Units whose pace the estimate of the time to go is made of: the last ones."""


class Finalizer(Protocol):
    """What publishes an archive whose units are all committed."""

    def finalize(self) -> Manifest:
        """Publish it; doing it again changes nothing."""


class HasWriter(Protocol):
    """A job, as far as it concerns the monitor."""

    @property
    def writer(self) -> Finalizer:
        """Of its archive."""


class JobMonitor:
    """Told by a runtime what comes of each unit; decides about attempts and the budget.

    As a context manager it also tells its observers the start and the end of the job, whatever that
    is.

    Args:
        report: what is kept up to date.
        failure_budget: failed images that are tolerated: a whole number counts them, a float below
            1 is their share of the images done (judged once 100 are done, and at the end).
        progress: shown the report from time to time.
        observers: told every event.
        seed: of the jitter of retries.
    """

    def __init__(
        self,
        report: JobReport,
        *,
        failure_budget: float = 0.1,
        progress: Progress | None = None,
        observers: Sequence[JobObserver] = (),
        seed: int | None = None,
    ) -> None:
        if failure_budget < 0 or (isinstance(failure_budget, float) and failure_budget > 1):
            raise ValueError(f"failure_budget is {failure_budget}: a count, or a share up to 1.0")
        self.report = report
        self._budget = failure_budget
        self._progress = progress
        self._observers = list(observers)
        self._random = random.Random(seed)
        self._started = time.perf_counter()
        self._shown = 0.0
        self._attempts: Counter[str] = Counter()
        self._delays: dict[str, float] = {}
        self._reasons: list[str] = []
        self._pace: deque[tuple[float, int, int]] = deque(maxlen=ETA_WINDOW_UNITS)
        report.started_at = time.time()

    def __enter__(self) -> Self:
        for observer in self._observers:
            observer.job_started(self.report)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.show(is_due=True)
        for observer in self._observers:
            observer.job_ended(self.report, value)

    def watch(self, observer: JobObserver) -> None:
        """Add an observer to a job that runs; it is told that the job started."""
        self._observers.append(observer)
        observer.job_started(self.report)

    def done(self, unit: Unit, result: UnitResult) -> None:
        """Count a committed unit. Raises FailureBudgetError when the budget is spent."""
        report = self.report
        report.units_done += 1
        report.images_in_flight = 0
        report.source_bytes_done += unit.num_bytes
        report.cpu_seconds += result.cpu_seconds
        report.unit_seconds.add(result.seconds)
        report.tally.merge(result.tally)
        _log.info(
            "unit %s: %d images in %.1f s on %s",
            unit.name, result.tally.images, result.seconds, result.worker,
        )  # fmt: skip
        self._estimate()
        for observer in self._observers:
            observer.unit_committed(report, unit, result)
        self.show(is_due=True)
        if report.tally.images >= BUDGET_GRACE_IMAGES or isinstance(self._budget, int):
            self._check_budget()

    @property
    def units_left(self) -> int:
        """Units without a commit."""
        return self.report.units_total - self.report.units_resumed - self.report.units_done

    def first_unit(self) -> None:
        """Note that a unit is begun; only the first time counts."""
        if self.report.first_unit_seconds is None:
            self.report.first_unit_seconds = time.perf_counter() - self._started

    def saw(self, row: EncodedImage) -> None:
        """Count a row of the unit that runs in this process, for the display only."""
        self.report.images_in_flight += 1
        self.show()

    def wants_retry(self, unit: Unit, error: Exception) -> bool:
        """Count an attempt that ended in an error; False once the unit is given up.

        The next attempt shall wait :meth:`retry_delay_s`.

        Raises:
            DicmhError, OSError: an error that the next attempt would meet again, in every unit; or
                the archive's store refused the last attempt.
        """
        if isinstance(error, FATAL_ERRORS):
            raise error
        self.report.images_in_flight = 0
        self._attempts[unit.name] += 1
        attempt = self._attempts[unit.name]
        _log.warning("unit %s, attempt %d of %d: %s", unit.name, attempt, MAX_ATTEMPTS, error)
        if attempt >= MAX_ATTEMPTS or isinstance(error, PERMANENT_ERRORS):
            self.give_up(unit, reason=f"{type(error).__name__}: {error}")
            if isinstance(error, STORE_ERRORS) or (
                isinstance(error, OSError) and error.errno in FULL_STORE
            ):
                raise error  # the others would be encoded in vain
            return False
        delay_s = self._delays[unit.name] = retry_delay_s(attempt, self._random)
        self.report.units_retried += 1
        for observer in self._observers:
            observer.unit_retried(self.report, unit, attempt=attempt, delay_s=delay_s, error=error)
        return True

    def retry_delay_s(self, unit: Unit) -> float:
        """Seconds that the next attempt at a unit shall wait; 0 for one that did not fail."""
        return self._delays.get(unit.name, 0.0)

    def crashed(self, unit: Unit) -> None:
        """Count a worker process that ended while it ran a unit."""
        self.report.workers_died += 1
        for observer in self._observers:
            observer.worker_died(self.report, unit)
        self.show(is_due=True)

    def give_up(self, unit: Unit, *, reason: str) -> None:
        """Leave a unit uncommitted; the job goes on and says so, and why, at its end."""
        self.report.units_failed.append(unit.name)
        self._reasons.append(f"{unit.name}: {reason}")
        for observer in self._observers:
            observer.unit_given_up(self.report, unit, reason=reason)
        self.show(is_due=True)

    def show(self, *, is_due: bool = False) -> None:
        """Refresh the progress display, at most five times a second unless it is due."""
        now = time.perf_counter()
        self.report.seconds = now - self._started
        if is_due or now - self._shown > 0.2:
            self._shown = now
            if self._progress is not None:
                self._progress(self.report)
            for observer in self._observers:
                observer.ticked(self.report)

    def finish(self, job: HasWriter) -> JobReport:
        """Publish the manifest when every unit is committed, then judge.

        Raises:
            JobError: units could not be run; everything else is committed.
            FailureBudgetError: the archive is complete, but too many of its images failed.
        """
        report = self.report
        if not report.units_failed:
            report.manifest = job.writer.finalize().version
            report.eta_s = 0.0
        self.show(is_due=True)
        if report.units_failed:
            told = "; ".join(self._reasons[:REASONS_TOLD])
            more = len(self._reasons) - REASONS_TOLD
            raise JobError(
                f"{len(report.units_failed)} of {report.units_total} units could not be run "
                f"({told}{f'; and {more} more' if more > 0 else ''}); "
                "the others are committed, run the job again to retry these"
            )
        self._check_budget()
        return report

    def _estimate(self) -> None:
        """Time to go, from the pace of the last units, in bytes of the sources where they are known.

        Before the window is full the pace counts from the start of the job, which holds the start
        of the workers: the first estimates are too long, not too short.
        """
        report = self.report
        now = time.perf_counter()
        if not self._pace:
            self._pace.append((self._started, 0, 0))
        then, units, num_bytes = self._pace[0]
        self._pace.append((now, report.units_done, report.source_bytes_done))
        done, left = report.source_bytes_done - num_bytes, report.source_bytes_total
        left -= report.source_bytes_done
        if not report.source_bytes_total:
            done = report.units_done - units
            left = report.units_total - report.units_resumed - report.units_done
        report.eta_s = max(0.0, left * (now - then) / done) if done else None

    def _check_budget(self) -> None:
        tally = self.report.tally
        is_count = isinstance(self._budget, int)
        allowed = self._budget if is_count else self._budget * tally.images
        if tally.failures > allowed:
            raise FailureBudgetError(tally.failures, tally.images, self._budget)
