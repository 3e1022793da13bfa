"""The reader: right rows, and no byte more than was asked for."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from dicmh_ray.archive import (
    BLOBS,
    SMALL_COLUMNS,
    PartOptions,
    create_archive,
    open_snapshot,
    open_store,
)
from dicmh_ray.archive.ranges import ByteRange, SparseFile, read_ranges
from dicmh_ray.archive.store import LocalStore
from dicmh_ray.bitstream import parse_bitstream
from dicmh_ray.errors import (
    CorruptObjectError,
    CorruptRowError,
    RowNotFoundError,
    WhereError,
)
from dicmh_ray.reader import ArchiveReader
from tests.archive.rows import CODEC_FILES, kept_row, mixed_rows, ok_row, plan_of


class CountingStore(LocalStore):
    """Remembers every range that is read."""

    def __init__(self, uri):
        super().__init__(uri)
        self.reads = []

    def get(self, name):
        data = super().get(name)
        self.reads.append((name, 0, len(data)))
        return data

    def get_range(self, name, start, length):
        self.reads.append((name, start, length))
        return super().get_range(name, start, length)

    def of_parts(self):
        return [(start, length) for name, start, length in self.reads if name.startswith("data/")]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Address and rows of an archive of two units in row groups of five."""
    uri = str(tmp_path_factory.mktemp("reader") / "archive")
    job = create_archive(
        uri,
        plan=plan_of("000000", "000001"),
        codec_files=CODEC_FILES,
        options=PartOptions(row_group_rows=5),
    )
    rows = mixed_rows(0, 23)
    rows.append(ok_row("large", tags=("large",), size=5000))
    job.commit_unit("000000", rows[:12])
    job.commit_unit("000001", rows[12:])
    job.finalize()
    return uri, {row.key: row for row in rows}


@pytest.fixture
def counted(archive):
    """A reader whose requests are counted, its indexes loaded."""
    uri, rows = archive
    snapshot = open_snapshot(uri)
    store = CountingStore(uri)
    reader = ArchiveReader(replace(snapshot, store=store))
    reader.get("large", columns="index", blobs=())
    store.reads.clear()
    return reader, store, rows


def blob_spans(reader):
    """All (start, stop) of blob values, by part."""
    spans = {}
    for table in reader.snapshot.read_indexes():
        for place in table.to_pylist():
            for blob in BLOBS:
                start, length = place[f"{blob}_offset"], place[f"{blob}_length"]
                if length:
                    spans.setdefault(place["part"], []).append((start, start + length))
    return spans


def test_every_row_can_be_fetched_by_key(archive):
    uri, rows = archive
    reader = ArchiveReader.open(uri)
    assert len(reader) == len(rows)
    assert set(reader.keys()) == set(rows)
    for key, row in rows.items():
        assert replace(reader.get(key), crc32c=0) == row
        assert replace(reader.get(key, blobs=()), crc32c=0) == replace(
            row, base=b"", detail=b"", original=b""
        )
    for key in ("", "nothing", "img-9999", "zzz"):
        with pytest.raises(RowNotFoundError):
            reader.get(key)


def test_base_alone_is_one_request_of_exactly_its_bytes(counted):
    reader, store, rows = counted
    row = reader.get("large", blobs=("base",), columns="index")
    assert row.base == rows["large"].base
    assert row.detail == b""
    ((_, length),) = store.of_parts()
    assert length == len(row.base)


@pytest.mark.parametrize("states", [1, 2, 3, 9, None])
def test_a_bitstream_prefix_reads_the_bytes_of_its_states(counted, states):
    reader, store, rows = counted
    expected = rows["large"].base + rows["large"].detail
    if states is not None and states < 3:
        expected = expected[: rows["large"].prefix_bytes[states - 1]]
    stream = reader.bitstream("large", states)
    assert stream == expected
    assert len(parse_bitstream(stream).states) == min(states or 3, 3)
    assert sum(length for _, length in store.of_parts()) == len(expected)
    assert len(store.of_parts()) == (1 if states in (1, 2) else 2)


def test_a_whole_row_costs_a_footer_a_row_group_and_its_blobs(counted):
    reader, store, rows = counted
    assert replace(reader.get("large"), crc32c=0) == rows["large"]
    assert len(store.of_parts()) == 4
    store.reads.clear()
    reader.get("large")
    assert len(store.of_parts()) == 2, "footer and small columns are kept"


def test_reading_small_columns_touches_no_blob_byte(counted):
    reader, store, rows = counted
    keys = [key for batch in reader.scan() for key in batch["key"].to_pylist()]
    assert sorted(keys) == sorted(rows)
    spans = blob_spans(reader)
    reads = [read for read in store.reads if read[0].startswith("data/")]
    assert reads
    for name, start, length in reads:
        assert not any(start < stop and first < start + length for first, stop in spans[name])


def test_columns_of_the_index_cost_no_request_to_a_part(counted):
    reader, store, rows = counted
    batches = list(reader.scan(["key", "tags", "width", "bpp"], where="'dog' in tags"))
    keys = [key for batch in batches for key in batch["key"].to_pylist()]
    assert sorted(keys) == sorted(key for key, row in rows.items() if "dog" in row.tags)
    assert batches[0].schema.names == ["key", "tags", "width", "bpp"]
    assert store.reads == []


def test_only_matching_rows_have_their_blobs_read(counted):
    reader, store, rows = counted
    found = list(reader.rows("key == 'large'", blobs=("base",)))
    assert [row.base for row in found] == [rows["large"].base]
    touched = sum(length for start, length in store.of_parts())
    assert len(rows["large"].base) < touched < len(rows["large"].base) + 20_000
    assert len({name for name, *_ in store.reads}) == 1, "the other part is left alone"


def test_a_metadata_filter_reads_metadata_first(counted):
    reader, _, rows = counted
    keys = {row.key for row in reader.rows("metadata.cls == 5")}
    assert keys == {"large"}
    assert len(list(reader.rows("metadata.cls == 8"))) == sum(
        row.status == "ok" and len(key) == 8 for key, row in rows.items()
    )


@pytest.mark.parametrize("states", [1, 2, 3, None])
def test_a_scan_cuts_bitstreams_after_the_states_asked_for(counted, states):
    reader, _, rows = counted
    for row in reader.rows(blobs=("base", "detail"), states=states):
        whole = rows[row.key].base + rows[row.key].detail
        cut = rows[row.key].prefix_bytes[:states]
        assert row.base + row.detail == whole[: cut[-1] if cut else 0]


def test_one_state_of_a_scan_leaves_detail_unread(counted):
    reader, store, _ = counted
    spans = []
    for table in reader.snapshot.read_indexes():
        for place in table.to_pylist():
            if place["detail_length"] > 5000:
                spans.append(place["detail_offset"])
    store.reads.clear()
    list(reader.scan(["key", "base", "detail"], states=1))
    assert len(spans) == 1
    assert not any(start <= spans[0] < start + length for start, length in store.of_parts())


def test_a_scan_gives_the_columns_asked_for_in_schema_order(archive):
    uri, rows = archive
    reader = ArchiveReader.open(uri)
    for columns in (["original", "key"], ["detail"], ["status"], [*BLOBS, *SMALL_COLUMNS]):
        for batch in reader.scan(columns):
            assert set(batch.schema.names) == set(columns)
            batch.validate(full=True)
    for batch in reader.scan(["key", "detail"]):
        for key, detail in zip(*(batch[i].to_pylist() for i in (0, 1)), strict=True):
            assert detail == rows[key].detail
    with pytest.raises(ValueError, match="no such columns"):
        list(reader.scan(["key", "nothing"]))
    with pytest.raises(ValueError, match="states is 0"):
        list(reader.scan(["base"], states=0))
    with pytest.raises(WhereError):
        list(reader.scan(where="width +"))


def test_fragments_cover_the_archive_and_can_be_read_anywhere(archive):
    uri, rows = archive
    reader = ArchiveReader.open(uri)
    fragments = reader.fragments()
    assert sum(fragment.num_rows for fragment in fragments) == len(rows)
    assert max(fragment.num_rows for fragment in fragments) == 5
    elsewhere = pickle.loads(pickle.dumps(reader))
    keys = [
        key
        for fragment in pickle.loads(pickle.dumps(fragments))
        for key in elsewhere.scan_fragment(fragment, ["key"])["key"].to_pylist()
    ]
    assert keys == list(reader.keys())
    assert reader.scan_fragment(fragments[0], where="key == 'nothing'") is None
    with pytest.raises(CorruptObjectError, match="row group 99 is not indexed"):
        reader.scan_fragment(replace(fragments[0], row_group=99))


def test_a_reader_serves_many_threads(archive):
    uri, rows = archive
    reader = ArchiveReader.open(uri)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.get, [*rows] * 4))
    assert all(replace(row, crc32c=0) == rows[row.key] for row in found)


def test_an_open_reader_does_not_see_later_commits(tmp_path):
    uri = str(tmp_path)
    job = create_archive(uri, plan=plan_of("a", "b"), codec_files=CODEC_FILES)
    job.commit_unit("a", mixed_rows(0, 2))
    reader = ArchiveReader.open(uri)
    job.commit_unit("b", mixed_rows(2, 2))
    assert len(reader) == len(list(reader.rows())) == 2
    assert len(ArchiveReader.open(uri)) == 4


def test_a_damaged_blob_is_refused_by_every_way_of_reading(tmp_path):
    uri = str(tmp_path)
    job = create_archive(uri, plan=plan_of("a"), codec_files=CODEC_FILES)
    job.commit_unit("a", [ok_row("x"), kept_row("y")])
    store = open_store(uri)
    (name,) = store.list("data/")
    data = bytearray(store.get(name))
    for place in open_snapshot(uri).read_indexes()[0].to_pylist():
        for blob in BLOBS:
            if place[f"{blob}_length"]:
                data[place[f"{blob}_offset"] + place[f"{blob}_length"] - 1] ^= 1
    store.put(name, bytes(data))
    reader = ArchiveReader.open(uri)
    assert len(list(reader.rows())) == 2
    for read in (
        lambda: reader.get("x"),
        lambda: reader.get("x", blobs=("base",)),
        lambda: reader.get("x", blobs=("detail",)),
        lambda: reader.bitstream("x", 2),
        lambda: reader.get("y", blobs=("original",)),
        lambda: list(reader.scan(["base"])),
        lambda: list(reader.scan(["detail"])),
        lambda: list(reader.scan(["original"])),
        lambda: list(reader.rows(blobs=BLOBS)),
    ):
        with pytest.raises(CorruptRowError) as caught:
            read()
        assert caught.value.part == name
        assert caught.value.key in ("x", "y")
    assert reader.bitstream("x", 1)
    with pytest.raises(ValueError, match="original cannot be checked"):
        reader.get("y", blobs=("original",), columns="index")


def test_rows_beside_a_unit_that_is_lost_are_read_as_they_were(tmp_path):
    uri = str(tmp_path)
    job = create_archive(uri, plan=plan_of("a", "b"), codec_files=CODEC_FILES)
    for unit in "ab":
        job.commit_unit(unit, [ok_row(f"of-{unit}")])
    job.finalize()
    whole = ArchiveReader.open(uri).get("of-b")
    store = open_store(uri)
    for name in [open_snapshot(uri).parts[0].name, *store.list("index/")]:
        store.delete(name)
    reader = ArchiveReader.open(uri)
    ((number, row),) = reader.numbered(blobs=BLOBS, on_error="skip")
    assert row == reader.read_row(number) == whole
    assert [fault.reason for fault in reader.faults] == ["is missing"]
    for read in (lambda: reader.get("of-b"), lambda: reader.read_rows(np.array([number]))):
        with pytest.raises(CorruptObjectError, match="is missing"):
            read()


def test_a_missing_part_is_a_damaged_object(tmp_path):
    uri = str(tmp_path)
    job = create_archive(uri, plan=plan_of("a"), codec_files=CODEC_FILES)
    job.commit_unit("a", [ok_row("x")])
    store = open_store(uri)
    (name,) = store.list("data/")
    store.delete(name)
    reader = ArchiveReader.open(uri)
    assert list(reader.keys()) == ["x"]
    for read in (lambda: reader.get("x"), lambda: reader.bitstream("x")):
        with pytest.raises(CorruptObjectError, match="is missing"):
            read()


def test_neighbouring_ranges_share_a_request(tmp_path):
    store = CountingStore(str(tmp_path))
    data = bytes(range(256)) * 40
    store.put("x", data)
    ranges = [ByteRange(5000, 10), ByteRange(0, 100), ByteRange(104, 50), ByteRange(7, 0)]
    found = read_ranges(store, "x", ranges, max_gap=4)
    assert found == [data[r.start : r.start + r.length] for r in ranges]
    assert [read[1:] for read in store.reads] == [(0, 154), (5000, 10)]
    overlapping = [ByteRange(0, 1000), ByteRange(10, 20), ByteRange(500, 600)]
    found = read_ranges(store, "x", overlapping, max_gap=0)
    assert found == [data[r.start : r.start + r.length] for r in overlapping]


def test_a_sparse_file_reads_like_a_file(tmp_path):
    store = CountingStore(str(tmp_path))
    store.put("x", bytes(range(100)))
    file = SparseFile(store, "x", 100)
    file.hold(10, bytes(range(10, 30)))
    file.seek(12)
    assert file.read(5) == bytes(range(12, 17))
    assert store.reads == []
    assert file.seek(-3, 2) == 97
    assert file.read() == bytes([97, 98, 99])
    assert file.read(10) == b""
    assert file.tell() == file.size() == 100


def test_archive_and_reader_load_neither_torch_nor_ray():
    code = (
        "import sys, dicmh_ray.archive, dicmh_ray.reader;"
        "bad = {'torch', 'ray', 'PIL', 'typer', 's3fs'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
