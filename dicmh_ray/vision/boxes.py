"""Boxes as detectors give them: overlap, suppression of repeats, and average precision.

Boxes are float ``[N, 4]``: left, top, right, bottom, each 0..1 of the picture's width or height.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.float64]

COCO_OVERLAPS = tuple(0.5 + 0.05 * i for i in range(10))
MAX_DETECTIONS = 100
"""A picture's best detections of a class that count, as in COCO's protocol."""

RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, kw_only=True, slots=True)
class Detections:
    """What was found in a picture, best first."""

    boxes: Boxes
    scores: npt.NDArray[np.float64]
    """0..1, ``[N]``, descending."""

    classes: npt.NDArray[np.int64]
    """``[N]``."""

    def above(self, score: float) -> "Objects":
        """Those with a higher score, as if they were true."""
        sure = self.scores > score
        return Objects(boxes=self.boxes[sure], classes=self.classes[sure])


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """What is in a picture."""

    boxes: Boxes
    classes: npt.NDArray[np.int64]


def overlaps(a: Boxes, b: Boxes) -> npt.NDArray[np.float64]:
    """Intersection over union, ``[len(a), len(b)]``."""
    corner = np.maximum(a[:, None, :2], b[None, :, :2])
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - corner
    common = np.prod(np.clip(sides, 0, None), axis=2)
    area_a, area_b = (np.prod(np.clip(x[:, 2:] - x[:, :2], 0, None), axis=1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - common
    return np.asarray(common / np.maximum(union, 1e-12))


def without_repeats(
    boxes: Boxes,
    scores: npt.NDArray[np.float64],
    classes: npt.NDArray[np.int64],
    *,
    max_overlap: float,
) -> Detections:
    """Non-maximum suppression within each class; the rest in order of score."""
    waiting = np.argsort(-scores, kind="stable")
    kept = []
    while waiting.size:
        best, others = waiting[0], waiting[1:]
        kept.append(best)
        shared = overlaps(boxes[best : best + 1], boxes[others])[0]
        waiting = others[(shared <= max_overlap) | (classes[others] != classes[best])]
    chosen = np.array(kept, np.int64)
    return Detections(boxes=boxes[chosen], scores=scores[chosen], classes=classes[chosen])


def mean_average_precision(
    found: Sequence[Detections], there: Sequence[Objects], *, min_overlaps: Sequence[float]
) -> float | None:
    """COCO's mean average precision: over classes that are there, and over the overlaps asked for.

    Precision is taken at 101 recalls as the best at that recall or higher. One detection may claim
    one object: the best overlapping of those still free.

    Args:
        found: detections of each picture.
        there: objects of each picture.
        min_overlaps: the intersections over union from which a detection is right.

    Returns:
        0..1, or None where no picture has an object.
    """
    classes = sorted({int(one) for objects in there for one in objects.classes})
    if not classes:
        return None
    precisions = [
        _average_precision(found, there, one, least) for least in min_overlaps for one in classes
    ]
    return float(np.mean(precisions))


def _average_precision(
    found: Sequence[Detections], there: Sequence[Objects], wanted: int, min_overlap: float
) -> float:
    scores, rights, num_objects = [], [], 0
    for detections, objects in zip(found, there, strict=True):
        mine = np.flatnonzero(detections.classes == wanted)[:MAX_DETECTIONS]
        truth = objects.boxes[objects.classes == wanted]
        num_objects += len(truth)
        scores.append(detections.scores[mine])
        rights.append(_claims(overlaps(detections.boxes[mine], truth), min_overlap))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    right = np.cumsum(np.concatenate(rights)[order])
    recall = right / num_objects
    precision = right / np.arange(1, len(right) + 1)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(best[np.searchsorted(recall, RECALLS)].mean())


def _claims(shared: npt.NDArray[np.float64], min_overlap: float) -> npt.NDArray[np.bool_]:
    """Which detections (rows, best first) get an object (columns) of their own."""
    claimed = np.zeros(len(shared), np.bool_)
    free = shared.copy()
    for row in range(len(shared)):
        if free.shape[1] and free[row].max() >= min_overlap:
            claimed[row] = True
            free[:, free[row].argmax()] = -1.0
    return claimed
