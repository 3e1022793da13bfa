"""Training photographs, decoded once, and the crops that training draws from them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dicmh_ray.codec.patterns import lay_pattern
from dicmh_ray.errors import SourceFormatError

JPEG_SHARE = 0.2
"""Share of the codec's crops that were JPEGs first, with chroma at half size, as most pictures of an
archive were."""

JPEG_QUALITIES = (75, 95)
"""Least and greatest quality of those."""

PATTERN_SHARE = 0.12
"""Share of the codec's crops with a drawn pattern: fine regular textures, letters."""


class PackedPhotographs:
    """Training photographs, decoded once, in one memory-mapped file beside its index.

    ``photographs.bin`` holds the uint8 RGB samples one picture after the other;
    ``photographs.json`` the list of ``[offset, height, width, tags]``. Raises SourceFormatError when
    they are cut short, as a crash of the machine can leave them.
    """

    def __init__(self, folder: Path) -> None:
        try:
            index = json.loads((folder / "photographs.json").read_text())
            self.samples: npt.NDArray[np.uint8] = np.memmap(
                folder / "photographs.bin", dtype=np.uint8, mode="r"
            )
        except ValueError as exc:
            raise SourceFormatError(str(folder), f"a damaged pack, delete it: {exc}") from exc
        self.entries = [(int(o), int(h), int(w)) for o, h, w, *_ in index]
        if max((o + 3 * h * w for o, h, w in self.entries), default=0) > self.samples.size:
            raise SourceFormatError(str(folder), "a damaged pack, delete it: samples are missing")
        self.tags: list[tuple[str, ...]] = [
            tuple(tags[0]) if tags else () for _, _, _, *tags in index
        ]

    def picture(self, i: int) -> npt.NDArray[np.uint8]:
        """Picture i, uint8 ``[H, W, 3]``."""
        offset, height, width = self.entries[i]
        return self.samples[offset : offset + height * width * 3].reshape(height, width, 3)

    def crops(
        self,
        count: int,
        size: int,
        rng: np.random.Generator,
        *,
        patterns: float = 0.0,
        jpegs: float = 0.0,
    ) -> Tensor:
        """Random crops, flipped and turned, uint8 ``[count, 3, size, size]``.

        A picture is drawn in proportion to its area; every third crop is a larger region halved,
        so that the network also sees the sharper detail of smaller pictures. A share of
        ``patterns`` has a drawn pattern laid over it (:func:`lay_pattern`), and a share of ``jpegs``
        is what a JPEG leaves of the crop (:data:`JPEG_QUALITIES`).
        """
        return self._cut(self._draw(count, size, rng), size, rng, patterns=patterns, jpegs=jpegs)

    def labelled_crops(
        self, count: int, size: int, rng: np.random.Generator, words: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`crops`, and which of the words each picture is tagged with, ``[count, words]``."""
        drawn = self._draw(count, size, rng)
        present = [[float(word in self.tags[i]) for word in words] for i in drawn]
        return self._cut(drawn, size, rng), torch.tensor(present).reshape(count, len(words))

    def tagged_crops(
        self, count: int, size: int, rng: np.random.Generator
    ) -> tuple[Tensor, list[tuple[str, ...]]]:
        """As :meth:`crops`, and the tags of the picture that each is from."""
        drawn = self._draw(count, size, rng)
        return self._cut(drawn, size, rng), [self.tags[i] for i in drawn]

    def require(self, size: int) -> None:
        """Raises SourceFormatError when no picture is large enough for crops of ``size`` pixels."""
        largest = max((min(h, w) for _, h, w in self.entries), default=0)
        if largest < size:
            raise SourceFormatError(
                "photographs", f"the largest short side is {largest} pixels, wanted {size} or more"
            )

    def _draw(self, count: int, size: int, rng: np.random.Generator) -> list[int]:
        areas = np.array([h * w for _, h, w in self.entries], np.float64)
        areas *= [min(h, w) >= size for _, h, w in self.entries]
        return [int(i) for i in rng.choice(len(areas), size=count, p=areas / areas.sum())]

    def _cut(
        self,
        drawn: Sequence[int],
        size: int,
        rng: np.random.Generator,
        *,
        patterns: float = 0.0,
        jpegs: float = 0.0,
    ) -> Tensor:
        out = np.empty((len(drawn), size, size, 3), np.uint8)
        for n, i in enumerate(drawn):
            picture = self.picture(i)
            factor = 2 if n % 3 == 2 and min(picture.shape[:2]) >= 2 * size else 1
            span = size * factor
            top = int(rng.integers(picture.shape[0] - span + 1))
            left = int(rng.integers(picture.shape[1] - span + 1))
            crop = picture[top : top + span, left : left + span]
            if factor == 2:
                wide = crop.astype(np.uint16)
                rows = wide[::2] + wide[1::2]
                crop = ((rows[:, ::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)
            if rng.random() < patterns:
                crop = lay_pattern(crop, rng)
            if rng.random() < jpegs:
                crop = _through_jpeg(crop, quality=int(rng.integers(*JPEG_QUALITIES)))
            crop = crop[:, :: 1 if rng.random() < 0.5 else -1]
            out[n] = np.rot90(crop) if rng.random() < 0.25 else crop
        return torch.from_numpy(out).permute(0, 3, 1, 2)


def _through_jpeg(crop: npt.NDArray[np.uint8], *, quality: int) -> npt.NDArray[np.uint8]:
    """A crop as a JPEG with chroma at half size gives it back."""
    coded = io.BytesIO()
    Image.fromarray(crop).save(coded, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(coded))
