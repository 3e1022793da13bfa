"""A job on Ray: connect, lay it out on the machines, run the pool, isolate what kills.

cluster: what fits where        pool: units -> actors        isolation: the images that kill
"""

import dataclasses
import signal
import time
from collections.abc import Sequence

# Before ray is imported, which reads what this sets in the environment.
from dicmh_ray.ray_plugin.cluster import Layout, connected  # isort: skip

import ray

from dicmh_ray.errors import JobStoppedError
from dicmh_ray.pipeline import Job, JobMonitor, JobReport
from dicmh_ray.pipeline.metrics import MetricsObserver
from dicmh_ray.pipeline.stopping import listening_for_stop
from dicmh_ray.ray_plugin.isolation import isolate_all
from dicmh_ray.ray_plugin.metrics import RayMetricSink
from dicmh_ray.ray_plugin.options import RayOptions
from dicmh_ray.ray_plugin.pool import WorkerPool
from dicmh_ray.source import Unit


def compress_on_ray(
    job: Job, units: Sequence[Unit], monitor: JobMonitor, options: RayOptions
) -> JobReport:
    """Run the units on a Ray cluster. Committed work stays, whatever is raised.

    Raises:
        JobStoppedError: told to stop (SIGTERM); what ran was committed or abandoned.
        JobError: workers die while they load the codec.
        DicmhError: see :meth:`JobMonitor.finish` and :meth:`JobMonitor.wants_retry`.
    """
    monitor.report.runtime = "ray"
    if not units:
        return monitor.finish(job)
    started = time.perf_counter()
    try:
        # Within the connection: Ray sets a handler of its own for SIGTERM when it connects.
        with connected(options), listening_for_stop(grace_s=options.grace_s) as notice:
            monitor.report.connect_seconds = time.perf_counter() - started
            monitor.watch(MetricsObserver(RayMetricSink()))
            given = job.encode_options
            layout = Layout.of(options, given.device, given.threads, len(units))
            job = dataclasses.replace(job, encode_options=layout.fit(given))
            # Put once: a job may carry a checkpoint, and every worker reads its machine's one copy.
            job_ref = ray.put(job)
            suspects = WorkerPool(job_ref, layout, options, monitor, notice).run(units)
            if suspects:
                at_once = min(monitor.report.workers, options.max_concurrency or len(suspects))
                isolate_all(suspects, job_ref, layout.worker, at_once, monitor, notice)
    except SystemExit as exc:
        # Ray's own handler, while it starts or stops and ours is not there.
        if exc.code == signal.SIGTERM:
            raise JobStoppedError(monitor.units_left) from exc
        raise
    return monitor.finish(job)
