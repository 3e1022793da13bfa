"""The training recipe end to end, in seconds: pack, train, resume, export, encode."""

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file

from dicmh_ray.codec import load_codec, read_checkpoint
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.codec.training import CodecStage, Distortion, TrainOptions, grow_from, train
from dicmh_ray.errors import SourceFormatError, WeightsError
from dicmh_ray.recipe import PRESETS, pack_photographs, read_labels, train_checkpoint
from tests.tiny_teacher import write_teacher

TINY = PRESETS["tiny"]
CODEC = dataclasses.replace(TINY.network, human_width=0)
QUICK = dataclasses.replace(TINY.options, steps=4, batch=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures with structure, one too small, one that is no picture."""
    folder = tmp_path_factory.mktemp("photographs")
    y, x = np.mgrid[:288, :260]
    for n in range(6):
        waves = np.stack([np.sin(x / (5 + n)), np.cos(y / (7 + n)), np.sin((x + y) / 11)], -1)
        Image.fromarray((127 + 90 * waves).astype(np.uint8)).save(folder / f"{n}.png")
    Image.new("RGB", (40, 400)).save(folder / "small.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def photographs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedPhotographs:
    return pack_photographs([str(folder)], tmp_path_factory.mktemp("pack"))


def test_a_pack_holds_the_pictures_that_can_be_trained_on(
    photographs: PackedPhotographs, folder: Path
) -> None:
    assert len(photographs.entries) == 6
    np.testing.assert_array_equal(photographs.picture(2), np.asarray(Image.open(folder / "2.png")))


def test_a_pack_without_pictures_is_refused_and_made_anew_when_there_are_some(
    tmp_path: Path,
) -> None:
    source, pack = tmp_path / "source", tmp_path / "pack"
    source.mkdir()
    Image.new("RGB", (64, 64)).save(source / "small.png")
    with pytest.raises(SourceFormatError, match="none of 1 pictures"):
        pack_photographs([str(source)], pack)
    Image.new("RGB", (300, 200)).save(source / "large.png")
    assert pack_photographs([str(source)], pack).entries == [(0, 200, 300)]


def test_a_run_cannot_begin_with_a_checkpoint_of_another_codec(
    photographs: PackedPhotographs, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    for name in ("latent_coder", "tables", "vae"):
        (tmp_path / "other" / f"{name}.safetensors").write_bytes(b"")
    config = {"format": "dicmh-checkpoint/1", "codec": "diff-icmh"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="codec is 'diff-icmh', wanted 'layered'"):
        train(
            photographs,
            tmp_path / "run",
            options=QUICK,
            network=CODEC,
            start_from=tmp_path / "other",
        )


@pytest.mark.parametrize(("name", "left"), [("bin", 0), ("bin", 1000), ("json", 0), ("json", 9)])
def test_a_pack_that_a_crash_cut_short_is_named(
    folder: Path, tmp_path: Path, name: str, left: int
) -> None:
    pack_photographs([str(folder)], tmp_path / "pack")
    cut = tmp_path / "pack" / f"photographs.{name}"
    cut.write_bytes(cut.read_bytes()[:left])
    with pytest.raises(SourceFormatError, match="pack: a damaged pack, delete it"):
        pack_photographs([str(folder)], tmp_path / "pack")


def test_crops_are_the_same_for_the_same_seed(photographs: PackedPhotographs) -> None:
    crops = [photographs.crops(5, 96, np.random.default_rng(3)) for _ in range(2)]
    assert crops[0].shape == (5, 3, 96, 96)
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], photographs.crops(5, 96, np.random.default_rng(4)))


def test_crops_that_were_jpegs_have_lost_the_detail_of_their_chroma(tmp_path: Path) -> None:
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2], stripes[:, 1::2] = (176, 90, 118), (76, 142, 118)  # of one luma
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    pack = pack_photographs([str(tmp_path)], tmp_path / "pack")

    def contrasts(jpegs: float) -> np.ndarray:
        crops = pack.crops(48, 176, np.random.default_rng(2), jpegs=jpegs).float()[:, 0]
        steps = [crops.diff(dim=d).abs().mean((1, 2)) for d in (1, 2)]
        return torch.maximum(*steps).numpy()[np.arange(48) % 3 != 2]  # those that are not halved

    assert (contrasts(0.0) == 100).all()
    assert (contrasts(1.0) < 20).all()
    assert 0.25 < (contrasts(0.5) < 20).mean() < 0.75


def test_a_stopped_run_goes_on_where_it_was_saved(
    photographs: PackedPhotographs, tmp_path: Path
) -> None:
    first = train(photographs, tmp_path, options=QUICK, network=CODEC)
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["step"] == 4
    again = train(photographs, tmp_path, options=QUICK, network=CODEC)
    for (name, a), b in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    longer = dataclasses.replace(QUICK, steps=7)
    changed = train(photographs, tmp_path, options=longer, network=CODEC)
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 7
    assert not torch.equal(first.autoencoder.analysis.weight, changed.autoencoder.analysis.weight)


def test_the_last_states_are_drawn_twice_as_often(
    photographs: PackedPhotographs, tmp_path: Path
) -> None:
    options = dataclasses.replace(QUICK, batch=8, frequent_states=1)
    device = torch.device("cpu")
    stage = CodecStage(photographs, tmp_path, options, CODEC, device, start_from=None, teacher=None)
    for step in range(3):
        _, states, _ = stage.draw(step, np.random.default_rng(step))
        assert torch.bincount(states).tolist() == [2, 2, 4]


def test_a_run_can_begin_with_the_weights_of_a_checkpoint(
    photographs: PackedPhotographs, tmp_path: Path
) -> None:
    checkpoint = Path(__file__).parent / "golden" / "checkpoint"
    given = load_file(checkpoint / "weights.safetensors")
    found = train(photographs, tmp_path, options=QUICK, network=CODEC, start_from=checkpoint)
    # Only the rate model trains at first, so the weights are still the checkpoint's.
    for name, value in found.state_dict().items():
        assert torch.equal(value, given[name].float()), name
    finer = dataclasses.replace(CODEC, finest_step=CODEC.finest_step / 2)
    train(photographs, tmp_path / "f", options=QUICK, network=finer, start_from=checkpoint)
    wider = dataclasses.replace(CODEC, hidden=24)
    with pytest.raises(WeightsError, match="its hidden is 16, wanted 24"):
        train(photographs, tmp_path / "w", options=QUICK, network=wider, start_from=checkpoint)


def test_a_deeper_network_begins_as_the_checkpoint_it_grew_from() -> None:
    checkpoint = read_checkpoint(Path(__file__).parent / "golden" / "checkpoint")
    weights = safetensors.torch.load(checkpoint.files["weights.safetensors"])
    config = NetworkConfig.from_dict(checkpoint.config["network"])
    same = CodecNetwork(config).eval()
    grow_from(same, config, weights, name="golden")
    deeper = CodecNetwork(
        dataclasses.replace(config, synthesis_blocks=3, restorer_blocks=2, gain_hidden=8)
    ).eval()
    grow_from(deeper, config, weights, name="golden")
    x = torch.rand(1, 3, 64, 48) * 255
    with torch.inference_mode():
        torch.testing.assert_close(deeper.encode(x), same.encode(x))
        y, state = same.encode(x), torch.tensor([1])
        torch.testing.assert_close(deeper.decode(y, state), same.decode(y, state))


def test_labels_become_words_for_kinds(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("file,label,size\na.jpg,dog3,1x1\nb.jpg,wolf_plushie,1x1\nc.jpg,T-Shirt,2x2\n")
    assert read_labels([table]) == {"a.jpg": "dog", "b.jpg": "plushie", "c.jpg": "t-shirt"}
    table.write_text("name,kind\na.jpg,dog\n")
    with pytest.raises(SourceFormatError, match="without `file` or `label`"):
        read_labels([table])


def test_labels_come_from_spreadsheets_and_can_be_numbers(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(b"\xef\xbb\xbffile,label\r\na.jpg,dog3\r\nb.jpg,7\r\n")
    assert read_labels([table]) == {"a.jpg": "dog", "b.jpg": "7"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "without `file` or `label`"),
        (b"a.jpg,dog\n", "without `file` or `label`"),
        (b"file,label\na.jpg,caf\xe9\n", "utf-8"),
        (b"file,label\na.jpg," + 200_000 * b"x", "field"),
        (b"file,label\na.jpg," + 300 * b"x", "300 bytes"),
        (b'file,label\na.jpg,"two\nlines"\n', "control character"),
    ],
)
def test_labels_that_could_not_be_tags_are_refused_before_training(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    with pytest.raises(SourceFormatError, match=reason):
        read_labels([table])


def test_labelled_crops_know_the_tags_of_their_pictures(folder: Path, tmp_path: Path) -> None:
    labels = {f"{n}.png": "even" if n % 2 == 0 else "odd" for n in range(6)}
    pack = pack_photographs([str(folder)], tmp_path, labels=labels)
    assert sorted(pack.tags) == [("even",)] * 3 + [("odd",)] * 3
    _, words = pack.labelled_crops(7, 64, np.random.default_rng(1), ["even", "odd", "other"])
    assert words.shape == (7, 3)
    assert words[:, :2].sum(1).tolist() == [1.0] * 7
    assert not words[:, 2].any()


def test_labels_that_no_packed_photograph_has_are_refused(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        tar.add(folder / "0.png", "0.png")
    with pytest.raises(SourceFormatError, match="those in tars"):
        pack_photographs([str(tmp_path / "pictures.tar")], tmp_path / "a", labels={"0.png": "dog"})
    pack_photographs([str(folder)], tmp_path / "b" / "pack")
    with pytest.raises(SourceFormatError, match="begun without"):
        pack_photographs([str(folder)], tmp_path / "b" / "pack", labels={"0.png": "dog"})


def test_a_run_of_another_shape_is_refused(photographs: PackedPhotographs, tmp_path: Path) -> None:
    train(photographs, tmp_path, options=QUICK, network=CODEC)
    other = dataclasses.replace(CODEC, hidden=24)
    with pytest.raises(WeightsError, match="another network shape"):
        train(photographs, tmp_path, options=QUICK, network=other)


def test_training_lowers_the_loss_and_its_checkpoint_codes_pictures(
    folder: Path, tmp_path: Path
) -> None:
    reports = []
    checkpoint = train_checkpoint(
        [str(folder)],
        tmp_path,
        preset="tiny",
        options=TrainOptions(steps=150, batch=4, crop=64, learning_rate=2e-3, structure=0),
        device="cpu",
        report_step=reports.append,
    )
    lambdas = TrainOptions().lambdas(3)

    def loss(report: dict) -> float:
        errors = [255**2 / 10 ** (psnr / 10) for psnr in report["psnr"]]
        terms = zip(report["bpp"], lambdas, errors, strict=True)
        return sum(bpp + weight * error for bpp, weight, error in terms)

    assert [report["step"] for report in reports] == [50, 100, 150]
    assert loss(reports[-1]) < loss(reports[0])
    codec = load_codec(tmp_path / "checkpoint", device="cpu")
    assert codec.codec_id == checkpoint.codec_id
    image = np.asarray(Image.open(folder / "0.png"))
    data = codec.encode([image], tags=[()], exif_orientations=[1])[0]
    assert codec.measure([image], codec.decode([data]))[0].psnr > 22


def test_a_checkpoint_names_every_teacher_that_its_weights_had(
    folder: Path, tmp_path: Path
) -> None:
    def teachers(run: str, **others: Any) -> list[str]:
        options = dataclasses.replace(QUICK, steps=2)
        run_folder = tmp_path / run
        train_checkpoint(
            [str(folder)], run_folder, preset="tiny", options=options, device="cpu", **others
        )
        return [one["name"] for one in read_checkpoint(run_folder / "checkpoint").teachers]

    human = dataclasses.replace(TINY.human, steps=1, minutes=1)
    first = write_teacher(tmp_path / "first")
    assert teachers("a", teacher=first, human=human) == ["first"]
    assert teachers("a") == ["first"], "it goes on without"
    assert teachers("b", start_from=tmp_path / "a" / "checkpoint") == ["first"]


def test_a_shift_of_tone_which_structure_hardly_sees_counts_in_full() -> None:
    options = TrainOptions(structure=0.9, semantics=0)
    x = 128 + 30 * torch.randn(2, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    error, distortion = Distortion(options, 5, torch.device("cpu"), None)(
        x, x + 6, torch.zeros(2, dtype=torch.int64)
    )
    assert torch.allclose(error, torch.full((2,), 36.0), rtol=1e-3)
    assert (distortion > 35.9).all()
    assert (distortion < 45).all()
