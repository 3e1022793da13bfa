"""Collections -> archives, on Ray or in this process, and back as Ray datasets.

The only folder that imports ray, and only when Ray is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dicmh_ray.codec import DEFAULT_CHECKPOINT, ImageCodec
from dicmh_ray.codec.image_taggers import TaggerSpec
from dicmh_ray.errors import MissingExtraError
from dicmh_ray.pipeline import (
    EncodeOptions,
    EncodePolicy,
    JobMonitor,
    JobObserver,
    JobReport,
    Progress,
    compress_local,
    plan_job,
)
from dicmh_ray.ray_plugin.options import RayOptions
from dicmh_ray.source import SourceOptions

__all__ = ["RayOptions", "Runtime", "compress"]

Runtime = Literal["ray", "local"]


def compress(
    sources: str | Sequence[str],
    archive: str,
    *,
    codec: str | Path | Callable[[], ImageCodec] = DEFAULT_CHECKPOINT,
    policy: EncodePolicy | None = None,
    runtime: Runtime = "ray",
    resume: bool = True,
    append: bool = False,
    failure_budget: float = 0.1,
    progress: Progress | None = None,
    observers: Sequence[JobObserver] = (),
    source_options: SourceOptions | None = None,
    encode_options: EncodeOptions | None = None,
    tagger: TaggerSpec | None = None,
    ray_options: RayOptions | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> JobReport:
    """Compress a collection of images into an archive.

    Units that an earlier run committed are skipped: after a crash, a kill or Ctrl-C, the same call
    finishes the job. Two calls at once are safe; they share the work badly but commit every unit
    once.

    Args:
        sources: tars, Parquet files, folders, globs, brace expressions, on any fsspec store.
        archive: where the archive is or will be; any fsspec store with conditional puts.
        codec: checkpoint name or directory; or a picklable function that makes an ImageCodec.
        policy: how many states, which quality floor, what happens to originals.
        runtime: ``ray`` for actors on every GPU or CPU, ``local`` for a loop in this process.
        resume: False refuses an archive that already has commits.
        append: add what a finished archive does not have yet, as its next version.
        failure_budget: failed images that are tolerated: a whole number counts them, a float is
            their share. Kept originals of sound images (below the floor, alpha, ...) do not count.
        progress: called with the live report, at most a few times a second.
        observers: told every event: logs, metrics, code of yours.
        source_options: columns, tag fields, limits of the source.
        encode_options: device, threads, batches.
        tagger: says what pictures show, besides their own tags: a zero-shot model or code of yours,
            loaded once in each worker.
        ray_options: which cluster, how many workers.
        storage_options: for the archive's store.

    Returns:
        the report of this run; the archive has its manifest.

    Raises:
        SourceNotFoundError, PlanConflictError, WeightsError, TaggerError: nothing was begun.
        FailureBudgetError: too many images failed; what was done is committed.
        JobError: some units could not be run; the others are committed.
    """
    job, units, report = plan_job(
        [sources] if isinstance(sources, str) else sources,
        archive,
        codec=codec,
        policy=policy,
        source_options=source_options,
        encode_options=encode_options,
        tagger=tagger,
        resume=resume,
        append=append,
        storage_options=storage_options,
    )
    if runtime not in ("local", "ray"):
        raise ValueError(f"runtime is {runtime!r}, wanted 'ray' or 'local'")
    report.runtime = runtime
    with JobMonitor(
        report, failure_budget=failure_budget, progress=progress, observers=observers
    ) as monitor:
        if runtime == "local":
            return compress_local(job, units, monitor)
        try:
            from dicmh_ray.ray_plugin.run import compress_on_ray
        except ModuleNotFoundError as exc:
            if exc.name != "ray":
                raise
            raise MissingExtraError("ray", "ray") from exc
        return compress_on_ray(job, units, monitor, ray_options or RayOptions())
