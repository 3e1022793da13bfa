"""Small parts become large ones, as a new version: the rows stay what they were, to the byte."""

import math

import pytest

from dicmh_ray.archive import (
    PartOptions,
    append_to_archive,
    compact_archive,
    create_archive,
    open_snapshot,
    open_store,
    read_history,
    verify_archive,
)
from dicmh_ray.archive.compact import CompactWriter, plan_compaction
from dicmh_ray.archive.later import put_plan
from dicmh_ray.errors import (
    AppendError,
    ArchiveNotFoundError,
    CommitFailedError,
    CorruptObjectError,
)
from dicmh_ray.reader import ArchiveReader
from tests.archive import schedules
from tests.archive.rows import CODEC_FILES, mixed_rows, ok_row, plan_of
from tests.archive.test_append import append, begin, check_sound, keys, later_plan

BLOBS = ("base", "detail", "original")


def build(uri, options=None, *, units=4):
    """A finished archive of small units, the last one appended."""
    plan = plan_of(*(f"{i:06d}" for i in range(units - 1)))
    job = create_archive(uri, plan=plan, codec_files=CODEC_FILES, storage_options=options)
    for number, unit in enumerate(plan.unit_names):
        info = {"causes": {"cmyk": 1}, "psnr_sum": 31.5}
        job.commit_unit(unit, mixed_rows(10 * number, 4), info=info)
    job.finalize()
    append(uri, "a.tar", start=500, options=options)
    return uri


def rows_of(uri, version=None, options=None):
    """Every row whole, checksum included, by key and in the order of the scan."""
    reader = ArchiveReader.open(uri, version=version, storage_options=options)
    return {row.key: row for row in reader.rows(blobs=BLOBS)}


@pytest.fixture
def uri(tmp_path):
    return f"memory://{tmp_path.as_posix().strip('/')}"


def test_rows_stay_what_they_were_and_become_one_part(place):
    build(place.uri, place.options)
    before = rows_of(place.uri, options=place.options)
    report = compact_archive(place.uri, storage_options=place.options)
    assert (report.version, report.groups, report.is_superseded) == (3, 1, False)
    assert (report.units_before, report.units_after) == (4, 1)
    assert (report.parts_before, report.parts_after) == (4, 1)
    after = rows_of(place.uri, options=place.options)
    assert after == before, "every column and every checksum"
    assert len(after) == 14
    reader = ArchiveReader.open(place.uri, storage_options=place.options)
    for key, row in before.items():
        assert reader.get(key) == row
    found = verify_archive(place.uri, storage_options=place.options)
    assert (found.exit_code, found.notes) == (0, [])
    assert rows_of(place.uri, 2, place.options) == before, "the version before it is as it was"
    assert len(rows_of(place.uri, 1, place.options)) == 12


def test_a_second_compaction_finds_nothing_to_do(uri):
    build(uri)
    compact_archive(uri)
    names = open_store(uri).list("")
    report = compact_archive(uri)
    assert (report.version, report.groups, report.bytes_rewritten) == (3, 0, 0)
    assert open_store(uri).list("") == names


def test_statistics_and_causes_are_carried_over(uri):
    build(uri)
    old = open_snapshot(uri)
    compact_archive(uri)
    new = open_snapshot(uri)
    assert new.statistics.rows == old.statistics.rows
    assert new.statistics.ok_bitstream_bytes == old.statistics.ok_bitstream_bytes
    assert new.statistics.bytes_in == old.statistics.bytes_in
    assert new.statistics.bytes_out < old.statistics.bytes_out
    (commit,) = new.commits
    assert commit.info["causes"] == {"cmyk": 3}
    assert commit.info["psnr_sum"] == pytest.approx(94.5)


def test_rows_of_a_new_part_are_sorted_by_tag_and_key_across_the_old_units(uri):
    build(uri)
    compact_archive(uri)
    order = [(row.tags[:1], row.key) for row in ArchiveReader.open(uri).rows()]
    assert order == sorted(order)


def test_groups_keep_to_the_target_and_large_units_stay(uri):
    plan = plan_of(*(f"{i:06d}" for i in range(6)))
    job = create_archive(uri, plan=plan, codec_files=CODEC_FILES)
    for number, unit in enumerate(plan.unit_names):
        size = 100_000 if number == 2 else 4_000
        job.commit_unit(unit, [ok_row(f"img-{number}", size=size)])
    job.finalize()
    sizes = [commit.num_bytes for commit in open_snapshot(uri).commits]
    target = sizes[3] * 2 + sizes[3] // 2
    report = compact_archive(uri, target_bytes=target)
    assert report.groups == 2
    commits = open_snapshot(uri).commits
    assert [commit.statistics.rows for commit in commits] == [2, 1, 2, 1]
    assert commits[1].num_bytes == sizes[2]
    assert max(c.num_bytes for c in commits if c.statistics.rows == 2) <= target
    assert keys(uri) == [f"img-{i}" for i in range(6)]


def test_one_unit_of_many_small_parts_is_rewritten(uri):
    plan = plan_of("000000")
    job = create_archive(
        uri, plan=plan, codec_files=CODEC_FILES, options=PartOptions(part_bytes=200)
    )
    job.commit_unit("000000", mixed_rows(0, 8))
    job.finalize()
    before = rows_of(uri)
    assert compact_archive(uri).parts_after == 1
    assert rows_of(uri) == before
    assert verify_archive(uri).exit_code == 0


def test_units_without_rows_are_joined_too(uri):
    plan = plan_of("000000", "000001")
    job = create_archive(uri, plan=plan, codec_files=CODEC_FILES)
    for unit in plan.unit_names:
        job.commit_unit(unit, [])
    job.finalize()
    report = compact_archive(uri)
    assert (report.units_after, report.parts_after) == (1, 0)
    assert verify_archive(uri).exit_code == 0


def test_a_repeated_key_keeps_its_first_meaning(uri):
    begin(uri)
    for number, tag in enumerate(["zebra", "ant", "ant"]):
        job = append_to_archive(uri, plan=later_plan(f"{number}.tar"), codec_files=CODEC_FILES)
        job.commit_unit("000000", [ok_row("twice", tags=(tag,), source_offset=number)])
        job.finalize()
    compact_archive(uri)
    reader = ArchiveReader.open(uri)
    assert reader.get("twice").source_offset == 0
    assert [row.source_offset for row in reader.rows(where="key == 'twice'")] == [0, 1, 2]
    assert len(open_snapshot(uri).commits) == 3, "the first is joined, the repeated ones are not"
    assert compact_archive(uri).groups == 0
    assert verify_archive(uri).exit_code == 0


def test_a_dry_run_says_what_would_be_and_writes_nothing(uri):
    build(uri)
    names = open_store(uri).list("")
    told = compact_archive(uri, dry_run=True)
    assert open_store(uri).list("") == names
    done = compact_archive(uri)
    for field in ("groups", "units_before", "units_after", "parts_after", "bytes_rewritten"):
        assert getattr(told, field) == getattr(done, field)
    assert told.version == 2


def test_an_unfinished_archive_is_not_compacted(uri):
    with pytest.raises(ArchiveNotFoundError):
        compact_archive(uri)
    create_archive(uri, plan=plan_of("u"), codec_files=CODEC_FILES)
    for dry_run in (False, True):
        with pytest.raises(AppendError, match="first job is unfinished"):
            compact_archive(uri, dry_run=dry_run)
    with pytest.raises(ValueError, match="target_bytes"):
        compact_archive(uri, target_bytes=0)


def test_damage_stops_a_compaction_before_anything_is_published(uri):
    build(uri)
    store = open_store(uri)
    name = open_snapshot(uri).parts[1].name
    data = store.get(name)
    store.put(name, data[:900] + bytes([data[900] ^ 1]) + data[901:])
    with pytest.raises(CorruptObjectError, match="does not match its SHA-256"):
        compact_archive(uri)
    assert open_snapshot(uri).manifest.version == 2
    store.put(name, data)
    assert compact_archive(uri).version == 3


def test_what_an_interrupted_compaction_began_is_finished_after_an_append(uri):
    build(uri)
    plan = plan_compaction(open_snapshot(uri), 2**20)
    put_plan(open_store(uri), plan)
    (job,) = read_history(uri).open_jobs
    assert (job.operation, job.units, job.committed) == ("compact", 1, 0)
    append(uri, "b.tar", start=600)
    before = rows_of(uri)
    report = compact_archive(uri)
    assert report.units_after == 1
    history = read_history(uri)
    assert [v.version.operation for v in history.versions] == [
        "create", "append", "append", "compact", "compact",
    ]  # fmt: skip
    assert history.versions[3].version.plan_id == plan.plan_id
    assert rows_of(uri) == before


def test_of_two_compactions_with_other_targets_one_wins(uri):
    build(uri)
    store = open_store(uri)
    snapshot = open_snapshot(uri)
    small = 2 * math.ceil(max(part.num_bytes for part in snapshot.parts) * 1.2)
    plans = [plan_compaction(snapshot, target) for target in (2**20, small)]
    assert plans[0].plan_id != plans[1].plan_id
    for plan in plans:
        put_plan(store, plan)
    before = rows_of(uri)
    writers = [CompactWriter(store, plan) for plan in plans]
    assert writers[0].run() is not None
    assert writers[0].run() == 0, "published: nothing left to do"
    assert writers[1].run() is None
    with pytest.raises(CommitFailedError, match="not committed"):
        writers[1].finalize()
    assert len(read_history(uri).versions) == 3
    assert read_history(uri).open_jobs == (), "the loser's plan can never be published"
    assert rows_of(uri) == before


def test_a_loser_that_had_written_everything_publishes_nothing(uri):
    build(uri)
    store, snapshot = open_store(uri), open_snapshot(uri)
    slow = CompactWriter(store, plan_compaction(snapshot, 2**21))
    put_plan(store, slow.plan)
    for unit in slow.plan.units:
        slow.rewrite(unit, slow.sources(snapshot.manifest, unit))
    fast = CompactWriter(store, plan_compaction(snapshot, 2**20))
    put_plan(store, fast.plan)
    fast.run()
    assert slow.publish() is None
    with pytest.raises(CommitFailedError, match="another compaction"):
        slow.finalize()
    check_sound(uri)


def test_a_compaction_killed_at_any_operation_leaves_a_sound_archive_and_is_finished_later(
    uri, monkeypatch
):
    base = build(f"{uri}/base", units=3)
    before = rows_of(base)
    script = schedules.scripted(monkeypatch)
    deaths = 0
    for place in schedules.kill_everywhere(
        script, compact_archive, lambda name: schedules.copy_archive(base, f"{uri}/{name}")
    ):
        deaths += 1
        check_sound(place)
        assert compact_archive(place).version == 3
        assert rows_of(place) == before
    assert deaths > 15
    check_sound(place)


def test_an_append_inside_a_compaction_at_any_operation_loses_nothing(uri, monkeypatch):
    base = build(f"{uri}/base", units=3)
    before = set(rows_of(base))
    script = schedules.scripted(monkeypatch)
    undisturbed = schedules.copy_archive(base, f"{uri}/undisturbed")
    total = schedules.operations_of(script, compact_archive, undisturbed)
    for number in range(1, total + 1):
        place = schedules.copy_archive(base, f"{uri}/{number}")
        script.plan(number, lambda place=place: append(place, "b.tar", start=600))
        report = compact_archive(place)
        script.plan(0, None)
        assert not report.is_superseded
        assert set(rows_of(place)) == before | {"img-0600", "img-0601"}
        assert {v.version.operation for v in read_history(place).versions[2:]} == {
            "append", "compact",
        }  # fmt: skip
    check_sound(place)


@pytest.mark.parametrize("seed", range(5))
def test_two_compactions_and_an_append_that_take_turns_by_chance(uri, monkeypatch, seed):
    build(uri)
    before = rows_of(uri)
    schedule = schedules.Lockstep(seed, ["x", "y", "z"])
    schedules.install(monkeypatch, schedule.operation)
    schedule.run(
        {
            "x": lambda: compact_archive(uri),
            "y": lambda: compact_archive(uri, target_bytes=2**20),
            "z": lambda: append(uri, "b.tar", start=600),
        }
    )
    after = rows_of(uri)
    assert {key: after[key] for key in before} == before
    assert len(after) == len(keys(uri)) == len(before) + 2
    check_sound(uri)
