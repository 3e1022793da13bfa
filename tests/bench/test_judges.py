"""What nets say of pictures: distances, cosines, LPIPS, and errors that name the net."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from dicmh_ray import bench
from dicmh_ray.bench.judges import tiles
from dicmh_ray.bench.metrics import decibels, label, record_of, text
from dicmh_ray.cli.measuring import teachers_of
from dicmh_ray.codec import read_checkpoint
from dicmh_ray.errors import MissingExtraError, NetError
from dicmh_ray.vision.onnx_net import OnnxNet, centre_crop
from tests.bench.tiny import JPEG, a_picture, save_feature_net, save_lpips

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"

IMAGE = a_picture(40, 56)


@pytest.fixture(scope="module")
def net_file(tmp_path_factory):
    return save_feature_net(tmp_path_factory.mktemp("net") / "tiny.onnx")


@pytest.fixture(scope="module")
def judge(net_file):
    return bench.FeatureJudge(bench.net_from_argument(f"{net_file}:shallow,deep"))


def test_identical_pictures_are_at_distance_zero(judge):
    likeness = judge.compare(judge.features(IMAGE), judge.features(IMAGE))
    assert likeness.distance == 0
    assert likeness.cosine == pytest.approx(1)


def test_distance_grows_and_likeness_falls_with_jpeg_strength(judge):
    reference = judge.features(IMAGE)
    decoded = [JPEG.decode(JPEG.encode(IMAGE, quality)) for quality in (95, 50, 10, 1)]
    seen = [judge.compare(reference, judge.features(one)) for one in decoded]
    distances = [one.distance for one in seen]
    assert distances == sorted(distances)
    assert distances[0] > 0
    assert distances[-1] < 2 * 2  # two taps, non-negative activations
    assert seen[0].cosine > seen[-1].cosine


@pytest.mark.parametrize(("height", "width"), [(16, 16), (5, 3), (17, 40), (33, 16)])
def test_tiles_have_the_size_asked_for_and_cover_the_picture(height, width):
    image = np.arange(height * width * 3).reshape(height, width, 3).astype(np.uint8)
    image[-1, -1] = 255
    made = list(tiles(image, (16, 16)))
    assert all(tile.shape == (16, 16, 3) for tile in made)
    assert np.array_equal(made[0][: min(16, height), : min(16, width)], image[:16, :16])
    if height >= 16 and width >= 16:
        assert (made[-1][-1, -1] == 255).all()


def test_a_centre_crop_is_the_middle():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 30:50] = 200
    crop = centre_crop(image, 16, 16)
    assert crop.shape == (16, 16, 3)
    assert crop[8, 8, 0] == 200


def test_lpips_is_what_the_users_file_says(tmp_path):
    lpips = bench.Lpips(save_lpips(tmp_path / "lpips.onnx"))
    black, grey = np.zeros((8, 9, 3), np.uint8), np.full((8, 9, 3), 51, np.uint8)
    assert lpips.compare(black, black) == 0
    assert lpips.compare(black, grey) == pytest.approx(0.4)  # -1 against -0.6


def test_a_file_with_one_input_is_no_lpips(net_file):
    with pytest.raises(NetError, match="two inputs"):
        bench.Lpips(net_file)


def test_unknown_and_missing_nets_are_named(tmp_path, net_file):
    for text_, reason in [
        ("gone.onnx:a", "is no file"),
        (str(net_file), "name the tensors"),
        (f"{net_file}:shallow,nothing", "no tensor is called nothing"),
    ]:
        with pytest.raises(NetError, match=reason):
            bench.FeatureJudge(bench.net_from_argument(text_))
    (tmp_path / "bad.onnx").write_bytes(b"not a net")
    with pytest.raises(NetError, match=r"bad\.onnx: cannot be loaded"):
        OnnxNet(tmp_path / "bad.onnx")
    with pytest.raises(NetError, match="cannot be run"):
        OnnxNet(net_file)(np.zeros((1, 3, 9, 9), np.float32))


def test_a_folder_is_described_or_known(tmp_path, net_file):
    with pytest.raises(NetError, match="is no folder"):
        bench.find_nets(tmp_path / "gone")
    with pytest.raises(NetError, match="no ONNX file"):
        bench.find_nets(tmp_path)
    (tmp_path / "odd.onnx").write_bytes(net_file.read_bytes())
    with pytest.raises(NetError, match=r"odd\.onnx: is not a known net: describe it"):
        bench.find_nets(tmp_path)
    description = tmp_path / "nets.toml"
    description.write_text('[Tiny]\nfile = "odd.onnx"\ntask = "classification"\ntaps = ["deep"]\n')
    (spec,) = bench.find_nets(tmp_path)
    assert (spec.name, spec.task, spec.taps) == ("Tiny", "classification", ("deep",))
    for wrong, reason in [
        ("[Tiny", "nets.toml"),
        ('[Tiny]\ntask = "classification"', "names no file"),
        ('[Tiny]\nfile = "gone.onnx"\ntaps = ["a"]', "is no file"),
        ('[Tiny]\nfile = "odd.onnx"\nsize = 3', "unknown field size"),
        ('[Tiny]\nfile = "odd.onnx"\ntask = "smelling"', "task is 'smelling'"),
        ('[Tiny]\nfile = "odd.onnx"', "neither a task nor taps"),
    ]:
        description.write_text(wrong)
        with pytest.raises(NetError, match=reason):
            bench.find_nets(tmp_path)


def test_a_file_known_by_name_needs_no_description(tmp_path, net_file):
    home = tmp_path / "detector"
    home.mkdir()
    (home / "fastestdet_coco80.onnx").write_bytes(net_file.read_bytes())
    (spec,) = bench.find_nets(tmp_path)
    assert (spec.name, spec.task, spec.colour) == ("FastestDet", "detection", "bgr")


def test_a_teacher_is_marked_by_its_digest_or_that_of_the_same_weights(judge):
    for teachers, expected in [
        (frozenset(), False),
        (frozenset({judge.net.sha256}), True),
        (frozenset({"ee"}), True),
        (frozenset({""}), False),
    ]:
        spec = dataclasses.replace(judge.spec, same_as_sha256="ee")
        assert record_of(spec, judge.net.sha256, teachers).is_teacher is expected
    assert record_of(judge.spec, "a", frozenset("a")).note == "teacher: not independent"


def test_teachers_are_read_from_the_provenance():
    one, golden = {"name": "MobileNetV2", "sha256": "ab"}, read_checkpoint(GOLDEN)

    def found(config):
        return teachers_of(dataclasses.replace(golden, config=config))

    assert found({"provenance": {"teacher": one}}) == {"ab"}
    assert found({"provenance": {"teacher": [one, {"sha256": "cd"}]}}) == {"ab", "cd"}
    assert found({"provenance": {"teacher": None}}) == found({}) == frozenset()


def test_every_metric_has_a_name_and_a_scale_where_more_is_better():
    assert label("distance:DeepLab") == "DeepLab distance"
    assert label("ms_ssim_rgb") == "MS-SSIM RGB"
    assert text("psnr", 31.456) == "31.46"
    assert text("lpips", None) == "-"
    assert decibels("psnr", 31.0) == 31.0
    assert decibels("ms_ssim", 0.99) == pytest.approx(20)
    assert decibels("ms_ssim", 1.0) == pytest.approx(100)
    assert decibels("distance:x", 0.1) > decibels("distance:x", 0.2)


def test_a_missing_runtime_is_one_sentence(net_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"onnx .* 'dicmh_ray\[bench\]'"):
        OnnxNet(net_file, ["deep"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime .* 'dicmh_ray\[bench\]'"):
        OnnxNet(net_file)
