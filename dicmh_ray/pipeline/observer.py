"""Who may watch a job: the events that its driver tells, in the order in which they happen."""

from typing import Protocol

from dicmh_ray.pipeline.report import JobReport, UnitResult
from dicmh_ray.source import Unit


class Progress(Protocol):
    """Whoever wants to see a job run. Called in the driver, at most a few times a second."""

    def __call__(self, report: JobReport) -> None:
        """Show the report; it is the live object and changes later."""


class JobObserver:
    """Watches a job from its driver. A subclass overrides what it wants to know.

    ``report`` is the live object: what shall not change is copied. An observer that raises ends the
    job, so one that writes somewhere survives that it cannot.
    """

    def job_started(self, report: JobReport) -> None:
        """The plan is known, nothing was run yet."""

    def unit_committed(self, report: JobReport, unit: Unit, result: UnitResult) -> None:
        """A unit's rows are in the archive, and counted in the report."""

    def unit_retried(
        self, report: JobReport, unit: Unit, *, attempt: int, delay_s: float, error: Exception
    ) -> None:
        """An attempt ended in an error; the next one follows after ``delay_s`` or later."""

    def worker_died(self, report: JobReport, unit: Unit) -> None:
        """A worker process ended while it ran a unit; the unit is run again elsewhere."""

    def unit_given_up(self, report: JobReport, unit: Unit, *, reason: str) -> None:
        """A unit stays uncommitted; the job goes on. ``reason``: the last error, in one line."""

    def ticked(self, report: JobReport) -> None:
        """Time went by. At most five times a second, and after each of the events above."""

    def job_ended(self, report: JobReport, error: BaseException | None) -> None:
        """The last event, whatever the end was."""
