"""Diff-ICMH training on Ray Train. Apart from :mod:`dicmh_ray.ray_plugin.training` because what it
needs, compressai and transformers, takes long to import."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dicmh_ray.codec import Checkpoint
from dicmh_ray.codec.icmh.presets import ICMH_PRESETS, largest_crop, train_icmh
from dicmh_ray.codec.icmh.training import CODEC_FILES, PRIOR_FILES, IcmhOptions
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.codec.run_state import Report
from dicmh_ray.ray_plugin.training import Workers, packed_run, run_workers, seen_by_workers


def train_icmh_on_ray(
    sources: Sequence[str],
    folder: Path,
    *,
    workers: Workers,
    preset: str,
    options: IcmhOptions | None = None,
    prior: IcmhOptions | None = None,
    labels: Mapping[str, str] | None = None,
    start_from: str | Path | None = None,
    report: Callable[[str], None] | None = None,
    report_step: Report | None = None,
) -> Checkpoint:
    """As :func:`dicmh_ray.icmh_recipe.train_icmh_checkpoint`, on several workers.

    Args:
        sources: training photographs, read by this process.
        folder: the run: pack, training state, logs and checkpoint. Every worker must see it under
            the same path: on several machines a shared file system.
        workers: how many, and where.
        preset: a name in :data:`~dicmh_ray.codec.icmh.presets.ICMH_PRESETS`.
        options: replaces the codec's schedule; ``batch`` is each worker's.
        prior: replaces the prior's, where the preset trains one.
        labels: tags of photographs by file name, which guide the human view.
        start_from: a Diff-ICMH checkpoint that a new run begins with; the workers read it.
        report: called with lines of text as stages end.
        report_step: called with the facts of each line that the run adds to its logs.

    Raises:
        SourceError: a source cannot be read, or no picture is large enough for a crop.
        WeightsError: ``folder`` holds a run of another shape, or ``start_from`` does not fit.
        JobError: the workers failed too often, or there are not so many GPUs.
    """
    folder, photographs = packed_run(sources, folder, workers, labels=labels, report=report)
    photographs.require(largest_crop(ICMH_PRESETS[preset], options, prior))
    arguments = {
        "folder": folder,
        "preset": preset,
        "options": options,
        "prior": prior,
        "device": workers.device,
        "start_from": seen_by_workers(start_from),
    }
    logs = [folder / files["log"] for files in (PRIOR_FILES, CODEC_FILES)]
    return run_workers(
        _train, arguments, folder=folder, workers=workers, logs=logs, report_step=report_step
    )


def _train(arguments: dict[str, Any]) -> None:
    """The body of a worker, in which ``torch.distributed`` is set up."""
    folder: Path = arguments["folder"]
    train_icmh(PackedPhotographs(folder / "pack"), **arguments)
