"""Garbage goes; what a version that is kept, or a job under way, needs stays."""

import json
import time

import pytest

from dicmh_ray.archive import (
    GcOptions,
    append_to_archive,
    collect_garbage,
    compact_archive,
    create_archive,
    open_snapshot,
    open_store,
    read_history,
    store,
    verify_archive,
)
from dicmh_ray.archive.compact import plan_compaction
from dicmh_ray.archive.later import put_plan
from dicmh_ray.errors import (
    ArchiveNotFoundError,
    CorruptObjectError,
    VersionExpiredError,
)
from tests.archive import schedules
from tests.archive.rows import CODEC_FILES, mixed_rows, plan_of
from tests.archive.test_append import append, begin, later_plan
from tests.archive.test_compact import build, rows_of
from tests.archive.test_schema import SCHEMAS, check

NEWEST_ONLY = GcOptions(keep_versions=1, keep_s=0, grace_s=0)
CAREFUL = GcOptions(keep_versions=1, keep_s=0)


@pytest.fixture
def uri(tmp_path):
    return f"memory://{tmp_path.as_posix().strip('/')}"


def tick(place):
    """Let the store's clock move on: some tell whole seconds."""
    time.sleep(1.1 if place.uri.startswith("s3") else 0.02)


def aged(monkeypatch, *names, seconds=10**6):
    """Have every memory store say that some objects are old; a new put makes them young."""
    old = set(names)
    kind = store.MemoryStore
    put, listing, modified = kind.put, kind.list_objects, kind.modified

    def put_young(self, name, data):
        old.discard(name)
        put(self, name, data)

    def old_listing(self, prefix):
        return [
            found._replace(modified=found.modified - seconds) if found.name in old else found
            for found in listing(self, prefix)
        ]

    def old_modified(self, name):
        found = modified(self, name)
        return found - seconds if name in old and found is not None else found

    monkeypatch.setattr(kind, "put", put_young)
    monkeypatch.setattr(kind, "list_objects", old_listing)
    monkeypatch.setattr(kind, "modified", old_modified)


def test_after_a_compaction_the_old_parts_go_with_the_old_versions(place):
    build(place.uri, place.options)
    compact_archive(place.uri, storage_options=place.options)
    before = rows_of(place.uri, options=place.options)
    tick(place)
    told = collect_garbage(
        place.uri, options=NEWEST_ONLY, dry_run=True, storage_options=place.options
    )
    assert len(rows_of(place.uri, 1, place.options)) == 12, "a dry run deletes nothing"
    assert place.store().list("scratch/") == []
    report = collect_garbage(place.uri, options=NEWEST_ONLY, storage_options=place.options)
    assert [s.name for s in told.deleted] == [s.name for s in report.deleted]
    assert told.num_bytes == report.num_bytes > 4 * 3000
    assert (report.given_up, report.kept_versions) == ((1, 2), (3,))
    assert (told.is_dry_run, report.is_dry_run) == (True, False)
    assert rows_of(place.uri, options=place.options) == before
    assert len(place.store().list("data/")) == len(place.store().list("index/")) == 1
    assert place.store().list("commit/") == []
    found = verify_archive(place.uri, storage_options=place.options)
    assert (found.exit_code, found.notes) == (0, [])
    for version in (1, 2):
        with pytest.raises(VersionExpiredError, match="given up by gc"):
            open_snapshot(place.uri, version=version, storage_options=place.options)
    history = read_history(place.uri, storage_options=place.options).versions
    assert [facts.is_kept for facts in history] == [False, False, True]
    times = [facts.created_at for facts in history]
    assert all(0 <= times[2] - each < 600 for each in times)
    tick(place)
    again = collect_garbage(place.uri, options=NEWEST_ONLY, storage_options=place.options)
    assert again.deleted == again.given_up == ()
    json.dumps(report.to_dict())


def test_versions_stay_by_number_or_by_age(uri):
    begin(uri)
    for number in range(4):
        append(uri, f"{number}.tar", start=10 * number + 10)
    report = collect_garbage(uri, options=GcOptions(keep_versions=1))
    assert (report.given_up, report.deleted) == ((), ())
    report = collect_garbage(uri, options=GcOptions(keep_versions=3, keep_s=0))
    assert (report.given_up, report.kept_versions) == ((1, 2), (3, 4, 5))
    names = [stored.name for stored in report.deleted]
    assert len(names) == 1, "an append takes nothing away but what joins the indexes of a version"
    assert names[0].startswith("index/joined-")
    check_kept(uri)


def check_kept(uri):
    """Every version that is kept opens, is read whole, and verifies; the others say so."""
    assert verify_archive(uri).exit_code == 0
    for facts in read_history(uri).versions:
        version = facts.version.archive_version
        if facts.is_kept:
            assert len(rows_of(uri, version)) == facts.version.rows
        else:
            with pytest.raises(VersionExpiredError):
                open_snapshot(uri, version=version)


def test_an_expired_manifest_matches_its_published_schema(uri):
    begin(uri)
    append(uri, "a.tar")
    collect_garbage(uri, options=CAREFUL)
    schema = json.loads((SCHEMAS / "expired.v1.schema.json").read_text())
    check(json.loads(open_store(uri).get("manifest/000001.json")), schema, "expired")


def test_damage_to_an_expired_manifest_is_found(uri):
    begin(uri)
    append(uri, "a.tar")
    collect_garbage(uri, options=CAREFUL)
    objects = open_store(uri)
    data = objects.get("manifest/000001.json")
    for at in range(0, len(data), 11):
        objects.put("manifest/000001.json", data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        assert verify_archive(uri).exit_code == 1
        with pytest.raises(CorruptObjectError):
            collect_garbage(uri, options=CAREFUL)


def test_strays_go_after_the_grace_period_only(uri, monkeypatch):
    begin(uri)
    objects = open_store(uri)
    names = ["data/part-x-00.parquet", "index/x-00.parquet", "job/x/y.json", "scratch/probe-x"]
    for name in names:
        objects.put(name, b"12345")
    report = collect_garbage(uri)
    assert report.deleted == ()
    assert sorted(s.name for s in report.spared) == sorted(names)
    aged(monkeypatch, *names)
    report = collect_garbage(uri)
    assert sorted(s.name for s in report.deleted) == sorted(names)
    assert report.num_bytes == 20
    assert verify_archive(uri).notes == []


def test_what_has_no_name_of_ours_is_never_touched(uri):
    begin(uri)
    objects = open_store(uri)
    names = ["README.md", "data/notes.txt", "plan/mine.json", "codec/other/weights.bin", "log/x"]
    for name in names:
        objects.put(name, b"mine")
    collect_garbage(uri, options=NEWEST_ONLY)
    assert set(names) <= set(objects.list(""))


def test_what_an_unfinished_job_has_committed_stays_however_old_it_is(uri, monkeypatch):
    begin(uri)
    job = append_to_archive(uri, plan=later_plan("a.tar", "b.tar"), codec_files=CODEC_FILES)
    job.commit_unit("000000", mixed_rows(10, 2))
    aged(monkeypatch, *open_store(uri).list(""))
    report = collect_garbage(uri, options=CAREFUL)
    assert report.deleted == report.spared == ()
    job.commit_unit("000001", mixed_rows(20, 2))
    job.finalize()
    check_kept(uri)


def test_an_archive_that_is_not_finished_keeps_every_commit(uri, monkeypatch):
    job = create_archive(uri, plan=plan_of("u", "v"), codec_files=CODEC_FILES)
    job.commit_unit("u", mixed_rows(0, 3))
    open_store(uri).put("data/part-u-0123456789abcdef.parquet", b"a stray")
    aged(monkeypatch, *open_store(uri).list(""))
    report = collect_garbage(uri, options=CAREFUL)
    assert [s.name for s in report.deleted] == ["data/part-u-0123456789abcdef.parquet"]
    job.commit_unit("v", [])
    assert job.finalize().version == 1
    check_kept(uri)


def test_every_attempt_stays_while_the_smallest_name_may_still_change(uri, monkeypatch):
    monkeypatch.setattr("dicmh_ray.archive.writer.probe", lambda store: False)
    job = create_archive(uri, plan=plan_of("u"), codec_files=CODEC_FILES)

    def late():
        job.commit_unit("u", mixed_rows(0, 2))
        yield from mixed_rows(10, 3)

    job.commit_unit("u", late())
    assert len(open_store(uri).list("commit/")) == len(open_store(uri).list("data/")) == 2
    aged(monkeypatch, *open_store(uri).list(""))
    assert collect_garbage(uri, options=CAREFUL).deleted == ()
    job.finalize()
    report = collect_garbage(uri, options=CAREFUL)
    assert len(report.deleted) == 3, "part, index and commit of the attempt that does not count"
    check_kept(uri)


def test_a_compaction_that_lost_is_garbage_with_its_plan(uri, monkeypatch):
    build(uri)
    lost = plan_compaction(open_snapshot(uri), 2**21)
    put_plan(open_store(uri), lost)
    deleted = collect_garbage(uri, options=NEWEST_ONLY).deleted
    assert [s.name.partition("-")[0] for s in deleted] == ["index/joined"], "of the old version"
    winner = plan_compaction(open_snapshot(uri), 2**20)
    assert winner.plan_id != lost.plan_id
    monkeypatch.setattr("dicmh_ray.archive.compact.open_plans", lambda *_: [])
    compact_archive(uri)
    report = collect_garbage(uri, options=GcOptions(grace_s=0))
    assert [s.name for s in report.deleted] == [f"plan/{lost.plan_id}.json"]
    check_kept(uri)


def test_the_same_job_again_does_nothing_after_its_commits_are_gone(uri):
    build(uri)
    compact_archive(uri)
    collect_garbage(uri, options=NEWEST_ONLY)
    plan = open_snapshot(uri).plan
    job = create_archive(uri, plan=plan, codec_files=CODEC_FILES)
    assert job.committed_units() == set(plan.unit_names)
    assert job.finalize().version == 3
    assert append(uri, "a.tar", start=500).version == 3
    check_kept(uri)


def test_a_writer_that_slept_through_a_collection_does_not_publish_into_the_past(uri):
    begin(uri)
    job = append_to_archive(uri, plan=later_plan("slow.tar"), codec_files=CODEC_FILES)
    job.commit_unit("000000", mixed_rows(10, 2))

    def meanwhile():
        append(uri, "a.tar", start=20)
        append(uri, "b.tar", start=30)
        collect_garbage(uri, options=NEWEST_ONLY)

    class Sleepy(store.MemoryStore):
        slept = False

        def put_if_absent(self, name, data):
            if name.startswith("manifest/") and not Sleepy.slept:
                Sleepy.slept = True
                meanwhile()
            return super().put_if_absent(name, data)

    job._store = Sleepy(uri)
    assert job.finalize().version == 4
    assert {"img-0010", "img-0020", "img-0030"} <= set(rows_of(uri))
    check_kept(uri)


@pytest.mark.parametrize(
    "which", ["plan.json", "manifest/000001.json", "manifest/000003.json", "plan/", "job/"]
)
def test_a_damaged_record_stops_the_collector_before_it_deletes(uri, which):
    build(uri)
    compact_archive(uri)
    job = append_to_archive(uri, plan=later_plan("z.tar", "y.tar"), codec_files=CODEC_FILES)
    job.commit_unit("000000", mixed_rows(900, 2))
    objects = open_store(uri)
    name = which.replace("/", f"/{job.plan.plan_id}") if which.endswith("/") else which
    (name,) = [found for found in objects.list("") if found.startswith(name)]
    data = objects.get(name)
    objects.put(name, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    before = objects.list("")
    with pytest.raises(CorruptObjectError, match=name):
        collect_garbage(uri, options=NEWEST_ONLY)
    assert objects.list("") == before


def test_an_object_that_was_put_again_since_the_listing_is_spared(uri, monkeypatch):
    begin(uri)
    objects = open_store(uri)
    name = "data/part-x-00.parquet"
    objects.put(name, b"old")
    aged(monkeypatch, name)
    listing = store.MemoryStore.list_objects

    def put_again(self, prefix):
        found = listing(self, prefix)
        if prefix == "":
            objects.put(name, b"old")
        return found

    monkeypatch.setattr(store.MemoryStore, "list_objects", put_again)
    collect_garbage(uri)
    assert objects.get(name) == b"old"


def test_what_a_killed_put_left_in_a_folder_goes_after_the_grace_period(tmp_path):
    uri = begin(str(tmp_path / "archive"))
    leftover = tmp_path / "archive" / "data" / ".tmp-0123"
    leftover.write_bytes(b"half a part")
    (tmp_path / "archive" / "data" / ".hidden").write_bytes(b"mine")
    assert collect_garbage(uri).deleted == ()
    told = collect_garbage(uri, options=NEWEST_ONLY, dry_run=True)
    assert leftover.exists()
    report = collect_garbage(uri, options=NEWEST_ONLY)
    assert [(s.name, s.num_bytes) for s in report.deleted] == [("data/.tmp-0123", 11)]
    assert told.deleted == report.deleted
    assert not leftover.exists()
    assert (tmp_path / "archive" / "data" / ".hidden").exists()


def test_a_dry_run_writes_nothing(uri, monkeypatch):
    begin(uri)
    append(uri, "a.tar")
    stray = "data/part-x-00.parquet"
    open_store(uri).put(stray, b"stray")
    aged(monkeypatch, stray)

    def refused(self, *args):
        raise PermissionError("these credentials may read")

    with monkeypatch.context() as patch:
        for operation in ("put", "_create", "delete"):
            patch.setattr(store.MemoryStore, operation, refused)
        told = collect_garbage(uri, options=CAREFUL, dry_run=True)
        with pytest.raises(PermissionError):
            collect_garbage(uri, options=CAREFUL)
    assert stray in [o.name for o in told.deleted]
    assert collect_garbage(uri, options=CAREFUL).deleted == told.deleted


def test_nothing_is_collected_where_no_archive_is(uri):
    with pytest.raises(ArchiveNotFoundError):
        collect_garbage(uri)
    assert open_store(uri).list("") == []


@pytest.mark.parametrize("wrong", [{"keep_versions": 0}, {"keep_s": -1}, {"grace_s": -1}])
def test_options_that_would_delete_the_archive_are_refused(wrong):
    with pytest.raises(ValueError, match=r"newest always stays|negative"):
        GcOptions(**wrong)


def test_a_collection_killed_at_any_operation_leaves_what_is_kept_sound_and_is_finished_later(
    uri, monkeypatch
):
    base = build(f"{uri}/base", units=3)
    compact_archive(base)
    stray = "data/part-x-00.parquet"
    open_store(base).put(stray, b"stray")
    before = rows_of(base)
    aged(monkeypatch, stray)
    script = schedules.scripted(monkeypatch)
    deaths = 0
    for place in schedules.kill_everywhere(
        script,
        lambda place: collect_garbage(place, options=NEWEST_ONLY),
        lambda name: schedules.copy_archive(base, f"{uri}/{name}"),
    ):
        deaths += 1
        check_kept(place)
        assert rows_of(place) == before
        collect_garbage(place, options=NEWEST_ONLY)
        found = verify_archive(place)
        assert (found.exit_code, found.notes) == (0, [])
        assert rows_of(place) == before
        assert [f.is_kept for f in read_history(place).versions] == [False, False, True]
    assert deaths > 20


@pytest.mark.parametrize("action", ["append", "compact"])
def test_a_collection_inside_another_job_at_any_operation_takes_nothing_it_needs(
    uri, monkeypatch, action
):
    base = build(f"{uri}/base", units=3)
    before = rows_of(base)
    script = schedules.scripted(monkeypatch)

    def work(place):
        return append(place, "b.tar", start=600) if action == "append" else compact_archive(place)

    total = schedules.operations_of(
        script, work, schedules.copy_archive(base, f"{uri}/undisturbed")
    )
    for number in range(1, total + 1):
        place = schedules.copy_archive(base, f"{uri}/{number}")
        script.plan(number, lambda place=place: collect_garbage(place, options=CAREFUL))
        work(place)
        script.plan(0, None)
        after = rows_of(place)
        assert {key: after[key] for key in before} == before
        assert len(after) == len(before) + (2 if action == "append" else 0)
        check_kept(place)


@pytest.mark.parametrize("action", ["append", "compact"])
def test_a_job_inside_a_collection_at_any_operation_loses_nothing(uri, monkeypatch, action):
    base = build(f"{uri}/base", units=3)
    compact_archive(base)
    append(base, "c.tar", start=700)
    before = rows_of(base)
    script = schedules.scripted(monkeypatch)

    def work(place):
        return append(place, "b.tar", start=600) if action == "append" else compact_archive(place)

    def collect(place):
        return collect_garbage(place, options=CAREFUL)

    total = schedules.operations_of(
        script, collect, schedules.copy_archive(base, f"{uri}/undisturbed")
    )
    for number in range(1, total + 1, 2):
        place = schedules.copy_archive(base, f"{uri}/{number}")
        script.plan(number, lambda place=place: work(place))
        collect(place)
        script.plan(0, None)
        after = rows_of(place)
        assert {key: after[key] for key in before} == before
        assert len(after) == len(before) + (2 if action == "append" else 0)
        check_kept(place)


def test_an_archive_opens_while_its_newest_version_is_replaced_and_given_up(uri, monkeypatch):
    base = begin(f"{uri}/base")
    script = schedules.scripted(monkeypatch)

    def replace_newest(place):
        append(place, "a.tar")
        collect_garbage(place, options=NEWEST_ONLY)

    total = schedules.operations_of(script, open_snapshot, base)
    for number in range(1, total + 1):
        place = schedules.copy_archive(base, f"{uri}/{number}")
        script.plan(number, lambda place=place: replace_newest(place))
        assert open_snapshot(place).statistics.rows in (3, 5)
        script.plan(0, None)


def test_a_check_is_not_led_astray_by_a_collection_at_any_operation(uri, monkeypatch):
    base = build(f"{uri}/base", units=2)
    compact_archive(base)
    script = schedules.scripted(monkeypatch)
    total = schedules.operations_of(script, verify_archive, base)
    for number in range(1, total + 1):
        place = schedules.copy_archive(base, f"{uri}/{number}")
        script.plan(number, lambda place=place: collect_garbage(place, options=NEWEST_ONLY))
        report = verify_archive(place)
        script.plan(0, None)
        assert report.exit_code == 0, report.problems


@pytest.mark.parametrize("seed", range(5))
def test_everything_at_once_by_chance(uri, monkeypatch, seed):
    build(uri)
    before = rows_of(uri)
    schedule = schedules.Lockstep(seed, ["append", "compact", "gc", "other gc"])
    schedules.install(monkeypatch, schedule.operation)
    schedule.run(
        {
            "append": lambda: append(uri, "b.tar", start=600),
            "compact": lambda: compact_archive(uri),
            "gc": lambda: collect_garbage(uri, options=CAREFUL),
            "other gc": lambda: collect_garbage(uri, options=CAREFUL),
        }
    )
    after = rows_of(uri)
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + 2
    check_kept(uri)
    collect_garbage(uri, options=NEWEST_ONLY)
    found = verify_archive(uri)
    assert (found.exit_code, found.notes) == (0, [])
