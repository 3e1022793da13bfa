"""Walk an archive in a fixed order: filtered, shuffled, shared among ranks, continued where it stopped.

    rows that match ─> row groups in order, or shuffled ─> a contiguous share for each rank
                    ─> blocks of row groups, rows shuffled inside a block ─> batches

The order is a function of the snapshot, the filter, the seed and the share alone: the same on every
machine, without any message between readers. Shares differ by at most one row, and together have
each row once.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dicmh_ray.archive import BLOBS, EncodedImage
from dicmh_ray.errors import ReadStateError
from dicmh_ray.reader.faults import OnError
from dicmh_ray.reader.index import Fragment, Numbers

if TYPE_CHECKING:
    from dicmh_ray.reader.archive_reader import ArchiveReader

BLOCK_BYTES = 64 * 2**20
"""Blob bytes that are read, and shuffled, together; one larger row group is a block of its own."""

BLOCK_ROWS = 20_000
"""The same in rows."""

STATE_FORMAT = 1


class FragmentRows(NamedTuple):
    """Some rows of one row group, in the order in which they are wanted."""

    fragment: Fragment
    """The row group."""

    rows: tuple[int, ...]
    """In the row group, from 0."""


class ReadOrder:
    """The rows that one reader of several walks, and how far it has come.

    A loop over it goes on from where the last one stopped. One loop at a time.
    """

    def __init__(
        self, reader: "ArchiveReader", rows: Numbers, edges: Numbers, identity: str
    ) -> None:
        self.rows = rows
        """int64 ``[n]``: number of each row in scan order, in the order of reading."""
        self.done = 0
        """How many of them were handed out, or left out as damaged."""
        self._reader = reader
        self._edges = edges
        self._identity = identity

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[EncodedImage]:
        for batch in self.batches(1):
            yield from batch

    @property
    def fragments(self) -> list[FragmentRows]:
        """The same order as runs of rows of one row group each."""
        return self._reader.fragment_rows(self.rows)

    def batches(
        self,
        batch_size: int,
        *,
        blobs: Iterable[str] = BLOBS,
        states: int | None = None,
        columns: Literal["all", "index"] = "all",
        on_error: OnError = "raise",
    ) -> Iterator[list[EncodedImage]]:
        """The rows that are left, ``batch_size`` at a time; the last batch may be smaller.

        While a block is consumed the next is read. :attr:`done` counts a batch when it is handed
        out. Arguments as :meth:`ArchiveReader.get_many`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, wanted 1 or more")
        batch: list[EncodedImage] = []
        for done, row in self.numbered(blobs, states, columns, on_error=on_error):
            batch.append(row)
            if len(batch) == batch_size:
                self.done = done
                yield batch
                batch = []
        self.done = len(self.rows)
        if batch:
            yield batch

    def numbered(
        self,
        blobs: Iterable[str] = BLOBS,
        states: int | None = None,
        columns: Literal["all", "index"] = "all",
        *,
        on_error: OnError = "raise",
        spare_originals: bool = False,
    ) -> Iterator[tuple[int, EncodedImage]]:
        """Rows that are left, each with what :attr:`done` is once it was handed out.

        It is for the caller to set :attr:`done`. Arguments as :meth:`ArchiveReader.read_rows`.
        """
        wanted = tuple(blobs)

        def read(start: int, stop: int) -> list[tuple[int, EncodedImage]]:
            found = self._reader.read_rows(
                self.rows[start:stop],
                wanted,
                states,
                columns,
                on_error=on_error,
                spare_originals=spare_originals,
            )
            return [(start + place + 1, row) for place, row in found]

        with ThreadPoolExecutor(1) as ahead:
            blocks = self._blocks_left()
            following = next(blocks, None)
            coming = None if following is None else ahead.submit(read, *following)
            while coming is not None:
                rows = coming.result()
                following = next(blocks, None)
                coming = None if following is None else ahead.submit(read, *following)
                yield from rows

    def state(self) -> dict[str, Any]:
        """Where the walk is, as JSON: for :meth:`resume` of an equal order."""
        return {"format": STATE_FORMAT, "order": self._identity, "done": self.done}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`.

        Raises:
            ReadStateError: it is of another snapshot, filter, seed or share, or no such state.
        """
        if state.get("format") != STATE_FORMAT:
            raise ReadStateError(f"its format is {state.get('format')!r}, not {STATE_FORMAT}")
        if state.get("order") != self._identity:
            raise ReadStateError("it is of another snapshot, filter, seed or share of an archive")
        done = state.get("done")
        if not isinstance(done, int) or not 0 <= done <= len(self.rows):
            raise ReadStateError(f"{done!r} of {len(self.rows)} rows are done")
        self.done = done

    def _blocks_left(self) -> Iterator[tuple[int, int]]:
        """Places (start, stop) of the blocks, from the first row that is left."""
        for start, stop in zip(self._edges.tolist(), self._edges[1:].tolist(), strict=False):
            if stop > self.done:
                yield max(start, self.done), stop


def arrange(
    rows: Numbers,
    groups: Numbers,
    group_bytes: Numbers,
    *,
    shuffle: int | None,
    rank: int,
    world: int,
) -> tuple[Numbers, Numbers]:
    """Order rows, take one rank's share, and cut it into blocks.

    Args:
        rows: int64 ``[n]``, ascending: what matches.
        groups: int64 ``[n]``: the row group of each.
        group_bytes: int64 ``[n]``: blob bytes of each row.
        shuffle: seed; None keeps the order.
        rank: which share, from 0.
        world: how many shares.

    Returns:
        The rows of the share, int64 ``[m]``, and the edges of its blocks, int64 ``[blocks + 1]``.
    """
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank is {rank} of {world}, wanted 0 or more and below it")
    if shuffle is not None:
        # All rows of a row group get one key: they stay together, and their order too, for now.
        order = np.argsort(scatter(groups, shuffle), kind="stable")
        rows, groups, group_bytes = rows[order], groups[order], group_bytes[order]
    start, stop = rank * len(rows) // world, (rank + 1) * len(rows) // world
    rows, groups, group_bytes = rows[start:stop], groups[start:stop], group_bytes[start:stop]
    edges = _block_edges(groups, group_bytes)
    if shuffle is not None:
        rows = rows.copy()
        for first, last in zip(edges.tolist(), edges[1:].tolist(), strict=False):
            block = rows[first:last]
            rows[first:last] = block[np.argsort(scatter(block, ~shuffle), kind="stable")]
    return rows, edges


def scatter(numbers: Numbers, seed: int) -> npt.NDArray[np.uint64]:
    """uint64 ``[n]``: numbers that look random, one to one, the same on every machine and release.

    SplitMix64's finaliser of ``number + hash(seed)``; numpy's own generators may change.
    """
    digest = hashlib.sha256(str(seed).encode()).digest()
    x = numbers.astype(np.uint64) + np.uint64(int.from_bytes(digest[:8], "little"))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _block_edges(groups: Numbers, row_bytes: Numbers) -> Numbers:
    """Cut at borders of row groups, so that no block is larger than it may, if it can be helped."""
    if not len(groups):
        return np.zeros(1, np.int64)
    borders = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    total = np.concatenate([[0], np.cumsum(row_bytes)])
    edges = [0]
    for border, following in zip(borders[1:], [*borders[2:], None], strict=True):
        if following is None or (
            total[following] - total[edges[-1]] > BLOCK_BYTES or following - edges[-1] > BLOCK_ROWS
        ):
            edges.append(border)
    return np.array(edges, np.int64)
