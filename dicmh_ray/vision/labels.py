"""What is known of a picture, found by where it lies.

For ``SET/images/NAME.jpg`` (or ``SET/NAME.jpg``, then the folders lie beside it):

* ``SET/labels_yolo/NAME.txt``: a line for each object: class, centre x, centre y, width, height,
  the last four 0..1. An empty file is a picture without objects, no file an unlabelled one.
* ``SET/semantic/NAME.png``: one 8-bit value a pixel; 0 is unlabelled.
* ``SET/classes.csv``: ``NAME,class`` with the classifier's index.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dicmh_ray.errors import SourceFormatError
from dicmh_ray.vision.boxes import Objects


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """The labels of one picture; each kind may be missing."""

    objects: Objects | None = None
    semantic: npt.NDArray[np.uint8] | None = None
    """``[H, W]`` of the upright picture."""

    class_index: int | None = None


def find_labels(picture: Path) -> Labels:
    """The labels of a picture.

    Raises:
        SourceFormatError: a label file is not in its format.
    """
    home = picture.parent.parent if picture.parent.name == "images" else picture.parent
    boxes = home / "labels_yolo" / f"{picture.stem}.txt"
    semantic = home / "semantic" / f"{picture.stem}.png"
    return Labels(
        objects=_read_boxes(boxes) if boxes.is_file() else None,
        semantic=_read_semantic(semantic) if semantic.is_file() else None,
        class_index=_class_of(home / "classes.csv", picture.stem),
    )


def _read_boxes(path: Path) -> Objects:
    try:
        rows = [[float(x) for x in line.split()] for line in path.read_text().splitlines() if line]
        table = np.array(rows, np.float64).reshape(len(rows), 5)
    except ValueError as exc:
        raise SourceFormatError(str(path), "wanted five numbers a line") from exc
    centres, halves = table[:, 1:3], table[:, 3:5] / 2
    return Objects(
        boxes=np.concatenate([centres - halves, centres + halves], axis=1),
        classes=table[:, 0].astype(np.int64),
    )


def _read_semantic(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as picture:
        if picture.mode not in ("L", "P"):
            raise SourceFormatError(str(path), f"mode is {picture.mode}, wanted 8-bit values")
        return np.asarray(picture)


def _class_of(path: Path, name: str) -> int | None:
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            if row and Path(row[0]).stem == name:
                try:
                    return int(row[1])
                except (IndexError, ValueError) as exc:
                    raise SourceFormatError(str(path), f"no class index for {name}") from exc
    return None
