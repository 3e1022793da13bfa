"""The human view: sampled, marked by its own view name, and the same wherever it is decoded."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from dicmh_ray.bitstream import parse_bitstream, prefix_bytes
from dicmh_ray.codec import layered_codec, load_codec, read_checkpoint
from dicmh_ray.codec.export import round_weights, write_checkpoint
from dicmh_ray.codec.layered_codec import LayeredCodec
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.noise import noise_key, window_noise
from dicmh_ray.codec.tables import ContextTables
from dicmh_ray.codec.training import grow_from
from dicmh_ray.errors import ViewError
from tests.codec.test_layered_codec import picture

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> LayeredCodec:
    """The golden checkpoint with an untrained restorer that does change pictures."""
    golden = read_checkpoint(GOLDEN)
    config = NetworkConfig.from_dict(golden.config["network"])
    torch.manual_seed(5)
    network = CodecNetwork(
        dataclasses.replace(
            config, human_width=8, human_blocks=1, human_evaluations=2, human_words=("dog", "cat")
        )
    )
    weights = safetensors.torch.load(golden.files["weights.safetensors"])
    grow_from(network, config, weights, name="golden")
    assert network.human is not None
    with torch.no_grad():
        for layer in (network.human.leave, network.human.up):
            layer.weight.normal_(0, 0.1)
        network.human.conditioning.words.normal_()
        for block in network.human.before:
            block.modulate.weight.normal_(0, 0.3)
    round_weights(network)
    tables = safetensors.numpy.load(golden.files["tables.safetensors"])
    folder = tmp_path_factory.mktemp("human")
    write_checkpoint(
        network, ContextTables.from_arrays(tables, "golden"), folder, provenance={"test": True}
    )
    loaded = load_codec(folder, device="cpu")
    assert isinstance(loaded, LayeredCodec)
    return loaded


def encode(codec: LayeredCodec, image: np.ndarray, *tags: str) -> bytes:
    return codec.encode([image], tags=[tags], exif_orientations=[1])[0]


def test_the_views_of_a_checkpoint_are_what_it_can_draw(codec: LayeredCodec) -> None:
    assert codec.views == ("machine", "human")
    assert load_codec(GOLDEN, device="cpu").views == ("machine",)
    with pytest.raises(ViewError, match="offers machine, human"):
        codec.decode([encode(codec, picture(20, 20))], view="x-ray")
    golden = load_codec(GOLDEN, device="cpu")
    with pytest.raises(ViewError, match="offers machine"):
        golden.decode([encode(golden, picture(20, 20))], view="human")


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (64, 48)])
def test_a_human_view_has_the_size_of_its_picture_and_is_not_the_machine_view(
    codec: LayeredCodec, size: tuple[int, int]
) -> None:
    data = encode(codec, picture(*size))
    human = codec.decode([data], view="human")[0]
    assert human.shape == (*size, 3)
    assert human.dtype == np.uint8
    assert (human != codec.decode([data])[0]).any()


def test_a_human_view_is_the_same_in_a_batch_again_and_after_other_work(
    codec: LayeredCodec,
) -> None:
    streams = [encode(codec, picture(40, 56, seed)) for seed in range(3)]
    batch = codec.decode(streams, view="human")
    np.random.default_rng(1).normal(size=10)
    torch.manual_seed(99)
    for data, together in zip(streams, batch, strict=True):
        np.testing.assert_array_equal(codec.decode([data], view="human")[0], together)


def test_windows_join_without_a_seam(codec: LayeredCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(codec, picture(190, 230))
    whole = codec.decode([data], view="human")[0].astype(int)
    monkeypatch.setattr(layered_codec, "WINDOW", 4)
    assert np.abs(codec.decode([data], view="human")[0] - whole).max() <= 1


def test_tags_guide_and_unknown_tags_do_not(codec: LayeredCodec) -> None:
    image = picture(48, 48)
    plain, dog, cat, other = (
        codec.decode([encode(codec, image, *tags)], view="human")[0]
        for tags in ((), ("dog",), ("cat",), ("a word nobody learned",))
    )
    np.testing.assert_array_equal(plain, other)
    for a, b in itertools.combinations([plain, dog, cat], 2):
        assert (a != b).any()


def test_every_prefix_of_a_stream_has_the_same_noise(codec: LayeredCodec) -> None:
    data = encode(codec, picture(48, 48))
    keys = {noise_key(parse_bitstream(data[:end]).states[0].payload) for end in prefix_bytes(data)}
    assert len(keys) == 1
    assert keys != {noise_key(parse_bitstream(encode(codec, picture(48, 48, 1))).states[0].payload)}


def test_noise_is_normal_and_belongs_to_a_place() -> None:
    normals = CodecNetwork(NetworkConfig(human_width=8)).human.normals.numpy()
    whole = window_noise(7, 0, (0, 40), (0, 30), 96, normals)
    assert whole.shape == (96, 40, 30)
    part = window_noise(7, 0, (13, 20), (5, 29), 96, normals)
    np.testing.assert_array_equal(part, whole[:, 13:20, 5:29])
    assert abs(whole.mean()) < 0.01
    assert abs(whole.std() - 1) < 0.01
    assert abs(np.corrcoef(whole[:, :, 1:].ravel(), whole[:, :, :-1].ravel())[0, 1]) < 0.02
    for other in (
        window_noise(8, 0, (0, 40), (0, 30), 96, normals),
        window_noise(7, 1, (0, 40), (0, 30), 96, normals),
    ):
        assert abs(np.corrcoef(whole.ravel(), other.ravel())[0, 1]) < 0.02
