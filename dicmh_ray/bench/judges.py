"""How different two pictures look to a net: feature distance, feature cosine, LPIPS.

The feature distance compares activations at a few depths: at each place of each tap the channels
are scaled to unit length, and the squared differences are summed over channels, averaged over
places and summed over taps. 0 is identical; 2 a tap is the most that non-negative activations
give. It is built as LPIPS is, without LPIPS's trained weights: never compare it with published
LPIPS figures. Pictures are seen at their own scale, in tiles of the size that the net takes.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dicmh_ray.errors import NetError
from dicmh_ray.vision.nets import NetSpec
from dicmh_ray.vision.onnx_net import Array, OnnxNet, Picture, planes

FREE_TILE_PX = 512
"""Largest side of a tile for nets that take any size: it bounds the memory of activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """Two pictures as one net sees them."""

    distance: float
    """0 is identical."""

    cosine: float
    """Of the deepest tap's activations, all places and channels as one vector; 1 is identical."""


Features = list[list[npt.NDArray[np.float32]]]
"""For each tile, for each tap ``[C, h, w]``."""


class FeatureJudge:
    """The feature distance of one net."""

    def __init__(self, spec: NetSpec) -> None:
        """Load the net. Raises NetError if it is not as described."""
        self.spec = spec
        self.net = OnnxNet(spec.file, spec.taps)
        self._tile_hw = self.net.input_hw

    def features(self, image: Picture) -> Features:
        """What the net makes of a uint8 ``[H, W, 3]`` picture."""
        return [self._activations(tile) for tile in tiles(image, self._tile_hw)]

    def compare(self, reference: Features, other: Features) -> Likeness:
        """Of two pictures of equal size."""
        distances, dots, norms_a, norms_b = [], 0.0, 0.0, 0.0
        for taps_a, taps_b in zip(reference, other, strict=True):
            pairs = list(zip(taps_a, taps_b, strict=True))
            distances.append(math.fsum(_unit_distance(a, b) for a, b in pairs))
            a, b = pairs[-1]
            dots += float(np.vdot(a, b))
            norms_a += float(np.vdot(a, a))
            norms_b += float(np.vdot(b, b))
        norm = math.sqrt(norms_a * norms_b)
        return Likeness(
            distance=math.fsum(distances) / len(distances),
            cosine=min(1.0, dots / norm) if norm else 1.0,
        )

    def _activations(self, tile: Picture) -> list[npt.NDArray[np.float32]]:
        spec = self.spec
        batch = planes(tile, mean=spec.mean, scale=spec.scale, is_bgr=spec.colour == "bgr")
        found = self.net(batch)
        for name in spec.taps:
            if found[name].ndim != 4:
                raise NetError(spec.name, f"tap {name} is {found[name].shape}, wanted [1, C, h, w]")
        return [found[name][0] for name in spec.taps]


class Lpips:
    """A user's LPIPS: an ONNX file with two inputs, float32 ``[1, 3, H, W]`` RGB in -1..1 of any
    H and W, and one number as its output."""

    def __init__(self, path: str | Path) -> None:
        """Load the file. Raises NetError if it does not have two inputs and one output."""
        self.net = OnnxNet(path)
        if len(self.net.inputs) != 2 or len(self.net.outputs) != 1:
            raise NetError(self.net.path.name, "wanted two inputs (RGB in -1..1) and one output")

    def compare(self, reference: Picture, other: Picture) -> float:
        """The distance of two uint8 ``[H, W, 3]`` pictures of equal size."""
        batches = (planes(image, mean=127.5, scale=127.5) for image in (reference, other))
        (value,) = self.net(*batches).values()
        if value.size != 1:
            raise NetError(self.net.path.name, f"gives {value.shape}, wanted one number")
        return float(value.item())


def tiles(image: Picture, tile_hw: tuple[int, int] | None) -> Iterator[Picture]:
    """Cover a picture with tiles at its own scale, evenly, overlapping where they must.

    Args:
        image: uint8 ``[H, W, 3]``; mirrored at its edges where it is smaller than a tile.
        tile_hw: size of every tile; None allows any size up to :data:`FREE_TILE_PX`.
    """
    height, width = tile_hw or (min(side, FREE_TILE_PX) for side in image.shape[:2])
    missing = [
        (0, max(0, want - have))
        for want, have in ((height, image.shape[0]), (width, image.shape[1]))
    ]
    if any(after for _, after in missing):
        image = np.pad(image, (*missing, (0, 0)), mode="symmetric")
    for top, left in itertools.product(
        _starts(image.shape[0], height), _starts(image.shape[1], width)
    ):
        yield image[top : top + height, left : left + width]


def _starts(length: int, tile: int) -> Sequence[int]:
    count = math.ceil(length / tile)
    return [0] if count == 1 else [i * (length - tile) // (count - 1) for i in range(count)]


def _unit_distance(a: Array, b: Array) -> float:
    """Mean over places of the squared difference of channel vectors of unit length."""
    difference = _unit(a) - _unit(b)
    return float(np.vdot(difference, difference)) / (a.shape[1] * a.shape[2])


def _unit(values: Array) -> Array:
    length = np.sqrt(np.einsum("chw,chw->hw", values, values))
    return np.asarray(values / np.maximum(length, np.float32(1e-8)))
