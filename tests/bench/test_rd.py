"""The evaluation harness: real bytes, one definition of quality, and curves compared fairly."""

import dataclasses
import json
import math
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dicmh_ray import bench
from dicmh_ray.bench.bd_rate import bd_rate
from dicmh_ray.bench.rd import average, curve_of
from dicmh_ray.bench.subject import find_images, for_each_picture
from dicmh_ray.cli import app
from dicmh_ray.errors import MissingExtraError, SourceFormatError, SourceNotFoundError
from tests.bench.tiny import JPEG, QUICK, CodecWithMsSsim, a_picture
from tests.fake_codec import POISON, FakeCodec

ONE = bench.Measurement(
    method="m",
    setting="s",
    image="i",
    num_bytes=10,
    num_pixels=80,
    metrics={"psnr": 30},
    encode_s=1,
    decode_s=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    Image.fromarray(a_picture()).save(root / "a.png")
    Image.fromarray(a_picture(seed=3)).save(root / "more" / "b.PNG")
    Image.fromarray(np.full((16, 16, 3), POISON, np.uint8)).save(root / "c.png")
    (root / "d.jpg").write_bytes(b"not an image")
    (root / "notes.txt").write_text("not looked at")
    return root


@pytest.fixture(scope="module")
def report(folder):
    seen = []
    made = bench.evaluate_rd(
        [folder],
        CodecWithMsSsim(),
        options=bench.BenchOptions(peers=QUICK, threads=1),
        command="dicmh bench rd photos",
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(1, 4, "a.png"), (2, 4, "c.png"), (3, 4, "d.jpg"), (4, 4, "more/b.PNG")]
    return made


def test_every_method_codes_the_same_images(report):
    assert report.num_images == 2
    settings = {(point.method, point.setting): point.num_images for point in report.points}
    assert list(settings) == [
        *(("dicmh", f"state {k}") for k in (1, 2, 3)),
        *((peer.name, f"q {q}") for peer in QUICK for q in (10, 40, 80)),
    ]
    assert set(settings.values()) == {2}
    assert {one.image for one in report.measurements} == {"a.png", "more/b.PNG"}


def test_an_image_that_cannot_be_coded_is_named_with_its_reason(report):
    assert [name for name, _ in report.skipped] == ["c.png", "d.jpg"]
    assert report.skipped[0][1] == "the latent is not finite"


def test_rates_are_all_bytes_over_the_unpadded_area(report, folder):
    codec = FakeCodec()
    (stream,) = codec.encode([a_picture()], tags=[()], exif_orientations=[1])
    ours = [one for one in report.measurements if one.image == "a.png" and one.method == "dicmh"]
    assert ours[-1].num_bytes == len(stream)
    assert ours[-1].bpp == 8 * len(stream) / (40 * 56)
    assert ours[-1].metrics["psnr"] == 100
    assert [one.bpp for one in ours] == sorted(one.bpp for one in ours)
    jpeg = next(
        one
        for one in report.measurements
        if (one.image, one.method, one.setting) == ("a.png", "JPEG", "q 40")
    )
    assert jpeg.num_bytes == len(JPEG.encode(a_picture(), 40))


def test_averages_are_means_and_leave_out_what_was_not_measured():
    other = dataclasses.replace(ONE, num_bytes=30, metrics={"psnr": 40, "ms_ssim": 0.9}, encode_s=3)
    (point,) = average([ONE, other])
    assert (point.bpp, point.metrics) == (2, {"psnr": 35, "ms_ssim": 0.9})
    assert (point.num_images, point.encode_s, point.decode_s) == (2, 2, 2)
    assert average([ONE])[0].quality("ms_ssim") is None


def test_a_curve_pairs_a_metric_with_the_rate_of_the_images_that_have_it():
    small = dataclasses.replace(ONE, image="small", num_bytes=1000)
    large = dataclasses.replace(small, image="large", num_bytes=10, metrics={"ms_ssim": 0.9})
    points = average([small, large])
    assert curve_of(points, "m", "ms_ssim") == [(1, pytest.approx(10))]
    assert curve_of(points, "m", "psnr") == [(100, 30)]


def test_pictures_of_one_name_in_two_folders_are_two_pictures(tmp_path):
    for i, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        Image.fromarray(a_picture(seed=i)).save(tmp_path / name / "1.png")
    Image.fromarray(a_picture(seed=2)).save(tmp_path / "b" / "2.png")
    found, skipped = for_each_picture(
        find_images([tmp_path / "a", tmp_path / "b"]),
        CodecWithMsSsim(),
        lambda subject: (subject.name, subject.image),
        peers=(),
        threads=1,
    )
    assert not skipped
    seeds = {str(tmp_path / "a" / "1.png"): 0, str(tmp_path / "b" / "1.png"): 1, "2.png": 2}
    assert {name for name, _ in found} == set(seeds)
    for name, image in found:
        np.testing.assert_array_equal(image, a_picture(seed=seeds[name]))


def test_a_picture_that_a_peer_cannot_hold_is_left_out_for_all(tmp_path):
    Image.fromarray(a_picture(8, 16400)).save(tmp_path / "long.png")
    Image.fromarray(a_picture()).save(tmp_path / "short.png")
    options = bench.BenchOptions(peers=QUICK, threads=1)
    report = bench.evaluate_rd([tmp_path], CodecWithMsSsim(), options=options)
    assert report.num_images == 1
    assert [name for name, _ in report.skipped] == ["long.png"]
    assert "WebP" in report.skipped[0][1]


@pytest.mark.parametrize("peer", bench.available_peers(), ids=lambda peer: peer.name)
def test_a_peer_round_trips_and_its_quality_argument_means_something(peer):
    image = a_picture(48, 48)
    sizes, errors = [], []
    for quality in (peer.qualities[2], peer.qualities[-1]):
        data = peer.encode(image, quality)
        decoded = peer.decode(data)
        assert decoded.shape == image.shape
        assert decoded.dtype == np.uint8
        sizes.append(len(data))
        errors.append(np.square(decoded.astype(float) - image).mean())
    assert sizes[0] < sizes[1]
    assert errors[0] > errors[1]


def test_the_smaller_of_baseline_and_progressive_jpeg_counts():
    image = a_picture(64, 64)
    each = [dataclasses.replace(JPEG, variants=(one,)).encode(image, 50) for one in JPEG.variants]
    assert len(each[0]) != len(each[1])
    assert JPEG.encode(image, 50) == min(each, key=len)


# BD-rate


def a_curve(scale=1.0, rates=(0.05, 0.1, 0.2, 0.4, 0.8, 1.6)):
    return [(scale * rate, 30 + 6 * math.log2(rate)) for rate in rates]


@pytest.mark.parametrize("method", ["pchip", "akima"])
def test_a_curve_at_half_the_rate_has_a_bd_rate_of_minus_fifty_percent(method):
    percent, interval = bd_rate(a_curve(), a_curve(0.5), method=method)
    assert percent == pytest.approx(-50)
    assert interval == pytest.approx((a_curve()[0][1], a_curve()[-1][1]))
    assert bd_rate(a_curve(), a_curve(), method=method)[0] == pytest.approx(0)


def test_curves_of_different_lengths_are_compared_where_both_are():
    percent, interval = bd_rate(a_curve(), a_curve(0.8, rates=(0.1, 0.3, 0.7)))
    assert percent == pytest.approx(-20, abs=0.2)
    assert interval == pytest.approx((30 + 6 * math.log2(0.1), 30 + 6 * math.log2(0.7)))


def test_the_headline_counts_only_qualities_reached_within_its_rates():
    bad_outside = [(0.01, 0.0), *a_curve(0.5), (40.0, 60.0)]
    wide = [(0.001, 0.0), *a_curve(), (4.0, 60.0)]
    percent, (low, high) = bd_rate(wide, bad_outside, bpp_range=(0.1, 0.8))
    assert percent == pytest.approx(-50, abs=2)
    # The anchor reaches 0.1 bpp at the lower end, the test at half the anchor's rate there.
    assert low == pytest.approx(30 + 6 * math.log2(0.2), abs=0.3)
    assert high == pytest.approx(30 + 6 * math.log2(0.8), abs=0.3)


def test_curves_that_share_no_quality_have_no_bd_rate():
    high = [(rate, quality + 100) for rate, quality in a_curve()]
    assert bd_rate(a_curve(), high) is None
    assert bd_rate(a_curve(), a_curve()[:1]) is None
    assert bd_rate(a_curve(), a_curve(), bpp_range=(2, 3)) is None


def test_points_that_cost_more_without_being_better_do_not_bend_a_curve():
    bumpy = [*a_curve(), (0.3, 1.0), (0.4, 2.0), (1.7, a_curve()[-1][1])]
    assert bd_rate(a_curve(), bumpy)[0] == pytest.approx(0)


def test_the_report_compares_us_with_every_peer_and_peers_with_the_first(report):
    pairs = {(one.test, one.anchor) for one in report.bd_rates}
    assert pairs == {("dicmh", "JPEG"), ("dicmh", "WebP"), ("WebP", "JPEG")}
    assert {one.metric for one in report.bd_rates} == {"psnr", "ms_ssim", "ms_ssim_rgb"}
    assert all(one.percent is not None for one in report.bd_rates)


# Reports


def test_a_report_is_written_as_json_markdown_and_plots(report, tmp_path):
    written = bench.write_report(report, tmp_path / "out")
    assert [path.name for path in written] == [
        "rd.json",
        "rd.md",
        *(
            f"rd-{metric}.{suffix}"
            for metric in ("psnr", "ms-ssim", "ms-ssim-rgb")
            for suffix in ("png", "svg")
        ),
    ]
    data = json.loads(written[0].read_text())
    assert data["points"][0]["method"] == "dicmh"
    assert len(data["measurements"]) == 2 * 9
    page = written[1].read_text()
    assert "Command: `dicmh bench rd photos`" in page
    assert report.environment.cpu in page
    assert "- c.png: the latent is not finite" in page
    with Image.open(written[2]) as plot:
        assert plot.width > 600


def test_the_same_report_gives_the_same_files(report, tmp_path):
    first, second = (bench.write_report(report, tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_without_ms_ssim_its_column_and_its_plot_are_absent(folder, tmp_path):
    options = bench.BenchOptions(peers=QUICK[:1], max_images=1, threads=1)
    report = bench.evaluate_rd([folder], FakeCodec(), options=options)
    assert {one.metric for one in report.bd_rates} == {"psnr"}
    assert "MS-SSIM" not in bench.tables(report)[1].columns
    names = [path.name for path in bench.write_report(report, tmp_path)]
    assert names == ["rd.json", "rd.md", "rd-psnr.png", "rd-psnr.svg"]


def test_tables_have_as_many_cells_as_columns(report):
    for table in bench.tables(report):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert len(table.markdown().splitlines()) == len(table.rows) + 4


def test_the_environment_says_where_when_and_how():
    found = bench.describe_environment("cmd", now=datetime(2026, 1, 2, tzinfo=UTC))
    assert found.cpu
    assert found.num_cores >= 1
    assert found.versions["numpy"] == np.__version__
    assert found.lines()[2:] == ("Date: 2026-01-02T00:00:00+00:00", "Command: `cmd`")


def test_a_missing_extra_is_one_sentence(report, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bjontegaard", None)
    with pytest.raises(MissingExtraError, match=r"bjontegaard .* 'dicmh_ray\[bench\]'"):
        bench.evaluate_rd([folder], FakeCodec())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib .* 'dicmh_ray\[bench\]'"):
        bench.plot_curves(report, tmp_path)


def test_a_folder_without_usable_images_is_named(tmp_path):
    with pytest.raises(SourceNotFoundError):
        bench.evaluate_rd([tmp_path], FakeCodec())
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(SourceFormatError, match=r"none of 1 .*; bad\.png: "):
        bench.evaluate_rd([tmp_path], FakeCodec())


@pytest.mark.parametrize(
    "bad",
    [
        {"headline_bpp": (1, 0.1)},
        {"threads": 0},
        {"max_images": 0},
        {"name": "JPEG"},
        {"views": ()},
    ],
)
def test_options_outside_their_range_cannot_be_made(bad):
    with pytest.raises(ValueError, match=r"wanted|at least|name"):
        bench.BenchOptions(**bad)


# Sheets


def test_a_sheet_shows_the_original_and_every_state():
    images = [("a.png", a_picture(300, 200)), ("b.png", a_picture(100, 400))]
    sheet = bench.comparison_sheet(images, FakeCodec(), cell_px=250)
    assert sheet.mode == "RGB"
    assert sheet.width >= 4 * 250
    assert sheet.height >= 250 + 63
    cell = np.asarray(sheet)[12 : 12 + 50, 12 : 12 + 50]
    assert cell.std() > 10  # a picture is there, not paper


def test_small_pictures_keep_their_size_and_long_names_their_end():
    cells = [bench.Cell(image=a_picture(20, 20), caption="x" * 300 + "end.png\nsecond line")]
    sheet = np.asarray(bench.draw_sheet([cells]))
    assert sheet.shape[1] < 300
    assert np.array_equal(sheet[12:32, 12:32], a_picture(20, 20))
    with pytest.raises(ValueError, match="cell"):
        bench.draw_sheet([[]])


def test_a_mistyped_source_is_refused_beside_one_that_is_there(tmp_path):
    Image.fromarray(a_picture()).save(tmp_path / "a.png")
    with pytest.raises(SourceNotFoundError, match=r"b\.png"):
        find_images([tmp_path / "a.png", tmp_path / "b.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceNotFoundError, match="empty"):
        find_images([tmp_path, tmp_path / "empty"])


def test_pictures_that_are_left_out_are_named_beside_the_tables(tmp_path):
    Image.fromarray(a_picture()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"bad")
    golden = Path(__file__).parents[1] / "golden" / "checkpoint"
    result = CliRunner().invoke(app, ["bench", "rd", str(tmp_path), "--checkpoint", str(golden)])
    assert result.exit_code == 0
    assert "left out: b.png: " in result.stderr
    assert "Means over 1 images" in result.stdout


def test_a_path_inside_one_folder_is_not_taken_for_the_whole_path_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "c", "b/a")):
        Path(name).mkdir(parents=True)
        Image.fromarray(a_picture(seed=seed)).save(Path(name) / "x.png")
    found = find_images(["a", "c", "b"])
    assert found == [(name, Path(name)) for name in ("a/x.png", "b/a/x.png", "c/x.png")]
