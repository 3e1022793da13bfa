"""Streams of samples, through the real webdataset library and through its tars."""

import json
import os
import tarfile

import numpy as np
import pytest

from dicmh_ray.adapters.samples import webdataset_key, webdataset_sample
from dicmh_ray.views import read_mark
from tests.adapters.conftest import key_of
from tests.adapters.counting_codec import counting
from tests.archive.rows import kept_row
from tests.fake_codec import FakeCodec

wds = pytest.importorskip("webdataset")

from dicmh_ray.adapters.webdataset_stream import webdataset_stream


def test_samples_are_bytes_as_those_of_a_tar(archive_uri, pictures):
    samples = list(webdataset_stream(archive_uri, codec=FakeCodec))
    assert {sample["__key__"] for sample in samples} == set(pictures)
    assert {tuple(sorted(sample)) for sample in samples} == {("__key__", "__url__", "json", "png")}
    sample = next(sample for sample in samples if sample["__key__"] == key_of(4))
    facts = json.loads(sample["json"])
    assert (facts["key"], facts["tags"]) == (key_of(4), ["cat"])
    assert not read_mark(sample["png"]).is_generated


def test_a_pipeline_takes_it_for_its_tars(archive_uri, pictures):
    pipeline = wds.DataPipeline(
        webdataset_stream(archive_uri, where="'dog' in tags", codec=FakeCodec),
        wds.shuffle(4),
        wds.decode("rgb8"),
        wds.to_tuple("__key__", "png", "json"),
        wds.batched(3),
    )
    seen = []
    for keys, images, facts in pipeline:
        for key, image, fact in zip(keys, images, facts, strict=True):
            assert (image == pictures[key]).all()
            assert fact["metadata"]["number"] == int(key[-3:])
            seen.append(key)
    assert sorted(seen) == [key_of(n) for n in range(0, 18, 3)]


def test_workers_share_the_rows_and_decode_each_once(archive_uri, pictures, tmp_path):
    pytest.importorskip("torch")
    codec, counts = counting(tmp_path)
    pipeline = wds.DataPipeline(
        webdataset_stream(archive_uri, format=None, shuffle=0, codec=codec), wds.batched(4)
    )
    keys = []
    for batch in wds.WebLoader(pipeline, batch_size=None, num_workers=2):
        assert all(image.shape == (24, 32, 3) for image in batch["image"])
        keys += batch["__key__"]
    assert sorted(keys) == sorted(pictures)
    assert sum(counts().values()) == 18
    assert len(counts()) == 2
    assert os.getpid() not in counts()


def test_nodes_share_the_rows(archive_uri, pictures, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        seen += [sample["__key__"] for sample in webdataset_stream(archive_uri, codec=FakeCodec)]
    assert sorted(seen) == sorted(pictures)


def test_each_loop_is_shuffled_in_another_way(archive_uri):
    stream = webdataset_stream(archive_uri, shuffle=1, codec=FakeCodec)
    first, second = ([s["__key__"] for s in stream] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_latents_and_thumbnails_stream_too(archive_uri):
    latents = wds.DataPipeline(
        webdataset_stream(archive_uri, view="latent", codec=FakeCodec), wds.decode()
    )
    assert next(iter(latents))["npy"].shape == (3, 24, 32)
    small = next(
        iter(webdataset_stream(archive_uri, view="thumbnail", format="jpg", codec=FakeCodec))
    )
    assert small["jpg"][:2] == b"\xff\xd8"


def test_a_human_view_is_marked_in_picture_and_json(archive_uri):
    sample = next(iter(webdataset_stream(archive_uri, view="human", codec=FakeCodec)))
    assert read_mark(sample["png"]).is_generated
    assert json.loads(sample["json"])["decoded"]["generated"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves it open
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_what_was_written_as_a_tar_is_read_as_one(archive_uri, pictures, tmp_path):
    with wds.TarWriter(str(tmp_path / "out.tar")) as sink:
        for sample in webdataset_stream(archive_uri, codec=FakeCodec):
            sink.write({name: value for name, value in sample.items() if name != "__url__"})
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert len(tar.getnames()) == 36
    found = wds.WebDataset(str(tmp_path / "out.tar"), shardshuffle=False).decode("rgb8")
    for sample in found:
        assert (sample["png"] == pictures[sample["__key__"]]).all()
        assert sample["json"]["key"] == sample["__key__"]


def test_a_dot_in_a_key_does_not_end_the_name_of_a_member():
    assert webdataset_key("a.b/photo.v2.jpg") == "a.b/photo%2Ev2%2Ejpg"
    assert webdataset_key("50%") == "50%25"


def test_an_original_has_its_own_suffix():
    row = kept_row("x", original=b"bytes")
    sample = webdataset_sample(row, b"bytes", view="original")
    assert sample["jpg"] == b"bytes"
    assert json.loads(sample["json"])["decoded"]["view"] == "original"


def test_decoded_samples_hold_arrays_and_objects(archive_uri):
    sample = next(iter(webdataset_stream(archive_uri, format=None, codec=FakeCodec)))
    assert sample["image"].dtype == np.uint8
    assert sample["json"]["key"] == sample["__key__"]


def test_what_cannot_be_a_stream_is_refused_at_once(archive_uri):
    with pytest.raises(ValueError, match="format is 'gif'"):
        webdataset_stream(archive_uri, format="gif")
    with pytest.raises(ValueError, match="view is 'none'"):
        webdataset_stream(archive_uri, view="none")
