"""The recipe of Diff-ICMH checkpoints, from any source of photographs.

Apart from :mod:`dicmh_ray.recipe` because what it needs, compressai and transformers, takes long to import.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dicmh_ray.codec.checkpoint import Checkpoint
from dicmh_ray.codec.icmh.presets import ICMH_PRESETS, train_icmh
from dicmh_ray.codec.icmh.training import IcmhOptions
from dicmh_ray.recipe import pack_photographs

__all__ = ["ICMH_PRESETS", "train_icmh_checkpoint"]


def train_icmh_checkpoint(
    sources: Sequence[str],
    folder: Path,
    *,
    preset: str,
    options: IcmhOptions,
    prior: IcmhOptions | None = None,
    device: str = "auto",
    start_from: str | Path | None = None,
    labels: Mapping[str, str] | None = None,
    report: Callable[[str], None] | None = None,
    report_step: Callable[[dict[str, Any]], None] | None = None,
) -> Checkpoint:
    """Train, or go on training, a Diff-ICMH codec and export it to ``folder/checkpoint``.

    Args:
        sources: training photographs.
        folder: the run: pack, training state, logs and checkpoint.
        preset: a name in :data:`~.codec.icmh.presets.ICMH_PRESETS`.
        options: the codec's schedule.
        prior: the prior's, where the preset trains one.
        device: a torch device, or ``"auto"``.
        start_from: a Diff-ICMH checkpoint that a new run begins with.
        labels: tags of photographs by file name, which guide the human view.
        report: called with lines of text as stages end.
        report_step: called every 50 steps with the step and the losses.

    Raises:
        SourceError: a source cannot be read, or no picture is large enough for a crop.
        WeightsError: ``folder`` holds a run of another shape, or ``start_from`` does not fit.
    """
    photographs = pack_photographs(sources, folder / "pack", labels=labels, report=report)
    return train_icmh(
        photographs,
        folder,
        preset=preset,
        options=options,
        prior=prior,
        device=device,
        start_from=start_from,
        report=report_step,
    )
