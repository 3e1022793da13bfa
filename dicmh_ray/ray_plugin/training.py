"""Diff-ICMH training on Ray Train: the photographs packed once, then one process for each worker.

    driver: pack ──> folder (shared) <── worker 0: train_icmh, writes state, logs, checkpoint
      └ follows the logs     └────────<── worker n: train_icmh, reads

Ray Train starts the workers, connects them (``torch.distributed``: NCCL between GPUs, gloo between
CPUs) and starts all of them again when one dies; they go on from what the run's folder has. What is
trained, and how gradients meet, is in :mod:`dicmh_ray.codec.stage`.
"""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Before ray is imported, which it does with its settings for the environment.
from dicmh_ray.ray_plugin.cluster import connected  # isort: skip

import ray
import ray.train
from ray.train.torch import TorchTrainer

from dicmh_ray.codec import Checkpoint, read_checkpoint
from dicmh_ray.codec.icmh.presets import ICMH_PRESETS, largest_crop, train_icmh
from dicmh_ray.codec.icmh.training import CODEC_FILES, PRIOR_FILES, IcmhOptions
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.codec.run_state import CHECKPOINT_NAME
from dicmh_ray.errors import DicmhError, JobError
from dicmh_ray.ray_plugin.options import RayOptions
from dicmh_ray.recipe import pack_photographs

LOG_SECONDS = 0.5
"""Between two looks at the logs."""

RAY_FOLDER = "ray"
"""In a run's folder: what Ray Train itself keeps."""

ReportStep = Callable[[dict[str, Any]], None]


def train_icmh_on_ray(
    sources: Sequence[str],
    folder: Path,
    *,
    preset: str,
    options: IcmhOptions | None = None,
    prior: IcmhOptions | None = None,
    labels: Mapping[str, str] | None = None,
    start_from: str | Path | None = None,
    workers: int,
    use_gpu: bool = False,
    max_failures: int = 3,
    address: str | None = None,
    report: Callable[[str], None] | None = None,
    report_step: ReportStep | None = None,
) -> Checkpoint:
    """Train, or go on training, on several workers and export to ``folder/checkpoint``.

    Args:
        sources: training photographs, read by this process.
        folder: the run: pack, training state, logs and checkpoint. Every worker must see it under
            the same path: on several machines a shared file system.
        preset: a name in :data:`~dicmh_ray.codec.icmh.presets.ICMH_PRESETS`.
        options: the codec's schedule; ``batch`` is each worker's.
        prior: the prior's, where the preset trains one.
        labels: tags of photographs by file name, which guide the human view.
        start_from: a Diff-ICMH checkpoint that a new run begins with; the workers read it.
        workers: processes.
        use_gpu: one GPU for each; else one CPU.
        max_failures: how often a run whose workers died is started again.
        address: of a Ray cluster; None as in :class:`RayOptions`.
        report: called with lines of text as stages end.
        report_step: called with the facts of each line that the run adds to its logs.

    Raises:
        SourceError: a source cannot be read, or no picture is large enough for a crop.
        WeightsError: ``folder`` holds a run of another shape, or ``start_from`` does not fit.
        JobError: the workers failed too often, or there are not so many GPUs.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, wanted at least 1")
    folder = folder.absolute()
    photographs = pack_photographs(sources, folder / "pack", labels=labels, report=report)
    photographs.require(largest_crop(ICMH_PRESETS[preset], options, prior))
    if start_from is not None:
        read_checkpoint(start_from)
        start_from = Path(start_from).absolute()
    arguments = {
        "folder": folder,
        "preset": preset,
        "options": options,
        "prior": prior,
        "device": "cuda" if use_gpu else "cpu",
        "start_from": start_from,
    }
    local_cpus = max(workers, os.cpu_count() or 1)
    with connected(RayOptions(address=address, local_cpus=local_cpus)) as is_own:
        if is_own and use_gpu:
            _require_gpus(workers)
        trainer = TorchTrainer(
            _train,
            train_loop_config=arguments,
            scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=ray.train.RunConfig(
                storage_path=str(folder / RAY_FOLDER),
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
            ),
        )
        _fit(trainer, folder, report_step)
    return read_checkpoint(folder / CHECKPOINT_NAME)


def _train(arguments: dict[str, Any]) -> None:
    """The body of a worker, in which ``torch.distributed`` is set up."""
    folder: Path = arguments["folder"]
    train_icmh(PackedPhotographs(folder / "pack"), **arguments)


def _require_gpus(workers: int) -> None:
    """Raises JobError where this machine alone would wait for GPUs for ever."""
    gpus = int(dict(ray.cluster_resources()).get("GPU", 0))  # type: ignore[no-untyped-call]
    if gpus < workers:
        raise JobError(f"{workers} workers need a GPU each, this machine has {gpus}")


def _fit(trainer: TorchTrainer, folder: Path, report_step: ReportStep | None) -> None:
    """Run a trainer, and tell what it logs meanwhile. Raises as ``train_icmh_on_ray``."""
    logs = [_Log(folder / files["log"]) for files in (PRIOR_FILES, CODEC_FILES)]
    is_over = threading.Event()

    def follow() -> None:
        while True:
            was_over = is_over.wait(LOG_SECONDS)
            for facts in (facts for log in logs for facts in log.news()):
                if report_step is not None:
                    report_step(facts)
            if was_over:
                return

    with ThreadPoolExecutor(1) as threads:
        following = threads.submit(follow)
        try:
            # Not in the thread: Ray Train handles Ctrl-C in the main one.
            trainer.fit()
        except ray.train.TrainingFailedError as exc:
            raise _cause(exc) from exc
        finally:
            is_over.set()
        following.result()


class _Log:
    """A log of a run, from its present end on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = path.stat().st_size if path.exists() else 0

    def news(self) -> list[dict[str, Any]]:
        """The facts of the lines that were added since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._seen)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._seen += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _cause(failed: Exception) -> DicmhError:
    """What the workers raised: our own error where there is one, else a JobError that tells it."""
    failures = dict(getattr(failed, "worker_failures", {}) or {})
    for failure in failures.values():
        # Ray Train wraps what a worker raised, to carry its traceback.
        raised = getattr(failure, "_base_exc", failure)
        if isinstance(raised, DicmhError):
            return raised
    told = [str(failure).strip().rpartition("\n")[2] for failure in (*failures.values(), failed)]
    return JobError(f"training failed on {len(failures)} workers: {told[0]}")
