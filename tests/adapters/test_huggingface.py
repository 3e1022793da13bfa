"""An archive as a dataset of Hugging Face's library, read with the library's own means."""

import os

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
datasets = pytest.importorskip("datasets")

from datasets.distributed import split_dataset_by_node

from dicmh_ray.adapters.huggingface import load_hf
from tests.adapters.conftest import key_of, tag_of
from tests.adapters.counting_codec import counting
from tests.fake_codec import FakeCodec


def test_examples_are_pil_images_and_columns(archive_uri, pictures):
    data = load_hf(archive_uri, columns=("key", "tags", "metadata", "psnr"), codec=FakeCodec)
    assert data.features["image"] == datasets.Image()
    assert data.features["tags"] == datasets.List(datasets.Value("string"))
    examples = list(data)
    assert sorted(example["key"] for example in examples) == sorted(pictures)
    for example in examples:
        assert (np.asarray(example["image"]) == pictures[example["key"]]).all()
        assert example["tags"] == [tag_of(int(example["key"][-3:]))]
        assert example["psnr"] > 30
        assert '"number"' in example["metadata"]


def test_a_filter_comes_before_any_decode(archive_uri, tmp_path):
    codec, counts = counting(tmp_path)
    data = load_hf(archive_uri, where="'dog' in tags", columns=("key",), codec=codec)
    assert counts() == {}
    assert [example["key"] for example in data] == [key_of(n) for n in range(0, 18, 3)]
    assert sum(counts().values()) == 6


def test_nodes_get_shards_of_their_own(archive_uri, pictures, tmp_path):
    codec, counts = counting(tmp_path)
    data = load_hf(archive_uri, codec=codec)
    assert data.num_shards == 3
    seen = []
    for rank in range(3):
        seen += [example["key"] for example in split_dataset_by_node(data, rank, 3)]
    assert sorted(seen) == sorted(pictures)
    assert sum(counts().values()) == 18


def test_the_library_shuffles_and_resumes(archive_uri, pictures):
    data = load_hf(archive_uri, codec=FakeCodec).shuffle(seed=3, buffer_size=4)
    assert sorted(example["key"] for example in data) == sorted(pictures)
    plain = load_hf(archive_uri, codec=FakeCodec)
    whole = [example["key"] for example in plain]
    examples = iter(plain)
    before = [next(examples)["key"] for _ in range(8)]
    state = plain.state_dict()
    again = load_hf(archive_uri, codec=FakeCodec)
    again.load_state_dict(state)
    assert before + [example["key"] for example in again] == whole


def test_latents_come_with_their_shape(archive_uri):
    data = load_hf(archive_uri, view="latent", states=1, codec=FakeCodec).with_format("numpy")
    example = next(iter(data))
    latent = np.reshape(example["latent"]["values"], example["latent"]["shape"])
    assert latent.shape == (3, 24, 32)
    assert latent.dtype == np.float16


def test_a_torch_loader_reads_it_with_workers(archive_uri, pictures):
    torch = pytest.importorskip("torch")
    data = load_hf(archive_uri, codec=FakeCodec)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
    assert sorted(example["key"] for example in loader) == sorted(pictures)


def test_what_cannot_be_a_dataset_is_refused_at_once(archive_uri):
    with pytest.raises(ValueError, match="no such columns"):
        load_hf(archive_uri, columns=("base",))
