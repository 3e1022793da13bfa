"""Training loops over an archive: real workers, real resumption, and no decode too many."""

import json
import os
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, DistributedSampler

from dicmh_ray.adapters.torch_data import ArchiveDataset, ArchiveIterable
from dicmh_ray.archive import create_archive
from dicmh_ray.errors import ArchiveNotFoundError, CorruptRowError, ReadStateError
from dicmh_ray.pipeline import EncodePolicy
from dicmh_ray.ray_plugin import compress
from tests.adapters.conftest import key_of, tag_of
from tests.adapters.counting_codec import counting
from tests.archive.rows import CODEC_FILES, ok_row, plan_of
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, write_tar

torch.set_num_threads(1)
DOGS = [key_of(n) for n in range(0, 18, 3)]


def keys_of(samples):
    return [sample["key"] for sample in samples]


def as_batch(samples):
    """Pictures of one size and their labels: what a loop trains on."""
    images = torch.from_numpy(np.stack([sample["image"] for sample in samples]))
    labels = torch.tensor([float(sample["tags"] == ["dog"]) for sample in samples])
    return images.permute(0, 3, 1, 2).float() / 255, labels, keys_of(samples)


def test_samples_are_dicts_of_the_columns_and_the_picture(archive_uri, pictures):
    data = ArchiveIterable(
        archive_uri, codec=FakeCodec, columns=("key", "tags", "metadata", "psnr")
    )
    samples = list(data)
    assert sorted(keys_of(samples)) == sorted(pictures)
    for sample in samples:
        number = sample["metadata"]["number"]
        assert (sample["key"], sample["tags"]) == (key_of(number), [tag_of(number)])
        assert sample["psnr"] > 30
        assert (sample["image"] == pictures[sample["key"]]).all()
    assert keys_of(data) == keys_of(samples)


def test_a_training_loop_with_two_workers_decodes_the_matching_rows_only(archive_uri, tmp_path):
    codec, counts = counting(tmp_path)
    data = ArchiveIterable(
        archive_uri,
        where="'dog' in tags or metadata.number == 4",
        columns=("key", "tags"),
        shuffle=7,
        codec=codec,
    )
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=as_batch)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 1),
    )  # fmt: skip
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    orders = []
    for epoch in range(2):
        data.set_epoch(epoch)
        seen = []
        for images, labels, keys in loader:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(images)[:, 0], labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seen += keys
        assert sorted(seen) == sorted([*DOGS, key_of(4)])
        assert torch.isfinite(loss)
        orders.append(seen)
    assert orders[0] != orders[1]
    decoded = counts()
    assert sum(decoded.values()) == 2 * (len(DOGS) + 1)
    assert os.getpid() not in decoded


def test_workers_that_live_on_are_told_of_the_epoch(archive_uri):
    data = ArchiveIterable(archive_uri, shuffle=1, codec=FakeCodec)
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        orders.append(keys_of(loader))
    del loader
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("shuffle", [None, 3])
def test_ranks_share_the_rows(archive_uri, pictures, world, shuffle):
    shares = [
        keys_of(
            ArchiveIterable(archive_uri, shuffle=shuffle, rank=rank, world=world, codec=FakeCodec)
        )
        for rank in range(world)
    ]
    assert Counter(key for share in shares for key in share) == Counter(pictures.keys())
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_even_shares_are_of_one_length(archive_uri):
    shares = [
        keys_of(ArchiveIterable(archive_uri, rank=r, world=4, even=True, codec=FakeCodec))
        for r in range(4)
    ]
    assert [len(share) for share in shares] == [4, 4, 4, 4]
    assert len({key for share in shares for key in share}) == 16


@pytest.mark.parametrize("done", [0, 1, 5, 16, 17, 18])
def test_a_loop_goes_on_where_it_stopped(archive_uri, done):
    def dataset():
        return ArchiveIterable(archive_uri, shuffle=5, decode_batch=4, codec=FakeCodec)

    first = dataset()
    first.set_epoch(2)
    samples = iter(first)
    before = [next(samples)["key"] for _ in range(done)]
    state = json.loads(json.dumps(first.state_dict()))
    second = dataset()
    second.load_state_dict(state)
    assert second.state_dict() == state
    after = keys_of(second)
    whole = dataset()
    whole.set_epoch(2)
    assert before + after == keys_of(whole)
    assert len(keys_of(second)) == 18


def test_a_state_of_another_loop_is_refused(archive_uri):
    data = ArchiveIterable(archive_uri, shuffle=5, codec=FakeCodec)
    next(iter(data))
    other = ArchiveIterable(archive_uri, where="'dog' in tags", shuffle=5, codec=FakeCodec)
    other.load_state_dict(data.state_dict())
    with pytest.raises(ReadStateError):
        iter(other)
    with pytest.raises(ReadStateError, match="no state of an ArchiveIterable"):
        data.load_state_dict({"done": 3})


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_resumes_in_the_middle_of_an_epoch(archive_uri, workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        data = ArchiveIterable(archive_uri, shuffle=9, decode_batch=4, codec=FakeCodec)
        return stateful.StatefulDataLoader(
            data, batch_size=2, num_workers=workers, collate_fn=keys_of
        )

    whole = [key for batch in loader() for key in batch]
    assert len(whole) == 18
    first = loader()
    batches = iter(first)
    before = [key for _ in range(4) for key in next(batches)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    del batches, first
    second = loader()
    second.load_state_dict(state)
    assert before + [key for batch in second for key in batch] == whole
    assert [key for batch in second for key in batch] == whole


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_any_row_can_be_asked_for_by_number_in_any_process(archive_uri, pictures, start, tmp_path):
    codec, counts = counting(tmp_path)
    data = ArchiveDataset(archive_uri, where="'dog' in tags", codec=codec)
    assert len(data) == len(DOGS)
    assert data[2]["key"] == DOGS[2]
    assert (data[-1]["image"] == pictures[DOGS[-1]]).all()
    with pytest.raises(IndexError):
        data[6]
    assert len(pickle.dumps(data)) < 2_000
    sampler = DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)
    loader = DataLoader(
        data, batch_size=2, sampler=sampler, num_workers=1, collate_fn=keys_of,
        multiprocessing_context=start,
    )  # fmt: skip
    assert list(loader) == [[DOGS[1], DOGS[3]], [DOGS[5]]]
    decoded = counts()
    assert decoded.pop(os.getpid()) == 2
    assert list(decoded.values()) == [3]


def test_a_batch_is_decoded_at_once(archive_uri):
    calls = []

    class Codec(FakeCodec):
        def decode(self, bitstreams, *, states=None, view="machine"):
            calls.append((len(bitstreams), states, view))
            return super().decode(bitstreams, states=states, view=view)

    data = ArchiveDataset(archive_uri, view="human", states=2, codec=Codec)
    assert len(data.__getitems__([5, 0, 5])) == 3
    assert calls == [(3, 2, "human")]


@pytest.mark.parametrize("kind", [ArchiveIterable, ArchiveDataset])
@pytest.mark.parametrize(
    ("view", "field", "shape"),
    [
        ("latent", "latent", (3, 24, 32)),
        ("thumbnail", "image", (24, 32, 3)),
        ("human", "image", (24, 32, 3)),
    ],
)
def test_other_views_are_samples_too(archive_uri, kind, view, field, shape):
    data = kind(archive_uri, view=view, codec=FakeCodec, transform=lambda s: s[field].shape)
    assert next(iter(data)) == shape


@pytest.mark.parametrize("kind", [ArchiveIterable, ArchiveDataset])
def test_thumbnails_are_of_the_states_that_were_asked_for(archive_uri, kind):
    calls = []

    class Codec(FakeCodec):
        def decode(self, bitstreams, *, states=None, view="machine"):
            calls.append(states)
            return super().decode(bitstreams, states=states, view=view)

    next(iter(kind(archive_uri, view="thumbnail", states=2, codec=Codec)))
    assert calls == [2]


@pytest.mark.parametrize("kind", [ArchiveIterable, ArchiveDataset])
def test_what_cannot_be_a_sample_is_refused_at_once(archive_uri, tmp_path, kind):
    with pytest.raises(ValueError, match="view is 'tags'"):
        kind(archive_uri, view="tags")
    with pytest.raises(ValueError, match=r"no such columns: \['base'\]"):
        kind(archive_uri, columns=("key", "base"))
    with pytest.raises(ArchiveNotFoundError):
        kind(str(tmp_path))


def test_rank_and_world_go_together(archive_uri):
    with pytest.raises(ValueError, match="go together"):
        ArchiveIterable(archive_uri, rank=1)


@pytest.fixture
def unfinished(tmp_path):
    """One unit of two is committed; its bitstreams mean nothing to FakeCodec."""
    writer = create_archive(
        str(tmp_path / "archive"), plan=plan_of("0", "1"), codec_files=CODEC_FILES
    )
    writer.commit_unit("0", [ok_row(f"row-{n}") for n in range(4)])
    return writer


def test_an_unfinished_archive_is_what_it_was_when_it_was_opened(unfinished):
    data = ArchiveDataset(unfinished.uri)
    unfinished.commit_unit("1", [ok_row("late")])
    unfinished.finalize()
    assert len(pickle.loads(pickle.dumps(data))) == 4
    assert len(ArchiveDataset(unfinished.uri)) == 5


def test_damage_is_raised_or_left_out_as_asked(tmp_path, archive_uri, caplog):
    copy = str(tmp_path / "copy")
    shutil.copytree(archive_uri, copy)
    (part,) = (tmp_path / "copy" / "data").glob("part-*0-*.parquet")
    data = bytearray(part.read_bytes())
    at = data.index(b"DICM")
    data[at + 60] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(CorruptRowError):
        list(ArchiveIterable(copy, codec=FakeCodec))
    found = keys_of(ArchiveIterable(copy, codec=FakeCodec, on_error="skip"))
    assert len(found) == 17
    assert "1 faults, rows were left out" in caplog.text


@pytest.mark.weights
def test_forked_workers_decode_with_the_real_codec_after_their_parent_did(tmp_path):
    tar = write_tar(tmp_path / "x.tar", {f"p{n}": bmp(picture(n, step=1)) for n in range(4)})
    policy = EncodePolicy(states=2, keep_original="never")
    compress(tar, str(tmp_path / "a"), runtime="local", policy=policy)
    data = ArchiveIterable(str(tmp_path / "a"))
    in_parent = {sample["key"]: sample["image"] for sample in data}
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for sample in loader:
        assert (sample["image"] == in_parent.pop(sample["key"])).all()
    assert in_parent == {}
