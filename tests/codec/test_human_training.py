"""Training the human view: what it changes, what it leaves alone, and that it goes on."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image

from dicmh_ray.codec import read_checkpoint
from dicmh_ray.codec.export import round_weights, write_checkpoint
from dicmh_ray.codec.human_training import HumanOptions, HumanStage, train_human
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.codec.tables import ContextTables
from dicmh_ray.codec.training import grow_from
from dicmh_ray.errors import WeightsError
from dicmh_ray.recipe import pack_photographs

GOLDEN = read_checkpoint(Path(__file__).parents[1] / "golden" / "checkpoint")
CODEC = NetworkConfig.from_dict(GOLDEN.config["network"])
HUMAN = dataclasses.replace(CODEC, human_width=8, human_blocks=1)
QUICK = HumanOptions(steps=6, batch=4, crop=64, report_steps=3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> PackedPhotographs:
    folder = tmp_path_factory.mktemp("photographs")
    y, x = np.mgrid[:224, :240]
    for n in range(4):
        waves = np.stack([np.sin(x / (2 + n)), np.cos(y / (3 + n)), np.sin((x + y) / 5)], -1)
        Image.fromarray((127 + 90 * waves).astype(np.uint8)).save(folder / f"{n}.png")
    labels = {"0.png": "dog", "1.png": "dog", "2.png": "cat"}
    return pack_photographs([str(folder)], tmp_path_factory.mktemp("pack"), labels=labels)


def codec_network(config: NetworkConfig = CODEC) -> CodecNetwork:
    """The golden checkpoint's, with a new human view where the configuration has one."""
    torch.manual_seed(7)
    network = CodecNetwork(config)
    weights = safetensors.torch.load(GOLDEN.files["weights.safetensors"])
    grow_from(network, CODEC, weights, name="golden")
    return network.eval()


def test_training_changes_the_human_view_and_nothing_else(
    photographs: PackedPhotographs, teacher_file: Path, tmp_path: Path
) -> None:
    lines = []
    codec = codec_network()
    trained = train_human(
        codec,
        HUMAN,
        photographs,
        tmp_path,
        options=QUICK,
        teacher=teacher_file,
        device="cpu",
        report=lines.append,
    )
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[-1].keys() > {"denoising", "perceptual", "semantic", "texture", "colour"}
    assert trained.config.human_words == ("cat", "dog")
    found = trained.state_dict()
    for name, value in codec.state_dict().items():
        assert torch.equal(found[name], value), name
    untrained = CodecNetwork(trained.config)
    assert trained.human is not None
    assert untrained.human is not None
    assert trained.human.leave.weight.abs().sum() > 0
    assert not untrained.human.leave.weight.abs().sum()


def test_training_lowers_what_it_minimises(
    photographs: PackedPhotographs, teacher_file: Path, tmp_path: Path
) -> None:
    lines = []
    alone = dict.fromkeys(("perceptual", "semantic", "texture", "colour"), 0.0)
    options = dataclasses.replace(QUICK, steps=120, learning_rate=6e-3, report_steps=30, **alone)
    train_human(
        codec_network(),
        HUMAN,
        photographs,
        tmp_path,
        options=options,
        teacher=teacher_file,
        device="cpu",
        report=lines.append,
    )
    assert lines[-1]["denoising"] < 0.93 * lines[0]["denoising"]


@pytest.mark.parametrize("known", [("cat", "dog"), ()], ids=["words", "no words"])
def test_a_stopped_run_goes_on_and_one_of_another_shape_is_refused(
    known: tuple[str, ...], photographs: PackedPhotographs, teacher_file: Path, tmp_path: Path
) -> None:
    def stage(config: NetworkConfig, steps: int) -> HumanStage:
        options = dataclasses.replace(QUICK, steps=steps)
        return HumanStage(
            codec_network(config),
            photographs,
            tmp_path,
            options,
            teacher=teacher_file,
            device=torch.device("cpu"),
        )

    words = dataclasses.replace(HUMAN, human_words=known)
    first = stage(words, 3)
    first.run()
    again = stage(words, 5)
    assert again.step == 3
    averaged, restored = first.trained["restorer"].state_dict(), again.averages["restorer"].tensors
    assert all(torch.equal(value, restored[name]) for name, value in averaged.items())
    again.run()
    assert again.step == 5
    with pytest.raises(WeightsError, match="another shape"):
        stage(dataclasses.replace(words, human_width=16), 9)
    with pytest.raises(WeightsError, match="no human restorer"):
        stage(CODEC, 9)


def test_a_run_can_begin_with_the_human_view_of_a_checkpoint_in_units_of_its_own(
    photographs: PackedPhotographs, teacher_file: Path, tmp_path: Path
) -> None:
    given = codec_network(dataclasses.replace(HUMAN, human_words=("cat", "dog")))
    assert given.human is not None
    with torch.no_grad():
        for parameter in given.human.parameters():
            parameter.normal_(0, 0.05)
        given.human.spread.fill_(3.0)
    round_weights(given)
    tables = safetensors.numpy.load(GOLDEN.files["tables.safetensors"])
    frozen = ContextTables.from_arrays(tables, "golden")
    write_checkpoint(given, frozen, tmp_path / "checkpoint", provenance={"test": True})
    found = [
        train_human(
            codec_network(),
            HUMAN,
            photographs,
            tmp_path / name,
            options=dataclasses.replace(QUICK, steps=0),
            teacher=teacher_file,
            device="cpu",
            start_from=start,
        ).human
        for name, start in (
            ("new", None),
            ("continued", tmp_path / "checkpoint"),
            ("continued", tmp_path / "gone"),  # a run that goes on has no need of it
        )
    ]
    new, _, continued = found
    assert new is not None
    assert continued is not None
    for name, value in given.human.named_parameters():
        assert torch.equal(dict(continued.named_parameters())[name], value), name
    # What a state lacks belongs to the codec, not to the weights that a run began with.
    assert torch.equal(new.spread, continued.spread)
    assert not torch.equal(new.spread, given.human.spread)
