"""Which nets look at pictures, and what each reads: a folder of ONNX files and its description.

``NETS/nets.toml`` has a table for each net, with the fields of :class:`NetSpec`; docs/evaluation.md
has an example. Files that this module knows by name need no description.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dicmh_ray.errors import NetError

TASKS = ("classification", "detection", "segmentation", "faces", "landmarks", "none")
DESCRIPTION = "nets.toml"

VOC_OF_COCO = {
    "5": 1, "2": 2, "16": 3, "9": 4, "44": 5, "6": 6, "3": 7, "17": 8, "62": 9, "21": 10, "67": 11,
    "18": 12, "19": 13, "4": 14, "1": 15, "64": 16, "20": 17, "63": 18, "7": 19, "72": 20,
}  # fmt: skip
"""COCO panoptic category -> class of Pascal VOC, by meaning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetSpec:
    """One net: its file, what it is for, and how a picture becomes its input."""

    name: str
    """As reports show it."""

    file: Path
    """The ONNX file; in ``nets.toml`` relative to the folder."""

    task: str = "none"
    """One of :data:`TASKS`; ``"none"`` only measures feature distances."""

    colour: str = "rgb"
    """``"rgb"`` or ``"bgr"``."""

    mean: float = 127.5
    """Subtracted from 0..255 samples..."""

    scale: float = 127.5
    """...which are then divided by this."""

    fit: str = "stretch"
    """How a task's picture becomes the input's size: ``"stretch"`` or ``"crop"`` (the middle)."""

    output: str = ""
    """The tensor a task reads; empty is the graph's first output (a detector's may be two)."""

    layout: str = "grid"
    """Of a detector: ``"grid"`` is FastestDet's map, ``"boxes"`` scores and corners in 0..1."""

    taps: tuple[str, ...] = ()
    """Tensors ``[1, C, h, w]``, shallow to deep, that the feature distance compares."""

    label_values: Mapping[str, int] = field(default_factory=dict)
    """Of a segmenter: value in a label image -> class. 0 is unlabelled; others are background."""

    same_as_sha256: str = ""
    """SHA-256 of another file with the same weights, by which a checkpoint may name this net."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("task", self.task, TASKS),
            ("colour", self.colour, ("rgb", "bgr")),
            ("fit", self.fit, ("stretch", "crop")),
            ("layout", self.layout, ("grid", "boxes")),
        ):
            if value not in known:
                raise NetError(self.name, f"{name} is {value!r}, wanted {', '.join(known)}")
        if self.task == "none" and not self.taps:
            raise NetError(self.name, "has neither a task nor taps")


KNOWN_NETS = {
    spec.file.name: spec
    for spec in (
        NetSpec(
            name="MobileNetV2",
            file=Path("mobilenetv2_imagenet1001_u8w.onnx"),
            task="classification",
            mean=128,
            scale=128,
            fit="crop",
            output="logits",
            same_as_sha256="f981ce3887396c446c088164296098efe703c85ef88baafff4dd628c1702a129",
        ),
        NetSpec(
            name="FastestDet",
            file=Path("fastestdet_coco80.onnx"),
            task="detection",
            colour="bgr",
            mean=0,
            scale=255,
            taps=("onnx::MaxPool_423", "input.8", "input.136", "input.376", "input.504"),
        ),
        NetSpec(
            name="DeepLab",
            file=Path("deeplabv3_mnv2_dm05_voc21_u8w.onnx"),
            task="segmentation",
            mean=128,
            scale=128,
            output="logits",
            taps=("t64", "t77", "t97", "t124", "t170"),
            label_values=VOC_OF_COCO,
        ),
        NetSpec(
            name="RFB-320",
            file=Path("version-RFB-320.onnx"),
            task="faces",
            mean=127,
            scale=128,
            layout="boxes",
        ),
    )
}
"""By file name. The first has the weights of a safetensors file, by which trainings know it."""


def find_nets(folder: str | Path) -> tuple[NetSpec, ...]:
    """The nets of a folder: those its ``nets.toml`` describes, or the known files at any depth.

    Raises:
        NetError: there is no such folder, it has no net, the description is wrong, or without one
            there is a file that this module does not know.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NetError(str(folder), "is no folder")
    if (folder / DESCRIPTION).is_file():
        return _described(folder)
    files = sorted(folder.rglob("*.onnx"))
    if not files:
        raise NetError(str(folder), f"holds no {DESCRIPTION} and no ONNX file")
    if unknown := [file.name for file in files if file.name not in KNOWN_NETS]:
        raise NetError(unknown[0], f"is not a known net: describe it in {folder / DESCRIPTION}")
    return tuple(replace(KNOWN_NETS[file.name], file=file) for file in files)


def net_from_argument(text: str) -> NetSpec:
    """The net of ``FILE`` or ``FILE:TAP,TAP``: RGB in -1..1, for feature distances only.

    A known file keeps its own description. Raises NetError if an unknown one names no taps.
    """
    name, _, taps = text.rpartition(":") if ".onnx:" in text else (text, "", "")
    file = Path(name)
    if not file.is_file():
        raise NetError(name, "is no file")
    chosen = tuple(tap for tap in taps.split(",") if tap)
    known = KNOWN_NETS.get(file.name)
    if known is not None:
        return replace(known, file=file, task="none", taps=chosen or known.taps)
    if not chosen:
        raise NetError(file.name, "name the tensors to compare: FILE.onnx:TAP,TAP")
    return NetSpec(name=file.stem, file=file, taps=chosen)


def net_of_file(file: str, description: str = "") -> NetSpec | None:
    """The net of a file name: a known one, or the one that a description has of it; else None.

    Args:
        file: name of the ONNX file, without a folder.
        description: text of the ``nets.toml`` beside it.

    Raises:
        NetError: the description is wrong.
    """
    if not description:
        return KNOWN_NETS.get(file)
    for name, table in _tables(DESCRIPTION, description).items():
        spec = _from_table(name, table, Path())
        if spec.file.name == file:
            return replace(spec, file=Path(file))
    return None


def _described(folder: Path) -> tuple[NetSpec, ...]:
    path = folder / DESCRIPTION
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise NetError(str(path), str(exc)) from exc
    tables = _tables(str(path), text)
    specs = tuple(_from_table(name, table, folder) for name, table in tables.items())
    for spec in specs:
        if not spec.file.is_file():
            raise NetError(spec.name, f"{spec.file} is no file")
    return specs


def _tables(path: str, text: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(text)
    except ValueError as exc:
        raise NetError(path, str(exc)) from exc
    if not tables:
        raise NetError(path, "describes no net")
    return tables


def _from_table(name: str, table: Any, folder: Path) -> NetSpec:
    if not isinstance(table, dict) or not isinstance(table.get("file"), str):
        raise NetError(name, "its table names no file")
    known = {one.name for one in fields(NetSpec)} - {"name"}
    if unknown := sorted(set(table) - known):
        raise NetError(name, f"unknown field {', '.join(unknown)}")
    values = {**table, "file": folder / table["file"]}
    if "taps" in values:
        values["taps"] = tuple(values["taps"])
    return NetSpec(name=name, **values)
