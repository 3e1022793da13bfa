"""The job's metrics as Ray metrics: they appear where the cluster's own do, with ``ray_`` before them.

Ray's agents serve them to Prometheus on every node; the driver of the job feeds them.
"""

from collections.abc import Mapping

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from dicmh_ray.pipeline.metrics import Metric


class RayMetricSink:
    """A :class:`~dicmh_ray.pipeline.metrics.MetricSink`, for as long as there is a connection to Ray.

    What a job says after that, its end, is nowhere to be told: Ray drops the values of a driver
    that left.
    """

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Increase a counter. Ray takes no zero: a counter appears with its first count."""
        if not value or not ray.is_initialized():
            return
        if metric.name not in self._counters:
            self._counters[metric.name] = Counter(metric.name, metric.help, tuple(labels))
        self._counters[metric.name].inc(value, dict(labels))

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge."""
        if not ray.is_initialized():
            return
        if metric.name not in self._gauges:
            self._gauges[metric.name] = Gauge(metric.name, metric.help, tuple(labels))
        self._gauges[metric.name].set(value, dict(labels))

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Count a value in a histogram."""
        if not ray.is_initialized():
            return
        if metric.name not in self._histograms:
            made = Histogram(metric.name, metric.help, list(metric.buckets), tuple(labels))
            self._histograms[metric.name] = made
        self._histograms[metric.name].observe(value, dict(labels))

    def flush(self, *, is_last: bool) -> None:
        """Ray sends values by itself."""
