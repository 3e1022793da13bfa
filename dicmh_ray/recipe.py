"""The recipe of the default checkpoint: photographs in, checkpoint directory out.

    sources ──pack──> photographs.bin ──train──> network ──fit──> checkpoint/

Each stage leaves its result in the run's folder and is skipped or continued when it is found
there, so that a run that was stopped goes on with the same command, and a finished one improves
with more minutes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicmh_ray.codec.checkpoint import Checkpoint
from dicmh_ray.codec.export import export
from dicmh_ray.codec.network import NetworkConfig
from dicmh_ray.codec.training import PackedPhotographs, TrainOptions, train
from dicmh_ray.errors import SourceImageError
from dicmh_ray.source import SourceOptions, load_pixels, plan_units, read_unit

PACK_NAME = "photographs"
CHECKPOINT_NAME = "checkpoint"
MIN_SIDE_PX = 192


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A named combination of network shape, schedule and effort of the table fit."""

    network: NetworkConfig
    options: TrainOptions
    table_crops: int
    """256x256 crops that the entropy model is fitted to."""

    table_steps: int
    """Optimiser steps of that fit, for each state."""


PRESETS: Mapping[str, Preset] = {
    "default": Preset(
        network=NetworkConfig(), options=TrainOptions(), table_crops=1600, table_steps=300
    ),
    "tiny": Preset(
        network=NetworkConfig(
            num_luma=12,
            num_chroma=3,
            num_merged=3,
            encoder_blocks=1,
            analysis_blocks=1,
            synthesis_blocks=1,
            restorer_blocks=1,
            hidden=16,
            bottleneck=16,
            num_states=3,
            finest_step=40.0,
        ),
        options=TrainOptions(steps=60, batch=6, crop=64),
        table_crops=32,
        table_steps=20,
    ),
}
"""``default`` is the checkpoint in the package; ``tiny`` trains in seconds, for tests and trials."""


def pack_photographs(
    sources: Sequence[str], folder: Path, *, report: Callable[[str], None] | None = None
) -> PackedPhotographs:
    """Decode photographs once into one file that training can map into memory.

    Pictures that cannot be decoded, or with a side below 192 pixels, are left out and counted.
    A pack that is complete is used as it is.

    Args:
        sources: as for compression: folders, globs, tars, Parquet.
        folder: gets ``photographs.bin`` and, when complete, ``photographs.json``.
        report: called with a line of text at the end.

    Raises:
        SourceError: a source cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index_path = folder / f"{PACK_NAME}.json"
    if not index_path.exists():
        index: list[tuple[int, int, int]] = []
        left_out = end = 0
        options = SourceOptions()
        with (folder / f"{PACK_NAME}.bin").open("wb") as samples:
            for unit in plan_units(sources, options=options):
                for source_image in read_unit(unit, options=options):
                    try:
                        image = load_pixels(source_image.data).image
                    except SourceImageError:
                        left_out += 1
                        continue
                    if min(image.shape[:2]) < MIN_SIDE_PX:
                        left_out += 1
                        continue
                    samples.write(image.tobytes())
                    index.append((end, image.shape[0], image.shape[1]))
                    end += image.size
        index_path.write_text(json.dumps(index))
        if report is not None:
            report(f"packed {len(index)} photographs, {end / 2**20:.0f} MiB; left out {left_out}")
    return PackedPhotographs(folder)


def train_checkpoint(
    sources: Sequence[str],
    folder: Path,
    *,
    preset: str = "default",
    options: TrainOptions | None = None,
    device: str = "auto",
    start_from: str | Path | None = None,
    report: Callable[[str], None] | None = None,
    report_step: Callable[[dict[str, Any]], None] | None = None,
) -> Checkpoint:
    """Train, or go on training, and export to ``folder/checkpoint``.

    Args:
        sources: training photographs.
        folder: the run: pack, training state, log and checkpoint.
        preset: a name in :data:`PRESETS`.
        options: replaces the preset's schedule.
        device: a torch device, or ``"auto"``.
        start_from: a checkpoint that a new run improves instead of beginning at the DCT.
        report: called with lines of text as stages end.
        report_step: called every 50 steps with step, bpp and PSNR of each state.

    Raises:
        SourceError: a source cannot be read.
        WeightsError: ``folder`` holds a run of another network shape.
    """
    chosen = PRESETS[preset]
    photographs = pack_photographs(sources, folder / "pack", report=report)
    schedule = options or chosen.options
    network = train(
        photographs,
        folder,
        options=schedule,
        network=chosen.network,
        device=device,
        start_from=start_from,
        report=report_step,
    )
    return export(
        network.cpu(),
        photographs,
        folder / CHECKPOINT_NAME,
        provenance={"preset": preset, "photographs": len(photographs.entries)},
        crops=chosen.table_crops,
        steps=chosen.table_steps,
        report=report,
    )
