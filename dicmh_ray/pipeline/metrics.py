"""What a monitoring system is told of a job: one list of metrics, and one place that feeds them.

    JobMonitor ──events──> MetricsObserver ──> MetricSink
                                                 ├─ TextfileSink      a file for Prometheus' node exporter
                                                 └─ RayMetricSink     ray.util.metrics (in ``ray_plugin``)

Counters count this run, from its start: a resumed job starts at 0 again, as Prometheus expects it.
"""

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from dicmh_ray.pipeline.observer import JobObserver
from dicmh_ray.pipeline.report import JobReport, UnitResult
from dicmh_ray.source import Unit

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric. Every one also has the label ``archive``."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str | None = None
    """A further label."""

    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""


IMAGES = Metric(
    name="dicmh_images_total",
    kind="counter",
    help="Images whose rows are committed.",
    label="status",
)
CAUSES = Metric(
    name="dicmh_images_without_stream_total",
    kind="counter",
    help="Committed images without a stream.",
    label="cause",
)
FAILURES = Metric(
    name="dicmh_failures_total",
    kind="counter",
    help="Committed images that count against the failure budget.",
)
BYTES_IN = Metric(
    name="dicmh_source_bytes_total", kind="counter", help="Bytes of committed source images."
)
BYTES_OUT = Metric(
    name="dicmh_archive_bytes_total", kind="counter", help="Bytes of committed parts."
)
STREAM_BYTES = Metric(
    name="dicmh_stream_bytes_total", kind="counter", help="Bytes of committed streams."
)
STREAM_PIXELS = Metric(
    name="dicmh_stream_pixels_total", kind="counter", help="Pixels of the images with a stream."
)
CPU_SECONDS = Metric(
    name="dicmh_worker_cpu_seconds_total",
    kind="counter",
    help="Processor time of workers in committed units.",
)
UNITS = Metric(name="dicmh_units_committed_total", kind="counter", help="Units committed.")
RETRIES = Metric(
    name="dicmh_unit_retries_total",
    kind="counter",
    help="Attempts at units that failed and are repeated.",
    label="error",
)
DEATHS = Metric(
    name="dicmh_worker_deaths_total",
    kind="counter",
    help="Worker processes that died in a unit.",
)
GIVEN_UP = Metric(
    name="dicmh_units_given_up_total",
    kind="counter",
    help="Units that stay uncommitted in this run.",
)
UNIT_SECONDS = Metric(
    name="dicmh_unit_seconds",
    kind="histogram",
    help="Wall-clock seconds of committed units.",
    buckets=(1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600),
)
UNITS_LEFT = Metric(name="dicmh_units_left", kind="gauge", help="Units without a commit.")
BYTES_LEFT = Metric(
    name="dicmh_source_bytes_left", kind="gauge", help="Source bytes of these units."
)
ETA = Metric(name="dicmh_eta_seconds", kind="gauge", help="Estimated time to the end.")
WORKERS = Metric(name="dicmh_workers", kind="gauge", help="Workers of the job.")
RUNNING = Metric(name="dicmh_job_running", kind="gauge", help="1 while the job runs, then 0.")
SUCCEEDED = Metric(
    name="dicmh_job_succeeded", kind="gauge", help="1 when the job ended well, 0 when not."
)
LAST_COMMIT = Metric(
    name="dicmh_last_commit_timestamp_seconds",
    kind="gauge",
    help="When a unit was last committed, seconds of the epoch.",
)

METRICS = (
    IMAGES, CAUSES, FAILURES, BYTES_IN, BYTES_OUT, STREAM_BYTES, STREAM_PIXELS, CPU_SECONDS, UNITS,
    RETRIES, DEATHS, GIVEN_UP, UNIT_SECONDS, UNITS_LEFT, BYTES_LEFT, ETA, WORKERS, RUNNING,
    SUCCEEDED, LAST_COMMIT,
)  # fmt: skip
"""All there are, in the order of the file."""


class MetricSink(Protocol):
    """Where values go. Labels are the metric's own and ``archive``."""

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Increase a counter."""

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge."""

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Count a value in a histogram."""

    def flush(self, *, is_last: bool) -> None:
        """Values changed: publish them if it is time, and in any case when they are the last."""


class MetricsObserver(JobObserver):
    """Turns a job's events into values."""

    def __init__(self, sink: MetricSink) -> None:
        self._sink = sink

    def job_started(self, report: JobReport) -> None:
        """All counters exist from the start: a rate of something that was never there is unknown."""
        for metric in METRICS:
            if metric.kind == "counter" and metric.label is None:
                self._add(metric, report, 0)
        for status in ("ok", "kept_original", "failed"):
            self._add(IMAGES, report, 0, status)
        self._set(RUNNING, report, 1)
        self.ticked(report)

    def unit_committed(self, report: JobReport, unit: Unit, result: UnitResult) -> None:
        """Add the unit's sums."""
        tally = result.tally
        for status in ("ok", "kept_original", "failed"):
            self._add(IMAGES, report, getattr(tally, status), status)
        for cause, count in tally.causes.items():
            self._add(CAUSES, report, count, cause)
        for metric, value in (
            (FAILURES, tally.failures),
            (BYTES_IN, tally.bytes_in),
            (BYTES_OUT, tally.bytes_out),
            (STREAM_BYTES, tally.stream_bytes),
            (STREAM_PIXELS, tally.stream_pixels),
            (CPU_SECONDS, result.cpu_seconds),
            (UNITS, 1),
        ):
            self._add(metric, report, value)
        self._sink.observe(UNIT_SECONDS, result.seconds, {"archive": report.archive})
        self._set(LAST_COMMIT, report, time.time())

    def unit_retried(
        self, report: JobReport, unit: Unit, *, attempt: int, delay_s: float, error: Exception
    ) -> None:
        """One more retry, by the class of the error."""
        self._add(RETRIES, report, 1, type(error).__name__)

    def worker_died(self, report: JobReport, unit: Unit) -> None:
        """One more death."""
        self._add(DEATHS, report, 1)

    def unit_given_up(self, report: JobReport, unit: Unit, *, reason: str) -> None:
        """One more unit that is left."""
        self._add(GIVEN_UP, report, 1)

    def ticked(self, report: JobReport) -> None:
        """What is left, and how long it takes."""
        left = report.units_total - report.units_resumed - report.units_done
        self._set(UNITS_LEFT, report, left)
        self._set(BYTES_LEFT, report, report.source_bytes_total - report.source_bytes_done)
        if report.eta_s is not None:
            self._set(ETA, report, report.eta_s)
        self._set(WORKERS, report, report.workers)
        self._sink.flush(is_last=False)

    def job_ended(self, report: JobReport, error: BaseException | None) -> None:
        """How it ended."""
        self._set(RUNNING, report, 0)
        self._set(SUCCEEDED, report, 0 if error else 1)
        self._sink.flush(is_last=True)

    def _add(self, metric: Metric, report: JobReport, value: float, label: str = "") -> None:
        self._sink.add(metric, value, _labels(metric, report, label))

    def _set(self, metric: Metric, report: JobReport, value: float) -> None:
        self._sink.set(metric, value, _labels(metric, report, ""))


def _labels(metric: Metric, report: JobReport, label: str) -> dict[str, str]:
    labels = {"archive": report.archive}
    return labels if metric.label is None else labels | {metric.label: label}


@dataclass(kw_only=True, slots=True)
class _Series:
    """A histogram with one set of labels: observations up to each bound, and their sum."""

    counts: list[int]
    total: float = 0.0
    count: int = 0


_Key = tuple[tuple[str, str], ...]


@dataclass(kw_only=True)
class TextfileSink:
    """A file in Prometheus' text format, for the textfile collector of its node exporter.

    Replaced as a whole, so that a reader never meets half of it. When it cannot be written the job
    goes on, and the log says so once.
    """

    path: Path
    """Its name should end in ``.prom``: the collector reads no other."""

    interval_s: float = 5.0
    """Written so often at most, and at the end."""

    _values: dict[str, dict[_Key, float]] = field(default_factory=lambda: defaultdict(dict))
    _series: dict[str, dict[_Key, _Series]] = field(default_factory=lambda: defaultdict(dict))
    _written: float = -math.inf
    _is_broken: bool = False

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Increase a counter."""
        values, key = self._values[metric.name], tuple(labels.items())
        values[key] = values.get(key, 0) + value

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge."""
        self._values[metric.name][tuple(labels.items())] = value

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Count a value in a histogram."""
        series = self._series[metric.name].setdefault(
            tuple(labels.items()), _Series(counts=[0] * len(metric.buckets))
        )
        for i, bound in enumerate(metric.buckets):
            series.counts[i] += value <= bound
        series.total += value
        series.count += 1

    def flush(self, *, is_last: bool) -> None:
        """Write the file, when it is time."""
        now = time.monotonic()
        if not is_last and now - self._written < self.interval_s:
            return
        self._written = now
        try:
            self.write()
        except OSError as exc:
            if not self._is_broken:
                _log.warning("metrics are not written: %s", exc)
            self._is_broken = True

    def write(self) -> None:
        """Write the file now. Raises OSError where it cannot be."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(self.text())
            temporary.replace(self.path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def text(self) -> str:
        """The file."""
        lines = []
        for metric in METRICS:
            values, series = self._values.get(metric.name, {}), self._series.get(metric.name, {})
            if not values and not series:
                continue
            lines.append(f"# HELP {metric.name} {metric.help}")
            lines.append(f"# TYPE {metric.name} {metric.kind}")
            lines += [f"{metric.name}{_braces(key)} {_number(v)}" for key, v in values.items()]
            for key, one in series.items():
                bounds = [*map(_number, metric.buckets), "+Inf"]
                for bound, count in zip(bounds, [*one.counts, one.count], strict=True):
                    lines.append(f"{metric.name}_bucket{_braces((*key, ('le', bound)))} {count}")
                lines.append(f"{metric.name}_sum{_braces(key)} {_number(one.total)}")
                lines.append(f"{metric.name}_count{_braces(key)} {one.count}")
        return "\n".join(lines) + "\n"


def _braces(labels: _Key) -> str:
    escaped = (
        (name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
        for name, value in labels
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
