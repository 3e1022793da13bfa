"""The codecs everyone has, through Pillow, at their good settings rather than their defaults."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from dicmh_ray.errors import EncodeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One codec of Pillow, with its quality sweep."""

    name: str
    """As reports show it."""

    format: str
    """Pillow's name of the format."""

    feature: str | None
    """Pillow's name of the library, to find out whether this build has it; None for a plugin."""

    qualities: tuple[int, ...]
    """Arguments of ``quality`` for a curve, ascending."""

    best_quality: int
    """The largest argument that means anything."""

    typical: Sequence[tuple[int, float]]
    """Quality and bits per pixel of an ordinary photograph, ascending. Only a search for a size
    starts from it, so it may be wrong without harm."""

    variants: tuple[Mapping[str, Any], ...]
    """Other arguments of ``save``. With several, all are tried and the smallest file counts; the
    encode time is then that of all of them."""

    def encode(self, image: npt.NDArray[np.uint8], quality: int) -> bytes:
        """The file of a uint8 ``[H, W, 3]`` picture at one quality.

        Raises:
            EncodeError: the format does not hold such a picture, WebP none wider than 16383 pixels.
        """
        picture = Image.fromarray(image)
        files = []
        for arguments in self.variants:
            file = io.BytesIO()
            try:
                picture.save(file, self.format, quality=quality, **arguments)
            except (OSError, ValueError) as exc:
                raise EncodeError(f"{self.name}: {exc}") from exc
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
        qualities=(3, 7, 14, 28, 50, 75, 90),
        best_quality=95,
        typical=((1, 0.08), (5, 0.14), (12, 0.3), (25, 0.53), (45, 0.8), (65, 1.08), (92, 2.43)),
        variants=(
            {"optimize": True, "subsampling": "4:2:0"},
            {"optimize": True, "subsampling": "4:2:0", "progressive": True},
        ),
    ),
    Peer(
        name="WebP",
        format="WEBP",
        feature="webp",
        qualities=(0, 4, 15, 40, 70, 88),
        best_quality=100,
        typical=((0, 0.10), (3, 0.19), (15, 0.33), (40, 0.58), (70, 0.88), (88, 1.7), (100, 4.0)),
        variants=({"method": 6},),
    ),
    Peer(
        name="AVIF",
        format="AVIF",
        feature="avif",
        qualities=(5, 18, 32, 46, 62),
        best_quality=100,
        typical=((0, 0.06), (5, 0.073), (14, 0.123), (24, 0.19), (36, 0.31), (48, 0.53), (74, 1.4)),
        variants=({"speed": 4, "subsampling": "4:2:0", "max_threads": 1},),
    ),
    Peer(
        name="JPEG XL",
        format="JXL",
        feature=None,
        qualities=(0, 10, 35, 65, 86),
        best_quality=100,
        typical=((0, 0.15), (5, 0.19), (30, 0.39), (60, 0.65), (76, 0.95), (90, 1.8), (100, 5.0)),
        variants=({"effort": 7, "num_threads": 1},),
    ),
)
"""Optimised Huffman tables, the smaller of baseline and progressive JPEG; WebP's slowest search;
AVIF at a speed an archive would choose and JPEG XL at libjxl's own default effort, both on one
thread so that seconds compare. The sweeps reach from the smallest file to beyond 1 bit per pixel,
with few points: an AVIF encode takes seconds."""


def available_peers() -> tuple[Peer, ...]:
    """Those of ``PEERS`` that this Pillow, with the plugins of the ``bench`` extra, can write."""
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401  (it registers itself with Pillow)
    Image.init()
    return tuple(
        peer
        for peer in PEERS
        if (features.check(peer.feature) if peer.feature else peer.format in Image.SAVE)
    )
