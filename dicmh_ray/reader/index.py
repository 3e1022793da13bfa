"""The row index of a snapshot: every row's facts and places, column by column.

Rows have a number: their place in scan order, from 0. Row groups are runs of it, known from the
commits alone; the index objects are read when the first fact of a row is asked for, and a column
of them is decoded when it is first needed.
"""

import bisect
import hashlib
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dicmh_ray.archive import ARROW_SCHEMA, BLOBS, Commit, PartFacts, Snapshot
from dicmh_ray.archive.part import INDEX_SCHEMA, index_part
from dicmh_ray.archive.ranges import ByteRange
from dicmh_ray.errors import CorruptObjectError, RowNotFoundError
from dicmh_ray.reader.faults import FaultSink, ReadFault
from dicmh_ray.reader.fetch import Fetcher

logger = logging.getLogger(__name__)

INDEX_FACTS = frozenset(INDEX_SCHEMA.names) & frozenset(ARROW_SCHEMA.names)
"""Columns of a row that the index has: they cost no request to a part."""

_SCANS_BEFORE_SORTING = 32
_DECODERS = 2
_PARALLEL_REQUESTS = 16

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """One row group of one part: what a parallel scan hands to a worker."""

    unit: str
    """Unit the rows belong to; units of two jobs may share a name."""

    part: str
    """Object that holds them."""

    row_group: int
    """In the part, from 0."""

    num_rows: int
    """Rows, before any filter."""

    num_bytes: int
    """Bytes of its blobs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """A run of rows that lie together."""

    unit: str
    """Unit they belong to."""

    facts: PartFacts
    """Part that holds them."""

    number: int
    """Row group in the part, from 0."""

    start: int
    """Number of the first row."""

    num_rows: int
    """Rows."""


class IndexedUnit(NamedTuple):
    """A unit whose index is at hand."""

    unit: str
    """Name."""

    parts: tuple[PartFacts, ...]
    """Parts that are indexed: all of them, but for damage that was skipped."""

    source: "pq.ParquetFile | pa.Table"
    """The index, undecoded as it was stored, or as it was made again."""


class RowIndex:
    """Facts and places of all rows. Thread-safe."""

    def __init__(self, units: Sequence[IndexedUnit]) -> None:
        self.groups: list[RowGroup] = []
        """All row groups in scan order."""
        self._sources = [unit.source for unit in units]
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._lock = threading.RLock()
        self._sorted: Numbers | None = None
        self._scans = 0
        start = 0
        for unit in units:
            for part in unit.parts:
                for number, facts in enumerate(part.row_groups):
                    group = RowGroup(
                        unit=unit.unit,
                        facts=part,
                        number=number,
                        start=start,
                        num_rows=facts.num_rows,
                    )
                    self.groups.append(group)
                    start += facts.num_rows
        self.num_rows = start
        """Rows of all units."""
        self._starts: Numbers = np.array([*(g.start for g in self.groups), start], np.int64)
        self._numbers = {(g.facts.name, g.number): i for i, g in enumerate(self.groups)}

    def group_number(self, part: str, row_group: int) -> int:
        """Which row group this is.

        Raises:
            CorruptObjectError: none of this snapshot.
        """
        number = self._numbers.get((part, row_group))
        if number is None:
            raise CorruptObjectError(part, f"row group {row_group} is not indexed")
        return number

    def groups_of(self, rows: Numbers) -> Numbers:
        """Row group of each row, int64."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Some columns of :data:`~dicmh_ray.archive.part.INDEX_SCHEMA`, all rows."""
        with self._lock:
            missing = [name for name in columns if name not in self._columns]
            if missing:
                with ThreadPoolExecutor(_DECODERS) as pool:
                    tables = list(pool.map(lambda s: _decoded(s, missing), self._sources))
                whole = pa.concat_tables([INDEX_SCHEMA.empty_table().select(missing), *tables])
                for name in missing:
                    self._columns[name] = whole[name]
            fields = [INDEX_SCHEMA.field(name) for name in columns]
            return pa.table([self._columns[name] for name in columns], schema=pa.schema(fields))

    def fragments(self) -> list[Fragment]:
        """The row groups, with the bytes of their blobs."""
        lengths = self.table([f"{blob}_length" for blob in BLOBS])
        total = np.zeros(self.num_rows, np.int64)
        for column in lengths.columns:
            total += column.to_numpy()
        sums = np.diff(np.concatenate([[0], np.cumsum(total)])[self._starts])
        return [
            Fragment(
                unit=group.unit,
                part=group.facts.name,
                row_group=group.number,
                num_rows=group.num_rows,
                num_bytes=int(num_bytes),
            )
            for group, num_bytes in zip(self.groups, sums, strict=True)
        ]

    def find(self, keys: Sequence[str]) -> list[int]:
        """Number of the row of each key; of two rows with one key, the first.

        A few keys are looked for in one pass over all; who asks often gets a binary search.

        Raises:
            RowNotFoundError: no row has a key.
        """
        column = self.table(["key"])["key"]
        with self._lock:
            self._scans += 1
            if self._sorted is None and self._scans > _SCANS_BEFORE_SORTING:
                # Arrow's sort is stable and by UTF-8 bytes, the order of Python's strings.
                self._sorted = pc.sort_indices(column).to_numpy()
        if self._sorted is not None:
            return [_bisected(column, self._sorted, key) for key in keys]
        wanted = pa.array(list(dict.fromkeys(keys)), pa.string())
        rows = np.flatnonzero(pc.is_in(column, value_set=wanted).to_numpy())
        numbers: dict[str, int] = {}
        for row, key in zip(rows.tolist(), column.take(rows).to_pylist(), strict=True):
            numbers.setdefault(key, row)
        for key in keys:
            if key not in numbers:
                raise RowNotFoundError(key)
        return [numbers[key] for key in keys]


def load_index(snapshot: Snapshot, fetcher: Fetcher, sink: FaultSink) -> RowIndex:
    """Read the index of every unit: in one request where the version has its joined index.

    A unit whose index is missing or damaged is indexed again from its parts, read whole. Parts
    that are damaged too are told to ``sink``; if it returns, the index is without their rows.
    """
    commits = snapshot.commits
    found: list[bytes | None] = [None] * len(commits)
    if snapshot.manifest is not None and len(commits) > 1:
        found = _joined(snapshot, fetcher)
    missing = [i for i, data in enumerate(found) if data is None]
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        read = pool.map(lambda i: _single(commits[i], fetcher), missing)
        for i, data in zip(missing, read, strict=True):
            found[i] = data
    units = []
    for commit, data in zip(commits, found, strict=True):
        unit = None if data is None else _opened(commit, data)
        units.append(unit or _made_again(commit, fetcher, sink))
    return RowIndex(units)


def _joined(snapshot: Snapshot, fetcher: Fetcher) -> list[bytes | None]:
    """The indexes out of the version's joined one; None for each that is not as committed."""
    if snapshot.manifest is None:
        return [None] * len(snapshot.commits)
    stops = np.cumsum([commit.index.num_bytes for commit in snapshot.commits]).tolist()
    ranges = [
        ByteRange(stop - commit.index.num_bytes, commit.index.num_bytes)
        for commit, stop in zip(snapshot.commits, stops, strict=True)
    ]
    name = snapshot.manifest.joined_index
    try:
        values = fetcher.ranges(name, ranges, max_gap=0).values
    except (FileNotFoundError, CorruptObjectError):
        # Written by an older program, or damaged: every unit has its own, too.
        return [None] * len(snapshot.commits)
    return [
        data if hashlib.sha256(data).hexdigest() == commit.index.sha256 else None
        for commit, data in zip(snapshot.commits, values, strict=True)
    ]


def _single(commit: Commit, fetcher: Fetcher) -> bytes | None:
    try:
        return fetcher.whole(commit.index)
    except CorruptObjectError as exc:
        logger.warning("%s; reading the parts of unit %s instead", exc, commit.unit)
        return None


def _opened(commit: Commit, data: bytes) -> IndexedUnit | None:
    """A stored index, if it is one of this version and has a row for each row of the parts."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        schema = file.schema_arrow
    except (OSError, pa.ArrowException) as exc:
        logger.warning("%s: not a readable index: %s", commit.index.name, exc)
        return None
    num_rows = sum(part.num_rows for part in commit.parts)
    if not schema.equals(INDEX_SCHEMA) or file.metadata.num_rows != num_rows:
        logger.warning("%s: not an index of its unit", commit.index.name)
        return None
    return IndexedUnit(commit.unit, commit.parts, file)


def _made_again(commit: Commit, fetcher: Fetcher, sink: FaultSink) -> IndexedUnit:
    parts, tables = [], [INDEX_SCHEMA.empty_table()]
    for part in commit.parts:
        try:
            table = index_part(part.name, fetcher.whole(part))
        except CorruptObjectError as exc:
            sink(exc, ReadFault.of_object(exc))
            continue
        parts.append(part)
        tables.append(table)
    return IndexedUnit(commit.unit, tuple(parts), pa.concat_tables(tables))


def _decoded(source: "pq.ParquetFile | pa.Table", columns: Sequence[str]) -> pa.Table:
    if isinstance(source, pa.Table):
        return source.select(list(columns))
    return source.read(columns=list(columns), use_threads=False).select(list(columns))


def _bisected(column: pa.ChunkedArray, order: Numbers, key: str) -> int:
    at = bisect.bisect_left(order, key, key=lambda row: column[int(row)].as_py())
    if at < len(order):
        row = int(order[at])
        if column[row].as_py() == key:
            return row
    raise RowNotFoundError(key)
