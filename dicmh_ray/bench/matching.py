"""A peer's files of one picture, and the search for the one that costs what ours does.

The rule: the best quality whose file is not larger than the given size. A file within
:data:`CLOSE_ENOUGH` below it ends the search early. A peer that cannot get that small gives its
smallest file, and the match says so: it then has more bytes than we do, never fewer.
"""

import math
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dicmh_ray.bench.peers import Peer

CLOSE_ENOUGH = 0.04
"""Of the wanted size: a file so little below it is a match. An AVIF encode takes seconds."""


@dataclass(frozen=True, kw_only=True)
class PeerFile:
    """What one peer made of a picture at one quality."""

    peer: Peer
    quality: int
    data: bytes
    encode_s: float

    @cached_property
    def decoded(self) -> tuple[npt.NDArray[np.uint8], float]:
        """The uint8 ``[H, W, 3]`` picture, and the seconds its decoding took."""
        start = time.perf_counter()
        return self.peer.decode(self.data), time.perf_counter() - start


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """A peer's file for a given number of bytes."""

    file: PeerFile

    is_over: bool
    """The peer cannot get that small; this is its smallest."""


class PeerFiles:
    """One picture in one peer's files; each quality is encoded once."""

    def __init__(self, peer: Peer, image: npt.NDArray[np.uint8]) -> None:
        self.peer = peer
        self._image = image
        self._files: dict[int, PeerFile] = {}

    @property
    def num_encoded(self) -> int:
        """How many qualities were encoded so far."""
        return len(self._files)

    def file(self, quality: int) -> PeerFile:
        """The picture at a quality."""
        if quality not in self._files:
            start = time.perf_counter()
            data = self.peer.encode(self._image, quality)
            self._files[quality] = PeerFile(
                peer=self.peer,
                quality=quality,
                data=data,
                encode_s=time.perf_counter() - start,
            )
        return self._files[quality]

    def match(self, num_bytes: int) -> Match:
        """The best file of at most so many bytes, or the smallest there is."""
        if num_bytes < 1:
            raise ValueError(f"num_bytes is {num_bytes}, wanted at least 1")
        under, over = -1, self.peer.best_quality + 1
        for quality, file in self._files.items():
            if len(file.data) <= num_bytes:
                under = max(under, quality)
            else:
                over = min(over, quality)
        while over - under > 1 and not self._is_close(under, num_bytes):
            quality = min(max(self._guess(num_bytes), under + 1), over - 1)
            if len(self.file(quality).data) <= num_bytes:
                under = quality
            else:
                over = quality
        return Match(file=self.file(max(under, 0)), is_over=under < 0)

    def _is_close(self, quality: int, num_bytes: int) -> bool:
        return quality >= 0 and len(self.file(quality).data) >= (1 - CLOSE_ENOUGH) * num_bytes

    def _guess(self, num_bytes: int) -> int:
        """Where the size should be, aiming at the middle of what is close enough.

        The picture's own files bend the typical curve: it is shifted by the nearest one, or, between
        two, leans from the one's shift to the other's.
        """
        qualities, rates = np.array(self.peer.typical).T
        wanted = math.log(num_bytes * (1 - CLOSE_ENOUGH / 2))
        known = sorted((math.log(len(file.data)), q) for q, file in self._files.items())
        if not known:
            return int(qualities[len(qualities) // 2 - 1])
        shifts = [size - float(np.interp(q, qualities, np.log(rates))) for size, q in known]
        shift = float(np.interp(wanted, [size for size, _ in known], shifts))
        return round(float(np.interp(wanted - shift, np.log(rates), qualities)))
