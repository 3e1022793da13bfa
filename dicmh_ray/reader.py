"""Read an archive: scan and filter its columns, or fetch one image by key.

    scan    index ─> filter ─> small columns (page checksums) ─> ranges of the matching blobs
    get     index ─> one range: exactly the bytes of the chosen states

The row index answers everything it can: keys, tags, sizes and rates cost no request to a part.
No blob byte is read unless a blob column is asked for, and none of a row that does not match.
Whatever is handed out was checked: a whole row against its CRC-32C, a bitstream prefix against the
checksums inside it, an original against its SHA-256.
"""

import bisect
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dicmh_ray.archive import (
    ARROW_SCHEMA,
    BLOBS,
    SMALL_COLUMNS,
    ArchiveStatistics,
    Commit,
    EncodedImage,
    PartFacts,
    Snapshot,
    open_snapshot,
    row_crc32c,
)
from dicmh_ray.archive.part import INDEX_SCHEMA, check_chunk, open_part, small_chunks
from dicmh_ray.archive.ranges import (
    POINT_GAP_BYTES,
    SCAN_GAP_BYTES,
    ByteRange,
    SparseFile,
    read_ranges,
)
from dicmh_ray.archive.schema import from_batch
from dicmh_ray.archive.where import Where, parse_where
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.errors import BitstreamError, CorruptObjectError, CorruptRowError, RowNotFoundError

__all__ = ["ArchiveReader", "Fragment", "Where", "parse_where"]

_INDEX_COLUMNS = frozenset(INDEX_SCHEMA.names) & frozenset(ARROW_SCHEMA.names)
_HELD_ROW_GROUPS = 8


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


class ArchiveReader:
    """One snapshot, for any number of scans and point reads. Thread-safe; pickles small."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        """What is read: later commits do not appear."""
        self._store = snapshot.store
        self._units = {_commit_key(commit): commit for commit in snapshot.commits}
        self._units_of_parts = {p.name: c for c in snapshot.commits for p in c.parts}
        self._parts = {part.name: part for part in snapshot.parts}
        self._lock = threading.Lock()
        self._indexes: dict[tuple[str, str], pa.Table] = {}
        self._lookup: _Lookup | None = None
        self._footers: dict[str, pq.FileMetaData] = {}
        self._small: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        version: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> "ArchiveReader":
        """A reader of the archive at ``uri``; see :func:`dicmh_ray.archive.open_snapshot`."""
        return cls(open_snapshot(uri, version=version, storage_options=storage_options))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.snapshot,)

    def __len__(self) -> int:
        return self.snapshot.statistics.rows

    @property
    def statistics(self) -> ArchiveStatistics:
        """Sums over the snapshot; no request."""
        return self.snapshot.statistics

    def keys(self) -> Iterator[str]:
        """Keys of all rows, in scan order, from the index alone."""
        for commit in self.snapshot.commits:
            yield from self._index(commit)["key"].to_pylist()

    def fragments(self) -> list[Fragment]:
        """The row groups of the snapshot, in scan order."""
        found = []
        for commit in self.snapshot.commits:
            for part, group, rows in _row_groups(self._index(commit)):
                found.append(
                    Fragment(
                        unit=commit.unit,
                        part=part,
                        row_group=group,
                        num_rows=len(rows),
                        num_bytes=sum(pc.sum(rows[f"{blob}_length"]).as_py() for blob in BLOBS),
                    )
                )
        return found

    def scan(
        self,
        columns: Sequence[str] | None = None,
        where: str | Where | None = None,
        states: int | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """The matching rows, one batch a row group; row groups without a match give none.

        Args:
            columns: names; None is every column but the blobs. The batch has them in schema order.
            where: filter, see :func:`parse_where`.
            states: cut ``base`` and ``detail`` after so many states; None is all. Bytes of later
                states are not read. The other columns still describe the whole stream.

        Raises:
            WhereError: the filter is wrong.
            CorruptRowError: a row fails its checksum; the message names it.
            CorruptObjectError: a part or index is missing or damaged.
        """
        wanted = _check_columns(columns)
        condition = parse_where(where) if isinstance(where, str) else where
        _check_states(states)
        for fragment in self.fragments():
            batch = self._scan_fragment(fragment, wanted, condition, states)
            if batch is not None:
                yield batch

    def scan_fragment(
        self,
        fragment: Fragment,
        columns: Sequence[str] | None = None,
        where: str | Where | None = None,
        states: int | None = None,
    ) -> pa.RecordBatch | None:
        """The matching rows of one row group, as :meth:`scan` gives them; None without a match."""
        condition = parse_where(where) if isinstance(where, str) else where
        _check_states(states)
        return self._scan_fragment(fragment, _check_columns(columns), condition, states)

    def rows(
        self,
        where: str | Where | None = None,
        *,
        blobs: Iterable[str] = (),
        states: int | None = None,
    ) -> Iterator[EncodedImage]:
        """The matching rows with every small column, and those blobs that are named."""
        for batch in self.scan([*SMALL_COLUMNS, *blobs], where, states):
            yield from from_batch(batch)

    def get(
        self,
        key: str,
        *,
        blobs: Iterable[str] = BLOBS,
        states: int | None = None,
        columns: Literal["all", "index"] = "all",
    ) -> EncodedImage:
        """One row by its key.

        Its blobs cost one range request each, of exactly the bytes asked for; neighbours in the
        file share one. ``columns="all"`` also reads the small columns of the row's row group
        (one request, and one for the part's footer; both are kept for the next rows).

        Args:
            key: of the row; of two rows with one key, the first in scan order.
            blobs: which blobs to read; the others are empty.
            states: cut the bitstream after so many states; None is all.
            columns: ``"index"`` fills only key, status, tags, width, height, bpp, num_states,
                prefix_bytes and crc32c; the others have their defaults. ``original`` needs
                ``"all"``: its checksum is among the small columns.

        Raises:
            RowNotFoundError: no row has the key.
            CorruptRowError: the row fails its checksum.
            CorruptObjectError: a part or index is missing or damaged.
        """
        wanted = frozenset(blobs)
        _check_states(states)
        if not wanted <= frozenset(BLOBS):
            raise ValueError(f"no blob columns: {sorted(wanted - frozenset(BLOBS))}")
        if columns == "index" and "original" in wanted:
            raise ValueError("original cannot be checked without the small columns")
        place = self._find(key)
        if columns == "all":
            part, group = place["part"][0].as_py(), place["row_group"][0].as_py()
            small = self._small_columns(part, group).slice(place["row"][0].as_py(), 1)
        else:
            small = place.select([name for name in INDEX_SCHEMA.names if name in _INDEX_COLUMNS])
        (row,) = from_batch(self._with_blobs(small, place, wanted, states, POINT_GAP_BYTES))
        return row

    def bitstream(self, key: str, states: int | None = None) -> bytes:
        """The first ``states`` states of a row's bitstream; ``b""`` for a row without one.

        One range request when they lie in ``base``, two otherwise.
        """
        row = self.get(key, blobs=("base", "detail"), states=states, columns="index")
        return row.base + row.detail

    def _scan_fragment(
        self, fragment: Fragment, wanted: Sequence[str], where: Where | None, states: int | None
    ) -> pa.RecordBatch | None:
        places = self._row_group_index(fragment)
        kept: pa.Array | None = None
        if where is not None and where.columns <= _INDEX_COLUMNS:
            kept = pa.array(where.test(places))
            if not kept.true_count:
                return None
        blobs = frozenset(wanted) & frozenset(BLOBS)
        needed = set(wanted) - blobs | {"key"}
        if where is not None and kept is None:
            needed |= where.columns
        if "original" in blobs:
            needed |= {"original_sha256"}
        if needed <= _INDEX_COLUMNS:
            small = places.select([name for name in ARROW_SCHEMA.names if name in needed])
        else:
            names = [name for name in SMALL_COLUMNS if name in needed]
            small = self._read_small(fragment.part, fragment.row_group, names)
        if where is not None:
            kept = pa.array(where.test(small)) if kept is None else kept
            if not kept.true_count:
                return None
            small, places = small.filter(kept), places.filter(kept)
        table = self._with_blobs(small, places, blobs, states, SCAN_GAP_BYTES)
        schema = pa.schema([ARROW_SCHEMA.field(name) for name in wanted])
        arrays = [table[name].combine_chunks() for name in wanted]
        return pa.RecordBatch.from_arrays(
            [a.chunk(0) if isinstance(a, pa.ChunkedArray) else a for a in arrays], schema=schema
        )

    def _with_blobs(
        self,
        small: pa.Table,
        places: pa.Table,
        wanted: frozenset[str],
        states: int | None,
        max_gap: int,
    ) -> pa.Table:
        """``small`` with the blobs that are wanted, read and checked; the rows of one part."""
        if not wanted:
            return small
        part = places["part"][0].as_py()
        # The checksums inside a bitstream run from its first byte: detail alone says nothing.
        read = [b for b in BLOBS if b in wanted or (b == "base" and "detail" in wanted)]
        ranges = [place for blob in read for place in _blob_ranges(blob, places, states)]
        try:
            found = read_ranges(self._store, part, ranges, max_gap=max_gap)
        except FileNotFoundError as exc:
            raise CorruptObjectError(part, "is missing") from exc
        num_rows = len(places)
        values = {blob: found[i * num_rows : (i + 1) * num_rows] for i, blob in enumerate(read)}
        table = small
        for blob in read:
            table = table.append_column(ARROW_SCHEMA.field(blob), pa.array(values[blob]))
        if states is None and set(table.column_names) >= set(ARROW_SCHEMA.names):
            _check_rows(table, places)
        else:
            _check_blobs(table, places, values)
        return table.select([*small.column_names, *(blob for blob in read if blob in wanted)])

    def _find(self, key: str) -> pa.Table:
        """The index row of a key."""
        with self._lock:
            lookup = self._lookup
        if lookup is None:
            lookup = _Lookup([self._index(commit) for commit in self.snapshot.commits])
            with self._lock:
                self._lookup = lookup
        return lookup.find(key)

    def _index(self, commit: Commit) -> pa.Table:
        with self._lock:
            table = self._indexes.get(_commit_key(commit))
            missing = len(self.snapshot.commits) - len(self._indexes)
        if table is not None:
            return table
        if missing == len(self.snapshot.commits) > 1:
            # Whoever needs one unit's index most often goes on to the others.
            tables = dict(zip(self._units, self.snapshot.read_indexes(), strict=True))
        else:
            tables = {_commit_key(commit): self.snapshot.read_index(commit)}
        with self._lock:
            self._indexes.update(tables)
        return tables[_commit_key(commit)]

    def _row_group_index(self, fragment: Fragment) -> pa.Table:
        commit = self._units_of_parts.get(fragment.part)
        if commit is not None:
            for part, group, rows in _row_groups(self._index(commit)):
                if (part, group) == (fragment.part, fragment.row_group):
                    return rows
        raise CorruptObjectError(fragment.part, f"row group {fragment.row_group} is not indexed")

    def _small_columns(self, part: str, row_group: int) -> pa.Table:
        """Every small column of a row group; the last few are kept for point reads."""
        place = (part, row_group)
        with self._lock:
            table = self._small.get(place)
            if table is not None:
                self._small.move_to_end(place)
                return table
        table = self._read_small(part, row_group, SMALL_COLUMNS)
        with self._lock:
            self._small[place] = table
            while len(self._small) > _HELD_ROW_GROUPS:
                self._small.popitem(last=False)
        return table

    def _read_small(self, part: str, row_group: int, columns: Sequence[str]) -> pa.Table:
        """Some small columns of a row group: their byte ranges in few requests, then Parquet."""
        facts = self._part(part)
        metadata = self._footer(facts)
        if not 0 <= row_group < len(facts.row_groups):
            raise CorruptObjectError(part, f"has no row group {row_group}")
        chunks = small_chunks(metadata, row_group)
        ranges = [chunks[column] for column in columns]
        try:
            held = read_ranges(self._store, part, ranges, max_gap=SCAN_GAP_BYTES)
        except FileNotFoundError as exc:
            raise CorruptObjectError(part, "is missing") from exc
        file = SparseFile(self._store, part, facts.num_bytes)
        for column, place, data in zip(columns, ranges, held, strict=True):
            check_chunk(part, row_group, facts.row_groups[row_group], column, data)
            file.hold(place.start, data)
        try:
            parquet = pq.ParquetFile(
                file, metadata=metadata, page_checksum_verification=True, pre_buffer=False
            )
            return parquet.read_row_group(row_group, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as exc:
            raise CorruptObjectError(part, f"row group {row_group}: {exc}") from exc

    def _footer(self, facts: PartFacts) -> pq.FileMetaData:
        with self._lock:
            metadata = self._footers.get(facts.name)
        if metadata is not None:
            return metadata
        start = facts.num_bytes - facts.footer_bytes
        try:
            data = self._store.get_range(facts.name, start, facts.footer_bytes)
        except FileNotFoundError as exc:
            raise CorruptObjectError(facts.name, "is missing") from exc
        if hashlib.sha256(data).hexdigest() != facts.footer_sha256:
            raise CorruptObjectError(facts.name, "footer does not match its SHA-256")
        # Parquet looks for a footer in the file's last 64 KiB: given these bytes as a file, it reads
        # no others. The offsets in it are those of the part.
        metadata = open_part(pa.BufferReader(b"PAR1" + data), facts.name).metadata
        with self._lock:
            self._footers[facts.name] = metadata
        return metadata

    def _part(self, name: str) -> PartFacts:
        facts = self._parts.get(name)
        if facts is None:
            raise CorruptObjectError(name, "is in an index but in no commit")
        return facts


class _Lookup:
    """Keys to index rows by binary search: 8 bytes a row beside the index itself."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self._table = pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()
        self._keys = self._table["key"]
        # Arrow's sort is stable and by UTF-8 bytes, which is the order of Python's strings.
        self._order = pc.sort_indices(self._keys).to_numpy()

    def find(self, key: str) -> pa.Table:
        at = bisect.bisect_left(self._order, key, key=lambda row: self._keys[int(row)].as_py())
        if at < len(self._order):
            row = int(self._order[at])
            if self._keys[row].as_py() == key:
                return self._table.slice(row, 1)
        raise RowNotFoundError(key)


def _row_groups(index: pa.Table) -> Iterator[tuple[str, int, pa.Table]]:
    """Runs of index rows that share a part and a row group."""
    if not len(index):
        return
    parts = index["part"].combine_chunks().dictionary_encode().indices.to_numpy()
    groups = index["row_group"].to_numpy()
    edges = np.flatnonzero((np.diff(parts) != 0) | (np.diff(groups) != 0)) + 1
    starts = [0, *edges.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(index)], strict=True):
        rows = index.slice(start, stop - start)
        yield rows["part"][0].as_py(), rows["row_group"][0].as_py(), rows


def _commit_key(commit: Commit) -> tuple[str, str]:
    """Units of several jobs may share a name."""
    return commit.plan_id, commit.unit


def _blob_ranges(blob: str, places: pa.Table, states: int | None) -> Iterator[ByteRange]:
    """The bytes of one blob in each row, cut after ``states`` states of the bitstream."""
    offsets = places[f"{blob}_offset"].to_pylist()
    lengths = places[f"{blob}_length"].to_pylist()
    if states is None or blob == "original":
        yield from map(ByteRange, offsets, lengths)
        return
    bases = places["base_length"].to_pylist()
    for offset, length, base, prefixes in zip(
        offsets, lengths, bases, places["prefix_bytes"].to_pylist(), strict=True
    ):
        stream_bytes = prefixes[min(states, len(prefixes)) - 1] if prefixes else 0
        reach = stream_bytes if blob == "base" else stream_bytes - base
        yield ByteRange(offset, min(length, max(0, reach)))


def _check_rows(table: pa.Table, places: pa.Table) -> None:
    """Check whole rows against their CRC-32C, in the part and in the index."""
    indexed = places["crc32c"].to_pylist()
    for number, row in enumerate(from_batch(table.select(ARROW_SCHEMA.names))):
        found = row_crc32c(row)
        if found != row.crc32c or found != indexed[number]:
            raise _corrupt(places, number, f"CRC-32C is {found:#010x}, not {row.crc32c:#010x}")


def _check_blobs(table: pa.Table, places: pa.Table, values: Mapping[str, Sequence[bytes]]) -> None:
    """Check the blobs of rows that are not whole, by what each carries or is told by."""
    bases, details = values.get("base", ()), values.get("detail", ())
    for number, base in enumerate(bases):
        stream = base + (details[number] if details else b"")
        if stream:
            try:
                prefix_bytes(stream)
            except BitstreamError as exc:
                raise _corrupt(places, number, f"bitstream: {exc}") from exc
    if "original" in values:
        digests = table["original_sha256"].to_pylist()
        for number, (data, sha256) in enumerate(zip(values["original"], digests, strict=True)):
            if data and hashlib.sha256(data).hexdigest() != sha256:
                raise _corrupt(places, number, "original does not match its SHA-256")


def _corrupt(places: pa.Table, number: int, reason: str) -> CorruptRowError:
    place = places.slice(number, 1).to_pylist()[0]
    return CorruptRowError(place["part"], place["row_group"], place["row"], place["key"], reason)


def _check_columns(columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        return list(SMALL_COLUMNS)
    unknown = sorted(set(columns) - set(ARROW_SCHEMA.names))
    if unknown or not columns:
        raise ValueError(f"no such columns: {unknown}" if unknown else "no columns asked for")
    return [name for name in ARROW_SCHEMA.names if name in columns]


def _check_states(states: int | None) -> None:
    if states is not None and states < 1:
        raise ValueError(f"states is {states}, wanted 1 or more")
