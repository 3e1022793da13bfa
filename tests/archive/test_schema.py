"""The code and the published contract say the same; the row checksum covers every column."""

import json
import struct
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pytest

from dicmh_ray.archive import ARROW_SCHEMA, BLOBS, SMALL_COLUMNS, EncodedImage, row_crc32c
from dicmh_ray.archive.codec_files import FILES_FORMAT, FILES_VERSION, write_codec_files
from dicmh_ray.archive.commit import COMMIT_FORMAT, COMMIT_VERSION
from dicmh_ray.archive.manifest import MANIFEST_FORMAT, MANIFEST_VERSION
from dicmh_ray.archive.part import INDEX_SCHEMA
from dicmh_ray.archive.plan import PLAN_FORMAT, PLAN_VERSION, Plan
from dicmh_ray.archive.schema import (
    COLUMNS,
    SCHEMA_VERSION,
    STATUSES,
    TIERS,
    canonical_row,
    check_row,
    from_batch,
    to_table,
)
from dicmh_ray.archive.store import open_store
from dicmh_ray.bitstream import crc32c
from tests.archive.rows import CODEC_FILES, CODEC_ID, failed_row, kept_row, ok_row, plan_of

SCHEMAS = Path(__file__).parents[2] / "schemas"


def described(field):
    """One column as archive.v1.json describes it."""
    column = {
        "id": int(field.metadata[b"PARQUET:field_id"]),
        "name": field.name,
        "type": str(field.type.value_type) if pa.types.is_list(field.type) else str(field.type),
        "list": pa.types.is_list(field.type),
        "required": not field.nullable,
        "unit": field.metadata[b"unit"].decode(),
        "doc": field.metadata[b"doc"].decode(),
    }
    if column["list"]:
        column["element_id"] = int(field.type.value_field.metadata[b"PARQUET:field_id"])
    return column


def contract():
    return {
        "version": SCHEMA_VERSION,
        "part": [described(field) for field in ARROW_SCHEMA],
        "index": [described(field) for field in INDEX_SCHEMA],
        "blobs": list(BLOBS),
        "statuses": list(STATUSES),
        "tiers": list(TIERS),
        "objects": {
            PLAN_FORMAT: PLAN_VERSION,
            COMMIT_FORMAT: COMMIT_VERSION,
            MANIFEST_FORMAT: MANIFEST_VERSION,
            FILES_FORMAT: FILES_VERSION,
        },
    }


def test_the_published_schema_is_the_one_in_the_code():
    assert json.loads((SCHEMAS / "archive.v1.json").read_text()) == contract()


def test_a_row_has_one_field_for_each_column():
    assert tuple(f.name for f in fields(EncodedImage)) == tuple(c.name for c in COLUMNS)
    assert (*SMALL_COLUMNS, *BLOBS) == tuple(ARROW_SCHEMA.names), "blobs come last"
    ids = [column.field_id for column in COLUMNS]
    assert len(set(ids)) == len(ids)


def test_the_checksum_of_a_known_row_never_changes():
    """Golden: the canonical bytes written out by hand, as archive.v1.md specifies them."""
    row = EncodedImage(
        key="k", status="ok", tags=("ä", "b"), width=3, bpp=0.5, prefix_bytes=(2,), num_states=1,
        tier="faithful", exif=b"", base=b"\x01\x02",
    )  # fmt: skip

    def text(value):
        return b"\x01" + struct.pack("<I", len(value.encode())) + value.encode()

    null, no_list = b"\x00", b"\x01\x00\x00\x00\x00"
    expected = b"".join(
        [
            text("k"), text("ok"), null,
            b"\x01\x02\x00\x00\x00" + b"\x02\x00\x00\x00\xc3\xa4" + b"\x01\x00\x00\x00b", no_list,
            b"\x01\x03\x00\x00\x00\x00\x00\x00\x00", null, b"\x01\x00\x00\x00\x3f",
            text("faithful"), null, null, null, b"\x01" + struct.pack("<q", 1),
            text(""), null, text(""), b"\x01" + bytes(8), null, text(""), null, text("{}"),
            b"\x01\x01\x00\x00\x00" + struct.pack("<q", 2),
            b"\x01\x02\x00\x00\x00\x01\x02", text(""), text(""),
        ]
    )  # fmt: skip
    assert canonical_row(row) == expected
    assert row_crc32c(row) == crc32c(expected) == 0x1DEDF44D


CHANGED = {
    "key": "other", "status": "failed", "error": "", "tags": ("dog", ""), "tag_scores": (0.5,),
    "width": 17, "height": None, "bpp": 1.0, "tier": "generative", "psnr": None,
    "worst_tile_psnr": -0.0, "ms_ssim": 0.0, "num_states": None, "source_uri": "x",
    "source_offset": 0, "original_sha256": "", "original_bytes": 1, "original_format": None,
    "exif": b"", "icc": b"", "metadata": "{ }", "prefix_bytes": (), "base": b"", "detail": b"x",
    "original": b"x",
}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in fields(EncodedImage) if f.name != "crc32c"])
def test_the_checksum_covers(name):
    row = ok_row("a", tags=("dog",))
    changed = replace(row, **{name: CHANGED[name]})
    assert row_crc32c(changed) != row_crc32c(row)


def test_moving_bytes_between_columns_changes_the_checksum():
    row = kept_row("a")
    assert row_crc32c(replace(row, base=b"ab", detail=b"")) != row_crc32c(
        replace(row, base=b"a", detail=b"b")
    )
    assert row_crc32c(replace(row, tags=("ab",))) != row_crc32c(replace(row, tags=("a", "b")))


def test_rows_survive_arrow():
    rows = [ok_row("a", tags=("x", "y"), tag_scores=(0.5, 0.25)), kept_row("b"), failed_row("c")]
    rows = [replace(row, bpp=None, crc32c=2**32 - 1) for row in rows]
    assert list(from_batch(to_table(rows))) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": ""}, "key is empty"),
        ({"status": "fine"}, "unknown"),
        ({"tier": "best"}, "unknown"),
        ({"tag_scores": (0.5,)}, "2 tags but 1 scores"),
        ({"psnr": float("inf")}, "psnr is inf"),
        ({"bpp": float("nan")}, "bpp is nan"),
        ({"metadata": "[]"}, "metadata is no JSON object"),
        ({"metadata": "{"}, "metadata is no JSON object"),
        ({"detail": b""}, "prefix_bytes"),
        ({"num_states": 2}, "num_states 2"),
        ({"base": b"", "detail": bytes(50)}, "prefix_bytes"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_row(replace(ok_row("a", tags=("x", "y")), **change))


def test_a_base_that_ends_inside_a_state_is_refused():
    row = ok_row("a")
    stream = row.base + row.detail
    with pytest.raises(ValueError, match="ends inside a state"):
        check_row(replace(row, base=stream[:-3], detail=stream[-3:]))


def test_a_plan_is_known_by_its_content():
    plan = plan_of("u", "v", target=0.5)
    assert Plan.from_bytes(plan.to_bytes()).plan_id == plan.plan_id
    assert plan_of("u", "v", target=0.25).plan_id != plan.plan_id
    assert plan_of("v", "u", target=0.5).plan_id != plan.plan_id
    assert json.loads(plan.to_bytes())["sha256"] == plan.plan_id


@pytest.mark.parametrize("units", [("a", "A"), ("../x",), ("",), (".x",), ("a/b",), ("x" * 101,)])
def test_a_unit_name_that_is_no_file_name_is_refused(units):
    with pytest.raises(ValueError, match="not fit for a file name"):
        plan_of(*units)


def test_a_plan_refuses_storage_options():
    with pytest.raises(ValueError, match="credentials"):
        plan_of("u", source={"storage_options": {"secret": "x"}})
    plan_of("u", source={"storage_options": {}})


def test_codec_files_are_never_replaced(tmp_path):
    store = open_store(str(tmp_path))
    write_codec_files(store, CODEC_ID, CODEC_FILES)
    write_codec_files(store, CODEC_ID, CODEC_FILES)
    with pytest.raises(Exception, match="holds other bytes"):
        write_codec_files(store, CODEC_ID, {**CODEC_FILES, "config.json": b"{}"})


def test_the_json_objects_match_their_published_schemas(small_archive):
    store = open_store(small_archive)
    for schema, name in [
        ("plan.v1.schema.json", "plan.json"),
        ("commit.v1.schema.json", "commit/000000.json"),
        ("manifest.v1.schema.json", "manifest/000001.json"),
    ]:
        check(json.loads(store.get(name)), json.loads((SCHEMAS / schema).read_text()), name)


def check(value, schema, where):
    """The few JSON Schema words that the published schemas use."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int}
    if "const" in schema:
        assert value == schema["const"], where
    if "type" in schema:
        assert isinstance(value, kinds[schema["type"]]), where
    if "required" in schema:
        assert set(schema["required"]) <= set(value), where
    if schema.get("additionalProperties") is False:
        assert set(value) <= set(schema["properties"]), where
    for name, inner in schema.get("properties", {}).items():
        if name in value:
            check(value[name], inner, f"{where}.{name}")
    for i, item in enumerate(value if "items" in schema else ()):
        check(item, schema["items"], f"{where}[{i}]")
