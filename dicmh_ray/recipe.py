"""The recipes of our checkpoints: photographs in, checkpoint directory out.

    sources ──pack──> photographs.bin ──train──> codec ──train──> human view ──fit──> checkpoint/

That is the layered codec's. Diff-ICMH's is :mod:`dicmh_ray.icmh_recipe`; both begin with a pack.
Each stage leaves its result in the run's folder and is skipped or continued when it is found
there, so that a run that was stopped goes on with the same command, and a finished one improves
with more minutes or, where those of its schedule are done, more steps.
"""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicmh_ray.codec.checkpoint import Checkpoint
from dicmh_ray.codec.export import export
from dicmh_ray.codec.human_training import HumanOptions, train_human
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.codec.run_state import CHECKPOINT_NAME, Report, RunFolder
from dicmh_ray.codec.training import FILES as CODEC_FILES
from dicmh_ray.codec.training import TrainOptions, train
from dicmh_ray.errors import SourceFormatError, SourceImageError
from dicmh_ray.source import SourceOptions, load_pixels, plan_units, read_unit
from dicmh_ray.tags import encode_tags

PACK_NAME = "photographs"
MIN_SIDE_PX = 192


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A named combination of network shape, schedule and effort of the table fit."""

    network: NetworkConfig
    options: TrainOptions
    """Schedule of the codec: rate and distortion of all states."""

    human: HumanOptions
    """Schedule of the human view's restorer, where the network has one and a teacher is given."""

    table_crops: int
    """256x256 crops that the entropy model is fitted to."""

    table_steps: int
    """Optimiser steps of that fit, for each state."""


PRESETS: Mapping[str, Preset] = {
    "default": Preset(
        network=NetworkConfig(gain_hidden=96, human_width=128),
        options=TrainOptions(),
        human=HumanOptions(),
        table_crops=1600,
        table_steps=2000,
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
            human_width=8,
            human_blocks=1,
        ),
        options=TrainOptions(steps=60, batch=6, crop=64, structure=0.0),
        human=HumanOptions(minutes=0.05, batch=2, crop=64),
        table_crops=32,
        table_steps=20,
    ),
}
"""``default`` is the checkpoint in the package; ``tiny`` trains in seconds, for tests and trials."""


CLASS_OF_SUBJECT: Mapping[str, str] = {
    "backpack_dog": "backpack",
    "bear_plushie": "plushie",
    "berry_bowl": "bowl",
    "colorful_sneaker": "sneaker",
    "duck_toy": "toy",
    "fancy_boot": "boot",
    "grey_sloth_plushie": "plushie",
    "monster_toy": "toy",
    "pink_sunglasses": "sunglasses",
    "poop_emoji": "plushie",
    "rc_car": "toy",
    "red_cartoon": "cartoon",
    "robot_toy": "toy",
    "shiny_sneaker": "sneaker",
    "wolf_plushie": "plushie",
}
"""Labels that name one subject, such as a certain plushie, and the word for its kind."""


def read_labels(paths: Sequence[Path]) -> dict[str, str]:
    """Tags of photographs by file name, from CSV files with columns ``file`` and ``label``.

    A label becomes the word for its kind (:func:`kind_of_label`).

    Raises:
        SourceFormatError: a file has no such columns, or a label cannot be a tag.
    """
    return {file: kind_of_label(label) for path in paths for file, label in label_rows(path)}


def label_rows(path: Path) -> Iterator[tuple[str, str]]:
    """File name and label of each row of a CSV file, in UTF-8 with or without a mark at its start.

    Raises:
        SourceFormatError: it has no such columns, or a label cannot be a tag.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"file", "label"} <= set(rows.fieldnames or ()):
                raise SourceFormatError(
                    str(path), f"a header without `file` or `label`: {rows.fieldnames}"
                )
            for row in rows:
                if not row["file"] or not row["label"]:
                    raise SourceFormatError(str(path), f"a row without `file` or `label`: {row}")
                # Now, not when a checkpoint is written after hours of training.
                encode_tags([kind_of_label(row["label"])])
                yield row["file"], row["label"]
    except (ValueError, csv.Error) as exc:
        raise SourceFormatError(str(path), str(exc)) from exc


def kind_of_label(label: str) -> str:
    """Lower case, without a number at its end unless it is one, and through :data:`CLASS_OF_SUBJECT`."""
    word = label.lower()
    word = word.rstrip("0123456789") or word
    return CLASS_OF_SUBJECT.get(word, word)


def pack_photographs(
    sources: Sequence[str],
    folder: Path,
    *,
    labels: Mapping[str, str] | None = None,
    report: Callable[[str], None] | None = None,
) -> PackedPhotographs:
    """Decode photographs once into one file that training can map into memory.

    Pictures that cannot be decoded, or with a side below 192 pixels, are left out and counted.
    A pack that is complete is used as it is.

    Args:
        sources: as for compression: folders, globs, tars, Parquet.
        folder: gets ``photographs.bin`` and, when complete, ``photographs.json``.
        labels: tag of a photograph by its file name, for those that have one.
        report: called with a line of text at the end.

    Raises:
        SourceError: a source cannot be read, none of its pictures can be used, or none of those
            packed has one of the labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index_path = folder / f"{PACK_NAME}.json"
    if not index_path.exists():
        index: list[tuple[int, int, int, list[str]]] = []
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
                    tag = (labels or {}).get(Path(source_image.source_uri).name)
                    index.append((end, image.shape[0], image.shape[1], [tag] if tag else []))
                    end += image.size
        if not index:
            raise SourceFormatError(
                ", ".join(sources),
                f"none of {left_out} pictures can be decoded and has sides of {MIN_SIDE_PX} pixels",
            )
        if labels and not any(tags for *_, tags in index):
            raise SourceFormatError(
                "labels", "no photograph has such a file name; those in tars and tables have none"
            )
        part = index_path.with_suffix(".part")
        part.write_text(json.dumps(index))
        part.replace(index_path)
        if report is not None:
            report(f"packed {len(index)} photographs, {end / 2**20:.0f} MiB; left out {left_out}")
    photographs = PackedPhotographs(folder)
    if labels and not any(photographs.tags):
        raise SourceFormatError("labels", f"the run in {folder.parent} was begun without")
    return photographs


def train_checkpoint(
    sources: Sequence[str],
    folder: Path,
    *,
    preset: str = "default",
    options: TrainOptions | None = None,
    human: HumanOptions | None = None,
    device: str = "auto",
    start_from: str | Path | None = None,
    teacher: Path | None = None,
    labels: Mapping[str, str] | None = None,
    report: Callable[[str], None] | None = None,
    report_step: Report | None = None,
) -> Checkpoint:
    """Train, or go on training, and export to ``folder/checkpoint``.

    Args:
        sources: training photographs.
        folder: the run: pack, training state, log and checkpoint.
        preset: a name in :data:`PRESETS`.
        options: replaces the preset's schedule of the codec.
        human: replaces its schedule of the human view.
        device: a torch device, or ``"auto"``.
        start_from: a checkpoint that a new run improves instead of beginning at the DCT.
        teacher: weights of a classifier, for the SC loss and for the human view; without one the
            checkpoint gets no human view.
        labels: tags of photographs by file name, which guide the human view.
        report: called with lines of text as stages end.
        report_step: called every 50 steps with the step and the losses.

    Raises:
        SourceError: a source cannot be read, or no picture is large enough for a crop.
        WeightsError: ``folder`` holds a run of another network shape, or the teacher is none.
    """
    photographs = pack_photographs(sources, folder / "pack", labels=labels, report=report)
    network = train_networks(
        photographs,
        folder,
        preset=preset,
        options=options,
        human=human,
        device=device,
        start_from=start_from,
        teacher=teacher,
        report=report_step,
    )
    return export_run(network, photographs, folder, preset=preset, report=report)


def train_networks(
    photographs: PackedPhotographs,
    folder: Path,
    *,
    preset: str = "default",
    options: TrainOptions | None = None,
    human: HumanOptions | None = None,
    device: str = "auto",
    start_from: str | Path | None = None,
    teacher: Path | None = None,
    report: Report | None = None,
) -> CodecNetwork:
    """The stages of :func:`train_checkpoint`, in one process or in each of several that train together.

    Arguments are those of :func:`train_checkpoint`, and so are the errors.

    Returns:
        The network with averaged weights, in evaluation mode; the same in every process.
    """
    chosen = PRESETS[preset]
    options, human = options or chosen.options, human or chosen.human
    human_teacher = teacher if chosen.network.human_width else None
    photographs.require(max(options.crop, human.crop) if human_teacher else options.crop)
    network = train(
        photographs,
        folder,
        options=options,
        network=dataclasses.replace(chosen.network, human_width=0),
        device=device,
        start_from=start_from,
        teacher=teacher,
        report=report,
    )
    if human_teacher is None:
        return network
    return train_human(
        network,
        chosen.network,
        photographs,
        folder,
        options=human,
        teacher=human_teacher,
        device=device,
        start_from=start_from,
        report=report,
    )


def export_run(
    network: CodecNetwork,
    photographs: PackedPhotographs,
    folder: Path,
    *,
    preset: str = "default",
    report: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Fit the tables to a run's network and write ``folder/checkpoint``; in one process alone."""
    chosen = PRESETS[preset]
    provenance: dict[str, Any] = {"preset": preset, "photographs": len(photographs.entries)}
    teachers = (RunFolder(folder, **CODEC_FILES).progress() or {}).get("teachers")
    if teachers:
        provenance["teacher"] = teachers[0] if len(teachers) == 1 else teachers
    return export(
        network.cpu(),
        photographs,
        folder / CHECKPOINT_NAME,
        provenance=provenance,
        crops=chosen.table_crops,
        steps=chosen.table_steps,
        report=report,
    )
