"""One snapshot of an archive, for any number of scans, point reads and walks."""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dicmh_ray.archive import (
    ARROW_SCHEMA,
    BLOBS,
    SMALL_COLUMNS,
    ArchiveStatistics,
    EncodedImage,
    Snapshot,
    open_snapshot,
)
from dicmh_ray.archive.range_cache import RangeCache
from dicmh_ray.archive.ranges import POINT_GAP_BYTES, SCAN_GAP_BYTES
from dicmh_ray.archive.schema import from_batch
from dicmh_ray.archive.where import Where, parse_where
from dicmh_ray.errors import ArchiveError, CorruptObjectError
from dicmh_ray.reader.blobs import PLACES, with_blobs
from dicmh_ray.reader.concurrency import at_once, read_ahead
from dicmh_ray.reader.faults import FaultSink, OnError, ReadFault, check_on_error, refuse
from dicmh_ray.reader.fetch import Fetcher
from dicmh_ray.reader.index import INDEX_FACTS, Fragment, Numbers, RowGroup, RowIndex, load_index
from dicmh_ray.reader.order import FragmentRows, ReadOrder, arrange, scatter
from dicmh_ray.reader.small_columns import SmallColumns

_INDEX_NAMES = [name for name in ARROW_SCHEMA.names if name in INDEX_FACTS]


class _Query(NamedTuple):
    """What a scan wants of each row group."""

    columns: list[str]
    rest: Where | None
    """The part of the filter that the index cannot decide."""
    states: int | None


class _Scanned(NamedTuple):
    """What a scan found in one row group."""

    rows: Numbers
    """Their numbers."""
    batch: pa.RecordBatch


class ArchiveReader:
    """One snapshot, for any number of scans and point reads. Thread-safe; pickles small."""

    def __init__(self, snapshot: Snapshot, *, cache: RangeCache | None = None) -> None:
        self.snapshot = snapshot
        """What is read: later commits do not appear."""
        self.faults: list[ReadFault] = []
        """What reads with ``on_error="skip"`` left out, in the order in which it was found."""
        digests = {part.name: part.sha256 for part in snapshot.parts}
        self._cache = cache
        self._fetcher = Fetcher(snapshot.store, digests, cache)
        self._small = SmallColumns(self._fetcher)
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._index: RowIndex | None = None
        self._lost: list[tuple[ArchiveError, ReadFault]] = []

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        version: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        cache: RangeCache | None = None,
    ) -> "ArchiveReader":
        """A reader of the archive at ``uri``; see :func:`dicmh_ray.archive.open_snapshot`."""
        snapshot = open_snapshot(uri, version=version, storage_options=storage_options)
        return cls(snapshot, cache=cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self.snapshot, self._cache)

    def __len__(self) -> int:
        return self.snapshot.statistics.rows

    @property
    def schema(self) -> pa.Schema:
        """All columns of a row."""
        return ARROW_SCHEMA

    @property
    def statistics(self) -> ArchiveStatistics:
        """Sums over the snapshot; no request."""
        return self.snapshot.statistics

    def keys(self) -> Iterator[str]:
        """Keys of all rows, in scan order, from the index alone."""
        for chunk in self._rows_index(refuse).table(["key"])["key"].chunks:
            yield from chunk.to_pylist()

    def key_at(self, position: int) -> str:
        """Key of the row at a place in scan order, from 0; negative ones count from the end.

        Raises:
            IndexError: there is no such row.
        """
        return str(self._rows_index(refuse).table(["key"])["key"][position].as_py())

    def keys_of(self, rows: Numbers, *, on_error: OnError = "raise") -> list[str]:
        """Keys of rows by their numbers, in that order; no request beyond the index."""
        check_on_error(on_error)
        index = self._rows_index(refuse if on_error == "raise" else self._note)
        keys: list[str] = index.table(["key"])["key"].take(rows).to_pylist()
        return keys

    def fragments(self) -> list[Fragment]:
        """The row groups of the snapshot, in scan order."""
        return self._rows_index(refuse).fragments()

    def scan(
        self,
        columns: Sequence[str] | None = None,
        where: str | Where | None = None,
        states: int | None = None,
        *,
        fragments: Sequence[Fragment] | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[pa.RecordBatch]:
        """The matching rows, one batch a row group; row groups without a match give none.

        What the index can decide of a filter is decided before any part is read. The next few
        row groups are read while one is consumed.

        Args:
            columns: names; None is every column but the blobs. The batch has them in schema order.
            where: filter, see :func:`parse_where`.
            states: cut ``base`` and ``detail`` after so many states; None is all. Bytes of later
                states are not read. The other columns still describe the whole stream.
            fragments: only these row groups, in this order; None is all.
            on_error: ``"skip"`` leaves out what is damaged or missing, and notes it in
                :attr:`faults`. A store that does not answer raises in any case.

        Raises:
            WhereError: the filter is wrong.
            CorruptRowError: a row fails its checksum; the message names it.
            CorruptObjectError: a part or index is missing or damaged.
        """
        wanted = _check_columns(columns)
        condition = parse_where(where) if isinstance(where, str) else where
        _check_states(states)
        check_on_error(on_error)
        for found in self._scan(wanted, condition, states, fragments, on_error):
            yield found.batch

    def scan_fragment(
        self,
        fragment: Fragment,
        columns: Sequence[str] | None = None,
        where: str | Where | None = None,
        states: int | None = None,
        *,
        on_error: OnError = "raise",
    ) -> pa.RecordBatch | None:
        """The matching rows of one row group, as :meth:`scan` gives them; None without a match."""
        scan = self.scan(columns, where, states, fragments=[fragment], on_error=on_error)
        return next(scan, None)

    def rows(
        self,
        where: str | Where | None = None,
        *,
        blobs: Iterable[str] = (),
        states: int | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[EncodedImage]:
        """The matching rows with every small column, and those blobs that are named."""
        for _, row in self.numbered(where, blobs=blobs, states=states, on_error=on_error):
            yield row

    def numbered(
        self,
        where: str | Where | None = None,
        *,
        blobs: Iterable[str] = (),
        states: int | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[tuple[int, EncodedImage]]:
        """As :meth:`rows`, each with its number: what tells two rows with one key apart."""
        wanted = _check_columns([*SMALL_COLUMNS, *blobs])
        condition = parse_where(where) if isinstance(where, str) else where
        _check_states(states)
        check_on_error(on_error)
        for rows, batch in self._scan(wanted, condition, states, None, on_error):
            yield from zip(rows.tolist(), from_batch(batch), strict=True)

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
        (number,) = self.find([key]).tolist()
        return self.read_row(number, blobs=blobs, states=states, columns=columns)

    def get_many(
        self,
        keys: Iterable[str],
        *,
        blobs: Iterable[str] = BLOBS,
        states: int | None = None,
        columns: Literal["all", "index"] = "all",
        on_error: OnError = "raise",
    ) -> list[EncodedImage]:
        """Rows by their keys, in the order of the keys; arguments and errors as :meth:`get`.

        Ranges that lie close together share a request, and row groups are read at once.
        With ``on_error="skip"`` damaged rows are left out and noted; an unknown key still raises.
        """
        rows = self.find(keys, on_error=on_error)
        found = self.read_rows(rows, blobs, states, columns, on_error=on_error)
        return [row for _, row in found]

    def find(self, keys: Iterable[str], *, on_error: OnError = "raise") -> Numbers:
        """Numbers of the rows with these keys, int64 ``[n]``, in the order of the keys.

        Of two rows with one key it is the first in scan order. No request beyond the index.

        Raises:
            RowNotFoundError: no row has a key.
        """
        check_on_error(on_error)
        index = self._rows_index(refuse if on_error == "raise" else self._note)
        return np.array(index.find(list(keys)), np.int64)

    def bitstream(self, key: str, states: int | None = None) -> bytes:
        """The first ``states`` states of a row's bitstream; ``b""`` for a row without one.

        One range request when they lie in ``base``, two otherwise.
        """
        row = self.get(key, blobs=("base", "detail"), states=states, columns="index")
        return row.base + row.detail

    def sample(self, n: int, *, seed: int, where: str | Where | None = None) -> list[str]:
        """Keys of ``n`` of the matching rows, in scan order; all if there are fewer.

        The same for the same snapshot, filter and seed, on every machine; each row at most once.
        """
        return self.keys_of(self.sample_rows(n, seed=seed, where=where))

    def sample_rows(
        self, n: int, *, seed: int, where: str | Where | None = None, on_error: OnError = "raise"
    ) -> Numbers:
        """Numbers of the rows that :meth:`sample` chooses, int64 ``[n]`` or fewer, ascending."""
        if n < 0:
            raise ValueError(f"n is {n}, wanted 0 or more")
        rows = self.matching(where, on_error=on_error)
        return np.sort(rows[np.argsort(scatter(rows, seed), kind="stable")[:n]])

    def order(
        self,
        *,
        where: str | Where | None = None,
        shuffle: int | None = None,
        rank: int = 0,
        world: int = 1,
        on_error: OnError = "raise",
    ) -> ReadOrder:
        """A fixed order of the matching rows, or one rank's share of it; see :class:`ReadOrder`.

        Args:
            where: filter.
            shuffle: seed; None is scan order. Row groups are shuffled, and rows within blocks of
                a few row groups (:data:`~dicmh_ray.reader.order.BLOCK_BYTES`).
            rank: which share, from 0.
            world: how many shares.
            on_error: ``"skip"``: rows that no filter can see, because what it looks at is damaged,
                are left out and noted.
        """
        rows = self.matching(where, on_error=on_error)
        index = self._rows_index(refuse if on_error == "raise" else self._note)
        lengths = index.table([f"{blob}_length" for blob in BLOBS]).take(rows)
        row_bytes = np.zeros(len(rows), np.int64)
        for column in lengths.columns:
            row_bytes += column.to_numpy()
        share, edges = arrange(
            rows, index.groups_of(rows), row_bytes, shuffle=shuffle, rank=rank, world=world
        )
        hashed = hashlib.sha256(edges.astype("<i8").tobytes() + share.astype("<i8").tobytes())
        for part in self.snapshot.parts:
            hashed.update(part.sha256.encode())
        return ReadOrder(self, share, edges, hashed.hexdigest())

    def matching(self, where: str | Where | None = None, *, on_error: OnError = "raise") -> Numbers:
        """Numbers of the matching rows, int64 ``[n]``, ascending: their places in scan order.

        Of columns that the index has, no request is made.
        """
        check_on_error(on_error)
        sink = refuse if on_error == "raise" else self._note
        condition = parse_where(where) if isinstance(where, str) else where
        index = self._rows_index(sink)
        cheap, rest = (None, None) if condition is None else condition.split(INDEX_FACTS)
        mask = np.ones(index.num_rows, bool)
        if cheap is not None:
            mask &= cheap.test(index.table(sorted(cheap.columns)))
        rows = np.flatnonzero(mask).astype(np.int64)
        if rest is None:
            return rows
        kept = []
        for number, members in _by_group(index, rows):
            group = index.groups[number]
            small = self._small_of(group, members, sorted(rest.columns), sink)
            if small is not None:
                kept.append(group.start + members[rest.test(small)])
        return np.concatenate([np.zeros(0, np.int64), *kept])

    def read_row(
        self,
        number: int,
        *,
        blobs: Iterable[str] = BLOBS,
        states: int | None = None,
        columns: Literal["all", "index"] = "all",
    ) -> EncodedImage:
        """One row by its number; arguments, costs and damage as :meth:`get`."""
        # A number that this index gave is that of its row, whatever other rows are lost.
        index = self._rows_index(refuse if self._index is None else self._note)
        rows = np.array([number], np.int64)
        ((_, row),) = self._read_rows(
            index, rows, blobs, states, columns, on_error="raise", max_gap=POINT_GAP_BYTES
        )
        return row

    def read_rows(
        self,
        rows: Numbers,
        blobs: Iterable[str] = BLOBS,
        states: int | None = None,
        columns: Literal["all", "index"] = "all",
        *,
        on_error: OnError = "raise",
        max_gap: int = SCAN_GAP_BYTES,
        spare_originals: bool = False,
    ) -> list[tuple[int, EncodedImage]]:
        """Rows by their numbers, each with its place in ``rows``; of damage as :meth:`scan`.

        With ``spare_originals`` the original is read only of rows without a bitstream.
        """
        check_on_error(on_error)
        index = self._rows_index(refuse if on_error == "raise" else self._note)
        return self._read_rows(
            index,
            rows,
            blobs,
            states,
            columns,
            on_error=on_error,
            max_gap=max_gap,
            spare_originals=spare_originals,
        )

    def _read_rows(
        self,
        index: RowIndex,
        rows: Numbers,
        blobs: Iterable[str],
        states: int | None,
        columns: Literal["all", "index"],
        *,
        on_error: OnError,
        max_gap: int,
        spare_originals: bool = False,
    ) -> list[tuple[int, EncodedImage]]:
        wanted = _check_blobs(blobs, columns)
        _check_states(states)
        order = np.argsort(rows, kind="stable")
        tasks = []
        for number, members in _by_group(index, rows[order]):
            places, order = order[: len(members)], order[len(members) :]
            tasks.append((index.groups[number], members, places))
        faults: list[list[tuple[ArchiveError, ReadFault]]] = [[] for _ in tasks]

        def read(task: int) -> list[tuple[int, EncodedImage]]:
            group, members, places = tasks[task]
            note = refuse if on_error == "raise" else _collector(faults[task])
            small = self._small_of(
                group, members, SMALL_COLUMNS if columns == "all" else _INDEX_NAMES, note
            )
            if small is None:
                return []
            number = pa.array(places)
            small = small.append_column("_place", number)
            table = self._with_blobs(
                group, members, small, wanted, states, max_gap, note, spare_originals
            )
            return list(
                zip(
                    table["_place"].to_pylist(),
                    from_batch(table.drop_columns("_place")),
                    strict=True,
                )
            )

        found = at_once(read, range(len(tasks)))
        for group_faults in faults:
            for exc, fault in group_faults:
                self._note(exc, fault)
        return sorted((pair for pairs in found for pair in pairs), key=lambda pair: pair[0])

    def fragment_rows(self, rows: Numbers) -> list[FragmentRows]:
        """Rows by their numbers, as runs of rows of one row group each, in the order given."""
        index = self._rows_index(refuse)
        fragments = index.fragments()
        numbers = index.groups_of(rows)
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)]
        runs = []
        for start, stop in pairwise(edges):
            if stop > start:
                number = int(numbers[start])
                members = rows[start:stop] - index.groups[number].start
                runs.append(FragmentRows(fragments[number], tuple(members.tolist())))
        return runs

    def _scan(
        self,
        wanted: list[str],
        where: Where | None,
        states: int | None,
        fragments: Sequence[Fragment] | None,
        on_error: OnError,
    ) -> Iterator[_Scanned]:
        sink = refuse if on_error == "raise" else self._note
        index = self._rows_index(sink)
        cheap, rest = (None, None) if where is None else where.split(INDEX_FACTS)
        query = _Query(wanted, rest, states)
        if fragments is None:
            numbers: Iterable[int] = range(len(index.groups))
        else:
            numbers = [index.group_number(f.part, f.row_group) for f in fragments]
        mask = None
        if cheap is not None:
            mask = cheap.test(index.table(sorted(cheap.columns)))
        tasks = (
            (index.groups[number], members)
            for number in numbers
            if len(members := _members(index.groups[number], mask))
        )

        def read(
            task: tuple[RowGroup, Numbers],
        ) -> tuple[_Scanned | None, list[tuple[ArchiveError, ReadFault]]]:
            faults: list[tuple[ArchiveError, ReadFault]] = []
            note = refuse if on_error == "raise" else _collector(faults)
            return self._scan_group(task[0], task[1], query, note), faults

        for found, faults in read_ahead(read, tasks):
            for exc, fault in faults:
                self._note(exc, fault)
            if found is not None:
                yield found

    def _scan_group(
        self, group: RowGroup, members: Numbers, query: _Query, sink: FaultSink
    ) -> _Scanned | None:
        blobs = frozenset(query.columns) & frozenset(BLOBS)
        needed = set(query.columns) - blobs
        if query.rest is not None:
            needed |= query.rest.columns
        if "original" in blobs:
            needed |= {"original_sha256"}
        names = [name for name in SMALL_COLUMNS if name in (needed or {"key"})]
        small = self._small_of(group, members, names, sink)
        if small is None:
            return None
        if query.rest is not None:
            kept = query.rest.test(small)
            if not kept.any():
                return None
            small, members = small.filter(pa.array(kept)), members[kept]
        small = small.append_column("_number", pa.array(group.start + members))
        table = self._with_blobs(group, members, small, blobs, query.states, SCAN_GAP_BYTES, sink)
        if not len(table):
            return None
        schema = pa.schema([ARROW_SCHEMA.field(name) for name in query.columns])
        arrays = [pa.concat_arrays(table[name].chunks) for name in query.columns]
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        return _Scanned(table["_number"].to_numpy(), batch)

    def _with_blobs(
        self,
        group: RowGroup,
        members: Numbers,
        small: pa.Table,
        blobs: frozenset[str],
        states: int | None,
        max_gap: int,
        sink: FaultSink,
        spare_originals: bool = False,
    ) -> pa.Table:
        if not blobs:
            return small
        index = self._rows_index(self._note)  # who has the rows was told what is lost
        places = index.table(PLACES).slice(group.start, group.num_rows).take(members)
        return with_blobs(
            small,
            places,
            blobs,
            states,
            fetcher=self._fetcher,
            max_gap=max_gap,
            sink=sink,
            spare_originals=spare_originals,
        )

    def _small_of(
        self, group: RowGroup, members: Numbers, names: Sequence[str], sink: FaultSink
    ) -> pa.Table | None:
        """Small columns of some rows of a row group; None if they are lost, and ``sink`` knows."""
        if set(names) <= INDEX_FACTS:
            facts = self._rows_index(self._note).table(names)
            return facts.slice(group.start, group.num_rows).take(members)
        try:
            return self._small.read(group, names).take(members)
        except CorruptObjectError as exc:
            sink(exc, ReadFault.of_object(exc, group.number))
            return None

    def _rows_index(self, sink: FaultSink) -> RowIndex:
        """The index, read when it is first needed; rows that it has lost are told to ``sink``."""
        with self._loading:
            if self._index is None:
                lost: list[tuple[ArchiveError, ReadFault]] = []
                loaded = load_index(
                    self.snapshot, self._fetcher, refuse if sink is refuse else _collector(lost)
                )
                self._index, self._lost = loaded, lost
                for exc, fault in lost:
                    self._note(exc, fault)
            if self._lost and sink is refuse:
                raise self._lost[0][0]
            return self._index

    def _note(self, exc: ArchiveError, fault: ReadFault) -> None:
        del exc
        with self._lock:
            self.faults.append(fault)


def _reopen(
    kind: type[ArchiveReader], snapshot: Snapshot, cache: RangeCache | None
) -> ArchiveReader:
    return kind(snapshot, cache=cache)


def _collector(faults: list[tuple[ArchiveError, ReadFault]]) -> FaultSink:
    def collect(exc: ArchiveError, fault: ReadFault) -> None:
        faults.append((exc, fault))

    return collect


def _members(group: RowGroup, mask: npt.NDArray[np.bool_] | None) -> Numbers:
    """Rows of a group that a filter leaves, int64, from the group's first."""
    if mask is None:
        return np.arange(group.num_rows, dtype=np.int64)
    return np.flatnonzero(mask[group.start : group.start + group.num_rows]).astype(np.int64)


def _by_group(index: RowIndex, rows: Numbers) -> Iterator[tuple[int, Numbers]]:
    """Ascending row numbers as (row group, rows in it from its first)."""
    numbers = index.groups_of(rows)
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)]
    for start, stop in pairwise(edges):
        if stop > start:
            number = int(numbers[start])
            yield number, rows[start:stop] - index.groups[number].start


def _check_columns(columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        return list(SMALL_COLUMNS)
    unknown = sorted(set(columns) - set(ARROW_SCHEMA.names))
    if unknown or not columns:
        raise ValueError(f"no such columns: {unknown}" if unknown else "no columns asked for")
    return [name for name in ARROW_SCHEMA.names if name in columns]


def _check_blobs(blobs: Iterable[str], columns: str) -> frozenset[str]:
    wanted = frozenset(blobs)
    if not wanted <= frozenset(BLOBS):
        raise ValueError(f"no blob columns: {sorted(wanted - frozenset(BLOBS))}")
    if columns == "index" and "original" in wanted:
        raise ValueError("original cannot be checked without the small columns")
    return wanted


def _check_states(states: int | None) -> None:
    if states is not None and states < 1:
        raise ValueError(f"states is {states}, wanted 1 or more")
