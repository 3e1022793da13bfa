"""Read many byte ranges of an object in few requests, and let Parquet read through them."""

import io
from collections.abc import Sequence
from typing import NamedTuple

from dicmh_ray.archive.store import Store

SCAN_GAP_BYTES = 64 * 2**10
"""Two ranges this close are read as one: bytes are cheaper than round trips to object storage."""

POINT_GAP_BYTES = 4
"""Only a length prefix apart: the next value of the same column."""

MAX_REQUEST_BYTES = 8 * 2**20
"""A merged request stays below this; a single larger range is still one request."""


class ByteRange(NamedTuple):
    """Part of an object."""

    start: int
    """First byte."""

    length: int
    """Bytes."""


def read_ranges(
    store: Store, name: str, ranges: Sequence[ByteRange], *, max_gap: int
) -> list[bytes]:
    """The bytes of each range, in the order given.

    Ranges no more than ``max_gap`` bytes apart share a request. Empty ranges cost nothing.

    Raises:
        FileNotFoundError: there is no such object.
        CorruptObjectError: the object ends before a range does.
    """
    found = [b""] * len(ranges)
    order = sorted((i for i, r in enumerate(ranges) if r.length), key=lambda i: ranges[i].start)
    group: list[int] = []
    start = stop = 0
    for i in [*order, None]:
        if i is not None and group:
            reach = max(stop, ranges[i].start + ranges[i].length)
            if ranges[i].start - stop <= max_gap and reach - start <= MAX_REQUEST_BYTES:
                group.append(i)
                stop = reach
                continue
        if group:
            data = store.get_range(name, start, stop - start)
            for j in group:
                at = ranges[j].start - start
                found[j] = data[at : at + ranges[j].length]
        if i is not None:
            group = [i]
            start, stop = ranges[i].start, ranges[i].start + ranges[i].length
    return found


class SparseFile(io.RawIOBase):
    """A stored object as a read-only file, of which some ranges are in memory already.

    Parquet reads column by column; handing it a file whose interesting ranges were fetched in
    one request keeps the number of requests ours to decide. Anything else is fetched when read.
    """

    def __init__(self, store: Store, name: str, num_bytes: int) -> None:
        super().__init__()
        self._store, self._name, self._num_bytes = store, name, num_bytes
        self._pos = 0
        self._held: list[tuple[int, bytes]] = []

    def hold(self, start: int, data: bytes) -> None:
        """Serve reads inside this range from memory."""
        self._held.append((start, data))

    def release(self) -> None:
        """Forget all held ranges."""
        self._held.clear()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._pos

    def size(self) -> int:
        """Length of the object in bytes."""
        return self._num_bytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._pos, io.SEEK_END: self._num_bytes}[whence]
        self._pos = origin + offset
        return self._pos

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._num_bytes - self._pos)
        length = left if size is None or size < 0 else min(size, left)
        start = self._pos
        self._pos += length
        for held_start, data in self._held:
            if held_start <= start and start + length <= held_start + len(data):
                return data[start - held_start : start - held_start + length]
        return self._store.get_range(self._name, start, length)
