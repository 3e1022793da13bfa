"""One row of an archive: its fields, its Arrow schema, and the checksum over all of it.

``schemas/archive.v1.json`` is the contract; this module carries the same facts for the program
and a test compares the two. A column may be renamed in a later version; its field id never moves.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import pyarrow as pa

from dicmh_ray.bitstream import crc32c

SCHEMA_VERSION = 1
Status = Literal["ok", "kept_original", "failed"]
Tier = Literal["faithful", "generative", "original", "none"]
STATUSES: tuple[str, ...] = get_args(Status)
TIERS: tuple[str, ...] = get_args(Tier)
BLOBS = ("base", "detail", "original")
"""The columns a scan must ask for by name; each value is one contiguous run of a part's bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImage:
    """One image in an archive. The bitstream is ``base + detail``."""

    key: str
    """Identity of the source image in its collection."""

    status: Status
    """``ok``: coded; ``kept_original``: the source's bytes are kept; ``failed``: neither."""

    error: str | None = None
    """Why the status is not ``ok``."""

    tags: tuple[str, ...] = ()
    """Main tag first: rows are sorted by it."""

    tag_scores: tuple[float, ...] = ()
    """Confidence of each tag in [0, 1]; empty when the tags came from the source."""

    width: int | None = None
    """Pixels, upright; None when the image could not be read."""

    height: int | None = None
    """Pixels, upright; None when the image could not be read."""

    bpp: float | None = None
    """8 × bytes of the whole bitstream over width × height; None without a bitstream."""

    tier: Tier = "none"
    """What a decode of this row may be called."""

    psnr: float | None = None
    """dB of the machine view against the source, 100 when identical."""

    worst_tile_psnr: float | None = None
    """dB of the worst 64 × 64 tile of the machine view."""

    ms_ssim: float | None = None
    """MS-SSIM of the machine view; None when a side is too short for it."""

    num_states: int | None = None
    """States in the bitstream; None without one."""

    source_uri: str = ""
    """Object the image came from."""

    source_offset: int | None = None
    """Byte offset in a tar, row number in a Parquet file; None for a plain file."""

    original_sha256: str = ""
    """64 hex digits over the source's bytes; empty when they could not be read."""

    original_bytes: int = 0
    """Length of the source's bytes."""

    original_format: str | None = None
    """As Pillow names it: JPEG, PNG, ..."""

    exif: bytes | None = None
    """The source's EXIF block, verbatim."""

    icc: bytes | None = None
    """The source's ICC profile, verbatim."""

    metadata: str = "{}"
    """The source's other fields as a JSON object."""

    prefix_bytes: tuple[int, ...] = ()
    """End of each state in the bitstream: its first ``prefix_bytes[k]`` bytes are k + 1 states."""

    crc32c: int = 0
    """CRC-32C over every other column; the part writer computes it."""

    base: bytes = b""
    """Header, tags and first states."""

    detail: bytes = b""
    """The later states."""

    original: bytes = b""
    """The source's bytes, where policy keeps them."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column as the contract describes it."""

    field_id: int
    name: str
    type: pa.DataType
    nullable: bool
    unit: str
    doc: str

    def to_field(self) -> pa.Field:
        """The Arrow field; the Parquet writer takes the field id from its metadata."""
        metadata = {"PARQUET:field_id": str(self.field_id), "unit": self.unit, "doc": self.doc}
        return pa.field(self.name, self.type, nullable=self.nullable, metadata=metadata)


def _list_of(item: pa.DataType, field_id: int) -> pa.DataType:
    metadata = {"PARQUET:field_id": str(field_id)}
    return pa.list_(pa.field("element", item, nullable=False, metadata=metadata))


COLUMNS = (
    Column(1, "key", pa.string(), False, "", "identity of the source image in its collection"),
    Column(2, "status", pa.string(), False, "", "ok | kept_original | failed"),
    Column(3, "error", pa.string(), True, "", "why the status is not ok"),
    Column(4, "tags", _list_of(pa.string(), 104), False, "", "tags, main tag first"),
    Column(5, "tag_scores", _list_of(pa.float32(), 105), False, "probability",
           "confidence of each tag; empty when the tags came from the source"),
    Column(6, "width", pa.int32(), True, "pixel", "upright width; null: image unreadable"),
    Column(7, "height", pa.int32(), True, "pixel", "upright height; null: image unreadable"),
    Column(8, "bpp", pa.float32(), True, "bit/pixel",
           "8 x bytes of the whole bitstream over width x height; null without a bitstream"),
    Column(9, "tier", pa.string(), False, "", "faithful | generative | original | none"),
    Column(10, "psnr", pa.float32(), True, "dB", "machine view against the source; 100: equal"),
    Column(11, "worst_tile_psnr", pa.float32(), True, "dB", "worst 64 x 64 tile, machine view"),
    Column(12, "ms_ssim", pa.float32(), True, "1", "MS-SSIM of the machine view"),
    Column(13, "num_states", pa.int16(), True, "state", "states in the bitstream"),
    Column(14, "source_uri", pa.string(), False, "", "object the image came from"),
    Column(15, "source_offset", pa.int64(), True, "byte or row",
           "byte offset in a tar, row number in a Parquet file; null for a plain file"),
    Column(16, "original_sha256", pa.string(), False, "",
           "SHA-256 of the source's bytes, 64 hex digits; empty: unreadable"),
    Column(17, "original_bytes", pa.int64(), False, "byte", "length of the source's bytes"),
    Column(18, "original_format", pa.string(), True, "", "JPEG, PNG, ... as Pillow names it"),
    Column(19, "exif", pa.binary(), True, "", "the source's EXIF block, verbatim"),
    Column(20, "icc", pa.binary(), True, "", "the source's ICC profile, verbatim"),
    Column(21, "metadata", pa.string(), False, "", "the source's other fields, a JSON object"),
    Column(22, "prefix_bytes", _list_of(pa.int32(), 122), False, "byte",
           "end of each state in base + detail"),
    Column(23, "crc32c", pa.uint32(), False, "", "CRC-32C over every other column of the row"),
    Column(24, "base", pa.binary(), False, "", "bitstream: header, tags, first states"),
    Column(25, "detail", pa.binary(), False, "", "bitstream: the later states"),
    Column(26, "original", pa.binary(), False, "", "the source's bytes where they are kept"),
)  # fmt: skip
ARROW_SCHEMA = pa.schema([column.to_field() for column in COLUMNS])
SMALL_COLUMNS = tuple(column.name for column in COLUMNS if column.name not in BLOBS)
"""Everything but the blobs, in file order: one contiguous range of each row group."""

_FLOATS = tuple(column.name for column in COLUMNS if column.type == pa.float32())
_LISTS = tuple(column.name for column in COLUMNS if pa.types.is_list(column.type))
_NULL, _PRESENT = b"\x00", b"\x01"


def _sized(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def _canonical_writer(kind: pa.DataType) -> Callable[[Any], bytes]:
    """What writes a value of a column, once and for all rows."""
    if pa.types.is_list(kind):
        write_item = _canonical_writer(kind.value_type)
        return lambda value: struct.pack("<I", len(value)) + b"".join(map(write_item, value))
    if pa.types.is_string(kind):
        return lambda value: _sized(value.encode())
    if pa.types.is_binary(kind):
        return lambda value: _sized(bytes(value))
    return struct.Struct("<f" if pa.types.is_float32(kind) else "<q").pack


_CANONICAL = [(c.name, _canonical_writer(c.type)) for c in COLUMNS if c.name != "crc32c"]


def canonical_row(row: EncodedImage) -> bytes:
    """The bytes ``crc32c`` covers; ``schemas/archive.v1.md`` specifies them.

    Every column but ``crc32c`` in field order, each behind a presence byte: text and binary as
    u32 length and bytes, integers as i64, floats as IEEE 754 binary32, lists as u32 count and
    elements. All little-endian.
    """
    parts: list[bytes] = []
    for name, write in _CANONICAL:
        value = getattr(row, name)
        if value is None:
            parts.append(_NULL)
        else:
            parts += _PRESENT, write(value)
    return b"".join(parts)


def row_crc32c(row: EncodedImage) -> int:
    """CRC-32C of :func:`canonical_row`."""
    return crc32c(canonical_row(row))


def check_row(row: EncodedImage) -> None:
    """Refuse a row that no reader could make sense of.

    Raises:
        ValueError: a field is outside its documented range; the message names it.
    """
    if not row.key:
        raise ValueError("key is empty")
    if row.status not in STATUSES or row.tier not in TIERS:
        raise ValueError(f"{row.key}: status {row.status!r} or tier {row.tier!r} is unknown")
    if row.tag_scores and len(row.tag_scores) != len(row.tags):
        raise ValueError(f"{row.key}: {len(row.tags)} tags but {len(row.tag_scores)} scores")
    for name in _FLOATS:
        value = getattr(row, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{row.key}: {name} is {value}")
    try:
        is_object = isinstance(json.loads(row.metadata), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise ValueError(f"{row.key}: metadata is no JSON object")
    stream_bytes = len(row.base) + len(row.detail)
    if (row.prefix_bytes[-1] if row.prefix_bytes else 0) != stream_bytes:
        raise ValueError(f"{row.key}: prefix_bytes {row.prefix_bytes} of {stream_bytes} bytes")
    if row.prefix_bytes and len(row.base) not in row.prefix_bytes:
        raise ValueError(f"{row.key}: base ends inside a state, at byte {len(row.base)}")
    if (row.num_states or 0) != len(row.prefix_bytes):
        raise ValueError(f"{row.key}: num_states {row.num_states}, prefixes {row.prefix_bytes}")


def to_table(rows: Sequence[EncodedImage]) -> pa.Table:
    """Rows as an Arrow table of :data:`ARROW_SCHEMA`."""
    arrays = [pa.array([getattr(r, c.name) for r in rows], type=c.type) for c in COLUMNS]
    return pa.Table.from_arrays(arrays, schema=ARROW_SCHEMA)


def from_batch(batch: pa.RecordBatch | pa.Table) -> Iterable[EncodedImage]:
    """Rows of a table that has some of the columns; the others take their defaults.

    ``key`` and ``status`` must be there.
    """
    known = {f.name for f in fields(EncodedImage)}
    for values in batch.to_pylist():
        row = {name: value for name, value in values.items() if name in known}
        for name in _LISTS:
            if name in row:
                row[name] = tuple(row[name])
        yield EncodedImage(**row)
