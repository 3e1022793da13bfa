"""A whole evaluation in small: tasks, looks and sheets at equal bytes, written and marked."""

import json

import numpy as np
import pytest
from PIL import Image

from dicmh_ray import bench
from dicmh_ray.bench.contact import CROP_PX, MAX_SHEET_BYTES, worst_corner
from dicmh_ray.bench.equal_bytes import choose_states
from dicmh_ray.errors import SourceFormatError
from tests.bench.tiny import QUICK, CodecWithMsSsim, a_picture, save_feature_net, save_segmenter
from tests.fake_codec import POISON, FakeCodec

OPTIONS = bench.BenchOptions(peers=QUICK, near_bpp=(4, 24), views=("machine", "human"))


class SeenCodec(CodecWithMsSsim):
    """Remembers the views asked for; its human view is a little brighter."""

    seen_views: set[str] = set()  # noqa: RUF012

    def decode(self, bitstreams, *, states=None, view="machine"):
        self.seen_views.add(view)
        pictures = super().decode(bitstreams, states=states)
        return [x | 3 for x in pictures] if view == "human" else pictures


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three pictures, one that cannot be coded, labels for one, and two described nets."""
    root = tmp_path_factory.mktemp("set")
    for name in ("images", "labels_yolo", "semantic", "nets"):
        (root / name).mkdir()
    for i, name in enumerate("abc"):
        Image.fromarray(a_picture(48, 64, seed=i)).save(root / "images" / f"{name}.png")
    Image.fromarray(np.full((16, 16, 3), POISON, np.uint8)).save(root / "images" / "d.png")
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(root / "semantic" / "a.png")
    save_feature_net(root / "nets" / "c.onnx")
    save_segmenter(root / "nets" / "s.onnx")
    (root / "nets" / "nets.toml").write_text(
        '[Namer]\nfile = "c.onnx"\ntask = "classification"\noutput = "logits"\n'
        'taps = ["shallow", "deep"]\nsame_as_sha256 = "feed"\n\n'
        '[Painter]\nfile = "s.onnx"\ntask = "segmentation"\nlabel_values = {7 = 1}\n'
    )
    return root


@pytest.fixture(scope="module")
def campaign(home):
    specs = bench.find_nets(home / "nets")
    codec = SeenCodec()
    seen = []
    made = bench.evaluate_all(
        [home / "images"],
        codec,
        [bench.load_task(spec) for spec in specs],
        gauge=bench.Gauge(codec, judges=[bench.FeatureJudge(specs[0])]),
        options=bench.BenchOptions(
            peers=QUICK, near_bpp=(4, 24), views=("machine", "human"), teachers=frozenset({"feed"})
        ),
        rd_images=2,
        command="dicmh bench all images",
        progress=lambda *step: seen.append(step),
    )
    assert [step[:2] for step in seen] == [(i, 4) for i in range(1, 5)]
    return made


def test_every_method_is_there_at_every_chosen_state(campaign):
    report = campaign.equal
    assert report.num_images == 3
    assert report.skipped == (("d.png", "the latent is not finite"),)
    keys = [(point.method, point.state) for point in report.points]
    methods = ["dicmh", "dicmh human", "JPEG", "WebP"]
    states = sorted({state for _, state in keys if state is not None})
    assert keys == [("original", None), *((m, s) for s in states for m in methods)]
    assert {"machine", "human"} <= SeenCodec.seen_views


def test_peers_have_no_more_bytes_than_we_have_unless_counted(campaign):
    ours = {p.state: p.bpp for p in campaign.equal.points if p.method == "dicmh"}
    for point in campaign.equal.points:
        if point.method in ("JPEG", "WebP"):
            assert point.bpp <= ours[point.state] or point.num_over > 0


def test_the_original_agrees_with_itself(campaign):
    original = campaign.equal.points[0]
    assert original.scores["Namer: top-1 agreement"] == 1
    assert original.scores["Painter: mIoU with the original's"] == 1
    assert 0 <= original.scores["Painter: mIoU"] <= 1
    assert original.scores["Namer: top-1 accuracy"] is None


def test_the_last_state_of_a_lossless_codec_scores_like_the_original(campaign):
    last = max(p.state for p in campaign.equal.points if p.state)
    (point,) = [p for p in campaign.equal.points if (p.method, p.state) == ("dicmh", last)]
    if last == 3:
        assert point.metrics["distance:Namer"] == 0
        assert point.scores["Namer: top-1 agreement"] == 1


def test_curves_come_from_the_pictures_asked_for_and_reuse_what_is_known(campaign):
    assert campaign.rd.num_images in (1, 2)
    assert "distance:Namer" in campaign.rd.metrics
    assert "worst_tile_psnr" not in campaign.rd.metrics
    rows = [one for one in campaign.rd.bd_rates if one.test == "dicmh human"]
    assert {one.metric for one in rows} >= {"psnr", "ms_ssim", "ms_ssim_rgb"}


def test_everything_is_written_small_and_teachers_are_marked(campaign, tmp_path):
    written = campaign.write(tmp_path / "out", pages=2)
    names = {path.name for path in written}
    assert {"rd.md", "equal-bytes.md", "rd-distance-namer.png", "rd-ms-ssim-rgb.svg"} <= names
    assert {"tasks-namer-top-1-agreement.png", "tasks-painter-miou.png"} <= names
    assert {"sheet-1.jpg", "worst-by-distance.jpg", "worst-tiles.jpg"} <= names
    assert "tasks-namer-top-1-accuracy.png" not in names  # nothing to score
    for path in written:
        limit = {".png": 100_000, ".jpg": MAX_SHEET_BYTES}.get(path.suffix)
        assert limit is None or path.stat().st_size < limit
    page = (tmp_path / "out" / "equal-bytes.md").read_text()
    assert "Namer distance (teacher: not independent)" in page
    assert "Painter: mIoU (teacher" not in page
    data = json.loads((tmp_path / "out" / "equal-bytes.json").read_text())
    assert data["points"][0]["method"] == "original"
    for table in (*bench.tables(campaign.rd), *bench.equal_tables(campaign.equal)):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_without_sheets_no_picture_is_written(campaign, tmp_path, monkeypatch):
    monkeypatch.setattr("dicmh_ray.bench.campaign.write_report", lambda *_: [])
    assert campaign.write(tmp_path, pages=0) == []


def test_tasks_alone_give_the_same_scores(home, campaign):
    specs = bench.find_nets(home / "nets")
    report = bench.evaluate_tasks(
        [home / "images"], SeenCodec(), [bench.load_task(spec) for spec in specs], options=OPTIONS
    )
    assert [p.scores for p in report.points] == [p.scores for p in campaign.equal.points]
    assert not any(net.is_teacher for net in report.tasks)


def test_states_are_those_nearest_to_the_rates_wanted(home):
    images = bench.find_images([home / "images"])
    assert choose_states(images, FakeCodec(), (0.001, 1000)) == (1, 3)
    assert choose_states(images, FakeCodec(), (0.001, 0.002)) == (1,)
    with pytest.raises(SourceFormatError, match=r"none of 1 .* d\.png: the latent is not finite"):
        choose_states(images[-1:], FakeCodec(), (1,))


def test_the_worst_tile_is_inside_the_crop():
    image = np.zeros((300, 400, 3), np.uint8)
    broken = image.copy()
    broken[280, 390] = 255
    top, left = worst_corner(image, broken)
    assert top <= 280 < top + CROP_PX
    assert left <= 390 < left + CROP_PX
    assert (top + CROP_PX, left + CROP_PX) <= (300, 400)
    assert worst_corner(image[:50, :50], broken[:50, :50]) == (0, 0)


def test_states_are_chosen_by_others_where_the_pictures_in_between_cannot_be_coded(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02}.png").write_bytes(b"no picture")
    Image.fromarray(a_picture()).save(tmp_path / "05.png")
    images = bench.find_images([tmp_path])
    assert choose_states(images, FakeCodec(), (0.001, 1000)) == (1, 3)


def test_curves_come_from_pictures_that_can_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for name in "bc":
        Image.fromarray(a_picture()).save(tmp_path / f"{name}.png")
    codec = SeenCodec()
    gauge = bench.Gauge(codec)
    made = bench.evaluate_all([tmp_path], codec, [], gauge=gauge, options=OPTIONS, rd_images=1)
    assert {one.image for one in made.rd.measurements} == {"b.png"}
    assert made.equal.num_images == 2
