"""The small columns of a snapshot's row groups, read from their parts and checked."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from dicmh_ray.archive import SMALL_COLUMNS, PartFacts
from dicmh_ray.archive.part import check_chunk, open_part, small_chunks
from dicmh_ray.archive.ranges import SCAN_GAP_BYTES, ByteRange, SparseFile
from dicmh_ray.errors import CorruptObjectError
from dicmh_ray.reader.fetch import Fetcher
from dicmh_ray.reader.index import RowGroup

HELD_ROW_GROUPS = 8
"""Row groups whose small columns are kept."""


class SmallColumns:
    """All columns but the blobs, by row group. Thread-safe; keeps footers and the last few groups."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._lock = threading.Lock()
        self._footers: dict[str, pq.FileMetaData] = {}
        self._held: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def read(self, group: RowGroup, names: Sequence[str]) -> pa.Table:
        """Some of them, of all rows of a row group, in schema order.

        Raises:
            CorruptObjectError: the part is missing or damaged there.
        """
        return self._all(group) if len(names) == len(SMALL_COLUMNS) else self._some(group, names)

    def _all(self, group: RowGroup) -> pa.Table:
        """Every one; those of the last few row groups are kept for point reads."""
        place = (group.facts.name, group.number)
        with self._lock:
            table = self._held.get(place)
            if table is not None:
                self._held.move_to_end(place)
                return table
        table = self._some(group, SMALL_COLUMNS)
        with self._lock:
            self._held[place] = table
            while len(self._held) > HELD_ROW_GROUPS:
                self._held.popitem(last=False)
        return table

    def _some(self, group: RowGroup, names: Sequence[str]) -> pa.Table:
        """Their byte ranges in few requests, then Parquet."""
        facts, part, number = group.facts, group.facts.name, group.number
        metadata = self._footer(facts)
        if not 0 <= number < metadata.num_row_groups:
            raise CorruptObjectError(part, f"has no row group {number}")
        chunks = small_chunks(metadata, number)
        ranges = [chunks[name] for name in names]
        try:
            fetched = self._fetcher.ranges(part, ranges, max_gap=SCAN_GAP_BYTES)
        except FileNotFoundError as exc:
            raise CorruptObjectError(part, "is missing") from exc
        file = SparseFile(self._fetcher.store, part, facts.num_bytes)
        for name, place, data in zip(names, ranges, fetched.values, strict=True):
            check_chunk(part, number, facts.row_groups[number], name, data)
            file.hold(place.start, data)
        self._fetcher.keep(fetched)
        try:
            parquet = pq.ParquetFile(
                file, metadata=metadata, page_checksum_verification=True, pre_buffer=False
            )
            return parquet.read_row_group(number, columns=list(names), use_threads=False)
        except (OSError, pa.ArrowException) as exc:
            raise CorruptObjectError(part, f"row group {number}: {exc}") from exc

    def _footer(self, facts: PartFacts) -> pq.FileMetaData:
        with self._lock:
            metadata = self._footers.get(facts.name)
        if metadata is not None:
            return metadata
        place = ByteRange(facts.num_bytes - facts.footer_bytes, facts.footer_bytes)
        try:
            fetched = self._fetcher.ranges(facts.name, [place], max_gap=0)
        except FileNotFoundError as exc:
            raise CorruptObjectError(facts.name, "is missing") from exc
        (data,) = fetched.values
        if hashlib.sha256(data).hexdigest() != facts.footer_sha256:
            raise CorruptObjectError(facts.name, "footer does not match its SHA-256")
        self._fetcher.keep(fetched)
        # Parquet looks for a footer in the file's last 64 KiB: given these bytes as a file, it reads
        # no others. The offsets in it are those of the part.
        metadata = open_part(pa.BufferReader(b"PAR1" + data), facts.name).metadata
        with self._lock:
            self._footers[facts.name] = metadata
        return metadata
