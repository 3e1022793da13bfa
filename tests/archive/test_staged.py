"""Units that are staged first and published at once: all of them, or no archive."""

import pytest

from dicmh_ray.archive import (
    GcOptions,
    collect_garbage,
    open_snapshot,
    open_store,
    verify_archive,
)
from dicmh_ray.archive import staged as staged_module
from dicmh_ray.archive.staged import StagedUnit, finish_staged, publish_staged, stage_unit
from dicmh_ray.errors import ArchiveNotFoundError, CorruptObjectError, PlanConflictError
from dicmh_ray.reader import ArchiveReader
from tests.archive.rows import CODEC_FILES, CODEC_ID, mixed_rows, ok_row


def stage(uri, name, rows):
    return stage_unit(open_store(uri), name, rows, codec_id=CODEC_ID)


def publish(uri, units):
    return publish_staged(uri, units, codec_id=CODEC_ID, codec_files=CODEC_FILES)


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "archive")


def test_staged_units_are_no_archive_until_they_are_published(uri):
    first, second = stage(uri, "a", mixed_rows(0, 5)), stage(uri, "b", mixed_rows(5, 3))
    with pytest.raises(ArchiveNotFoundError):
        open_snapshot(uri)
    manifest = publish(uri, [first, second])
    assert manifest.version == 1
    assert sorted(ArchiveReader.open(uri).keys()) == [f"img-{n:04d}" for n in range(8)]
    assert verify_archive(uri).exit_code == 0


def test_staging_again_gives_the_same_objects(uri):
    assert stage(uri, "a", mixed_rows()) == stage(uri, "a", mixed_rows())
    assert len(open_store(uri).list("data/")) == 1


def test_a_unit_survives_its_plan():
    unit = StagedUnit.from_unit(stage("memory://staged-plan", "a", mixed_rows()).to_unit())
    assert unit == stage("memory://staged-plan", "a", mixed_rows())
    with pytest.raises(CorruptObjectError, match="not a plan of staged units"):
        StagedUnit.from_unit({"name": "a", "uri": "x.tar"})


@pytest.fixture
def cut_off(uri, monkeypatch):
    """Three units whose publication ended behind the plan and the commit of the first."""
    units = [stage(uri, name, [ok_row(f"{name}-{n}") for n in range(3)]) for name in "abc"]
    commit = staged_module._StagedWriter.commit_staged

    def dies(self, unit):
        if unit.name == "b":
            raise KeyboardInterrupt
        return commit(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(staged_module._StagedWriter, "commit_staged", dies)
        with pytest.raises(KeyboardInterrupt):
            publish(uri, units)
    assert not open_snapshot(uri).is_complete
    return units


def test_what_was_cut_off_behind_the_plan_is_finished_from_the_plan(uri, cut_off):
    units = cut_off
    manifest = finish_staged(uri)
    assert finish_staged(uri) == publish(uri, units) == manifest
    assert len(ArchiveReader.open(uri)) == 9
    assert verify_archive(uri).exit_code == 0


def test_what_was_cut_off_is_no_garbage_until_it_is_published(uri, cut_off):
    stray = stage(uri, "stray", mixed_rows())
    report = collect_garbage(uri, options=GcOptions(grace_s=0))
    assert {o.name for o in report.deleted} == {o.name for o in stray.objects}
    finish_staged(uri)
    assert verify_archive(uri).exit_code == 0
    assert collect_garbage(uri, options=GcOptions(grace_s=0)).deleted == ()
    assert len(ArchiveReader.open(uri)) == 9


@pytest.mark.parametrize("kind", ["data/", "index/"])
def test_what_was_staged_and_is_gone_is_not_published(uri, cut_off, kind):
    (lost,) = [o.name for o in cut_off[2].objects if o.name.startswith(kind)]
    store = open_store(uri)
    data = store.get(lost)
    before = store.list("commit/")
    for damage, reason in [(store.delete, "is missing"), (lambda n: store.put(n, b""), "0 bytes")]:
        damage(lost)
        with pytest.raises(CorruptObjectError, match=f"{lost}.*{reason}.*nothing is published"):
            finish_staged(uri)
        assert store.list("commit/") == before
        assert store.list("manifest/") == []
    store.put(lost, data)
    assert finish_staged(uri).version == 1


def test_units_are_staged_and_published_where_there_are_no_hard_links(uri, no_hard_links):
    publish(uri, [stage(uri, "a", mixed_rows(0, 5))])
    assert finish_staged(uri).version == 1
    assert verify_archive(uri).exit_code == 0


def test_of_two_writes_to_one_address_one_is_published(uri):
    ours, theirs = stage(uri, "a", mixed_rows(0, 3)), stage(uri, "b", mixed_rows(3, 3))
    manifest = publish(uri, [ours])
    with pytest.raises(PlanConflictError):
        publish(uri, [theirs])
    assert open_snapshot(uri).manifest == manifest
    assert len(ArchiveReader.open(uri)) == 3


def test_where_nothing_was_published_there_is_nothing_to_finish(uri):
    stage(uri, "a", mixed_rows())
    with pytest.raises(ArchiveNotFoundError):
        finish_staged(uri)


def test_no_units_are_an_empty_archive(uri):
    publish(uri, [])
    assert len(ArchiveReader.open(uri)) == 0
