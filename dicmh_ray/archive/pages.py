"""Where each value of a blob column lies in a Parquet file, found by walking its page headers.

A required, PLAIN, uncompressed BYTE_ARRAY column stores every value verbatim as ``u32 length``
and bytes, page after page. Parquet's own readers hide those positions; with them, one value is
one range request. The walk reads page headers (Thrift compact protocol) and the length prefixes
only, and trusts nothing it reads.
"""

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dicmh_ray.errors import CorruptObjectError

_DATA_PAGE = 0
_PLAIN = 0
_MAX_DEPTH = 8
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = (
    0, 1, 2, 3, 7, 8, 9, 10, 11, 12,
)  # fmt: skip
_INTEGERS = frozenset({4, 5, 6})


class ValueRanges(NamedTuple):
    """Position of every value of one column, in row order; the length prefix is left out."""

    offsets: npt.NDArray[np.int64]
    """First byte, from the start of the file."""

    lengths: npt.NDArray[np.int64]
    """Bytes of the value."""


def value_ranges(data: bytes, start: int, stop: int, num_values: int, name: str) -> ValueRanges:
    """Positions of the values of one column chunk, its page checksums verified.

    Args:
        data: the whole file.
        start: first byte of the column chunk: of its first data page's header.
        stop: first byte after the column chunk.
        num_values: rows of the row group.
        name: of the object, for errors.

    Raises:
        CorruptObjectError: the bytes are not such a column chunk.
    """
    offsets = np.zeros(num_values, np.int64)
    lengths = np.zeros(num_values, np.int64)
    row, pos = 0, start
    while pos < stop:
        header = _Compact(data, pos, stop, name)
        page = header.struct()
        body, size = header.pos, _integer(page, 3, name)
        details = page.get(5)
        if page.get(1) != _DATA_PAGE or not isinstance(details, dict) or details.get(2) != _PLAIN:
            raise CorruptObjectError(name, f"page at byte {pos} is no plain data page")
        if size != page.get(2) or size < 0 or body + size > stop:
            raise CorruptObjectError(name, f"page at byte {pos} has an impossible size {size}")
        if page.get(4, 0) & 0xFFFFFFFF != zlib.crc32(data[body : body + size]):
            raise CorruptObjectError(name, f"page at byte {pos} fails its checksum")
        pos, end = body, body + size
        for _ in range(_integer(details, 1, name)):
            if row == num_values or pos + 4 > end:
                raise CorruptObjectError(name, f"page ending at byte {end} has too many values")
            length = int.from_bytes(data[pos : pos + 4], "little")
            offsets[row], lengths[row] = pos + 4, length
            row, pos = row + 1, pos + 4 + length
        if pos != end:
            raise CorruptObjectError(name, f"values do not fill the page ending at byte {end}")
    if row != num_values:
        raise CorruptObjectError(name, f"column has {row} values, its row group {num_values} rows")
    return ValueRanges(offsets, lengths)


def _integer(fields: dict[int, Any], field_id: int, name: str) -> int:
    value = fields.get(field_id)
    if not isinstance(value, int) or value < 0:
        raise CorruptObjectError(name, f"page header field {field_id} is {value!r}")
    return value


@dataclass(slots=True)
class _Compact:
    """A cursor over Thrift compact bytes. Unknown fields are read past, as the protocol asks."""

    data: bytes
    pos: int
    stop: int
    name: str

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        field_id = 0
        while (head := self._byte()) & 0x0F != _STOP:
            delta, kind = head >> 4, head & 0x0F
            field_id = field_id + delta if delta else self._zigzag()
            if kind in (_TRUE, _FALSE):
                fields[field_id] = kind == _TRUE
            else:
                fields[field_id] = self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise CorruptObjectError(self.name, "page header is nested too deep")
        if kind in _INTEGERS:
            return self._zigzag()
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind == _DOUBLE:
            return self._take(8)
        if kind == _BINARY:
            return self._take(self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            size = head >> 4 if head >> 4 != 15 else self._varint()
            return [self._value(head & 0x0F, depth + 1) for _ in range(min(size, self.stop))]
        if kind == _MAP:
            size = self._varint()
            kinds = self._byte() if size else 0
            return [
                (self._value(kinds >> 4, depth + 1), self._value(kinds & 0x0F, depth + 1))
                for _ in range(min(size, self.stop))
            ]
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise CorruptObjectError(self.name, f"page header has a field of unknown type {kind}")

    def _take(self, length: int) -> bytes:
        if self.pos + length > self.stop:
            raise CorruptObjectError(self.name, f"page header runs past byte {self.stop}")
        self.pos += length
        return self.data[self.pos - length : self.pos]

    def _byte(self) -> int:
        return self._take(1)[0]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value
            shift += 7
            if shift > 63:
                raise CorruptObjectError(self.name, "page header has an endless integer")

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
