"""Blobs of rows that lie in one part: where they are, and whether they are what was written."""

import hashlib
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dicmh_ray.archive import ARROW_SCHEMA, BLOBS, row_crc32c
from dicmh_ray.archive.ranges import ByteRange
from dicmh_ray.archive.schema import from_batch
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.errors import BitstreamError, CorruptObjectError, CorruptRowError
from dicmh_ray.reader.faults import FaultSink, ReadFault
from dicmh_ray.reader.fetch import Fetched, Fetcher

PLACES = (
    *("part", "row_group", "row", "key", "prefix_bytes", "crc32c"),
    *(f"{blob}_{what}" for blob in BLOBS for what in ("offset", "length")),
)
"""Columns of the index that reading a blob takes."""


def with_blobs(
    small: pa.Table,
    places: pa.Table,
    wanted: frozenset[str],
    states: int | None,
    *,
    fetcher: Fetcher,
    max_gap: int,
    sink: FaultSink,
    spare_originals: bool = False,
) -> pa.Table:
    """``small`` with the blobs that are wanted, read and checked; the rows of one part.

    Args:
        small: other columns of the rows.
        places: :data:`PLACES` of the same rows.
        wanted: blobs to read.
        states: cut bitstreams after so many states; None is all.
        fetcher: reads.
        max_gap: bytes between two ranges that are read as one.
        sink: told of every row that is damaged; if it returns, the row is left out.
        spare_originals: leave ``original`` empty where there is a bitstream.
    """
    if not wanted or not len(places):
        return small
    part = places["part"][0].as_py()
    # The checksums inside a bitstream run from its first byte: detail alone says nothing.
    read = [b for b in BLOBS if b in wanted or (b == "base" and "detail" in wanted)]
    ranges = [place for blob in read for place in _ranges(blob, places, states, spare_originals)]
    try:
        fetched = fetcher.ranges_each(part, ranges, max_gap=max_gap)
    except FileNotFoundError:
        exc = CorruptObjectError(part, "is missing")
        sink(exc, ReadFault.of_object(exc, places["row_group"][0].as_py()))
        return _empty(small, [blob for blob in read if blob in wanted])
    num_rows = len(places)
    values = {b: fetched.values[i * num_rows : (i + 1) * num_rows] for i, b in enumerate(read)}
    table = small
    for blob in read:
        table = table.append_column(ARROW_SCHEMA.field(blob), pa.array(values[blob], pa.binary()))
    faults = {i % num_rows: reason for i, reason in fetched.reasons.items()}
    is_whole = set(table.column_names) >= set(ARROW_SCHEMA.names)
    if is_whole and states is None and not spare_originals:
        found = _row_faults(table, places)
    else:
        found = _blob_faults(table, values)
    for row, reason in found:
        faults.setdefault(row, reason)
    _keep(fetcher, fetched, num_rows, faults.keys())
    for row in sorted(faults):
        damage = _corrupt(places, row, faults[row])
        sink(damage, ReadFault.of_row(damage))
    table = table.select([*small.column_names, *(blob for blob in read if blob in wanted)])
    if faults:
        sound = np.ones(num_rows, bool)
        sound[list(faults)] = False
        table = table.filter(pa.array(sound))
    return table


def _keep(fetcher: Fetcher, fetched: Fetched, num_rows: int, damaged: Collection[int]) -> None:
    if damaged:
        fetcher.keep(
            fetched, [i for i in range(len(fetched.values)) if i % num_rows not in damaged]
        )
    else:
        fetcher.keep(fetched)


def _empty(small: pa.Table, blobs: Sequence[str]) -> pa.Table:
    table = small.slice(0, 0)
    for blob in blobs:
        table = table.append_column(ARROW_SCHEMA.field(blob), pa.array([], pa.binary()))
    return table


def _ranges(
    blob: str, places: pa.Table, states: int | None, spare_originals: bool
) -> Iterator[ByteRange]:
    """The bytes of one blob in each row, cut after ``states`` states of the bitstream."""
    offsets: npt.NDArray[np.int64] = places[f"{blob}_offset"].to_numpy()
    lengths: npt.NDArray[np.int64] = places[f"{blob}_length"].to_numpy()
    if blob == "original" and spare_originals:
        streams = places["prefix_bytes"].to_pylist()
        lengths = np.where([bool(ends) for ends in streams], 0, lengths)
    if states is None or blob == "original":
        yield from map(ByteRange, offsets.tolist(), lengths.tolist())
        return
    bases = places["base_length"].to_pylist()
    for offset, length, base, prefixes in zip(
        offsets.tolist(), lengths.tolist(), bases, places["prefix_bytes"].to_pylist(), strict=True
    ):
        stream_bytes = prefixes[min(states, len(prefixes)) - 1] if prefixes else 0
        reach = stream_bytes if blob == "base" else stream_bytes - base
        yield ByteRange(offset, min(length, max(0, reach)))


def _row_faults(table: pa.Table, places: pa.Table) -> Iterator[tuple[int, str]]:
    """Whole rows that do not match their CRC-32C in the part, or in the index."""
    indexed = places["crc32c"].to_pylist()
    for number, row in enumerate(from_batch(table.select(ARROW_SCHEMA.names))):
        found = row_crc32c(row)
        if found != row.crc32c or found != indexed[number]:
            yield number, f"CRC-32C is {found:#010x}, not {row.crc32c:#010x}"


def _blob_faults(table: pa.Table, values: dict[str, list[bytes]]) -> Iterator[tuple[int, str]]:
    """Blobs of rows that are not whole, by what each carries or is told by."""
    bases, details = values.get("base", []), values.get("detail", [])
    for number, base in enumerate(bases):
        stream = base + (details[number] if details else b"")
        if stream:
            try:
                prefix_bytes(stream)
            except BitstreamError as exc:
                yield number, f"bitstream: {exc}"
    if "original" in values:
        digests = table["original_sha256"].to_pylist()
        for number, (data, sha256) in enumerate(zip(values["original"], digests, strict=True)):
            if data and hashlib.sha256(data).hexdigest() != sha256:
                yield number, "original does not match its SHA-256"


def _corrupt(places: pa.Table, number: int, reason: str) -> CorruptRowError:
    place = places.select(["part", "row_group", "row", "key"]).slice(number, 1).to_pylist()[0]
    return CorruptRowError(place["part"], place["row_group"], place["row"], place["key"], reason)
