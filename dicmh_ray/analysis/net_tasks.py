"""Tasks of ONNX nets: what they see on pictures, one row a picture, things in it as lists.

A net travels to workers as its bytes, so only the driver needs its file.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from dicmh_ray.analysis.task import PICTURES, Batch, Task
from dicmh_ray.errors import NetError
from dicmh_ray.vision import Detections, NetSpec, OnnxNet, Picture, load_task
from dicmh_ray.vision.tasks import (
    Classification,
    Detection,
    Faces,
    Landmarks,
    Segmentation,
    fitted,
)

_Kind = TypeVar("_Kind", Classification, Detection, Faces, Landmarks, Segmentation)

FLOATS, INTS = pa.list_(pa.float32()), pa.list_(pa.int32())
BOXES = pa.list_(pa.list_(pa.float32(), 4))
"""Left, top, right, bottom, each 0..1 of the picture's width or height."""

POINTS = pa.list_(pa.list_(pa.float32(), 2))
"""x and y, each 0..1 of the picture's width or height."""


class PictureNetTask(Task):
    """A net on pictures."""

    wanted: ClassVar[str]
    """What the net must be described for; empty is anything."""

    def __init__(
        self,
        spec: NetSpec,
        data: bytes,
        *,
        names: Sequence[str] = (),
        view: str = "machine",
        states: int | None = None,
    ) -> None:
        """
        Args:
            spec: description of the net.
            data: its file.
            names: of its classes, in order; none leaves names out.
            view: ``"machine"`` or ``"thumbnail"``.
            states: of the pictures; None is all.

        Raises:
            NetError: the net is for something else.
            ValueError: there are no such pictures.
        """
        if view not in PICTURES:
            raise ValueError(f"view is {view!r}, wanted one of {', '.join(PICTURES)}")
        if self.wanted and spec.task != self.wanted:
            raise NetError(spec.name, f"is for {spec.task}, wanted {self.wanted}")
        self.spec, self.data, self.names = spec, data, tuple(names)
        self.reads, self.states = view, states

    def parameters(self) -> Mapping[str, Any]:
        """The net's digest, how pictures become its input, and the names."""
        how = asdict(self.spec)
        for field in ("name", "file", "same_as_sha256", "taps", "label_values"):
            del how[field]
        return {
            "net_sha256": hashlib.sha256(self.data).hexdigest(),
            "net": how,
            "names_sha256": hashlib.sha256("\n".join(self.names).encode()).hexdigest(),
        }

    def name_of(self, index: int) -> str | None:
        """Of a class; None where it has none."""
        return self.names[index] if index < len(self.names) else None

    def _load(self, kind: type[_Kind]) -> _Kind:
        net = load_task(self.spec, self.data)
        if not isinstance(net, kind):
            raise NetError(self.spec.name, f"is for {self.spec.task}, wanted {self.wanted}")
        if self.names and (count := net.num_classes()) != len(self.names):
            raise NetError(
                self.spec.name, f"has {count} classes, there are {len(self.names)} names"
            )
        return net


class Classify(PictureNetTask):
    """The most probable classes of a picture, by softmax."""

    name = "classify"
    wanted = "classification"
    schema = pa.schema(
        [
            ("class", pa.int32()),
            ("label", pa.string()),
            ("score", pa.float32()),
            ("top_classes", INTS),
            ("top_labels", pa.list_(pa.string())),
            ("top_scores", FLOATS),
        ]
    )

    def __init__(self, spec: NetSpec, data: bytes, *, top_k: int = 5, **options: Any) -> None:
        """As :class:`PictureNetTask`, and how many classes of each picture are kept."""
        super().__init__(spec, data, **options)
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, wanted 1 or more")
        self.top_k = top_k

    def parameters(self) -> Mapping[str, Any]:
        """Those of the net, and how many classes."""
        return {**super().parameters(), "top_k": self.top_k}

    def setup(self) -> None:
        """Load the net."""
        self._net = self._load(Classification)

    def __call__(self, batch: Batch) -> pa.Table:
        """See :class:`Task`."""
        found = [self._top(self._net.logits(picture)) for picture in batch.values]
        columns: dict[str, Iterable[Any]] = {
            "class": [classes[0] for classes, _ in found],
            "label": [self.name_of(classes[0]) for classes, _ in found],
            "score": [scores[0] for _, scores in found],
            "top_classes": [classes for classes, _ in found],
            "top_labels": [[self.name_of(c) for c in classes] for classes, _ in found],
            "top_scores": [scores for _, scores in found],
        }
        return batch.table(**columns)

    def _top(self, logits: npt.NDArray[Any]) -> tuple[list[int], list[float]]:
        odds = np.exp(logits.astype(np.float64) - logits.max())
        order = np.argsort(-odds, kind="stable")[: self.top_k]
        return order.tolist(), (odds[order] / odds.sum()).tolist()


class Detect(PictureNetTask):
    """The things in a picture, most certain first."""

    name = "detect"
    wanted = "detection"
    schema = pa.schema(
        [
            ("count", pa.int32()),
            ("boxes", BOXES),
            ("scores", FLOATS),
            ("classes", INTS),
            ("labels", pa.list_(pa.string())),
        ]
    )

    def __init__(
        self, spec: NetSpec, data: bytes, *, min_score: float = 0.35, **options: Any
    ) -> None:
        """As :class:`PictureNetTask`, and the score from which a thing is kept, 0..1."""
        super().__init__(spec, data, **options)
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score is {min_score}, wanted 0 to 1")
        self.min_score = min_score

    def parameters(self) -> Mapping[str, Any]:
        """Those of the net, and the least score."""
        return {**super().parameters(), "min_score": self.min_score}

    def setup(self) -> None:
        """Load the net."""
        self._net: Detection | Faces = self._load(Detection)

    def __call__(self, batch: Batch) -> pa.Table:
        """See :class:`Task`."""
        found = [_above(self._net.read(picture), self.min_score) for picture in batch.values]
        classes = [one.classes.tolist() for one in found]
        return batch.table(
            count=[len(one) for one in classes],
            boxes=[one.boxes.tolist() for one in found],
            scores=[one.scores.tolist() for one in found],
            classes=classes,
            labels=[[self.name_of(c) for c in one] for one in classes],
        )


class FindFaces(Detect):
    """The faces in a picture, most certain first."""

    name = "faces"
    wanted = "faces"

    def __init__(
        self, spec: NetSpec, data: bytes, *, min_score: float = Faces.SURE_SCORE, **options: Any
    ) -> None:
        """As :class:`Detect`; below 0.7 nothing is found whatever the least score."""
        super().__init__(spec, data, min_score=min_score, **options)

    def setup(self) -> None:
        """Load the net."""
        self._net = self._load(Faces)


class FindLandmarks(PictureNetTask):
    """Points on a picture, in the order of the net."""

    name = "landmarks"
    wanted = "landmarks"
    schema = pa.schema([("points", POINTS)])

    def setup(self) -> None:
        """Load the net."""
        self._net = self._load(Landmarks)

    def __call__(self, batch: Batch) -> pa.Table:
        """See :class:`Task`."""
        return batch.table(points=[self._net.read(picture).tolist() for picture in batch.values])


class Segment(PictureNetTask):
    """Which classes a picture shows on how much of it, and where, on the net's own grid."""

    name = "segment"
    wanted = "segmentation"
    schema = pa.schema(
        [
            ("classes", INTS),
            ("labels", pa.list_(pa.string())),
            ("shares", FLOATS),
            pa.field("mask", pa.binary(), metadata={"doc": "8-bit PNG: the class of each cell"}),
        ]
    )

    def setup(self) -> None:
        """Load the net."""
        self._net = self._load(Segmentation)

    def __call__(self, batch: Batch) -> pa.Table:
        """See :class:`Task`."""
        masks = [self._net.coarse(picture).classes for picture in batch.values]
        counts = [np.bincount(mask.ravel(), minlength=256) for mask in masks]
        order = [np.argsort(-one, kind="stable")[: np.count_nonzero(one)] for one in counts]
        return batch.table(
            classes=[one.tolist() for one in order],
            labels=[[self.name_of(int(c)) for c in one] for one in order],
            shares=[(n[one] / n.sum()).tolist() for n, one in zip(counts, order, strict=True)],
            mask=[_png(mask) for mask in masks],
        )


class EmbedPicture(PictureNetTask):
    """A vector of a picture from inside a net: a tensor, averaged over places, of unit length."""

    name = "embed"
    wanted = ""
    schema = pa.schema([("embedding", FLOATS)])

    def __init__(self, spec: NetSpec, data: bytes, *, tap: str, **options: Any) -> None:
        """As :class:`PictureNetTask`, and the name of the tensor, ``[1, C]`` or ``[1, C, h, w]``."""
        super().__init__(spec, data, **options)
        self.tap = tap

    def parameters(self) -> Mapping[str, Any]:
        """Those of the net, and the tensor."""
        return {**super().parameters(), "tap": self.tap}

    def setup(self) -> None:
        """Load the net. Raises NetError if it has no such tensor, or takes pictures of any size."""
        self._onnx = OnnxNet(self.spec.file, (self.tap,), self.data)
        size = self._onnx.input_hw
        if size is None:
            raise NetError(self.spec.name, "takes any size: a task needs a fixed one")
        self._size_hw = size

    def __call__(self, batch: Batch) -> pa.Table:
        """See :class:`Task`."""
        return batch.table(embedding=[self.vector(picture).tolist() for picture in batch.values])

    def vector(self, picture: Picture) -> npt.NDArray[np.float32]:
        """Of one uint8 ``[H, W, 3]`` picture, float32 ``[C]``."""
        found = self._onnx(fitted(picture, self.spec, self._size_hw))[self.tap][0]
        if found.ndim not in (1, 3):
            raise NetError(self.spec.name, f"{self.tap} is {found.shape}, wanted [C] or [C, h, w]")
        vector = found.reshape(len(found), -1).mean(axis=1, dtype=np.float32)
        return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)


def _above(found: Detections, score: float) -> Detections:
    sure = found.scores >= score
    return Detections(
        boxes=found.boxes[sure], scores=found.scores[sure], classes=found.classes[sure]
    )


def _png(mask: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()
