"""Damage of every kind to every object is found, and the report says where it is.

Set ``DICMH_FLIP_STRIDE=1`` to flip a bit in every single byte under a full verify (minutes);
the default run samples that, and tries every byte on the functions that decide.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dicmh_ray.archive import (
    Plan,
    create_archive,
    open_snapshot,
    open_store,
    reindex,
    verify_archive,
)
from dicmh_ray.archive.codec_files import list_codec_files
from dicmh_ray.archive.commit import Commit, ObjectFacts
from dicmh_ray.archive.manifest import Manifest
from dicmh_ray.archive.snapshot import read_object
from dicmh_ray.errors import (
    ArchiveError,
    CommitFailedError,
    CorruptObjectError,
    CorruptRowError,
    SymbolError,
)
from dicmh_ray.reader import ArchiveReader
from tests.archive.rows import (
    CODEC_FILES,
    CODEC_ID,
    failed_row,
    kept_row,
    mixed_rows,
    ok_row,
    plan_of,
)

STRIDE = int(os.environ.get("DICMH_FLIP_STRIDE", "0"))


def flipped(data, at, bit=0):
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def problem_names(report):
    return {problem.name for problem in report.problems}


@pytest.fixture
def tiny(tmp_path):
    """Address and store of a complete archive of one unit: one row of each status."""
    uri = f"memory://{tmp_path.as_posix().strip('/')}"
    job = create_archive(uri, plan=plan_of("u"), codec_files=CODEC_FILES)
    job.commit_unit("u", [ok_row("a", tags=("dog",)), kept_row("b"), failed_row("c")])
    job.finalize()
    return uri, open_store(uri)


def objects_of(store):
    return {name: store.get(name) for name in store.list("")}


def parser_of(name, snapshot):
    """What verify decides by, for one object: raises on damage."""
    readers = {
        "plan.json": Plan.from_bytes,
        "commit": lambda data: Commit.from_bytes(name, data),
        "manifest": lambda data: Manifest.from_bytes(name, data, snapshot.plan),
    }
    if name.endswith("files.json"):
        return lambda data: list_codec_files(CODEC_ID, data)
    return readers.get(name.split("/")[0])


def test_every_bit_of_every_json_object_counts(tiny):
    uri, store = tiny
    snapshot = open_snapshot(uri)
    tried = 0
    for name, data in objects_of(store).items():
        parse = parser_of(name, snapshot)
        if parse is None:
            continue
        sound = parse(data)
        for at in range(len(data)):
            bit = random.Random(at).randrange(8)
            with pytest.raises(ArchiveError):
                parse(flipped(data, at, bit))
            tried += 1
        assert parse(data) == sound
    assert tried > 2000


def test_every_bit_of_every_other_object_counts(tiny):
    uri, store = tiny
    snapshot = open_snapshot(uri)
    (commit,) = snapshot.commits
    files = list_codec_files(CODEC_ID, store.get(f"codec/{CODEC_ID}/files.json"))
    for facts in (commit.index, *commit.parts, *files):
        data = store.get(facts.name)
        assert read_object(store, facts) == data
        for at in range(len(data)):
            found = ObjectFacts.of(facts.name, flipped(data, at, at % 8))
            assert found.sha256 != facts.sha256


def test_verify_names_the_object_of_a_flipped_bit(tiny):
    uri, store = tiny
    for name, data in objects_of(store).items():
        stride = STRIDE or (97 if name.endswith(".parquet") else 13)
        for at in range(stride // 2, len(data), stride):
            store.put(name, flipped(data, at, at % 8))
            report = verify_archive(uri)
            assert report.exit_code == 1, f"{name} byte {at}"
            assert name in problem_names(report), f"{name} byte {at}"
        store.put(name, data)
    assert verify_archive(uri).exit_code == 0


def test_verify_names_the_row_of_a_flipped_blob_byte(tiny):
    uri, store = tiny
    snapshot = open_snapshot(uri)
    (part,) = snapshot.parts
    data = store.get(part.name)
    for place in snapshot.read_indexes()[0].to_pylist():
        for blob in ("base", "detail", "original"):
            start, length = place[f"{blob}_offset"], place[f"{blob}_length"]
            for at in range(start, start + length, STRIDE or 23):
                store.put(part.name, flipped(data, at, at % 8))
                rows = [p for p in verify_archive(uri).problems if p.row is not None]
                assert [(p.key, p.row_group, p.row) for p in rows] == [
                    (place["key"], place["row_group"], place["row"])
                ]
                assert "CRC-32C" in str(rows[0])


def test_a_reader_never_hands_out_a_changed_row(tiny):
    """Whatever byte of a part is flipped, reading whole rows gives these rows or an error."""
    uri, store = tiny
    (part,) = open_snapshot(uri).parts
    data = store.get(part.name)
    whole = ("base", "detail", "original")
    expected = list(ArchiveReader(open_snapshot(uri)).rows(blobs=whole))
    refused = 0
    end_of_rows = part.num_bytes - part.footer_bytes
    for at in range(0, end_of_rows, STRIDE or 7):
        store.put(part.name, flipped(data, at, at % 8))
        reader = ArchiveReader(open_snapshot(uri))
        try:
            rows = list(reader.rows(blobs=whole))
        except (CorruptRowError, CorruptObjectError):
            refused += 1
        else:
            assert rows == expected, f"byte {at}"
    assert refused > 0.5 * end_of_rows / (STRIDE or 7)


def test_a_damaged_chunk_costs_its_row_group_and_is_named(tiny):
    uri, store = tiny
    (part,) = open_snapshot(uri).parts
    data = store.get(part.name)
    store.put(part.name, flipped(data, 10))
    problems = [p for p in verify_archive(uri).problems if p.row_group is not None]
    assert [str(p) for p in problems] == [
        f"{part.name} row group 0: column key does not match its CRC-32C"
    ]


def test_a_damaged_footer_is_refused_by_the_reader(tiny):
    uri, store = tiny
    (part,) = open_snapshot(uri).parts
    data = store.get(part.name)
    for at in range(part.num_bytes - part.footer_bytes, part.num_bytes, 499):
        store.put(part.name, flipped(data, at))
        with pytest.raises(CorruptObjectError, match="footer does not match"):
            ArchiveReader(open_snapshot(uri)).get("a")


def test_one_damaged_row_leaves_the_others_readable(tiny):
    uri, store = tiny
    snapshot = open_snapshot(uri)
    (part,) = snapshot.parts
    place = next(p for p in snapshot.read_indexes()[0].to_pylist() if p["key"] == "a")
    store.put(part.name, flipped(store.get(part.name), place["base_offset"] + 50))
    reader = ArchiveReader(open_snapshot(uri))
    with pytest.raises(CorruptRowError, match=r"row group 0 row \d \('a'\)") as caught:
        reader.get("a")
    assert caught.value.key == "a"
    assert caught.value.part == part.name
    assert reader.get("b").original == kept_row("b").original
    assert reader.get("a", blobs=()).width == 16


@pytest.mark.parametrize("cut", ["nothing", "half", "all but one byte"])
def test_truncation_is_found_in_every_object(tiny, cut):
    uri, store = tiny
    for name, data in objects_of(store).items():
        keep = {"nothing": 0, "half": len(data) // 2, "all but one byte": len(data) - 1}[cut]
        store.put(name, data[:keep])
        report = verify_archive(uri)
        assert report.exit_code == 1, name
        assert name in problem_names(report)
        store.put(name, data)


def test_a_removed_object_is_found(tiny):
    uri, store = tiny
    for name, data in objects_of(store).items():
        store.delete(name)
        report = verify_archive(uri)
        assert report.exit_code == 1, name
        assert any(p.name == name and "is missing" in p.what for p in report.problems), name
        store.put(name, data)


def test_an_object_swapped_with_a_sound_one_is_found(small_archive):
    store = open_store(small_archive)
    contents = objects_of(store)
    kinds = {}
    for name in contents:
        kinds.setdefault(name.split("/")[0], []).append(name)
    for one, other in (kinds[kind][:2] for kind in ("commit", "data", "index", "codec")):
        store.put(one, contents[other])
        report = verify_archive(small_archive)
        assert report.exit_code == 1
        assert one in problem_names(report)
        store.put(one, contents[one])


def test_a_commit_of_another_attempt_is_found(tiny, tmp_path):
    uri, store = tiny
    other = f"{uri}-other"
    job = create_archive(other, plan=plan_of("u"), codec_files=CODEC_FILES)
    job.commit_unit("u", [ok_row("a")])
    store.put("commit/u.json", open_store(other).get("commit/u.json"))
    report = verify_archive(uri)
    assert "is not the commit that the manifest lists" in str(report.problems[0])


def test_damage_to_the_plan_does_not_hide_damage_to_a_part(tiny):
    uri, store = tiny
    (part,) = open_snapshot(uri).parts
    store.put("plan.json", b"{}")
    store.put(part.name, store.get(part.name)[:-5])
    assert {"plan.json", part.name} <= problem_names(verify_archive(uri))


def test_zeroed_and_repeated_blocks_are_found(tiny):
    uri, store = tiny
    (part,) = open_snapshot(uri).parts
    data = store.get(part.name)
    for block in (bytes(512), data[512:1024]):
        for at in (0, 1024, 2048, 8192):
            store.put(part.name, data[:at] + block + data[at + len(block) :])
            assert part.name in problem_names(verify_archive(uri))


def test_random_garbage_never_crashes_the_check(tiny):
    uri, store = tiny
    chance = random.Random(1)
    contents = objects_of(store)
    for _ in range(40):
        name = chance.choice(list(contents))
        data = bytearray(contents[name])
        for _ in range(chance.randrange(1, 40)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        store.put(name, bytes(data))
        report = verify_archive(uri)
        assert report.exit_code == (0 if bytes(data) == contents[name] else 1)
        store.put(name, contents[name])


def test_strays_are_notes_and_no_damage(tiny):
    uri, store = tiny
    store.put("data/part-u-0123456789abcdef.parquet", b"left by an attempt that lost")
    report = verify_archive(uri)
    assert report.exit_code == 0
    assert report.notes == ["data/part-u-0123456789abcdef.parquet: stray object, part of nothing"]


def test_the_subsets_together_are_a_full_check(small_archive):
    full = verify_archive(small_archive)
    halves = [verify_archive(small_archive, subset=f"{n}/2") for n in (1, 2)]
    assert full.rows == 7
    assert sum(half.rows for half in halves) == full.rows
    assert all(half.exit_code == 0 for half in halves)
    for bad in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(ValueError, match="subset"):
            verify_archive(small_archive, subset=bad)


def test_a_decoder_that_refuses_a_row_is_reported(small_archive):
    seen = []

    def decode(bitstreams):
        seen.extend(bitstreams)
        if len(seen) == 2:
            raise SymbolError("state 1", "symbols do not match their checksum")

    report = verify_archive(small_archive, decode=decode)
    assert len(seen) == 4
    assert report.exit_code == 1
    (problem,) = report.problems
    assert problem.key is not None
    assert "does not decode" in problem.what


def test_a_store_that_cannot_be_read_is_exit_code_2(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("dicmh_ray.archive.store.Store.list", refuse)
    report = verify_archive(str(tmp_path))
    assert report.exit_code == 2
    assert "no route" in report.unchecked
    json.dumps(report.to_dict())


def test_a_lost_index_is_read_from_the_parts_and_restored(small_archive, caplog):
    rows = list(ArchiveReader.open(small_archive).rows())
    snapshot = open_snapshot(small_archive)
    # Readers take this one first, and would miss no other.
    (Path(small_archive) / snapshot.manifest.joined_index).unlink()
    names = [commit.index.name for commit in snapshot.commits]
    contents = [(Path(small_archive) / name).read_bytes() for name in names]
    (Path(small_archive) / names[0]).unlink()
    (Path(small_archive) / names[1]).write_bytes(flipped(contents[1], 100))
    assert list(ArchiveReader.open(small_archive).rows()) == rows
    assert "reading the parts of unit 000000 instead" in caplog.text
    assert problem_names(verify_archive(small_archive)) == set(names)
    assert reindex(small_archive) == names
    assert [(Path(small_archive) / name).read_bytes() for name in names] == contents
    assert reindex(small_archive) == []


def test_reindex_says_when_it_cannot_restore_the_bytes(small_archive, monkeypatch):
    shutil.rmtree(Path(small_archive) / "index")
    monkeypatch.setattr("dicmh_ray.archive.snapshot.write_index", lambda table: b"other bytes")
    with pytest.raises(CommitFailedError, match="readers rebuild it"):
        reindex(small_archive)


def test_an_unfinished_codec_folder_is_a_note_before_the_first_commit(tmp_path):
    uri = f"memory://{tmp_path.as_posix().strip('/')}"
    open_store(uri).put("plan.json", plan_of("u").to_bytes())
    report = verify_archive(uri)
    assert report.exit_code == 0
    assert any("not written yet" in note for note in report.notes)


def test_a_key_in_two_units_is_noted(tmp_path):
    uri = f"memory://{tmp_path.as_posix().strip('/')}"
    job = create_archive(uri, plan=plan_of("u", "v"), codec_files=CODEC_FILES)
    job.commit_unit("u", mixed_rows(0, 2))
    job.commit_unit("v", mixed_rows(1, 2))
    assert "'img-0001': key of more than one row" in verify_archive(uri).notes


def test_other_parquet_readers_see_the_same_rows(small_archive):
    for path in sorted((Path(small_archive) / "data").iterdir()):
        table = pq.read_table(path)
        keys = set(table["key"].to_pylist())
        for row in ArchiveReader.open(small_archive).rows(blobs=("base",)):
            if row.key in keys:
                at = table["key"].to_pylist().index(row.key)
                assert table["base"][at].as_py() == row.base
