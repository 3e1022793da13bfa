"""One suite for every store: what a job may do to an archive, and what a reader then sees."""

import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from dicmh_ray.archive import (
    ArchiveWriter,
    GcOptions,
    append_to_archive,
    collect_garbage,
    compact_archive,
    create_archive,
    joined_index,
    open_snapshot,
    open_store,
    verify_archive,
    writer,
)
from dicmh_ray.archive.store import MemoryStore
from dicmh_ray.errors import (
    AppendError,
    ArchiveNotFoundError,
    CommitFailedError,
    CorruptObjectError,
    PlanConflictError,
)
from dicmh_ray.reader import ArchiveReader
from tests.archive.conftest import KEY, SECRET, on_every_store
from tests.archive.rows import CODEC_FILES, CODEC_ID, mixed_rows, ok_row, plan_of


def start(place, *units, **parameters):
    return create_archive(
        place.uri,
        plan=plan_of(*(units or ("000000", "000001")), **parameters),
        codec_files=CODEC_FILES,
        storage_options=place.options,
    )


def snapshot(place):
    return open_snapshot(place.uri, storage_options=place.options)


def verify(place, **options):
    return verify_archive(place.uri, storage_options=place.options, **options)


@on_every_store
class TestArchive:
    def test_rows_come_back_as_they_went_in(self, place):
        job = start(place)
        rows = mixed_rows(0, 9)
        job.commit_unit("000000", rows)
        job.commit_unit("000001", mixed_rows(9, 4))
        job.finalize()
        reader = ArchiveReader(snapshot(place))
        assert len(reader) == 13
        assert len(set(reader.keys())) == 13
        for row in rows:
            assert replace(reader.get(row.key), crc32c=0) == row
        assert verify(place).exit_code == 0

    def test_an_unfinished_archive_can_be_read_and_verified(self, place):
        job = start(place)
        job.commit_unit("000001", mixed_rows(0, 3))
        opened = snapshot(place)
        assert not opened.is_complete
        assert opened.statistics.rows == 3
        assert (opened.statistics.committed, opened.statistics.units) == (1, 2)
        report = verify(place)
        assert report.exit_code == 0
        assert report.notes == ["unfinished: 1 of 2 units are not committed"]
        with pytest.raises(CommitFailedError, match="1 of 2 units"):
            job.finalize()

    def test_an_equal_plan_continues_and_another_is_refused(self, place):
        start(place, target=0.5).commit_unit("000000", mixed_rows(0, 2))
        again = start(place, target=0.5)
        assert again.committed_units() == {"000000"}
        with pytest.raises(PlanConflictError, match="other sources, codec or settings"):
            start(place, target=0.25)

    def test_a_committed_unit_is_not_encoded_again(self, place):
        job = start(place)
        first = job.commit_unit("000000", mixed_rows(0, 2), info={"host": "a"})

        def encode():
            raise AssertionError("iterated")
            yield

        assert job.commit_unit("000000", encode(), info={"host": "b"}) == first

    def test_racing_finishers_agree(self, place):
        job = start(place, "000000")
        job.commit_unit("000000", mixed_rows(0, 2))
        with ThreadPoolExecutor(4) as pool:
            manifests = list(pool.map(lambda _: job.finalize(), range(4)))
        assert all(manifest == manifests[0] for manifest in manifests)
        assert manifests[0].version == 1
        assert snapshot(place).manifest == manifests[0]

    def test_a_writer_survives_pickle(self, place):
        job = pickle.loads(pickle.dumps(start(place, "000000")))
        job.commit_unit("000000", [])
        assert job.finalize().version == 1
        assert len(ArchiveReader(snapshot(place))) == 0
        assert list(ArchiveReader(snapshot(place)).scan()) == []
        assert verify(place).exit_code == 0

    def test_no_object_holds_a_credential(self, place):
        job = start(place, "000000")
        job.commit_unit("000000", mixed_rows(0, 3))
        job.finalize()
        store = place.store()
        for name in store.list(""):
            for secret in (KEY, SECRET):
                assert secret.encode() not in store.get(name)

    def test_garbage_goes_and_the_archive_stays(self, place):
        job = start(place)
        job.commit_unit("000000", mixed_rows(0, 4))
        stray = "data/part-000001-0123456789abcdef.parquet"
        job._store.put(stray, b"stray")
        time.sleep(1.1 if place.uri.startswith("s3") else 0)
        options = {"options": GcOptions(grace_s=0), "storage_options": place.options}
        assert [o.name for o in collect_garbage(place.uri, **options).deleted] == [stray]
        job.commit_unit("000001", mixed_rows(4, 4))
        job.finalize()
        assert collect_garbage(place.uri, **options).deleted == ()
        found = verify(place)
        assert (found.exit_code, found.rows, found.notes) == (0, 8, [])

    def test_the_checkpoint_comes_back_verified(self, place):
        job = start(place, "000000")
        assert snapshot(place).codec_files() == CODEC_FILES
        job._store.put(f"codec/{CODEC_ID}/config.json", b'{"states":4}')
        with pytest.raises(CorruptObjectError, match=r"config.json: content does not match"):
            snapshot(place).codec_files()
        job._store.delete(f"codec/{CODEC_ID}/config.json")
        with pytest.raises(CorruptObjectError, match=r"config.json: is missing"):
            snapshot(place).codec_files()

    def test_nothing_at_the_address_is_no_archive(self, place):
        with pytest.raises(ArchiveNotFoundError, match="no archive at"):
            snapshot(place)
        assert verify(place).exit_code == 2

    def test_statistics_add_up(self, place):
        job = start(place)
        rows = mixed_rows(0, 8)
        first = job.commit_unit("000000", rows)
        second = job.commit_unit("000001", mixed_rows(8, 4))
        job.finalize()
        statistics = snapshot(place).statistics
        assert (statistics.rows, statistics.ok) == (12, 6)
        assert (statistics.kept_original, statistics.failed) == (3, 3)
        assert statistics.bytes_out == first.num_bytes + second.num_bytes
        assert statistics.bytes_in == sum(row.original_bytes for row in rows) + 3000 - 1000 + 56
        oks = [row for row in [*rows, *mixed_rows(8, 4)] if row.status == "ok"]
        bits = 8 * sum(len(row.base) + len(row.detail) for row in oks)
        assert statistics.mean_bpp == pytest.approx(bits / (128 * len(oks)))
        json.dumps(statistics.to_dict())


def test_of_eight_attempts_at_a_unit_one_is_committed(place):
    job = start(place, "000000")
    gate = threading.Barrier(8, timeout=60)

    def attempt(number):
        def rows():
            gate.wait()
            yield ok_row("image", source_offset=number)

        return job.commit_unit("000000", rows())

    with ThreadPoolExecutor(8) as pool:
        commits = list(pool.map(attempt, range(8)))
    assert len({commit.attempt for commit in commits}) == 1
    assert len(job._store.list("data/")) == 8, "the losers' parts are strays"
    (row,) = ArchiveReader(snapshot(place)).rows()
    assert commits[0].parts[0].name in job._store.list("data/")
    assert row.key == "image"
    assert job.finalize() == job.finalize()
    report = verify(place)
    assert report.exit_code == 0
    assert sum("stray" in note for note in report.notes) == 14


class TestStoreWithoutConditionalPuts:
    """Some S3 look-alikes ignore If-None-Match: commits are then named by attempt."""

    @pytest.fixture
    def uri(self, tmp_path, monkeypatch):
        monkeypatch.setattr(writer, "probe", lambda store: False)
        return f"memory://{tmp_path.as_posix().strip('/')}"

    def start(self, uri):
        return create_archive(uri, plan=plan_of("u0", "u1"), codec_files=CODEC_FILES)

    def test_the_smallest_attempt_wins_everywhere(self, uri):
        job = self.start(uri)
        assert not job.conditional
        assert not pickle.loads(pickle.dumps(job)).conditional
        gate = threading.Barrier(4, timeout=60)

        def attempt(number):
            def rows():
                gate.wait()
                yield ok_row("image", source_offset=number)

            return job.commit_unit("u0", rows())

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(attempt, range(4)))
        names = job._store.list("commit/")
        assert len(names) == 4
        (commit,) = open_snapshot(uri).commits
        assert f"commit/u0/{commit.attempt}.json" == names[0]
        assert job.commit_unit("u0", []) == commit
        assert job.committed_units() == {"u0"}
        job.commit_unit("u1", [])
        manifest = job.finalize()
        assert next(iter(manifest.commits)) == names[0]
        assert open_snapshot(uri).commits[0] == commit
        assert verify_archive(uri).exit_code == 0

    def test_the_same_codec_with_another_companion_resumes_with_what_is_stored(self, uri):
        self.start(uri)
        upgraded = CODEC_FILES | {"tagger.safetensors": b"came with a newer release"}
        create_archive(uri, plan=plan_of("u0", "u1"), codec_files=upgraded)
        assert open_snapshot(uri).codec_files() == CODEC_FILES

    def test_no_other_job_is_added(self, tmp_path, no_hard_links):
        uri = str(tmp_path / "archive")
        job = self.start(uri)
        for unit in job.plan.unit_names:
            job.commit_unit(unit, [ok_row(f"{unit}-image")])
        job.finalize()
        before = open_store(uri).list("")
        with pytest.raises(AppendError, match="ignores conditional puts"):
            append_to_archive(uri, plan=plan_of("u2"), codec_files=CODEC_FILES)
        with pytest.raises(AppendError, match="ignores conditional puts"):
            compact_archive(uri)
        assert open_store(uri).list("") == before

    def test_another_plan_is_still_refused(self, uri):
        self.start(uri)
        self.start(uri)
        with pytest.raises(PlanConflictError):
            create_archive(uri, plan=plan_of("u0"), codec_files=CODEC_FILES)


def test_what_an_operating_system_leaves_in_folders_is_not_read_and_not_touched(tmp_path):
    uri = tmp_path / "archive"
    job = create_archive(str(uri), plan=plan_of("000000", "000001"), codec_files=CODEC_FILES)
    job.commit_unit("000000", mixed_rows(0, 3))
    litter = [
        uri / folder / name
        for folder in ("commit", "data", "index", "scratch", "job/0", "manifest", "plan", "codec")
        for name in ("._000000.json", ".DS_Store", "._part-x.parquet", "part-a copy.parquet")
    ] + [uri / "commit" / "000000 2.json", uri / "commit" / "000000" / "._1.json"]
    for path in litter:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"litter")
    assert [commit.unit for commit in open_snapshot(str(uri)).commits] == ["000000"]
    collect_garbage(str(uri), options=GcOptions(keep_s=0, grace_s=0))
    assert verify_archive(str(uri)).exit_code == 0
    job.commit_unit("000001", mixed_rows(3, 2))
    job.finalize()
    later = append_to_archive(str(uri), plan=plan_of("a"), codec_files=CODEC_FILES)
    later.commit_unit("a", mixed_rows(5, 1))
    (uri / "job" / later.plan.plan_id / "._a.json").write_bytes(b"litter")
    collect_garbage(str(uri), options=GcOptions(keep_versions=1, keep_s=0, grace_s=0))
    assert later.finalize().version == 2
    assert verify_archive(str(uri)).exit_code == 0
    assert all(path.exists() for path in litter)


class LosesAnswers(MemoryStore):
    """Every other conditional put takes effect and then times out."""

    puts = 0

    def _create(self, path, data):
        super()._create(path, data)
        type(self).puts += 1
        if self.puts % 2:
            raise TimeoutError("no answer")


def test_commits_whose_answer_was_lost_count_once(tmp_path):
    uri = f"memory://{tmp_path.as_posix().strip('/')}"
    plan = plan_of(*(f"{i:06d}" for i in range(6)))
    create_archive(uri, plan=plan, codec_files=CODEC_FILES)
    job = ArchiveWriter(LosesAnswers(uri), plan)
    for i, unit in enumerate(plan.unit_names):
        commit = job.commit_unit(unit, mixed_rows(4 * i, 4), info={"try": 1})
        assert job.commit_unit(unit, []) == commit
    job.finalize()
    assert open_snapshot(uri).statistics.rows == 24
    assert verify_archive(uri).notes == []


def test_a_job_killed_between_any_two_writes_is_resumed(tmp_path):
    """Stop before the n-th write for every n; resuming always gives the same complete archive."""

    class Killed(Exception):
        pass

    class Mortal(MemoryStore):
        left = 0

        def _spend(self):
            if self.left == 0:
                raise Killed
            self.left -= 1

        def put(self, name, data):
            self._spend()
            super().put(name, data)

        def put_if_absent(self, name, data):
            self._spend()
            return super().put_if_absent(name, data)

    def work(uri, store):
        plan = plan_of("u0", "u1")
        create_archive(uri, plan=plan, codec_files=CODEC_FILES)
        job = ArchiveWriter(store, plan)
        for unit in sorted(set(plan.unit_names) - job.committed_units()):
            job.commit_unit(unit, mixed_rows(10 * int(unit[1]), 3))
        job.finalize()

    for writes in range(8):
        uri = f"memory://{tmp_path.as_posix().strip('/')}/{writes}"
        store = Mortal(uri)
        store.left = writes
        if writes < 7:
            with pytest.raises(Killed):
                work(uri, store)
        store.left = 100
        work(uri, store)
        report = verify_archive(uri)
        assert report.exit_code == 0
        assert report.is_complete
        assert report.rows == 6


def test_indexes_too_large_to_be_joined_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(joined_index, "MAX_JOINED_BYTES", 100)
    uri = str(tmp_path / "archive")
    job = create_archive(uri, plan=plan_of("u0", "u1"), codec_files=CODEC_FILES)
    for number, unit in enumerate(["u0", "u1"]):
        job.commit_unit(unit, mixed_rows(10 * number, 3))
    manifest = job.finalize()
    assert manifest.joined_index not in open_snapshot(uri).store.list("")
    assert verify_archive(uri).exit_code == 0
    reader = ArchiveReader.open(uri)
    assert [reader.get(key).key for key in reader.keys()] == list(reader.keys())  # noqa: SIM118
