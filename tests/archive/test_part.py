"""Parts: whatever the rows, the index points at the very bytes, and limits hold."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicmh_ray.archive.pages import value_ranges
from dicmh_ray.archive.part import (
    INDEX_SCHEMA,
    PartOptions,
    index_part,
    read_index,
    write_index,
    write_parts,
)
from dicmh_ray.archive.schema import (
    ARROW_SCHEMA,
    BLOBS,
    SMALL_COLUMNS,
    EncodedImage,
    from_batch,
    row_crc32c,
)
from dicmh_ray.errors import CorruptObjectError
from tests.archive.rows import mixed_rows, ok_row

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
number = st.none() | st.floats(-(2.0**100), 2.0**100, width=32)
blob = st.binary(max_size=60)


@st.composite
def any_rows(draw):
    """Rows with unique keys and anything in their fields that the format allows."""
    rows = []
    for key in draw(st.lists(text.filter(bool), unique=True, max_size=12)):
        tags = tuple(draw(st.lists(text, max_size=3)))
        scored = draw(st.booleans())
        base, detail = draw(st.binary(min_size=1, max_size=60)), draw(blob)
        ends = (len(base), len(base) + len(detail)) if detail else (len(base),)
        stream = draw(st.booleans())
        rows.append(
            EncodedImage(
                key=key,
                status=draw(st.sampled_from(["ok", "kept_original", "failed"])),
                error=draw(st.none() | text),
                tags=tags,
                tag_scores=tuple(draw(st.floats(0, 1, width=32)) for _ in tags if scored),
                width=draw(st.none() | st.integers(0, 2**31 - 1)),
                bpp=draw(number),
                psnr=draw(number),
                num_states=len(ends) if stream else None,
                source_offset=draw(st.none() | st.integers(0, 2**63 - 1)),
                original_bytes=draw(st.integers(0, 2**63 - 1)),
                exif=draw(st.none() | blob),
                prefix_bytes=ends if stream else (),
                base=base if stream else b"",
                detail=detail if stream else b"",
                original=draw(blob),
            )
        )
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_rows(), st.integers(1, 5), st.integers(1, 300), st.integers(1, 600))
def test_every_value_lies_where_the_index_says(rows, group_rows, group_bytes, part_bytes):
    options = PartOptions(
        row_group_rows=group_rows, row_group_bytes=group_bytes, part_bytes=part_bytes
    )
    found = []
    for part in write_parts("u", rows, footer={}, options=options):
        read = list(from_batch(pq.read_table(pa.BufferReader(part.data))))
        assert index_part(part.name, part.data).equals(part.index)
        assert len(read) == len(part.index) == part.num_rows
        for row, place in zip(read, part.index.to_pylist(), strict=True):
            assert row.crc32c == row_crc32c(row) == place["crc32c"]
            assert row.key == place["key"]
            for name in BLOBS:
                start = place[f"{name}_offset"]
                value = part.data[start : start + place[f"{name}_length"]]
                assert value == getattr(row, name)
        found += read
    expected = sorted(rows, key=lambda row: (row.tags[:1], row.key))
    assert [replace(row, crc32c=0) for row in found] == expected


def test_row_groups_and_parts_stay_within_their_limits():
    rows = [ok_row(f"{i:03d}", size=100) for i in range(50)]
    size = len(rows[0].base) + len(rows[0].detail)
    options = PartOptions(row_group_rows=7, part_bytes=20 * size)
    parts = list(write_parts("u", rows, footer={}, options=options))
    assert [part.num_rows for part in parts] == [20, 20, 10]
    assert [g.num_rows for part in parts for g in part.row_groups] == [7, 7, 6, 7, 7, 6, 7, 3]
    assert len({part.name for part in parts}) == 3
    keys = [key for part in parts for key in part.index["key"].to_pylist()]
    assert keys == [row.key for row in rows]


def test_one_blob_larger_than_every_limit_is_written_alone():
    rows = [ok_row(key, size=100) for key in "abc"]
    parts = list(write_parts("u", rows, footer={}, options=PartOptions(part_bytes=10)))
    assert [part.num_rows for part in parts] == [1, 1, 1]


def test_blobs_of_several_pages_are_indexed():
    rows = [replace(ok_row(f"{i:02d}"), original=bytes([i]) * 300_000) for i in range(12)]
    (part,) = write_parts("u", rows, footer={})
    chunk = pq.ParquetFile(pa.BufferReader(part.data)).metadata.row_group(0).column(25)
    assert chunk.total_compressed_size > 3 * 2**20
    starts = part.index["original_offset"].to_pylist()
    assert [part.data[start] for start in starts] == list(range(12))


def test_the_same_rows_give_the_same_bytes():
    one, two = (list(write_parts("u", rows, footer={})) for rows in (mixed_rows(), mixed_rows()))
    assert [part.sha256 for part in one] == [part.sha256 for part in two]


def test_blob_columns_are_stored_plain_and_the_others_compressed():
    (part,) = write_parts("u", mixed_rows(), footer={"dicmh.unit": "u"})
    file = pq.ParquetFile(pa.BufferReader(part.data))
    assert file.schema_arrow.equals(ARROW_SCHEMA)
    assert file.schema_arrow.metadata[b"dicmh.unit"] == b"u"
    group = file.metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(26)}
    for name, column in columns.items():
        is_blob = name in BLOBS
        assert column.compression == ("UNCOMPRESSED" if is_blob else "ZSTD")
        assert column.is_stats_set == (not is_blob)
        if is_blob:
            assert not column.has_dictionary_page
    assert columns["tags.list.element"].has_dictionary_page
    assert file.schema.names[0] == "key"
    end_of_small = max(
        columns[n].data_page_offset for n in columns if n.split(".")[0] in SMALL_COLUMNS
    )
    assert end_of_small < min(columns[name].data_page_offset for name in BLOBS)


def test_a_repeated_key_is_refused():
    with pytest.raises(ValueError, match="a key of unit u is repeated"):
        list(write_parts("u", [ok_row("a"), ok_row("a")], footer={}))


def test_an_index_survives_its_object():
    (part,) = write_parts("u", mixed_rows(), footer={})
    data = write_index(part.index)
    assert read_index("index/u", data).equals(part.index)
    assert write_index(part.index) == data
    assert part.index.schema.equals(INDEX_SCHEMA)
    with pytest.raises(CorruptObjectError, match="not a readable index"):
        read_index("index/u", data[:-1])
    with pytest.raises(CorruptObjectError, match="columns are not those"):
        read_index("index/u", part.data)


def blob_chunk(part):
    metadata = pq.ParquetFile(pa.BufferReader(part.data)).metadata
    column = metadata.row_group(0).column(23)
    start = column.data_page_offset
    return start, start + column.total_compressed_size, metadata.num_rows


def test_a_page_walk_survives_any_damage():
    """Every byte of a blob column flipped, all eight bits: the right ranges, or the named error."""
    (part,) = write_parts("u", mixed_rows(), footer={})
    start, stop, num_rows = blob_chunk(part)
    sound = value_ranges(part.data, start, stop, num_rows, "p")
    refused = 0
    for at in range(start, stop):
        for bit in range(8):
            data = bytearray(part.data)
            data[at] ^= 1 << bit
            try:
                found = value_ranges(bytes(data), start, stop, num_rows, "p")
            except CorruptObjectError:
                refused += 1
            else:
                assert np.array_equal(found.offsets, sound.offsets)
                assert np.array_equal(found.lengths, sound.lengths)
    assert refused > 0.9 * 8 * (stop - start)


@given(st.binary(max_size=200), st.integers(0, 5))
def test_a_page_walk_over_garbage_ends_in_the_named_error(data, num_values):
    try:
        ranges = value_ranges(data, 0, len(data), num_values, "p")
    except CorruptObjectError:
        return
    assert len(ranges.offsets) == num_values
