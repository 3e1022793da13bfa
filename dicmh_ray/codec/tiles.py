"""How a large picture is cut: symbols into tiles that are coded alone, work into windows that overlap.

Both are counted in the cells of one grid, the codec's coarsest.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dicmh_ray.errors import SymbolError


class Window(NamedTuple):
    """A stretch of cells on one axis, with and without its margin."""

    start: int
    stop: int
    outer_start: int
    outer_stop: int

    def inner(self, scale: int = 1) -> slice:
        """The window within its margin, on a grid ``scale`` times as fine."""
        return slice(
            (self.start - self.outer_start) * scale, (self.stop - self.outer_start) * scale
        )

    def outer(self, scale: int = 1) -> slice:
        """The window with its margin, in the whole."""
        return slice(self.outer_start * scale, self.outer_stop * scale)

    def whole(self, scale: int = 1) -> slice:
        """The window, in the whole."""
        return slice(self.start * scale, self.stop * scale)


def windows(cells: int, *, size: int, margin: int) -> list[Window]:
    """Windows of at most ``size`` cells that cover an axis; margins end at its ends."""
    return [
        Window(
            start,
            min(start + size, cells),
            max(start - margin, 0),
            min(start + size + margin, cells),
        )
        for start in range(0, cells, size)
    ]


def tiles(shape: Sequence[int], *, size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile, row by row."""
    rows, columns = shape
    for top in range(0, rows, size):
        for left in range(0, columns, size):
            yield slice(top, min(top + size, rows)), slice(left, min(left + size, columns))


def join_tiles(payloads: Sequence[bytes]) -> bytes:
    """One payload: the lengths of all tiles but the last, u32 little-endian, then the tiles."""
    lengths = b"".join(len(payload).to_bytes(4, "little") for payload in payloads[:-1])
    return lengths + b"".join(payloads)


def split_tiles(payload: bytes, count: int, section: str) -> list[bytes]:
    """The inverse of :func:`join_tiles` for a known number of tiles.

    Raises:
        SymbolError: the lengths do not fit into the payload; ``section`` names it.
    """
    table = 4 * (count - 1)
    if len(payload) < table:
        raise SymbolError(section, f"{len(payload)} bytes do not hold {count} tiles")
    lengths = np.frombuffer(payload, "<u4", count - 1).astype(np.int64).tolist()
    edges = [table]
    for length in lengths:
        edges.append(edges[-1] + length)
    if edges[-1] > len(payload):
        raise SymbolError(section, f"its tiles need more than {len(payload)} bytes")
    edges.append(len(payload))
    return [payload[start:stop] for start, stop in itertools.pairwise(edges)]
