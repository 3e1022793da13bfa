"""Which versions an archive has, and that each stays as it was."""

import json

import pytest

from dicmh_ray.archive import append_to_archive, create_archive, open_snapshot, read_history
from dicmh_ray.errors import ArchiveNotFoundError
from dicmh_ray.reader import ArchiveReader
from tests.archive.rows import CODEC_FILES, mixed_rows
from tests.archive.test_append import append, begin, keys, later_plan
from tests.archive.test_schema import SCHEMAS, check


def test_the_history_names_every_version_with_its_job_and_its_sums(place):
    begin(place.uri, place.options)
    append(place.uri, "a.tar", start=10, options=place.options)
    manifest = append(place.uri, "b.tar", "c.tar", start=20, options=place.options)
    history = read_history(place.uri, storage_options=place.options)
    versions = [facts.version for facts in history.versions]
    assert [v.operation for v in versions] == ["create", "append", "append"]
    assert [v.rows for v in versions] == [3, 5, 9]
    assert [v.units for v in versions] == [1, 2, 4]
    assert [v.plan_id for v in versions] == [
        later_plan("first.tar").plan_id,
        later_plan("a.tar").plan_id,
        later_plan("b.tar", "c.tar").plan_id,
    ]
    assert tuple(versions) == manifest.history
    assert all(facts.is_kept for facts in history.versions)
    times = [facts.created_at for facts in history.versions]
    assert times == sorted(times)
    assert abs(times[0] - place.store().now()) < 600
    assert history.open_jobs == ()
    json.dumps(history.to_dict())


def test_an_unfinished_archive_has_a_job_and_no_version(place):
    plan = later_plan("a.tar", "b.tar")
    job = create_archive(
        place.uri, plan=plan, codec_files=CODEC_FILES, storage_options=place.options
    )
    job.commit_unit("000001", mixed_rows(0, 1))
    history = read_history(place.uri, storage_options=place.options)
    assert history.versions == ()
    (found,) = history.open_jobs
    assert (found.operation, found.units, found.committed) == ("create", 2, 1)


def test_a_job_that_is_under_way_is_shown_until_it_is_published(place):
    begin(place.uri, place.options)
    plan = later_plan("a.tar", "b.tar")
    job = append_to_archive(
        place.uri, plan=plan, codec_files=CODEC_FILES, storage_options=place.options
    )
    job.commit_unit("000000", mixed_rows(10, 1))
    history = read_history(place.uri, storage_options=place.options)
    (found,) = history.open_jobs
    assert (found.plan_id, found.operation) == (plan.plan_id, "append")
    assert (found.units, found.committed) == (2, 1)
    job.commit_unit("000001", mixed_rows(20, 1))
    job.finalize()
    history = read_history(place.uri, storage_options=place.options)
    assert history.open_jobs == ()
    assert len(history.versions) == 2


def test_what_is_no_archive_has_no_history(place):
    with pytest.raises(ArchiveNotFoundError):
        read_history(place.uri, storage_options=place.options)


def test_statistics_are_those_of_the_version_that_was_opened(tmp_path):
    uri = begin(str(tmp_path))
    append(uri, "a.tar")
    assert open_snapshot(uri, version=1).statistics.rows == 3
    statistics = open_snapshot(uri).statistics
    assert (statistics.rows, statistics.units, statistics.committed) == (5, 2, 2)
    assert (statistics.archive_version, open_snapshot(uri, version=1).statistics.units) == (2, 1)


def test_an_open_reader_does_not_see_what_is_appended(tmp_path):
    uri = begin(str(tmp_path))
    reader = ArchiveReader.open(uri)
    append(uri, "a.tar")
    assert len(reader) == len(list(reader.rows())) == 3
    assert len(keys(uri)) == 5


def test_later_manifests_match_their_published_schema(tmp_path):
    uri = begin(str(tmp_path))
    append(uri, "a.tar")
    store = open_snapshot(uri).store
    schema = json.loads((SCHEMAS / "manifest.v2.schema.json").read_text())
    check(json.loads(store.get("manifest/000002.json")), schema, "manifest")
    (name,) = store.list("plan/")
    schema = json.loads((SCHEMAS / "plan.v1.schema.json").read_text())
    check(json.loads(store.get(name)), schema, name)
    (name,) = store.list("job/")
    schema = json.loads((SCHEMAS / "commit.v1.schema.json").read_text())
    check(json.loads(store.get(name)), schema, name)
