"""A bulk decode in processes of this machine, one thread each."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from dicmh_ray.archive import open_snapshot
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import JobError
from dicmh_ray.views.bulk import BulkDecode, ShardRecord
from dicmh_ray.views.codecs import codec_of

_worker: tuple[BulkDecode, ImageCodec | None] | None = None


def decode_here(
    job: BulkDecode,
    *,
    workers: int | None = None,
    codec: Callable[[], ImageCodec] | None = None,
    device: str = "auto",
    on_shard: Callable[[ShardRecord], None] | None = None,
) -> None:
    """Make every shard that is left.

    Args:
        job: planned by :func:`dicmh_ray.views.bulk.plan_bulk_decode`.
        workers: processes; None is one for each CPU. With one, or one shard, it is this process.
        codec: picklable function that makes the codec; None is the archive's own.
        device: where the archive's own runs.
        on_shard: called with each record.

    Raises:
        JobError: a process died.
        DicmhError: a shard cannot be made; what was made stays.
    """
    left = job.shards_left()
    count = min(workers or multiprocessing.cpu_count(), len(left))
    if count <= 1:
        own = _codec(job, codec, device, None) if left else None
        for shard in left:
            _tell(on_shard, job.run_shard(shard, own))
        return
    with ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(job, codec, device),
    ) as pool:
        try:
            for done in as_completed([pool.submit(_run, shard) for shard in left]):
                _tell(on_shard, done.result())
        except BrokenProcessPool as exc:
            raise JobError("a process that decodes died; the same call again goes on") from exc
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(job: BulkDecode, codec: Callable[[], ImageCodec] | None, device: str) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = (job, _codec(job, codec, device, 1))


def _codec(
    job: BulkDecode, codec: Callable[[], ImageCodec] | None, device: str, threads: int | None
) -> ImageCodec | None:
    if codec is not None:
        return codec()
    if job.options.view == "original":
        return None
    snapshot = open_snapshot(job.archive, version=job.version, storage_options=job.storage_options)
    return codec_of(snapshot, device=device, threads=threads)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next shard forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run(shard: int) -> ShardRecord:
    if _worker is None:
        raise RuntimeError("the process was not begun")
    job, codec = _worker
    return job.run_shard(shard, codec)


def _tell(on_shard: Callable[[ShardRecord], None] | None, record: ShardRecord) -> None:
    if on_shard is not None:
        on_shard(record)
