"""Walks through an archive: the same everywhere, each row once, continued where they stopped."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from dicmh_ray.archive import PartOptions, create_archive, open_store
from dicmh_ray.errors import ReadStateError, RowNotFoundError
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.reader import order as order_module
from dicmh_ray.reader.order import scatter
from tests.archive.rows import CODEC_FILES, mixed_rows, plan_of


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """An archive of three units, 45 rows, in row groups of four."""
    uri = str(tmp_path_factory.mktemp("order") / "archive")
    job = create_archive(
        uri,
        plan=plan_of("a", "b", "c"),
        codec_files=CODEC_FILES,
        options=PartOptions(row_group_rows=4),
    )
    for number, unit in enumerate("abc"):
        job.commit_unit(unit, mixed_rows(100 * number, 10 + 5 * number))
    job.finalize()
    return uri


@pytest.fixture
def reader(uri):
    return ArchiveReader.open(uri)


def keys_of(order):
    return [row.key for batch in order.batches(7, blobs=()) for row in batch]


def test_without_a_seed_the_order_is_that_of_a_scan(reader):
    order = reader.order()
    assert keys_of(order) == list(reader.keys())
    assert len(order) == order.done == len(reader)
    assert list(order) == []


@pytest.mark.parametrize("shuffle", [None, 0, 7])
@pytest.mark.parametrize("world", [1, 3, 7, 60])
def test_the_ranks_together_have_every_row_once(reader, shuffle, world):
    shares = [
        keys_of(reader.order(shuffle=shuffle, rank=rank, world=world)) for rank in range(world)
    ]
    assert sorted(key for share in shares for key in share) == sorted(reader.keys())
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_seed_gives_one_order_and_another_seed_another(uri, monkeypatch):
    monkeypatch.setattr(order_module, "BLOCK_ROWS", 12)
    first, second = (keys_of(ArchiveReader.open(uri).order(shuffle=5)) for _ in range(2))
    other = keys_of(ArchiveReader.open(uri).order(shuffle=6))
    assert first == second != other
    assert sorted(first) == sorted(other) == sorted(ArchiveReader.open(uri).keys())


def test_the_scattering_is_the_one_that_bookmarks_were_made_with():
    numbers = scatter(np.arange(3), 42)
    assert numbers.tolist() == [
        12834895061833029239,
        2342300725459365589,
        8067208608386417461,
    ]


@pytest.mark.parametrize("taken", [0, 1, 4, 17, 44, 45])
def test_a_walk_goes_on_from_its_bookmark_in_another_process(uri, taken, monkeypatch):
    monkeypatch.setattr(order_module, "BLOCK_ROWS", 9)
    whole = keys_of(ArchiveReader.open(uri).order(shuffle=3))
    walk = ArchiveReader.open(uri).order(shuffle=3)
    rows = iter(walk)
    begun = [next(rows).key for _ in range(taken)]
    state = json.loads(json.dumps(walk.state()))
    later = pickle.loads(pickle.dumps(ArchiveReader.open(uri))).order(shuffle=3)
    later.resume(state)
    assert begun + [row.key for row in later] == whole


def test_a_bookmark_of_another_walk_is_refused(reader):
    state = reader.order(shuffle=1).state()
    for other in (
        reader.order(shuffle=2),
        reader.order(shuffle=1, rank=0, world=2),
        reader.order(shuffle=1, where="'dog' in tags"),
    ):
        with pytest.raises(ReadStateError, match="another snapshot"):
            other.resume(state)
    with pytest.raises(ReadStateError, match="format"):
        reader.order().resume({})
    with pytest.raises(ReadStateError, match="of 45 rows"):
        reader.order(shuffle=1).resume({**state, "done": 46})
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        reader.order(rank=2, world=2)


def test_only_matching_rows_are_walked(reader):
    dogs = [row.key for row in reader.rows("'dog' in tags")]
    assert sorted(keys_of(reader.order(where="'dog' in tags", shuffle=1))) == sorted(dogs)
    by_metadata = reader.order(where="'dog' in tags and metadata.cls == 8 and psnr > 30")
    assert keys_of(by_metadata) == dogs
    assert keys_of(reader.order(where="key == 'nothing'")) == []


def test_the_fragments_of_an_order_are_its_rows(reader):
    order = reader.order(shuffle=4, rank=1, world=3)
    found = [
        reader.scan_fragment(fragment, ["key"])["key"][row].as_py()
        for fragment, rows in order.fragments
        for row in rows
    ]
    assert found == keys_of(order)


def test_a_sample_is_the_same_everywhere_and_has_no_row_twice(uri):
    first, second = (ArchiveReader.open(uri).sample(9, seed=1) for _ in range(2))
    assert first == second
    assert len(set(first)) == 9
    assert first != ArchiveReader.open(uri).sample(9, seed=2)
    reader = ArchiveReader.open(uri)
    assert reader.sample(99, seed=1) == list(reader.keys())
    dogs = reader.sample(99, seed=1, where="'dog' in tags")
    assert dogs == [row.key for row in reader.rows("'dog' in tags")]
    assert reader.sample(0, seed=1) == []


def test_many_rows_come_in_the_order_of_their_keys(reader):
    rows = {row.key: row for row in reader.rows(blobs=("base", "detail", "original"))}
    keys = [*reversed(list(reader.keys()))][::3] * 2
    assert reader.get_many(keys) == [rows[key] for key in keys]
    bare = reader.get_many(keys, blobs=(), columns="index")
    assert [(row.key, row.tags) for row in bare] == [(key, rows[key].tags) for key in keys]
    assert reader.get_many([]) == []
    with pytest.raises(RowNotFoundError):
        reader.get_many(["img-0001", "nothing"])


def test_keys_are_found_by_a_pass_and_later_by_a_search(reader):
    keys = list(reader.keys())
    for key in keys * 2:
        assert reader.get(key, blobs=(), columns="index").key == key
    with pytest.raises(RowNotFoundError):
        reader.get("nothing")
    assert reader.key_at(-1) == keys[-1]
    with pytest.raises(IndexError):
        reader.key_at(45)


@pytest.fixture
def damaged(tmp_path):
    """An archive of three units: one row of ``a`` damaged, ``b`` cut short, the part of ``c`` gone."""
    uri = str(tmp_path / "archive")
    job = create_archive(
        uri,
        plan=plan_of("a", "b", "c", "d"),
        codec_files=CODEC_FILES,
        options=PartOptions(row_group_rows=4),
    )
    for number, unit in enumerate("abcd"):
        job.commit_unit(unit, mixed_rows(100 * number, 8))
    job.finalize()
    whole = {row.key: row for row in ArchiveReader.open(uri).rows(blobs=("base", "detail"))}
    store = open_store(uri)
    reader = ArchiveReader.open(uri)
    parts = {commit.unit: commit.parts[0] for commit in reader.snapshot.commits}
    hit = next(f for f in reader.fragments() if f.unit == "a")
    row = next(r for r in reader.snapshot.read_indexes()[0].to_pylist() if r["detail_length"])
    data = bytearray(store.get(hit.part))
    data[row["base_offset"] + 60] ^= 1
    store.put(hit.part, bytes(data))
    last = max(place["base_offset"] for place in reader.snapshot.read_indexes()[1].to_pylist())
    store.put(parts["b"].name, store.get(parts["b"].name)[: last + 10])
    store.delete(parts["c"].name)
    return uri, whole, row["key"]


def test_damage_is_skipped_and_noted_and_the_rest_is_read_bit_for_bit(damaged):
    uri, whole, hit = damaged
    reader = ArchiveReader.open(uri)
    columns = ["key", "base", "detail"]
    found = {}
    for batch in reader.scan(columns, on_error="skip"):
        for row in batch.to_pylist():
            found[row["key"]] = row["base"], row["detail"]
    units = {key: "abcd"[int(key[4:]) // 100] for key in whole}
    lost = set(whole) - set(found)
    assert {key for key in lost if units[key] == "a"} == {hit}
    assert {key for key in whole if units[key] == "c" and whole[key].base} <= lost
    assert 0 < sum(units[key] == "b" for key in lost) < 8
    assert not any(units[key] == "d" for key in lost)
    assert all(found[key] == (whole[key].base, whole[key].detail) for key in found)
    assert {fault.key for fault in reader.faults if fault.key} == {
        key for key in lost if units[key] != "c"
    }
    gone = [fault for fault in reader.faults if fault.key is None]
    assert {fault.reason for fault in gone} == {"is missing"}


def test_damage_is_raised_where_that_was_chosen(damaged):
    uri, _, hit = damaged
    reader = ArchiveReader.open(uri)
    with pytest.raises(Exception, match=hit):
        list(reader.scan(["key", "base"]))
    assert reader.faults == []
    with pytest.raises(ValueError, match="on_error is 'warn'"):
        list(reader.scan(["key"], on_error="warn"))


def test_a_walk_skips_damage_too(damaged):
    uri, whole, hit = damaged
    reader = ArchiveReader.open(uri)
    order = reader.order(shuffle=1)
    rows = [
        r for batch in order.batches(3, blobs=("base", "detail"), on_error="skip") for r in batch
    ]
    assert order.done == len(order) == len(whole)
    assert hit not in {row.key for row in rows}
    assert all(replace(row, original=b"") == whole[row.key] for row in rows)
    assert len(rows) > 8
    assert [r.key for r in reader.get_many([hit, "img-0303"], on_error="skip")] == ["img-0303"]


def test_units_without_an_index_and_without_parts_are_noted_once(damaged):
    uri, whole, _ = damaged
    store = open_store(uri)
    for name in store.list("index/"):
        store.delete(name)
    reader = ArchiveReader.open(uri)
    keys = [k for batch in reader.scan(["key"], on_error="skip") for k in batch["key"].to_pylist()]
    assert sorted(keys) == sorted(key for key in whole if key >= "img-0300")
    assert len(reader.faults) == 3
    with pytest.raises(Exception, match=r"SHA-256|bytes|missing"):
        list(reader.keys())
