"""The codecs everyone has, through Pillow, at their good settings rather than their defaults."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, features


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One codec of Pillow, with its quality sweep."""

    name: str
    """As reports show it."""

    format: str
    """Pillow's name of the format."""

    feature: str
    """Pillow's name of the library, to find out whether this build has it."""

    qualities: tuple[int, ...]
    """Arguments of ``quality``, ascending."""

    variants: tuple[Mapping[str, Any], ...]
    """Other arguments of ``save``. With several, all are tried and the smallest file counts; the
    encode time is then that of all of them."""

    def encode(self, image: npt.NDArray[np.uint8], quality: int) -> bytes:
        """The file of a uint8 ``[H, W, 3]`` picture at one quality."""
        picture = Image.fromarray(image)
        files = []
        for arguments in self.variants:
            file = io.BytesIO()
            picture.save(file, self.format, quality=quality, **arguments)
            files.append(file.getvalue())
        return min(files, key=len)

    def decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        """The uint8 ``[H, W, 3]`` picture of a file written by ``encode``."""
        with Image.open(io.BytesIO(data), formats=[self.format]) as picture:
            return np.asarray(picture.convert("RGB"))


PEERS = (
    Peer(
        name="JPEG",
        format="JPEG",
        feature="jpg",
        qualities=(3, 5, 8, 12, 18, 25, 35, 45, 55, 65, 75, 85, 92),
        variants=(
            {"optimize": True, "subsampling": "4:2:0"},
            {"optimize": True, "subsampling": "4:2:0", "progressive": True},
        ),
    ),
    Peer(
        name="WebP",
        format="WEBP",
        feature="webp",
        qualities=(0, 3, 8, 15, 25, 40, 55, 70, 80, 88, 94),
        variants=({"method": 6},),
    ),
    Peer(
        name="AVIF",
        format="AVIF",
        feature="avif",
        qualities=(5, 14, 24, 36, 48, 60, 74),
        variants=({"speed": 4, "subsampling": "4:2:0", "max_threads": 1},),
    ),
)
"""Optimised Huffman tables, the smaller of baseline and progressive JPEG; WebP's slowest search;
AVIF at a speed an archive would choose, on one thread so that seconds compare."""


def available_peers() -> tuple[Peer, ...]:
    """Those of ``PEERS`` that this build of Pillow can write."""
    return tuple(peer for peer in PEERS if features.check(peer.feature))
