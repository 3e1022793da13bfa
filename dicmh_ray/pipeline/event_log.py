"""A job's events as JSON lines: what a log collector takes without a parser of its own."""

import json
import logging
from datetime import UTC, datetime
from typing import Any, TextIO

from dicmh_ray.errors import FailureBudgetError, JobStoppedError
from dicmh_ray.pipeline.observer import JobObserver
from dicmh_ray.pipeline.report import JobReport, UnitResult
from dicmh_ray.source import Unit

_log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 60.0
"""Between two lines that only say how far the job is."""


class JsonEventLog(JobObserver):
    """Writes one line for each event to a stream, which stays the caller's.

    Every line has ``time`` (UTC), ``event`` and ``archive``. When the stream cannot be written the
    job goes on, and the log says so once.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_broken = False
        self._progress_at = PROGRESS_INTERVAL_S

    def job_started(self, report: JobReport) -> None:
        """``job_started``: what there is to do."""
        self._write(
            "job_started",
            report,
            runtime=report.runtime,
            codec_id=report.codec_id,
            units_total=report.units_total,
            units_resumed=report.units_resumed,
            source_bytes=report.source_bytes_total,
        )

    def unit_committed(self, report: JobReport, unit: Unit, result: UnitResult) -> None:
        """``unit_committed``, and ``failures`` where images of the unit have no stream."""
        tally = result.tally
        self._write(
            "unit_committed",
            report,
            unit=unit.name,
            worker=result.worker,
            seconds=round(result.seconds, 3),
            cpu_seconds=round(result.cpu_seconds, 3),
            images=tally.images,
            ok=tally.ok,
            kept_original=tally.kept_original,
            failed=tally.failed,
            bytes_in=tally.bytes_in,
            bytes_out=tally.bytes_out,
            bpp=_rounded(tally.mean_bpp),
            psnr=_rounded(tally.mean_psnr),
            units_done=report.units_resumed + report.units_done,
            units_total=report.units_total,
        )
        if tally.causes:
            examples = {
                cause: [example._asdict() for example in found]
                for cause, found in sorted(tally.summary.examples.items())
            }
            causes = dict(sorted(tally.causes.items()))
            self._write("failures", report, unit=unit.name, causes=causes, examples=examples)

    def unit_retried(
        self, report: JobReport, unit: Unit, *, attempt: int, delay_s: float, error: Exception
    ) -> None:
        """``unit_retried``: the error of an attempt."""
        self._write(
            "unit_retried",
            report,
            unit=unit.name,
            attempt=attempt,
            delay_s=round(delay_s, 3),
            error=type(error).__name__,
            message=str(error),
        )

    def worker_died(self, report: JobReport, unit: Unit) -> None:
        """``worker_died``: in which unit."""
        self._write("worker_died", report, unit=unit.name)

    def unit_given_up(self, report: JobReport, unit: Unit, *, reason: str) -> None:
        """``unit_given_up``: it stays for the next run."""
        self._write("unit_given_up", report, unit=unit.name, reason=reason)

    def ticked(self, report: JobReport) -> None:
        """``progress``, once a minute."""
        if report.seconds >= self._progress_at:
            self._progress_at = report.seconds + PROGRESS_INTERVAL_S
            self._write("progress", report, **_totals(report))

    def job_ended(self, report: JobReport, error: BaseException | None) -> None:
        """``job_ended``: how, and all sums."""
        facts: dict[str, Any] = {"outcome": _outcome(error), "manifest": report.manifest}
        if error is not None:
            facts |= {"error": type(error).__name__, "message": str(error)}
        causes = dict(sorted(report.tally.causes.items()))
        self._write("job_ended", report, **facts, **_totals(report), causes=causes)

    def _write(self, event: str, report: JobReport, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, "archive": report.archive, **facts}
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        except OSError as exc:
            if not self._is_broken:
                _log.warning("events are not logged: %s", exc)
            self._is_broken = True


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "succeeded"
    if isinstance(error, FailureBudgetError):
        return "over_failure_budget"
    return "stopped" if isinstance(error, JobStoppedError | KeyboardInterrupt) else "failed"


def _totals(report: JobReport) -> dict[str, Any]:
    tally = report.tally
    return {
        "seconds": round(report.seconds, 3),
        "eta_s": _rounded(report.eta_s),
        "units_done": report.units_resumed + report.units_done,
        "units_total": report.units_total,
        "units_retried": report.units_retried,
        "units_given_up": len(report.units_failed),
        "workers_died": report.workers_died,
        "images": tally.images,
        "failures": tally.failures,
        "images_per_s": round(report.images_per_s, 3),
        "bytes_in": tally.bytes_in,
        "bytes_out": tally.bytes_out,
        "bytes_saved": tally.bytes_saved,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
