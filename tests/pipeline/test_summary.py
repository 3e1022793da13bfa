"""Summaries add up, survive their short form, and stay small."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray.archive import open_snapshot
from dicmh_ray.archive.schema import EncodedImage
from dicmh_ray.pipeline.histogram import Histogram, Scale
from dicmh_ray.pipeline.summary import (
    EXAMPLES_OF_UNIT,
    WORST_KEPT,
    WORST_OF_UNIT,
    RowSummary,
)
from dicmh_ray.ray_plugin import compress
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, write_tar

SCALES = st.sampled_from([Scale(1.0), Scale(0.1), Scale(0.5, is_log=True), Scale(2, is_log=True)])
QUICK = settings(max_examples=40, deadline=None)
VALUES = st.lists(st.floats(1e-3, 100), max_size=20)


def histogram(scale, values):
    made = Histogram(scale=scale)
    for value in values:
        made.add(value)
    return made


def row(key, *, psnr=None, error=None, original_bytes=1000):
    is_ok = error is None
    return EncodedImage(
        key=key,
        status="ok" if is_ok else "failed",
        error=error,
        tier="faithful" if is_ok else "none",
        source_uri="x",
        original_sha256="",
        original_bytes=original_bytes,
        width=10 if is_ok else None,
        height=10 if is_ok else None,
        psnr=psnr,
        bpp=0.5 if is_ok else None,
        num_states=1 if is_ok else None,
        prefix_bytes=(7,) if is_ok else (),
        base=b"streams" if is_ok else b"",
    )


@QUICK
@given(SCALES, VALUES, VALUES)
def test_the_histogram_of_two_halves_is_that_of_the_whole(scale, first, second):
    merged = histogram(scale, first)
    merged.merge(histogram(scale, second))
    whole = histogram(scale, first + second)
    assert merged.bins == whole.bins
    assert merged.total == pytest.approx(whole.total)
    assert sum(count for _, _, count in whole.columns()) == whole.count == len(first + second)


@QUICK
@given(SCALES, VALUES.filter(bool), st.floats(0.01, 1))
def test_a_quantile_is_in_the_bin_of_the_value_it_stands_for(scale, values, share):
    found = histogram(scale, values).quantile(share)
    exact = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    number = scale.bin_of(exact)
    low, high = scale.edge(number), scale.edge(number + 1)
    assert low * (1 - 1e-6) <= found <= high * (1 + 1e-6)


def test_a_quantile_of_whole_numbers_is_one_of_them():
    counted = histogram(Scale(1.0, is_whole=True), [2, 2, 3, 5])
    assert [counted.quantile(share) for share in (0.25, 0.5, 0.75, 1.0)] == [2, 2, 3, 5]


@QUICK
@given(SCALES, VALUES)
def test_a_histogram_survives_its_short_form(scale, values):
    made = histogram(scale, values)
    back = Histogram.unpacked(scale, json.loads(json.dumps(made.packed())))
    assert back.bins == made.bins
    assert back.total == pytest.approx(made.total, abs=1e-3)


def test_histograms_of_other_bins_do_not_add_up():
    with pytest.raises(ValueError, match="do not add up"):
        Histogram(scale=Scale(1.0)).merge(Histogram(scale=Scale(2.0)))


def test_the_worst_images_of_units_are_the_worst_of_all():
    rows = [row(f"{i:03d}", psnr=20 + (i * 37 % 100) / 3) for i in range(100)]
    whole, merged = RowSummary(), RowSummary()
    for start in range(0, 100, 10):
        unit = RowSummary()
        for one in rows[start : start + 10]:
            whole.add(one)
            unit.add(one)
        merged.merge(unit)
    assert merged.worst == whole.worst
    assert len(whole.worst) == WORST_KEPT
    assert whole.worst[0].psnr == 20


def test_a_summary_survives_its_short_form_and_what_is_no_summary_is_absent():
    summary = RowSummary()
    for i in range(50):
        summary.add(row(f"ok{i}", psnr=30 + i / 10), max_bytes=6)
        summary.add(row(f"bad{i}", error="unreadable: it is\nno image" * 99))
    packed = json.loads(json.dumps(summary.packed()))
    assert len(json.dumps(packed)) < 1000
    back = RowSummary.of_info({"summary": packed})
    assert len(back.worst) == WORST_OF_UNIT
    assert len(back.examples["unreadable"]) == EXAMPLES_OF_UNIT
    assert back.over_max_bytes == 50
    assert back.histograms["psnr"].count == 50
    assert back.histograms["source_bytes"].count == 100
    for damaged in (None, 3, {"version": 2}, {"version": 1}, packed | {"worst": [[1]]}):
        assert RowSummary.of_info({"summary": damaged}) is None
    assert RowSummary.of_info({}) is None


def test_the_summaries_of_commits_add_up_to_the_report(tmp_path):
    images = {f"{i}": bmp(picture(i, step=1 if i % 2 else 16)) for i in range(8)} | {"x": b"junk"}
    tars = [write_tar(tmp_path / f"{n}.tar", images) for n in range(2)]
    report = compress(
        tars, str(tmp_path / "a"), codec=FakeCodec, runtime="local", failure_budget=1.0
    )
    total = RowSummary()
    for commit in open_snapshot(str(tmp_path / "a")).commits:
        total.merge(RowSummary.of_info(commit.info))
    assert total.to_dict() == report.tally.summary.to_dict()
    values = json.loads(json.dumps(report.to_dict()))
    assert values["histograms"]["states"]["count"] == report.tally.ok == 16
    assert values["histograms"]["psnr"]["mean"] == pytest.approx(report.mean_psnr)
    assert values["examples"]["unreadable"][0]["key"].endswith("x")
    assert values["unit_seconds"]["p50"] <= values["unit_seconds"]["p99"]
