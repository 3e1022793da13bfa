"""Training on two workers of a local Ray: one checkpoint, one log, errors with their types."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

from dicmh_ray.cli import app
from dicmh_ray.codec import load_codec
from dicmh_ray.codec.checkpoint import Checkpoint, FilesOnDisk
from dicmh_ray.codec.human_training import HumanOptions
from dicmh_ray.codec.icmh.presets import ICMH_PRESETS
from dicmh_ray.codec.training import TrainOptions
from dicmh_ray.errors import SourceFormatError, WeightsError
from dicmh_ray.ray_plugin import icmh_training, training
from dicmh_ray.ray_plugin.icmh_training import train_icmh_on_ray
from dicmh_ray.ray_plugin.training import Workers, train_on_ray
from tests.small_collections import picture
from tests.tiny_teacher import write_teacher

pytestmark = [
    pytest.mark.ray,
    # Ray reads its own old settings when it makes a trainer.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

TINY = "diff-icmh-tiny"
QUICK = dataclasses.replace(ICMH_PRESETS[TINY].codec, steps=2, report_steps=1)
TWO = Workers(count=2, max_failures=0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two pictures that are large enough, and their labels."""
    folder = tmp_path_factory.mktemp("photographs")
    for n in range(2):
        Image.fromarray(picture(n, height=200, width=220, step=1)).save(folder / f"{n}.png")
    return str(folder)


def train(photographs, folder, **changes):
    arguments = {"options": QUICK, "prior": QUICK, "workers": TWO} | changes
    return train_icmh_on_ray([photographs], folder, preset=TINY, **arguments)


def test_two_workers_train_one_checkpoint(cluster, photographs, tmp_path):
    told, packed = [], []
    checkpoint = train(
        photographs,
        tmp_path,
        labels={"0.png": "dog"},
        report=packed.append,
        report_step=told.append,
    )
    assert packed[0].startswith("packed 2 photographs")
    assert [facts["step"] for facts in told] == [1, 2, 1, 2], "the first worker's logs alone"
    assert "bpp" in told[-1]
    assert json.loads((tmp_path / "codec.json").read_text())["step"] == 2
    codec = load_codec(tmp_path / "checkpoint", device="cpu")
    assert codec.codec_id == checkpoint.codec_id
    image = picture(3, height=70, width=90)
    (data,) = codec.encode([image], tags=[("dog",)], exif_orientations=[1])
    assert all(codec.decode([data], view=view)[0].dtype == np.uint8 for view in codec.views)


def test_two_workers_train_a_layered_codec_and_its_human_view(cluster, photographs, tmp_path):
    told = []
    checkpoint = train_on_ray(
        [photographs],
        tmp_path / "run",
        workers=TWO,
        preset="tiny",
        options=TrainOptions(steps=2, batch=4, crop=64, structure=0, report_steps=1),
        human=HumanOptions(steps=2, batch=2, crop=64, report_steps=1),
        teacher=write_teacher(tmp_path / "teacher.safetensors"),
        labels={"0.png": "dog"},
        report_step=told.append,
    )
    assert [facts["step"] for facts in told] == [1, 2, 1, 2], "the first worker's logs alone"
    assert "psnr" in told[1]
    assert "perceptual" in told[3]
    assert checkpoint.config["provenance"]["teacher"]["name"] == "teacher.safetensors"
    codec = load_codec(tmp_path / "run" / "checkpoint", device="cpu")
    assert codec.views == ("machine", "human")
    image = picture(3, height=70, width=90)
    (data,) = codec.encode([image], tags=[("dog",)], exif_orientations=[1])
    assert all(codec.decode([data], view=view)[0].shape == image.shape for view in codec.views)


def test_what_a_worker_raises_arrives_with_its_type(cluster, photographs, tmp_path):
    (tmp_path / "prior.json").write_text('{"step": 1}')
    save_file({"module/unet/other": np.zeros(1)}, tmp_path / "prior.safetensors")
    with pytest.raises(WeightsError, match="another shape"):
        train(photographs, tmp_path, workers=dataclasses.replace(TWO, count=1))


def test_what_can_be_known_before_is_told_without_workers(photographs, tmp_path):
    with pytest.raises(SourceFormatError, match="256 or more"):
        train(photographs, tmp_path, prior=dataclasses.replace(QUICK, crop=256))
    with pytest.raises(WeightsError, match="not a directory"):
        train(photographs, tmp_path, start_from=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="workers is 0"):
        train(photographs, tmp_path, workers=Workers(count=0))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--gpu",), "--gpu is for --workers"),
        (("--workers", "2", "--device", "cpu"), "--device does nothing"),
        (("--preset", TINY, "--gpu"), "--gpu is for --workers"),
        (("--preset", TINY, "--workers", "2", "--device", "cpu"), "--device does nothing"),
        (("--preset", TINY, "--workers", "0"), "Invalid value for '--workers'"),
    ],
)
def test_the_program_refuses_workers_where_they_do_nothing(arguments, told, tmp_path):
    result = CliRunner().invoke(app, ["train", "photos", "-o", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


@pytest.fixture
def started(monkeypatch):
    """What the program calls, with which arguments."""

    def record(sources, folder, **options):
        calls.append((sources, folder, options))
        return Checkpoint(
            name="", codec_id="ab" * 32, codec="", num_states=1, config={}, files=FilesOnDisk({})
        )

    calls = []
    monkeypatch.setattr(icmh_training, "train_icmh_on_ray", record)
    monkeypatch.setattr(training, "train_on_ray", record)
    return calls


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (("--preset", TINY, "--prior-minutes", "2"), ("prior", 2)),
        (("--human-minutes", "2", "--teacher", __file__), ("human", 2)),
    ],
)
def test_the_program_hands_its_options_to_the_workers(arguments, given, started, tmp_path):
    words = ["train", "photos", "-o", str(tmp_path), "--workers", "3", "--gpu", "--steps", "7"]
    result = CliRunner().invoke(app, [*words, *arguments])
    assert result.exit_code == 0, result.output
    assert result.output.split()[-1] == "ab" * 32
    ((sources, folder, options),) = started
    assert (sources, folder) == (["photos"], tmp_path)
    assert options["workers"] == Workers(count=3, use_gpu=True)
    stage, minutes = given
    assert (options["options"].steps, options[stage].minutes) == (7, minutes)
