"""Rows -> the bytes of Parquet parts, and the row index taken from those very bytes.

Blobs are required, PLAIN and uncompressed, in the last columns; everything else is ZSTD. Any
Parquet engine reads a part; the index turns a point read into one range request.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dicmh_ray.archive.pages import value_ranges
from dicmh_ray.archive.ranges import ByteRange
from dicmh_ray.archive.schema import (
    ARROW_SCHEMA,
    BLOBS,
    COLUMNS,
    SMALL_COLUMNS,
    EncodedImage,
    check_row,
    row_crc32c,
    to_table,
)
from dicmh_ray.bitstream import crc32c
from dicmh_ray.errors import CorruptObjectError

PART_PREFIX = "data/"

_MAGIC = b"PAR1"
_LEAVES = {
    c.name: f"{c.name}.list.element" if pa.types.is_list(c.type) else c.name for c in COLUMNS
}
_DICTIONARIES = ["status", _LEAVES["tags"], "tier", "source_uri", "original_format", "num_states"]
_INDEXED = ("key", "status", "tags", "width", "height", "bpp", "num_states", "prefix_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class PartOptions:
    """How rows are laid out. Readers depend on none of it."""

    row_group_rows: int = 2_000
    """Rows per row group at most: the unit in which the small columns are read."""

    row_group_bytes: int = 16 * 2**20
    """Blob bytes per row group; one larger blob gets a row group of its own."""

    part_bytes: int = 256 * 2**20
    """Blob bytes per part; a unit with more has several parts. A part is built in memory."""

    def __post_init__(self) -> None:
        if min(self.row_group_rows, self.row_group_bytes, self.part_bytes) < 1:
            raise ValueError(f"sizes must be positive: {self}")


_INDEX_FIELDS = [
    *(ARROW_SCHEMA.field(name) for name in _INDEXED),
    pa.field("part", pa.string(), nullable=False, metadata={
        "PARQUET:field_id": "201", "unit": "", "doc": "object that holds the row"}),
    pa.field("row_group", pa.int32(), nullable=False, metadata={
        "PARQUET:field_id": "202", "unit": "", "doc": "row group in the part, from 0"}),
    pa.field("row", pa.int32(), nullable=False, metadata={
        "PARQUET:field_id": "203", "unit": "row", "doc": "row in the row group, from 0"}),
    *(
        pa.field(f"{blob}_{what}", kind, nullable=False, metadata={
            "PARQUET:field_id": str(number), "unit": "byte", "doc": f"{doc} of {blob}"})
        for number, blob, what, kind, doc in [
            (204, "base", "offset", pa.int64(), "first byte in the part"),
            (205, "base", "length", pa.int32(), "length"),
            (206, "detail", "offset", pa.int64(), "first byte in the part"),
            (207, "detail", "length", pa.int32(), "length"),
            (208, "original", "offset", pa.int64(), "first byte in the part"),
            (209, "original", "length", pa.int32(), "length"),
        ]
    ),
    ARROW_SCHEMA.field("crc32c"),
]  # fmt: skip
INDEX_SCHEMA = pa.schema(_INDEX_FIELDS)
"""One row for each row of a unit's parts, in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroupFacts:
    """What the small columns of a row group must be.

    Parquet's page checksums leave out the page headers, and its C++ reader may abort the process
    on a damaged one: no column chunk reaches it before its bytes are known to be sound.
    """

    num_rows: int
    """Rows."""

    chunk_crc32c: tuple[int, ...]
    """CRC-32C of the bytes of each small column's chunk, in schema order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One finished Parquet file, in memory, and its share of the unit's index."""

    name: str
    """Object name: content-addressed, so that no other bytes are ever put there."""

    data: bytes
    """The file."""

    sha256: str
    """Of the file, 64 hex digits."""

    footer_bytes: int
    """Length of the footer with its trailer: the file's last bytes."""

    footer_sha256: str
    """Of those bytes: page checksums do not cover them."""

    row_groups: tuple["RowGroupFacts", ...]
    """What each row group must be."""

    index: pa.Table
    """:data:`INDEX_SCHEMA`, one row a row."""

    @property
    def num_rows(self) -> int:
        """Rows in all row groups."""
        return len(self.index)


def write_parts(
    unit: str,
    rows: Sequence[EncodedImage],
    *,
    footer: Mapping[str, str],
    options: PartOptions | None = None,
) -> Iterator[Part]:
    """Write a unit's rows, sorted by first tag and key, as one part or more.

    Each row's ``crc32c`` is computed here. Every blob is compared with the bytes at the position
    that the index gives for it, before anybody else sees the part.

    Args:
        unit: part names start with it.
        rows: in any order.
        footer: text pairs for the file's key-value metadata.
        options: sizes.

    Raises:
        ValueError: a row is not one this format can hold.
    """
    options = options or PartOptions()
    for row in rows:
        check_row(row)
    if len({row.key for row in rows}) != len(rows):
        raise ValueError(f"a key of unit {unit} is repeated")
    ordered = sorted(rows, key=lambda row: (row.tags[:1], row.key))
    for groups in _pack(ordered, options):
        yield _write_part(unit, groups, footer)


def index_part(name: str, data: bytes) -> pa.Table:
    """The index of a part, from its bytes alone: what :func:`write_parts` took when it wrote it.

    Raises:
        CorruptObjectError: the bytes are no sound part.
    """
    try:
        file = open_part(pa.BufferReader(data), name)
        tables = []
        for group in range(file.num_row_groups):
            small = file.read_row_group(group, columns=[*_INDEXED, "crc32c"], use_threads=False)
            tables.append(index_row_group(name, data, file.metadata, group, small))
    except (OSError, pa.ArrowException) as exc:
        raise CorruptObjectError(name, f"not a readable part: {exc}") from exc
    return pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()


def open_part(source: Any, name: str) -> pq.ParquetFile:
    """Open a part with page checksums verified, and check that its columns are ours.

    Raises:
        CorruptObjectError: the footer cannot be read, or describes another table.
    """
    try:
        file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
        schema = file.schema_arrow
    except (OSError, pa.ArrowException) as exc:
        raise CorruptObjectError(name, f"footer cannot be read: {exc}") from exc
    if not schema.equals(ARROW_SCHEMA):
        raise CorruptObjectError(name, "columns are not those of this archive version")
    return file


def index_row_group(
    name: str, data: bytes, metadata: pq.FileMetaData, group: int, small: pa.Table
) -> pa.Table:
    """The index of one row group, from the file's bytes and its sound small columns.

    Raises:
        CorruptObjectError: the blob columns are not as this format writes them.
    """
    num_rows = metadata.row_group(group).num_rows
    columns: dict[str, Any] = {field: small[field] for field in (*_INDEXED, "crc32c")}
    columns["part"] = pa.array([name] * num_rows, pa.string())
    columns["row_group"] = pa.array(np.full(num_rows, group, np.int32))
    columns["row"] = pa.array(np.arange(num_rows, dtype=np.int32))
    for column in range(metadata.num_columns):
        chunk = metadata.row_group(group).column(column)
        blob = chunk.path_in_schema
        if blob not in BLOBS:
            continue
        stop = chunk.data_page_offset + chunk.total_compressed_size
        if chunk.compression != "UNCOMPRESSED" or not 0 < stop <= len(data):
            raise CorruptObjectError(name, f"column {blob} of row group {group} is not plain")
        ranges = value_ranges(data, chunk.data_page_offset, stop, num_rows, name)
        columns[f"{blob}_offset"] = pa.array(ranges.offsets)
        columns[f"{blob}_length"] = pa.array(ranges.lengths.astype(np.int32))
    return pa.table([columns[field.name] for field in INDEX_SCHEMA], schema=INDEX_SCHEMA)


def small_chunks(metadata: pq.FileMetaData, group: int) -> dict[str, ByteRange]:
    """Where the chunk of each small column of a row group lies, in schema order."""
    chunks = metadata.row_group(group)
    found = {}
    for number in range(chunks.num_columns):
        chunk = chunks.column(number)
        name = chunk.path_in_schema.partition(".")[0]
        if name not in BLOBS:
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            found[name] = ByteRange(start, chunk.total_compressed_size)
    return found


def check_chunk(name: str, group: int, facts: RowGroupFacts, column: str, data: bytes) -> None:
    """Check the bytes of one small column's chunk.

    Raises:
        CorruptObjectError: they are not those that were written.
    """
    if crc32c(data) != facts.chunk_crc32c[SMALL_COLUMNS.index(column)]:
        reason = f"row group {group}: column {column} does not match its CRC-32C"
        raise CorruptObjectError(name, reason)


_INDEX_ENCODINGS = {
    "key": "DELTA_BYTE_ARRAY",
    **dict.fromkeys(
        [
            *("row_group", "row"),
            *(f"{blob}_{what}" for blob in BLOBS for what in ("offset", "length")),
        ],
        "DELTA_BINARY_PACKED",
    ),
    **dict.fromkeys(["bpp", _LEAVES["prefix_bytes"]], "BYTE_STREAM_SPLIT"),
}
"""Every read of an archive starts with its index: with these it is a quarter smaller than plain."""


def write_index(table: pa.Table) -> bytes:
    """An index as a Parquet object."""
    leaves = [_LEAVES.get(name, name) for name in INDEX_SCHEMA.names]
    texts = {"status", "part", _LEAVES["tags"]}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=[leaf for leaf in leaves if leaf in texts],
        column_encoding=_INDEX_ENCODINGS,
        write_page_checksum=True,
        data_page_version="1.0",
    )
    return bytes(sink.getvalue().to_pybytes())


def read_index(name: str, data: bytes) -> pa.Table:
    """The table of an index object.

    Raises:
        CorruptObjectError: the bytes are no index of this version.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read()
    except (OSError, pa.ArrowException) as exc:
        raise CorruptObjectError(name, f"not a readable index: {exc}") from exc
    if not table.schema.equals(INDEX_SCHEMA):
        raise CorruptObjectError(name, "columns are not those of an index of this version")
    return table


def _pack(rows: Sequence[EncodedImage], options: PartOptions) -> Iterator[list[list[EncodedImage]]]:
    """Parts as lists of row groups, each filled until one limit would be passed."""
    groups: list[list[EncodedImage]] = []
    group: list[EncodedImage] = []
    part_bytes = group_bytes = 0
    for row in rows:
        size = len(row.base) + len(row.detail) + len(row.original)
        if group and part_bytes + size > options.part_bytes:
            yield [*groups, group]
            groups, group, part_bytes, group_bytes = [], [], 0, 0
        full = len(group) == options.row_group_rows
        if group and (full or group_bytes + size > options.row_group_bytes):
            groups.append(group)
            group, group_bytes = [], 0
        group.append(row)
        part_bytes += size
        group_bytes += size
    if group:
        yield [*groups, group]


def _write_part(
    unit: str, groups: Sequence[Sequence[EncodedImage]], footer: Mapping[str, str]
) -> Part:
    sink = pa.BufferOutputStream()
    tables = []
    writer = pq.ParquetWriter(
        sink,
        ARROW_SCHEMA.with_metadata(dict(footer)),
        compression={leaf: "NONE" if name in BLOBS else "ZSTD" for name, leaf in _LEAVES.items()},
        use_dictionary=_DICTIONARIES,
        write_statistics=[leaf for name, leaf in _LEAVES.items() if name not in BLOBS],
        data_page_version="1.0",
        write_page_checksum=True,
    )
    with writer:
        for group in groups:
            table = to_table([replace(row, crc32c=row_crc32c(row)) for row in group])
            writer.write_table(table, row_group_size=len(group))
            tables.append(table)
    data = bytes(sink.getvalue().to_pybytes())
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"{PART_PREFIX}part-{unit}-{sha256[:16]}.parquet"
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    indexes = []
    for number, (group, table) in enumerate(zip(groups, tables, strict=True)):
        index = index_row_group(name, data, metadata, number, table)
        _check_index(name, data, index, group)
        indexes.append(index)
    length = footer_bytes(name, data[-8:], len(data))
    return Part(
        name=name,
        data=data,
        sha256=sha256,
        footer_bytes=length,
        footer_sha256=hashlib.sha256(data[-length:]).hexdigest(),
        row_groups=tuple(_row_group_facts(data, metadata, number) for number in range(len(groups))),
        index=pa.concat_tables(indexes),
    )


def footer_bytes(name: str, trailer: bytes, num_bytes: int) -> int:
    """Length of a Parquet footer with its 8-byte trailer, given that trailer.

    Raises:
        CorruptObjectError: the file does not end like a Parquet file of ``num_bytes``.
    """
    length = int.from_bytes(trailer[:4], "little") + 8
    if trailer[4:] != _MAGIC or length + len(_MAGIC) > num_bytes:
        raise CorruptObjectError(name, "does not end like a Parquet file")
    return length


def _check_index(name: str, data: bytes, index: pa.Table, rows: Sequence[EncodedImage]) -> None:
    """Compare every blob with the file's bytes where the index says it is."""
    for blob in BLOBS:
        offsets = index[f"{blob}_offset"].to_numpy()
        lengths = index[f"{blob}_length"].to_numpy()
        for row, offset, length in zip(rows, offsets, lengths, strict=True):
            if data[offset : offset + length] != getattr(row, blob):
                raise CorruptObjectError(name, f"index of {blob} misses the value of {row.key!r}")


def _row_group_facts(data: bytes, metadata: pq.FileMetaData, group: int) -> RowGroupFacts:
    chunks = small_chunks(metadata, group)
    if tuple(chunks) != SMALL_COLUMNS:
        raise AssertionError("the Parquet writer changed the order of columns")
    return RowGroupFacts(
        num_rows=metadata.row_group(group).num_rows,
        chunk_crc32c=tuple(
            crc32c(data[start : start + length]) for start, length in chunks.values()
        ),
    )
