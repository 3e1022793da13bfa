"""The job's metrics as Ray metrics: they appear where the cluster's own do, with ``ray_`` before them.

Ray's agents serve them to Prometheus on every node; the driver of the job feeds them.
"""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from dicmh_ray.pipeline.metrics import Metric


class RayMetricSink:
    """A :class:`~dicmh_ray.pipeline.metrics.MetricSink`. Needs a connection to Ray."""

    def __init__(self) -> None:
        self._made: dict[str, Counter | Gauge | Histogram] = {}

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Increase a counter. Ray takes no zero: a counter appears with its first count."""
        if value:
            self._get(metric, Counter).inc(value, dict(labels))

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge."""
        self._get(metric, Gauge).set(value, dict(labels))

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Count a value in a histogram."""
        self._get(metric, Histogram).observe(value, dict(labels))

    def flush(self, *, is_last: bool) -> None:
        """Ray sends values by itself."""

    def _get(self, metric: Metric, kind: type) -> "Counter | Gauge | Histogram":
        if metric.name not in self._made:
            tag_keys = ("archive",) if metric.label is None else ("archive", metric.label)
            more = {"boundaries": list(metric.buckets)} if kind is Histogram else {}
            self._made[metric.name] = kind(
                metric.name, description=metric.help, tag_keys=tag_keys, **more
            )
        return self._made[metric.name]
