"""The filter language: what matches, and that nothing else is understood."""

import contextlib
import json
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicmh_ray.archive.schema import to_table
from dicmh_ray.archive.where import parse_where
from dicmh_ray.errors import WhereError
from tests.archive.rows import failed_row, kept_row, ok_row

DOG = ok_row("dog-1", tags=("dog", "grass"), metadata=json.dumps({"cls": 3, "by": {"name": "Ann"}}))
CAT = replace(ok_row("cat-1", tags=("cat",), metadata=json.dumps({"cls": "3", "labels": ["a"]})),
              width=640, height=480, psnr=40.0)  # fmt: skip
KEPT = kept_row("kept-1", metadata='{"cls": null, "flag": true}')
FAILED = failed_row("failed-1")
TABLE = to_table([DOG, CAT, KEPT, FAILED])


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("'dog' in tags", "d"),
        ("'dog' not in tags", "ckf"),
        ("not 'dog' in tags", "ckf"),
        ("'dog' in tags or 'cat' in tags", "dc"),
        ("'dog' in tags and 'grass' in tags", "d"),
        ("width >= 640", "c"),
        ("640 <= width", "c"),
        ("width < 640", "d"),
        ("not width < 640", "ckf"),
        ("10 < width < 100", "d"),
        ("width > height", "dc"),
        ("width == height", ""),
        ("status == 'failed'", "f"),
        ("status != 'failed'", "dck"),
        ("status in ('failed', 'kept_original')", "kf"),
        ("status not in ['failed']", "dck"),
        ("error is None", "dc"),
        ("error is not None", "kf"),
        ("psnr > 31 and psnr <= 40", "dc"),
        ("psnr == 31.5", "d"),
        ("psnr > -5", "dc"),
        ("'-1' in key", "dckf"),
        ("'cat' in key", "c"),
        ("metadata.cls == 3", "d"),
        ("metadata.cls == '3'", "c"),
        ("metadata.cls != 3", "ckf"),
        ("metadata.cls < 4", "d"),
        ("metadata.cls is None", "kf"),
        ("metadata.by.name == 'Ann'", "d"),
        ("metadata['by']['name'] in ('Ann', 'Bob')", "d"),
        ("'nn' in metadata.by.name", "d"),
        ("'a' in metadata.labels", "c"),
        ("metadata.flag == True", "k"),
        ("metadata.labels > 3", ""),
        ("source_offset == 512 and num_states == 3", "dc"),
        ("True", "dckf"),
        ("False", ""),
        ("True and width >= 640", "c"),
    ],
)
def test_matches(text, matches):
    mask = parse_where(text).test(TABLE).tolist()
    found = [row for row, hit in zip("dckf", mask, strict=True) if hit]
    assert found == list(matches)


def test_an_empty_table_matches_nothing():
    for text in ("'dog' in tags", "width > 3", "metadata.cls == 3", "error is None", "True"):
        assert parse_where(text).test(TABLE.slice(0, 0)).tolist() == []


def test_a_slice_of_a_table_is_judged_by_its_own_rows():
    assert parse_where("'cat' in tags").test(TABLE.slice(1, 2)).tolist() == [True, False]


def test_a_filter_names_the_columns_it_needs():
    assert parse_where("'a' in tags and metadata.x == 1").columns == {"tags", "metadata"}


def test_a_filter_survives_pickle():
    where = pickle.loads(pickle.dumps(parse_where("'dog' in tags")))
    assert where == parse_where("'dog' in tags")
    assert where.test(TABLE).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    "text",
    [
        "", "width", "3", "None", "true", "width >", "nonsense == 3", "base == 'x'", "exif is None",
        "tags == 'dog'", "3 in tags", "width in 3", "tags in ('a',)", "width == 'x'",
        "key == 3", "key == True", "width == None", "width is 3", "metadata == 3", "metadata is None",
        "key.x == 3", "metadata[0] == 3", "metadata.x() == 3", "__import__('os') == 3",
        "(lambda: 1)() == 1", "[x for x in tags] == 1", "width + 1 == 3", "f'{width}' == 'a'",
        "width := 3", "key == b'x'", "width == 1e999999j", "width == 99999999999999999999",
        "width == 3; width == 4", "'a' in prefix_bytes", "width if width else key", "...",
        "not " * 5000 + "width == 3", "(" * 3000, "x" * 20_000, "width == -'a'", "width\0 == 3",
        "width == " + "-" * 300 + "1", "metadata" + ".a" * 3000 + " == 1 and True",
        "width == 0x" + "f" * 9000, "width == 0x" + "f" * 9000 + " and True",
        "key == 'a\ud800'", r"key == 'a\ud800'", r"'\ud800' in tags", r"'\ud800' in key",
        r"metadata['\ud800'] == 1", r"metadata.x in ['\udfff']", r"key in ('\ud800',)",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(WhereError):
        parse_where(text)


@given(st.text(max_size=40))
def test_any_text_is_a_filter_or_a_named_error(text):
    with contextlib.suppress(WhereError):
        assert len(parse_where(text).test(TABLE)) == len(TABLE)


def test_a_message_quotes_what_is_wrong():
    with pytest.raises(WhereError, match="nonsense is no column to filter by"):
        parse_where("width == 3 and nonsense > 3")
    with pytest.raises(WhereError, match="write 'dog' in tags"):
        parse_where("tags == 'dog'")
