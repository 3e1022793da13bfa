"""A job added to a finished archive: one more version, whoever else is at work."""

import json
import pickle
from dataclasses import replace

import pytest

from dicmh_ray.archive import (
    GcOptions,
    Plan,
    append_to_archive,
    collect_garbage,
    create_archive,
    open_snapshot,
    open_store,
    published_units,
    read_history,
    verify_archive,
    writer,
)
from dicmh_ray.archive.append import AppendWriter
from dicmh_ray.archive.manifest import Manifest
from dicmh_ray.archive.sealed import unseal
from dicmh_ray.errors import (
    AppendError,
    ArchiveNotFoundError,
    CommitFailedError,
    CorruptObjectError,
    SchemaVersionError,
)
from dicmh_ray.reader import ArchiveReader
from tests.archive import schedules
from tests.archive.rows import CODEC_FILES, CODEC_ID, mixed_rows, ok_row


def later_plan(*uris, **parameters):
    """Units with the names that the first job's have: names are unique in a plan only."""
    return Plan(
        units=[{"name": f"{i:06d}", "uri": uri} for i, uri in enumerate(uris)],
        codec_id=CODEC_ID,
        parameters=parameters,
    )


def begin(uri, options=None):
    """An archive of one unit and three rows."""
    plan = later_plan("first.tar")
    job = create_archive(uri, plan=plan, codec_files=CODEC_FILES, storage_options=options)
    job.commit_unit("000000", mixed_rows(0, 3))
    job.finalize()
    return uri


def append(uri, *uris, start=10, options=None, codec_files=CODEC_FILES):
    """Append units of two rows each, all the way."""
    plan = later_plan(*uris)
    job = append_to_archive(uri, plan=plan, codec_files=codec_files, storage_options=options)
    for number, unit in enumerate(plan.unit_names):
        if unit not in job.committed_units():
            job.commit_unit(unit, mixed_rows(start + 2 * number, 2))
    return job.finalize()


def keys(uri, version=None, options=None):
    return list(ArchiveReader.open(uri, version=version, storage_options=options).keys())


@pytest.fixture
def uri(tmp_path):
    return f"memory://{tmp_path.as_posix().strip('/')}"


class TestAppend:
    def test_appended_rows_come_after_those_that_were_there(self, place):
        begin(place.uri, place.options)
        before = keys(place.uri, options=place.options)
        manifest = append(place.uri, "a.tar", "b.tar", options=place.options)
        assert manifest.version == 2
        reader = ArchiveReader.open(place.uri, storage_options=place.options)
        assert list(reader.keys())[:3] == before
        assert len(reader) == len(set(reader.keys())) == 7
        for row in [*mixed_rows(0, 3), *mixed_rows(10, 2), *mixed_rows(12, 2)]:
            assert replace(reader.get(row.key), crc32c=0) == row
        assert len(list(reader.rows())) == 7
        report = verify_archive(place.uri, storage_options=place.options)
        assert (report.exit_code, report.notes, report.rows) == (0, [], 7)

    def test_the_same_job_twice_adds_nothing(self, place):
        begin(place.uri, place.options)
        first = append(place.uri, "a.tar", options=place.options)
        assert append(place.uri, "a.tar", options=place.options) == first
        assert place.store().list("manifest/") == ["manifest/000001.json", "manifest/000002.json"]

    def test_an_older_version_stays_as_it_was(self, place):
        begin(place.uri, place.options)
        one = keys(place.uri, options=place.options)
        append(place.uri, "a.tar", start=10, options=place.options)
        two = keys(place.uri, options=place.options)
        append(place.uri, "b.tar", start=20, options=place.options)
        assert keys(place.uri, 1, place.options) == one
        assert keys(place.uri, 2, place.options) == two
        assert len(keys(place.uri, 3, place.options)) == 7
        with pytest.raises(ArchiveNotFoundError, match="version 4"):
            keys(place.uri, 4, place.options)


def test_a_job_that_is_not_complete_is_not_part_of_the_archive(uri):
    begin(uri)
    job = append_to_archive(uri, plan=later_plan("a.tar", "b.tar"), codec_files=CODEC_FILES)
    job.commit_unit("000001", mixed_rows(10, 2))
    assert job.committed_units() == {"000001"}
    assert len(keys(uri)) == 3
    with pytest.raises(CommitFailedError, match="1 of 2 units"):
        job.finalize()
    report = verify_archive(uri)
    assert report.exit_code == 0
    assert report.rows == 5, "its rows are checked all the same"
    (note,) = report.notes
    assert "not published, 1 of 2 units" in note
    again = append_to_archive(uri, plan=job.plan, codec_files=CODEC_FILES)
    again.commit_unit("000000", mixed_rows(20, 2))
    assert again.finalize().version == 2
    assert again.committed_units() == {"000000", "000001"}


def test_an_unfinished_archive_takes_no_other_job(uri):
    create_archive(uri, plan=later_plan("first.tar"), codec_files=CODEC_FILES)
    with pytest.raises(AppendError, match="first job is unfinished"):
        append(uri, "a.tar")
    with pytest.raises(AppendError, match="first job is unfinished"):
        published_units(open_snapshot(uri))
    assert open_store(uri).list("plan/") == []


def test_nothing_is_appended_to_what_is_not_there(uri):
    with pytest.raises(ArchiveNotFoundError):
        append(uri, "a.tar")
    assert open_store(uri).list("") == []


def test_another_codec_is_refused_before_anything_is_written(uri):
    begin(uri)
    before = open_store(uri).list("")
    plan = Plan(units=later_plan("a.tar").units, codec_id="cd" * 32, parameters={})
    with pytest.raises(AppendError, match="an archive has one codec"):
        append_to_archive(uri, plan=plan, codec_files=CODEC_FILES)
    assert open_store(uri).list("") == before


def test_a_store_that_ignores_the_condition_is_refused(uri, monkeypatch):
    begin(uri)
    monkeypatch.setattr("dicmh_ray.archive.later.probe", lambda store: False)
    with pytest.raises(AppendError, match="ignores conditional puts"):
        append(uri, "a.tar")


def test_the_plan_of_a_compaction_is_no_append(uri):
    begin(uri)
    with pytest.raises(ValueError, match="not for appends"):
        append_to_archive(
            uri, plan=later_plan("a.tar", operation="compact"), codec_files=CODEC_FILES
        )


def test_the_archives_own_plan_continues_the_first_job(uri):
    begin(uri)
    job = append_to_archive(uri, plan=later_plan("first.tar"), codec_files=CODEC_FILES)
    assert not isinstance(job, AppendWriter)
    assert job.committed_units() == {"000000"}
    assert job.finalize().version == 1


def test_a_writer_of_an_append_survives_pickle(uri):
    begin(uri)
    job = append_to_archive(uri, plan=later_plan("a.tar"), codec_files=CODEC_FILES)
    job = pickle.loads(pickle.dumps(job))
    job.commit_unit("000000", mixed_rows(10, 1))
    assert pickle.loads(pickle.dumps(job)).finalize().version == 2


def test_a_job_may_have_other_settings(uri):
    begin(uri)
    job = append_to_archive(uri, plan=later_plan("a.tar", bpp=0.5), codec_files=CODEC_FILES)
    job.commit_unit("000000", mixed_rows(10, 1))
    assert job.finalize().version == 2


def test_a_key_of_two_jobs_keeps_its_first_meaning_and_loses_no_row(uri):
    begin(uri)
    for number, name in enumerate(["a.tar", "b.tar"]):
        job = append_to_archive(uri, plan=later_plan(name), codec_files=CODEC_FILES)
        # A tag that sorts earlier must not make a later row the first one.
        tags = ("zebra",) if number == 0 else ("ant",)
        job.commit_unit("000000", [ok_row("twice", tags=tags, source_offset=number)])
        job.finalize()
    reader = ArchiveReader.open(uri)
    assert reader.get("twice").source_offset == 0
    assert [r.source_offset for r in reader.rows(where="key == 'twice'")] == [0, 1]
    assert verify_archive(uri).notes == ["'twice': key of more than one row"]


def test_a_source_object_that_is_there_is_not_added_again(uri):
    begin(uri)
    assert append(uri, "a.tar", "b.tar").version == 2
    manifest = append(uri, "b.tar", "c.tar", "first.tar", start=30)
    assert manifest.version == 3
    assert manifest.history[-1].units == 4, "first, a, b and c"
    assert len(keys(uri)) == 3 + 4 + 2
    assert {unit["uri"] for unit in published_units(open_snapshot(uri))} == {
        "first.tar", "a.tar", "b.tar", "c.tar",
    }  # fmt: skip


def test_the_history_is_a_chain_that_a_check_follows(uri):
    begin(uri)
    append(uri, "a.tar")
    store = open_store(uri)
    sound = store.get("manifest/000001.json")
    body = json.loads(sound)
    other = Manifest.from_bytes("manifest/000001.json", sound, None)
    store.put("manifest/000001.json", replace(other, created_by="somebody").to_bytes())
    report = verify_archive(uri)
    assert [p.name for p in report.problems] == ["manifest/000001.json"]
    assert "is not the version that manifest 2 follows" in str(report.problems[0])
    assert body["version"] == 1


@pytest.mark.parametrize("pattern", ["plan/*", "job/*", "manifest/000002.json", "data/*"])
def test_damage_to_what_an_append_wrote_is_found(uri, pattern):
    begin(uri)
    store = open_store(uri)
    before = set(store.list(""))
    append(uri, "a.tar")
    (name,) = [n for n in store.list("") if n not in before and n.startswith(pattern.rstrip("*"))]
    data = store.get(name)
    for at in range(0, len(data), max(1, len(data) // 16)):
        store.put(name, data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        report = verify_archive(uri)
        assert report.exit_code == 1
        assert name in {problem.name for problem in report.problems}
    store.delete(name)
    report = verify_archive(uri)
    if pattern.startswith("manifest"):
        assert len(keys(uri)) == 3, "the version before it is an archive"
    else:
        assert report.exit_code == 1


def test_a_manifest_whose_history_lies_is_refused(uri):
    begin(uri)
    manifest = append(uri, "a.tar")
    plan = open_snapshot(uri).plan
    last = manifest.history[-1]
    for history in (
        manifest.history[:1],
        (manifest.history[0], replace(last, rows=99)),
        (replace(manifest.history[0], plan_id="00" * 32), last),
        (manifest.history[0], replace(last, plan_id="00" * 32)),
        (manifest.history[0], replace(last, operation="magic")),
    ):
        data = replace(manifest, history=history).to_bytes()
        with pytest.raises(CorruptObjectError):
            Manifest.from_bytes(manifest.name, data, plan)


def test_software_of_the_first_version_names_the_version_it_does_not_know(uri):
    begin(uri)
    append(uri, "a.tar")
    store = open_store(uri)
    with pytest.raises(SchemaVersionError, match="has version 2, this package reads 1"):
        unseal(
            "manifest/000002.json", store.get("manifest/000002.json"), "dicmh.archive.manifest", 1
        )
    unseal("manifest/000001.json", store.get("manifest/000001.json"), "dicmh.archive.manifest", 1)


def test_parts_that_were_put_too_long_ago_are_not_committed(uri, monkeypatch):
    begin(uri)
    job = append_to_archive(uri, plan=later_plan("a.tar"), codec_files=CODEC_FILES)
    monkeypatch.setattr(writer, "COMMIT_LEASE_S", -1)
    with pytest.raises(CommitFailedError, match="hours ago"):
        job.commit_unit("000000", mixed_rows(10, 2))
    monkeypatch.undo()
    job.commit_unit("000000", mixed_rows(10, 2))
    assert job.finalize().version == 2


def test_a_part_in_the_place_of_an_old_stray_gets_other_bytes_and_another_name(uri, monkeypatch):
    begin(uri)
    job = append_to_archive(uri, plan=later_plan("a.tar"), codec_files=CODEC_FILES)
    job.commit_unit("000000", mixed_rows(10, 2))
    store = open_store(uri)
    (commit,) = store.list("job/")
    (stray,) = set(store.list("data/")) - {p.name for p in open_snapshot(uri).parts}
    store.delete(commit)
    young = job.commit_unit("000000", mixed_rows(10, 2))
    assert young.parts[0].name == stray, "the same bytes, the same name"
    store.delete(commit)
    modified = type(store).modified
    ages = iter([-(10**6)])
    monkeypatch.setattr(
        type(store), "modified", lambda self, name: modified(self, name) + next(ages, 0)
    )
    old = job.commit_unit("000000", mixed_rows(10, 2))
    monkeypatch.undo()
    assert old.parts[0].name != stray
    job.finalize()
    assert verify_archive(uri).exit_code == 0


def check_sound(uri):
    """Every version there is opens, can be read whole, and verifies."""
    assert verify_archive(uri).exit_code == 0
    for name in open_store(uri).list("manifest/"):
        version = int(name[-11:-5])
        reader = ArchiveReader.open(uri, version=version)
        assert len(list(reader.rows(blobs=("base", "detail", "original")))) == len(reader)


def test_an_append_killed_at_any_operation_leaves_a_sound_archive_and_is_finished_later(
    uri, monkeypatch
):
    base = begin(f"{uri}/base")
    script = schedules.scripted(monkeypatch)
    deaths = 0
    for place in schedules.kill_everywhere(
        script,
        lambda place: append(place, "a.tar"),
        lambda name: schedules.copy_archive(base, f"{uri}/{name}"),
    ):
        deaths += 1
        check_sound(place)
        assert append(place, "a.tar").version == 2
        assert sorted(keys(place)[3:]) == ["img-0010", "img-0011"]
    assert deaths > 12
    check_sound(place)


def test_one_append_inside_another_at_any_operation_are_two_versions(uri, monkeypatch):
    base = begin(f"{uri}/base")
    script = schedules.scripted(monkeypatch)
    undisturbed = schedules.copy_archive(base, f"{uri}/undisturbed")
    total = schedules.operations_of(script, lambda place: append(place, "a.tar"), undisturbed)
    for number in range(1, total + 1):
        place = schedules.copy_archive(base, f"{uri}/{number}")
        script.plan(number, lambda place=place: append(place, "b.tar", start=20))
        append(place, "a.tar")
        script.plan(0, None)
        assert sorted(keys(place)[3:]) == ["img-0010", "img-0011", "img-0020", "img-0021"]
        assert len(open_store(place).list("manifest/")) == 3
    check_sound(place)


@pytest.mark.parametrize("seed", range(6))
def test_appends_that_take_turns_by_chance_all_arrive(uri, monkeypatch, seed):
    begin(uri)
    sources = {name: [f"{name}.tar", "shared.tar"] for name in ("a", "b", "c")}
    schedule = schedules.Lockstep(seed, sources)
    schedules.install(monkeypatch, schedule.operation)
    found = schedule.run(
        {
            name: lambda name=name: append(uri, *sources[name], start=10 + 10 * ord(name))
            for name in sources
        }
    )
    assert sorted(manifest.version for manifest in found.values()) == [2, 3, 4]
    assert len(keys(uri)) == 3 + 3 * 2 + 2, "the shared source object came in once"
    check_sound(uri)


@pytest.mark.parametrize("seed", range(4))
def test_two_drivers_of_one_append_publish_it_once(uri, monkeypatch, seed):
    begin(uri)
    schedule = schedules.Lockstep(seed, ["x", "y"])
    schedules.install(monkeypatch, schedule.operation)
    found = schedule.run(dict.fromkeys(["x", "y"], lambda: append(uri, "a.tar", "b.tar")))
    assert found["x"] == found["y"]
    assert found["x"].version == 2
    assert len(keys(uri)) == 7
    check_sound(uri)


def files_plan(*names, root="photos/"):
    """A job of one group of image files."""
    unit = {"name": "000000", "kind": "files", "root": root, "uri": list(names)}
    return Plan(units=[unit], codec_id=CODEC_ID, parameters={})


def committed(uri, plan):
    """A writer of an append whose one unit is committed: a row for each file."""
    job = append_to_archive(uri, plan=plan, codec_files=CODEC_FILES)
    job.commit_unit("000000", [ok_row(name) for name in plan.units[0]["uri"]])
    return job


@pytest.mark.parametrize(
    "later",
    [files_plan("2.png", "3.png"), files_plan("photos/2.png", root=""), files_plan("1.png")],
)
def test_a_group_of_files_of_which_another_job_added_some_is_not_published(uri, later):
    begin(uri)
    slow = committed(uri, later)
    assert committed(uri, files_plan("1.png", "2.png")).finalize().version == 2
    with pytest.raises(CommitFailedError, match="run the same command again"):
        slow.finalize()
    assert keys(uri)[3:] == ["1.png", "2.png"]
    assert read_history(uri).open_jobs == ()
    assert collect_garbage(uri).deleted == (), "it is garbage, but young"
    gone = {o.name for o in collect_garbage(uri, options=GcOptions(grace_s=0)).deleted}
    assert f"plan/{later.plan_id}.json" in gone
    assert not any(later.plan_id in name for name in open_store(uri).list(""))
    assert committed(uri, files_plan("3.png")).finalize().version == 3
    assert keys(uri)[3:] == ["1.png", "2.png", "3.png"]
    check_sound(uri)


def test_groups_of_other_files_and_equal_groups_do_not_stop_each_other(uri):
    begin(uri)
    jobs = [
        committed(uri, plan)
        for plan in (
            files_plan("1.png", "2.png"),
            files_plan("3.png"),
            files_plan("1.png", root="other/"),
        )
    ]
    again = replace(jobs[0].plan, parameters={"bpp": 0.5})
    jobs.append(committed(uri, again))
    assert [job.finalize().version for job in jobs] == [2, 3, 4, 5]
    assert keys(uri)[3:] == ["1.png", "2.png", "3.png", "1.png"]


def test_an_append_whose_answers_are_lost_is_published_once(uri, monkeypatch):
    begin(uri)
    create = schedules.store.MemoryStore._create

    def losing(self, path, data):
        create(self, path, data)
        losing.puts += 1
        if losing.puts % 2:
            raise TimeoutError("no answer")

    losing.puts = 0
    monkeypatch.setattr(schedules.store.MemoryStore, "_create", losing)
    assert append(uri, "a.tar", "b.tar").version == 2
    assert losing.puts > 4
    check_sound(uri)
