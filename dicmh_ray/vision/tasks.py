"""Machine tasks: what a net reads off a picture, and how well it does so from a decoded one.

Each task turns a picture into a reading, compares a reading with that of the original and with
labels (evidence, small enough to keep for every picture), and scores the evidence of a whole set.
A score is 0..1, larger is better, or None where the set has nothing to score.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from dicmh_ray.errors import NetError
from dicmh_ray.vision.boxes import (
    COCO_OVERLAPS,
    Boxes,
    Detections,
    Objects,
    mean_average_precision,
    overlaps,
    without_repeats,
)
from dicmh_ray.vision.labels import Labels
from dicmh_ray.vision.nets import NetSpec
from dicmh_ray.vision.onnx_net import Array, OnnxNet, Picture, centre_crop, planes, resized

Scores = Mapping[str, float | None]


class NetTask(Protocol):
    """One net at its task."""

    spec: NetSpec
    net: OnnxNet

    def read(self, image: Picture) -> Any:
        """What the net says of a uint8 ``[H, W, 3]`` picture."""

    def compare(self, reading: Any, original: Any, labels: Labels) -> Any:
        """Evidence of one picture: its reading beside the original's reading and the labels."""

    def score(self, evidence: Sequence[Any]) -> Scores:
        """The scores of a set of pictures."""


def load_task(spec: NetSpec, data: bytes | None = None) -> NetTask:
    """The task of a net. Raises NetError if the file is not as described, or is for no task.

    Args:
        spec: its description.
        data: the bytes of its file, where they were read already.
    """
    kinds: dict[str, type[Classification | Detection | Segmentation | Faces | Landmarks]] = {
        "classification": Classification,
        "detection": Detection,
        "segmentation": Segmentation,
        "faces": Faces,
        "landmarks": Landmarks,
    }
    if spec.task not in kinds:
        raise NetError(spec.name, "is described for no task")
    return kinds[spec.task](spec, data)


class TaskNet:
    """A net with a fixed input size, fed as its description says."""

    def __init__(self, spec: NetSpec, data: bytes | None = None) -> None:
        self.spec = spec
        self.net = OnnxNet(spec.file, (spec.output,) if spec.output else (), data)
        size = self.net.input_hw
        if size is None:
            raise NetError(spec.name, "takes any size: a task needs a fixed one")
        self.size_hw = size

    def run(self, image: Picture) -> list[Array]:
        """The net's outputs for one picture, without the batch axis."""
        return [output[0] for output in self.net(fitted(image, self.spec, self.size_hw)).values()]

    def num_classes(self) -> int:
        """How many classes the net tells apart, as its outputs for a black picture say; 0: none."""
        return 0

    def _blank(self) -> Picture:
        return np.zeros((*self.size_hw, 3), np.uint8)

    def wrong(self, found: Sequence[Array], wanted: str) -> NetError:
        """The error for outputs of unexpected shapes."""
        return NetError(self.spec.name, f"gives {[x.shape for x in found]}, wanted {wanted}")


class ClassEvidence(NamedTuple):
    """One picture of a classification."""

    agrees: bool
    is_right: bool | None


class Classification(TaskNet):
    """Does the net name the same class as for the original, and the right one?"""

    def logits(self, image: Picture) -> Array:
        """What the net gives each class, float ``[classes]``."""
        logits = self.run(image)[0]
        if logits.ndim != 1:
            raise self.wrong([logits], "logits [classes]")
        return logits

    def num_classes(self) -> int:
        """See :meth:`TaskNet.num_classes`."""
        return len(self.logits(self._blank()))

    def read(self, image: Picture) -> int:
        """The class of the picture."""
        return int(self.logits(image).argmax())

    def compare(self, reading: int, original: int, labels: Labels) -> ClassEvidence:
        """See :class:`NetTask`."""
        truth = labels.class_index
        return ClassEvidence(reading == original, None if truth is None else reading == truth)

    def score(self, evidence: Sequence[ClassEvidence]) -> Scores:
        """See :class:`NetTask`."""
        labelled = [one.is_right for one in evidence if one.is_right is not None]
        return {
            "top-1 agreement": _share([one.agrees for one in evidence]),
            "top-1 accuracy": _share(labelled),
        }


class DetectionEvidence(NamedTuple):
    """One picture of a detection."""

    found: Detections
    found_on_original: Objects
    objects: Objects | None


class Detection(TaskNet):
    """Average precision against the labels, and against what is found on the original."""

    MIN_SCORE = 0.01
    SURE_SCORE = 0.35
    """Detections on the original that count as true: FastestDet's usual threshold is near this."""

    MAX_OVERLAP = 0.45

    def num_classes(self) -> int:
        """See :meth:`TaskNet.num_classes`."""
        first = self.run(self._blank())[0]
        return first.shape[1] - 1 if self.spec.layout == "boxes" else len(first) - 5

    def read(self, image: Picture) -> Detections:
        """The objects found."""
        found = self.run(image)
        if self.spec.layout == "boxes":
            boxes, scores, classes = _listed(found, self)
        else:
            boxes, scores, classes = _gridded(found, self)
        some = scores > self.MIN_SCORE
        return without_repeats(
            boxes[some], scores[some], classes[some], max_overlap=self.MAX_OVERLAP
        )

    def compare(
        self, reading: Detections, original: Detections, labels: Labels
    ) -> DetectionEvidence:
        """See :class:`NetTask`."""
        return DetectionEvidence(reading, original.above(self.SURE_SCORE), labels.objects)

    def score(self, evidence: Sequence[DetectionEvidence]) -> Scores:
        """See :class:`NetTask`."""
        labelled = [one for one in evidence if one.objects is not None]
        found = [one.found for one in labelled]
        there = [one.objects for one in labelled if one.objects is not None]
        return {
            "AP50": mean_average_precision(found, there, min_overlaps=[0.5]),
            "AP50-95": mean_average_precision(found, there, min_overlaps=COCO_OVERLAPS),
            "AP50 of the original's": mean_average_precision(
                [one.found for one in evidence],
                [one.found_on_original for one in evidence],
                min_overlaps=[0.5],
            ),
        }


class SegmentationReading(NamedTuple):
    """The class of each pixel."""

    classes: npt.NDArray[np.uint8]
    """``[H, W]``, at the picture's own size (of :meth:`Segmentation.coarse`, the net's)."""

    num_classes: int


class SegmentationEvidence(NamedTuple):
    """One picture of a segmentation: counts ``[true class, found class]`` of pixels."""

    with_original: npt.NDArray[np.int64]
    with_labels: npt.NDArray[np.int64] | None


class Segmentation(TaskNet):
    """Mean intersection over union with the labels, and with the original's segmentation."""

    UNLABELLED = 255

    def __init__(self, spec: NetSpec, data: bytes | None = None) -> None:
        super().__init__(spec, data)
        values = np.zeros(256, np.uint8)
        for value, index in spec.label_values.items():
            values[int(value)] = index
        values[0] = self.UNLABELLED
        self._class_of_label = values

    def num_classes(self) -> int:
        """See :meth:`TaskNet.num_classes`."""
        return self.coarse(self._blank()).num_classes

    def coarse(self, image: Picture) -> SegmentationReading:
        """The class of each cell of the net's own grid."""
        logits = self.run(image)[0]
        if logits.ndim != 3:
            raise self.wrong([logits], "logits [classes, h, w]")
        return SegmentationReading(logits.argmax(axis=0).astype(np.uint8), len(logits))

    def read(self, image: Picture) -> SegmentationReading:
        """The class of each pixel."""
        classes, num_classes = self.coarse(image)
        size = (image.shape[1], image.shape[0])
        whole = Image.fromarray(classes).resize(size, Image.Resampling.NEAREST)
        return SegmentationReading(np.asarray(whole), num_classes)

    def compare(
        self, reading: SegmentationReading, original: SegmentationReading, labels: Labels
    ) -> SegmentationEvidence:
        """See :class:`NetTask`. Raises NetError if the labels are of another picture's size."""
        found, num_classes = reading
        semantic = labels.semantic if self.spec.label_values else None
        if semantic is not None and semantic.shape != found.shape:
            raise NetError(self.spec.name, f"labels are {semantic.shape}, picture {found.shape}")
        return SegmentationEvidence(
            confusion(original.classes, found, num_classes),
            None
            if semantic is None
            else confusion(self._class_of_label[semantic], found, num_classes),
        )

    def score(self, evidence: Sequence[SegmentationEvidence]) -> Scores:
        """See :class:`NetTask`."""
        labelled = [one.with_labels for one in evidence if one.with_labels is not None]
        return {
            "mIoU": mean_iou(np.sum(labelled, axis=0)) if labelled else None,
            "mIoU with the original's": mean_iou(
                np.sum([one.with_original for one in evidence], axis=0)
            ),
        }


class Faces(TaskNet):
    """Are the faces of the original still found, and where? Score per face, not per picture."""

    SURE_SCORE = 0.7
    MAX_OVERLAP = 0.3
    MIN_OVERLAP = 0.5

    def read(self, image: Picture) -> Detections:
        """The faces found."""
        boxes, scores, classes = _listed(self.run(image), self)
        sure = scores > self.SURE_SCORE
        return without_repeats(
            boxes[sure], scores[sure], classes[sure], max_overlap=self.MAX_OVERLAP
        )

    def compare(
        self,
        reading: Detections,
        original: Detections,
        labels: Labels,
    ) -> list[float]:
        """For each face of the original, the overlap with the nearest that is found."""
        shared = overlaps(original.boxes, reading.boxes)
        return [float(row.max(initial=0.0)) for row in shared]

    def score(self, evidence: Sequence[list[float]]) -> Scores:
        """See :class:`NetTask`."""
        shared = [one for faces in evidence for one in faces]
        return {
            "faces found": _share([one >= self.MIN_OVERLAP for one in shared]),
            "face box IoU": float(np.mean(shared)) if shared else None,
        }


class Landmarks(TaskNet):
    """Are the points of the original found again? Score per point, not per picture."""

    NEAR = 0.05
    """Distance, of the picture's sides, up to which a point counts as found."""

    def read(self, image: Picture) -> npt.NDArray[np.float64]:
        """The points, ``[N, 2]``: x and y, 0..1 of the picture's width and height."""
        found = self.run(image)
        points = np.asarray(found[0], np.float64)
        if len(found) != 1 or points.size == 0 or points.size % 2:
            raise self.wrong(found, "one output of N x 2 numbers, x and y in 0..1")
        return points.reshape(-1, 2)

    def compare(
        self,
        reading: npt.NDArray[np.float64],
        original: npt.NDArray[np.float64],
        labels: Labels,
    ) -> list[float]:
        """How far each point is from where it is on the original."""
        distances: list[float] = np.hypot(*(reading - original).T).tolist()
        return distances

    def score(self, evidence: Sequence[list[float]]) -> Scores:
        """See :class:`NetTask`."""
        return {"points found": _share([d <= self.NEAR for points in evidence for d in points])}


def fitted(image: Picture, spec: NetSpec, size_hw: tuple[int, int]) -> Array:
    """A picture as a net takes it, float32 ``[1, 3, H, W]``."""
    small = (centre_crop if spec.fit == "crop" else resized)(image, *size_hw)
    return planes(small, mean=spec.mean, scale=spec.scale, is_bgr=spec.colour == "bgr")


def confusion(
    true: npt.NDArray[np.uint8], found: npt.NDArray[np.uint8], num_classes: int
) -> npt.NDArray[np.int64]:
    """Pixels of each true class (rows) that are found as each class; unlabelled ones are left out."""
    known = true != Segmentation.UNLABELLED
    pairs = num_classes * true[known].astype(np.int64) + found[known]
    counts = np.bincount(pairs, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes)


def mean_iou(counts: npt.NDArray[np.int64]) -> float | None:
    """Over the classes that are there; None if there is none."""
    right = np.diag(counts)
    there = counts.sum(axis=1) > 0
    union = counts.sum(axis=0) + counts.sum(axis=1) - right
    return float((right[there] / union[there]).mean()) if there.any() else None


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _gridded(found: Sequence[Array], net: TaskNet) -> tuple[Boxes, Array, Array]:
    """FastestDet's map ``[5 + classes, n, m]``: objectness, box relative to the cell, classes.

    The net has applied sigmoid to the objectness and softmax to the classes, not to the box.
    """
    grid = found[0]
    if len(found) != 1 or grid.ndim != 3 or len(grid) < 6:
        raise net.wrong(found, "one map [5 + classes, n, m]")
    height, width = grid.shape[1:]
    rows, columns = np.mgrid[:height, :width]
    values = grid.astype(np.float64)
    centre_x = (columns + np.tanh(values[1])) / width
    centre_y = (rows + np.tanh(values[2])) / height
    half_w, half_h = (1 / (1 + np.exp(-values[i])) / 2 for i in (3, 4))
    boxes = np.stack(
        [centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h], axis=-1
    )
    scores = values[0] ** 0.6 * values[5:].max(axis=0) ** 0.4  # as FastestDet weighs them
    return boxes.reshape(-1, 4), scores.ravel(), values[5:].argmax(axis=0).ravel()


def _listed(found: Sequence[Array], net: TaskNet) -> tuple[Boxes, Array, Array]:
    """Scores ``[N, 1 + classes]``, class 0 being nothing, and boxes ``[N, 4]`` as corners 0..1."""
    if len(found) != 2 or any(x.ndim != 2 for x in found) or found[1].shape[1] != 4:
        raise net.wrong(found, "scores [N, 1 + classes] and boxes [N, 4]")
    scores, boxes = (x.astype(np.float64) for x in found)
    return boxes, scores[:, 1:].max(axis=1), scores[:, 1:].argmax(axis=1)
