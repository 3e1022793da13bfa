"""A bulk decode on Ray: actors that make shards, one on each CPU or GPU.

A shard whose actor dies is given to a new one; a shard that kills several is given up, and the job
ends with its name. Any number of attempts at a shard leave one shard: see
:mod:`dicmh_ray.views.bulk`.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

# Before ray is imported, which reads what this sets in the environment.
from dicmh_ray.ray_plugin.cluster import connected  # isort: skip

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError

from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import JobError
from dicmh_ray.ray_plugin.options import RayOptions
from dicmh_ray.views.bulk import BulkDecode, ShardRecord

_log = logging.getLogger(__name__)

_WORKER_DIED = (RayActorError, WorkerCrashedError, OutOfMemoryError)
MAX_DEATHS = 3
"""Actors that one shard may kill."""


class _Decoder:
    """Makes shards of one job, one at a time."""

    def __init__(self, job: BulkDecode, codec: Callable[[], ImageCodec] | None) -> None:
        self._job = job
        self._codec = None if codec is None else codec()

    def run(self, shard: int) -> ShardRecord:
        return self._job.run_shard(shard, self._codec)


def decode_on_ray(
    job: BulkDecode,
    *,
    workers: int | None = None,
    num_gpus: float = 0,
    address: str | None = None,
    codec: Callable[[], ImageCodec] | None = None,
    on_shard: Callable[[ShardRecord], None] | None = None,
) -> None:
    """Make every shard that is left.

    Args:
        job: planned by :func:`dicmh_ray.views.bulk.plan_bulk_decode`.
        workers: actors; None is one for each CPU of the cluster, or each GPU that they claim.
        num_gpus: claimed by each actor; 0 decodes on the CPU, each actor on one.
        address: of a running cluster; None joins the Ray of this process or of ``RAY_ADDRESS``
            where there is one; else a local Ray is started and stopped again.
        codec: picklable function that makes the codec; None is the archive's own.
        on_shard: called with each record.

    Raises:
        JobError: a shard killed :data:`MAX_DEATHS` actors.
        RayUnavailableError: the cluster does not answer, or the local one does not start.
        DicmhError: a shard cannot be made; what was made stays.
    """
    waiting = deque(job.shards_left())
    if not waiting:
        return
    with connected(RayOptions(address=address, local_cpus=workers)):
        _run(job, waiting, workers, num_gpus, codec, on_shard)


def _run(
    job: BulkDecode,
    waiting: deque[int],
    workers: int | None,
    num_gpus: float,
    codec: Callable[[], ImageCodec] | None,
    on_shard: Callable[[ShardRecord], None] | None,
) -> None:
    claimed = "GPU" if num_gpus else "CPU"
    resources_there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    room = int(resources_there.get(claimed, 1) / (num_gpus or 1))
    count = max(1, min(workers or room, room, len(waiting)))
    resources: dict[str, Any] = {"num_cpus": 0 if num_gpus else 1, "num_gpus": num_gpus}
    make: Any = ray.remote(max_restarts=0, max_task_retries=0, **resources)(_Decoder)
    job_ref = ray.put(job)
    deaths: Counter[int] = Counter()
    calls: dict[Any, tuple[Any, int]] = {}
    actors: list[Any] = []
    try:
        idle: list[Any] = [make.remote(job_ref, codec) for _ in range(count)]
        actors += idle
        while waiting or calls:
            while idle and waiting:
                actor, shard = idle.pop(), waiting.popleft()
                calls[actor.run.remote(shard)] = (actor, shard)
            (done,), _ = ray.wait(list(calls), num_returns=1)
            actor, shard = calls.pop(done)
            try:
                record = ray.get(done)
            except _WORKER_DIED as exc:
                deaths[shard] += 1
                if deaths[shard] == MAX_DEATHS:
                    raise JobError(f"shard {shard} killed {MAX_DEATHS} workers: {exc}") from exc
                _log.warning("a worker died at shard %d: trying again", shard)
                waiting.append(shard)
                actor = make.remote(job_ref, codec)
                actors.append(actor)
            else:
                if on_shard is not None:
                    on_shard(record)
            idle.append(actor)
    finally:
        for actor in actors:
            ray.kill(actor)
