"""Training on Ray Train: the photographs packed once, then one process for each worker.

    driver: pack ──> folder (shared) <── worker 0: trains, writes state, logs, checkpoint
      └ follows the logs     └────────<── worker n: trains, reads

Ray Train starts the workers, connects them (``torch.distributed``: NCCL between GPUs, gloo between
CPUs) and starts all of them again when one dies; they go on from what the run's folder has. What is
trained, and how gradients meet, is in :mod:`dicmh_ray.codec.stage`. Diff-ICMH's training is in
:mod:`dicmh_ray.ray_plugin.icmh_training`.
"""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before ray is imported, which it does with its settings for the environment.
from dicmh_ray.ray_plugin.cluster import connected  # isort: skip

import ray
import ray.train
from ray.train.torch import TorchTrainer

from dicmh_ray.codec import Checkpoint, read_checkpoint
from dicmh_ray.codec.human_training import FILES as HUMAN_FILES
from dicmh_ray.codec.human_training import HumanOptions
from dicmh_ray.codec.objectives import FeatureTeacher
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.codec.run_state import CHECKPOINT_NAME, Report
from dicmh_ray.codec.training import FILES as CODEC_FILES
from dicmh_ray.codec.training import TrainOptions
from dicmh_ray.errors import DicmhError, JobError
from dicmh_ray.ray_plugin.options import RayOptions
from dicmh_ray.recipe import export_run, pack_photographs, train_networks

LOG_SECONDS = 0.5
"""Between two looks at the logs."""

RAY_FOLDER = "ray"
"""In a run's folder: what Ray Train itself keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """The processes that train together."""

    count: int

    use_gpu: bool = False
    """One GPU for each; else one CPU."""

    max_failures: int = 3
    """How often a run whose workers died is started again."""

    address: str | None = None
    """Of a Ray cluster; None as in :class:`RayOptions`."""

    @property
    def device(self) -> str:
        """What each of them trains on."""
        return "cuda" if self.use_gpu else "cpu"


def train_on_ray(
    sources: Sequence[str],
    folder: Path,
    *,
    workers: Workers,
    preset: str = "default",
    options: TrainOptions | None = None,
    human: HumanOptions | None = None,
    teacher: Path | None = None,
    labels: Mapping[str, str] | None = None,
    start_from: str | Path | None = None,
    report: Callable[[str], None] | None = None,
    report_step: Report | None = None,
) -> Checkpoint:
    """As :func:`dicmh_ray.recipe.train_checkpoint`, on several workers.

    Args:
        sources: training photographs, read by this process.
        folder: the run: pack, training state, logs and checkpoint. Every worker must see it under
            the same path: on several machines a shared file system.
        workers: how many, and where.
        preset: a name in :data:`~dicmh_ray.recipe.PRESETS`.
        options: replaces the preset's schedule of the codec; ``batch`` is each worker's.
        human: replaces its schedule of the human view; ``batch`` likewise.
        teacher: weights of a classifier; the workers read it.
        labels: tags of photographs by file name, which guide the human view.
        start_from: a checkpoint that a new run improves; the workers read it.
        report: called with lines of text as stages end.
        report_step: called with the facts of each line that the run adds to its logs.

    Raises:
        SourceError: a source cannot be read.
        WeightsError: ``folder`` holds a run of another network shape, or the teacher is none.
        JobError: the workers failed too often, or there are not so many GPUs.
    """
    if teacher is not None:
        FeatureTeacher(teacher)
    folder = packed_run(sources, folder, workers, labels=labels, report=report)[0]
    arguments = {
        "folder": folder,
        "preset": preset,
        "options": options,
        "human": human,
        "teacher": teacher and teacher.absolute(),
        "device": workers.device,
        "start_from": seen_by_workers(start_from),
    }
    logs = [folder / files["log"] for files in (CODEC_FILES, HUMAN_FILES)]
    return run_workers(
        _train, arguments, folder=folder, workers=workers, logs=logs, report_step=report_step
    )


def _train(arguments: dict[str, Any]) -> None:
    """The body of a worker, in which ``torch.distributed`` is set up."""
    folder: Path = arguments["folder"]
    photographs = PackedPhotographs(folder / "pack")
    network = train_networks(photographs, **arguments)
    if ray.train.get_context().get_world_rank() == 0:
        export_run(network, photographs, folder, preset=arguments["preset"])


def packed_run(
    sources: Sequence[str],
    folder: Path,
    workers: Workers,
    *,
    labels: Mapping[str, str] | None,
    report: Callable[[str], None] | None,
) -> tuple[Path, PackedPhotographs]:
    """The folder of a run, absolute, and the photographs packed into it."""
    if workers.count < 1:
        raise ValueError(f"workers is {workers.count}, wanted at least 1")
    folder = folder.absolute()
    return folder, pack_photographs(sources, folder / "pack", labels=labels, report=report)


def seen_by_workers(start_from: str | Path | None) -> str | Path | None:
    """The name of a checkpoint as workers, which have other working directories, can read it.

    Raises:
        WeightsError: there is no such checkpoint.
    """
    if start_from is not None:
        read_checkpoint(start_from)
    is_named = start_from is None or str(start_from) == "default"
    return start_from if is_named else Path(str(start_from)).absolute()


def run_workers(
    body: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    *,
    folder: Path,
    workers: Workers,
    logs: Sequence[Path],
    report_step: Report | None,
) -> Checkpoint:
    """Run a body in every worker, and tell what the first of them logs meanwhile.

    Args:
        body: trains, connected to the others, and writes the checkpoint in the first worker.
        arguments: what each is called with.
        folder: of the run.
        workers: how many, and where.
        logs: files that grow by a line of JSON at a time.
        report_step: told the facts of each line.

    Raises:
        JobError: the workers failed too often, or there are not so many GPUs.
        DicmhError: what a worker raised.
    """
    local_cpus = max(workers.count, os.cpu_count() or 1)
    with connected(RayOptions(address=workers.address, local_cpus=local_cpus)) as is_own:
        if is_own and workers.use_gpu:
            _require_gpus(workers.count)
        trainer = TorchTrainer(
            body,
            train_loop_config=arguments,
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers.count, use_gpu=workers.use_gpu
            ),
            run_config=ray.train.RunConfig(
                storage_path=str(folder / RAY_FOLDER),
                failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
            ),
        )
        _fit(trainer, logs, report_step)
    return read_checkpoint(folder / CHECKPOINT_NAME)


def _require_gpus(workers: int) -> None:
    """Raises JobError where this machine alone would wait for GPUs for ever."""
    gpus = int(dict(ray.cluster_resources()).get("GPU", 0))  # type: ignore[no-untyped-call]
    if gpus < workers:
        raise JobError(f"{workers} workers need a GPU each, this machine has {gpus}")


def _fit(trainer: TorchTrainer, logs: Sequence[Path], report_step: Report | None) -> None:
    """Run a trainer and follow the logs. Raises as ``run_workers``."""
    followed = [_Log(path) for path in logs]
    is_over = threading.Event()

    def follow() -> None:
        while True:
            was_over = is_over.wait(LOG_SECONDS)
            for facts in (facts for log in followed for facts in log.news()):
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
