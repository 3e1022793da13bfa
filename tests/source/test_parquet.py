"""Parquet of every shape that people keep images in."""

import datetime
import decimal
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dicmh_ray.errors import SourceChangedError, SourceColumnsError, SourceFormatError
from dicmh_ray.source import SourceImage, SourceOptions, plan_units, read_unit
from tests.source.faults import FaultyFileSystem
from tests.source.pictures import jpeg

JPEGS = [jpeg(seed) for seed in range(6)]


def read(path: object, **options: object) -> list[SourceImage]:
    settings = SourceOptions(**options)
    return [
        image
        for unit in plan_units([str(path)], options=settings)
        for image in read_unit(unit, options=settings)
    ]


def write(path, columns: dict[str, object], **options: object) -> None:
    pq.write_table(pa.table(columns), path, **options)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize("name", ["image", "jpg", "PNG", "img", "bytes", "content", "whatever"])
def test_the_image_column_is_found_by_name_or_as_the_only_binary_one(tmp_path, kind, name):
    write(tmp_path / "a.parquet", {"key": ["x", "y"], name: pa.array(JPEGS[:2], kind)})
    images = read(tmp_path / "a.parquet")
    assert [(image.key, image.data) for image in images] == [("x", JPEGS[0]), ("y", JPEGS[1])]
    assert [image.source_offset for image in images] == [0, 1]


def test_hugging_face_structs_give_bytes_and_path(tmp_path):
    rows = [
        {"bytes": JPEGS[0], "path": "a/1.jpg"},
        {"bytes": JPEGS[1], "path": None},
        {"bytes": None, "path": "gone.jpg"},
        None,
        {"bytes": b"", "path": "empty.jpg"},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    write(tmp_path / "h.parquet", {"image": pa.array(rows, kind), "label": [3, 1, 4, 1, 5]})
    images = read(tmp_path / "h.parquet", tag_fields=("label",))
    assert [(image.key, image.error and image.error.reason) for image in images] == [
        ("a/1.jpg", None),
        ("h-00000001", None),
        ("gone.jpg", "null"),
        ("h-00000003", "null"),
        ("empty.jpg", "empty"),
    ]
    assert images[0].metadata == {"label": 3, "image.path": "a/1.jpg"}
    assert images[0].tags == ("3",)


def test_columns_can_be_named_and_wrong_names_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, {"image": [b"no", b"no"], "other": JPEGS[:2], "n": [7, 8], "f": [0.5, 1.5]})
    images = read(path, image_column="other", key_column="n")
    assert [(image.key, image.data) for image in images] == [("7", JPEGS[0]), ("8", JPEGS[1])]
    assert images[0].metadata == {"image": "bm8=", "n": 7, "f": 0.5}
    for options in ({"image_column": "f"}, {"image_column": "zz"}, {"key_column": "f"}):
        with pytest.raises(SourceColumnsError, match="column"):
            read(path, **options)


def test_nothing_but_the_image_and_a_mere_key_is_left_out_of_the_metadata(tmp_path):
    path = tmp_path / "a.parquet"
    write(
        path,
        {
            "image": [{"bytes": JPEGS[0], "path": "p.jpg", "caption": "c", "when": None}],
            "image.path": ["a column's"],
            "key": [3.5],
            "id": ["row"],
            "__key__": ["sample"],
        },
    )
    fields = {"image.path": "a column's", "image.path~2": "p.jpg", "image.caption": "c"}
    (image,) = read(path)
    assert (image.key, image.metadata) == ("sample", fields | {"key": 3.5, "id": "row"})
    (image,) = read(path, key_column="id")
    wanted = fields | {"key": 3.5, "id": "row", "__key__": "sample"}
    assert (image.key, image.metadata) == ("row", wanted)
    (image,) = read(path, max_metadata_bytes=20, key_column="id")
    assert "image.path~2" in image.metadata["__dropped__"]


@pytest.mark.parametrize("is_small", [True, False])
def test_columns_that_are_not_clear_end_the_planning(tmp_path, is_small):
    write(tmp_path / "a.parquet", {"image": JPEGS[:1]})
    write(tmp_path / "b.parquet", {"left": JPEGS[:1], "right": JPEGS[:1]})
    options = SourceOptions() if is_small else SourceOptions(unit_bytes=1)
    with pytest.raises(SourceColumnsError, match=r"b\.parquet.*'left', 'right'"):
        plan_units([str(tmp_path)], options=options)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string()), ("path", pa.string())])
    write(tmp_path / "b.parquet", {"image": pa.nulls(1, kind)})
    with pytest.raises(SourceColumnsError, match="two fields of one name"):
        plan_units([str(tmp_path)], options=options)


def test_a_small_damaged_file_does_not_end_the_planning_of_the_others(tmp_path):
    write(tmp_path / "a.parquet", {"image": JPEGS[:1]})
    (tmp_path / "b.parquet").write_bytes(b"no table")
    whole, damaged = plan_units([str(tmp_path)])
    assert (whole.start, whole.stop) == (None, None)
    with pytest.raises(SourceFormatError, match="Parquet"):
        list(read_unit(damaged))


def test_two_unnamed_binary_columns_are_not_guessed_between(tmp_path):
    write(tmp_path / "a.parquet", {"a": JPEGS[:1], "b": JPEGS[:1]})
    with pytest.raises(SourceColumnsError, match="image_column"):
        read(tmp_path / "a.parquet")
    write(tmp_path / "a.parquet", {"a": ["text"]})
    with pytest.raises(SourceColumnsError, match="leave it out"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["key", "__key__", "id", "image_id", "path", "filename"])
def test_key_columns_are_found_and_duplicates_suffixed(tmp_path, name):
    write(tmp_path / "a.parquet", {"image": JPEGS[:4], name: ["a", "a", None, ""]})
    found = [image.key for image in read(tmp_path / "a.parquet")]
    assert found == ["a", "a~2", "a-00000002", "a-00000003"]


def test_other_columns_become_json(tmp_path):
    day = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC)
    columns = {
        "image": JPEGS[:1],
        "text": ["ü"],
        "none": pa.array([None], pa.string()),
        "flag": [True],
        "nan": [float("nan")],
        "when": [day],
        "date": [day.date()],
        "nanos": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns")),
        "far": pa.array([2**61], pa.timestamp("ms")),
        "span": pa.array([1500], pa.duration("ms")),
        "price": [decimal.Decimal("1.10")],
        "blob": [b"\x00\xff"],
        "list": [[1, 2, None]],
        "struct": [{"a": [{"b": b"x"}], "t": day}],
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "dict": pa.array(["red"]).dictionary_encode(),
        "small": pa.array([7], pa.uint8()),
        "half": pa.array([0.5], pa.float32()),
    }
    write(tmp_path / "a.parquet", columns)
    (image,) = read(tmp_path / "a.parquet", tag_fields=("dict", "list", "struct.a"))
    metadata = dict(image.metadata)
    json.dumps(metadata, allow_nan=False).encode()
    assert metadata.pop("nanos").startswith("2023-11-14")
    assert metadata.pop("far")
    assert metadata == {
        "text": "ü",
        "none": None,
        "flag": True,
        "nan": "nan",
        "when": "2024-02-29T12:30:00+00:00",
        "date": "2024-02-29",
        "span": 1.5,
        "price": "1.10",
        "blob": "AP8=",
        "list": [1, 2, None],
        "struct": {"a": [{"b": "eA=="}], "t": "2024-02-29T12:30:00+00:00"},
        "map": [["k", 1]],
        "dict": "red",
        "small": 7,
        "half": 0.5,
    }
    assert image.tags == ("red", "1", "2")


def test_large_metadata_is_listed_and_large_images_are_errors(tmp_path):
    write(tmp_path / "a.parquet", {"image": [JPEGS[0], bytes(9000)], "t": ["x" * 5000, "y"]})
    first, second = read(tmp_path / "a.parquet", max_image_bytes=8000, max_metadata_bytes=1000)
    assert first.metadata == {"__dropped__": {"t": 5000}}
    assert (second.data, second.error.reason) == (b"", "larger than max_image_bytes")


def test_row_groups_become_units_of_bounded_size(tmp_path):
    path = tmp_path / "a.parquet"
    images = [JPEGS[i % 6] + bytes([i]) for i in range(40)]
    write(path, {"image": images}, row_group_size=5, compression="none", use_dictionary=False)
    options = SourceOptions(unit_bytes=25_000)
    units = plan_units([str(path)], options=options)
    ranges = [(unit.start, unit.stop) for unit in units]
    assert len(units) > 2
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 8
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert len({unit.etag for unit in units}) == 1
    found = [image for unit in units for image in read_unit(unit, options=options)]
    assert [image.data for image in found] == images
    assert [image.source_offset for image in found] == list(range(40))
    assert [image.key for image in found] == [f"a-{row:08d}" for row in range(40)]
    assert found == read(path)


def test_an_empty_file_has_no_images(tmp_path):
    write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())})
    assert read(tmp_path / "a.parquet") == []


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "footer"])
def test_what_is_no_parquet_is_named(tmp_path, damage):
    path = tmp_path / "a.parquet"
    write(path, {"image": JPEGS})
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[:-100],
            "text": b"hello, world" * 9,
            "empty": b"",
            "footer": data[:-8] + b"\xff\xff\xff\x7fPAR1",
        }[damage]
    )
    with pytest.raises(SourceFormatError, match="Parquet"):
        read(path)


def test_damage_in_a_later_row_group_leaves_the_earlier_ones(tmp_path):
    path = tmp_path / "a.parquet"
    write(
        path,
        {"image": JPEGS},
        row_group_size=1,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=False,
    )
    data = bytearray(path.read_bytes())
    at = data.index(JPEGS[4]) + 50
    data[at] ^= 1
    path.write_bytes(data)
    images = []
    with pytest.raises(SourceFormatError, match="Parquet"):
        images.extend(read_unit(plan_units([str(path)])[0]))
    assert [image.data for image in images] == JPEGS[:4]


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, {"image": JPEGS})
    (unit,) = plan_units([str(path)])
    write(path, {"image": JPEGS[:2]})
    with pytest.raises(SourceChangedError, match="changed"):
        list(read_unit(unit))


def test_broken_connections_lose_and_repeat_no_row(tmp_path):
    path = tmp_path / "a.parquet"
    images = [JPEGS[i % 6] + bytes(3000) for i in range(30)]
    write(path, {"image": images, "n": list(range(30))}, row_group_size=7, compression="none")
    options = SourceOptions(retry_base_s=0.0001)
    FaultyFileSystem.calm()
    (unit,) = plan_units([f"faulty://{path}"], options=options)
    expected = list(read_unit(unit, options=options))
    assert [image.data for image in expected] == images
    for offset in range(4, unit.num_bytes, 10 * 1024):
        FaultyFileSystem.calm()
        FaultyFileSystem.break_at = [offset]
        assert list(read_unit(unit, options=options)) == expected
    FaultyFileSystem.calm()
    FaultyFileSystem.break_at, FaultyFileSystem.is_permanent = [unit.num_bytes // 2], True
    with pytest.raises(ConnectionResetError):
        list(read_unit(unit, options=options))
    FaultyFileSystem.calm()
