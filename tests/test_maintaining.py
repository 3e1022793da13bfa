"""Append, history, compact and gc as a user meets them. No torch, no ray."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dicmh_ray.archive import open_snapshot
from dicmh_ray.cli import app
from dicmh_ray.errors import AppendError, CommitFailedError, JobError
from dicmh_ray.pipeline.job import Checkpoint, compress_local, plan_job
from dicmh_ray.pipeline.monitor import JobMonitor
from dicmh_ray.source import SourceOptions
from dicmh_ray.views import codecs
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, write_tar


@pytest.fixture
def run(monkeypatch):
    """Runs the program with FakeCodec as the default checkpoint."""
    checkpoint = Checkpoint(codec_id="ab" * 32, files={}, factory=FakeCodec)
    monkeypatch.setattr(Checkpoint, "open", classmethod(lambda cls, _: checkpoint))
    monkeypatch.setattr(codecs, "load_codec", lambda *_, **__: FakeCodec())
    monkeypatch.setattr(codecs, "_loaded_codecs", {})

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return invoke


def shard(folder, number, *, images=2):
    folder.mkdir(exist_ok=True)
    keys = {f"{number:03d}-{i}": bmp(picture(10 * number + i)) for i in range(images)}
    return write_tar(folder / f"shard-{number:03d}.tar", keys)


def compress(run, *arguments, code=0):
    found = run("compress", *arguments, "--runtime", "local", "--json", code=code)
    return json.loads(found.stdout) if found.stdout else found.stderr


def keys(run, archive, *arguments):
    shown = run("ls", archive, "--columns", "key", "--json", *arguments).stdout
    return {json.loads(line)["key"].rpartition("/")[2] for line in shown.splitlines()}


@pytest.fixture
def archive(run, tmp_path):
    """Two tars, compressed."""
    for number in range(2):
        shard(tmp_path / "in", number)
    compress(run, tmp_path / "in" / "*.tar", tmp_path / "archive")
    return tmp_path / "archive"


def test_the_same_glob_appends_only_what_is_new(run, archive, tmp_path):
    sources = tmp_path / "in" / "*.tar"
    report = compress(run, sources, archive, "--append")
    assert (report["units_total"], report["images"], report["manifest"]) == (0, 0, 1)
    shard(tmp_path / "in", 2)
    told = json.loads(run("compress", sources, archive, "--append", "--dry-run", "--json").stdout)
    assert [unit["uri"].rpartition("/")[2] for unit in told["units"]] == ["shard-002.tar"]
    report = compress(run, sources, archive, "--append")
    assert (report["units_total"], report["images"], report["manifest"]) == (1, 2, 2)
    report = compress(run, sources, archive, "--append")
    assert (report["units_total"], report["manifest"]) == (0, 2)
    assert keys(run, archive) == {f"{n:03d}-{i}" for n in range(3) for i in range(2)}
    assert keys(run, archive, "--version", 1) == {f"{n:03d}-{i}" for n in range(2) for i in (0, 1)}
    assert run("verify", archive).stdout.startswith("sound: ")


def test_new_files_of_a_folder_are_appended_and_the_known_ones_left_alone(run, tmp_path):
    photos, archive = tmp_path / "photos", tmp_path / "archive"
    photos.mkdir()
    for name in ("b", "d"):
        (photos / f"{name}.bmp").write_bytes(bmp(picture(ord(name))))
    compress(run, photos, archive)
    (photos / "d.bmp").write_bytes(bmp(picture(99)))
    for name in ("a", "c"):
        (photos / f"{name}.bmp").write_bytes(bmp(picture(ord(name))))
    assert compress(run, photos, archive, "--append")["images"] == 2
    assert compress(run, photos, archive, "--append")["units_total"] == 0
    assert keys(run, archive) == {"a.bmp", "b.bmp", "c.bmp", "d.bmp"}


def test_a_tar_that_was_changed_is_new(run, archive, tmp_path):
    shard(tmp_path / "in", 1, images=3)
    assert compress(run, tmp_path / "in" / "*.tar", archive, "--append")["images"] == 3
    assert "key of more than one row" in run("verify", archive).stdout
    assert len(keys(run, archive)) == 5


def test_of_two_drivers_that_saw_different_files_each_picture_is_added_once(run, archive, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()

    def arrive(*numbers):
        for number in numbers:
            (photos / f"{number}.bmp").write_bytes(bmp(picture(50 + number)))

    def driver():
        return plan_job([str(photos)], str(archive), append=True)

    arrive(0, 1, 2)
    early = driver()
    arrive(3, 4)
    late = driver()
    job, todo, report = early
    assert compress_local(job, todo, JobMonitor(report)).manifest == 2
    job, todo, report = late
    with pytest.raises(CommitFailedError, match="added by another job meanwhile"):
        compress_local(job, todo, JobMonitor(report))
    assert compress(run, photos, archive, "--append")["images"] == 2
    shown = run("ls", archive, "--columns", "key", "--json").stdout.splitlines()
    pictures = [key for line in shown if (key := json.loads(line)["key"]).endswith(".bmp")]
    assert sorted(pictures) == [f"{number}.bmp" for number in range(5)]
    assert json.loads(run("verify", archive, "--json").stdout)["exit_code"] == 0
    assert compress(run, photos, archive, "--append")["units_total"] == 0
    run("gc", archive, "--grace-hours", "0")
    assert json.loads(run("verify", archive, "--json").stdout)["notes"] == []


def test_a_table_that_would_be_cut_otherwise_is_not_added_twice(run, archive, tmp_path):
    table = pa.table({"image": [bmp(picture(60 + n)) for n in range(4)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    whole = SourceOptions()
    ranges = SourceOptions(unit_bytes=1)

    def plan(options):
        return plan_job(
            [str(tmp_path / "t.parquet")], str(archive), source_options=options, append=True
        )

    job, todo, report = plan(whole)
    assert compress_local(job, todo, JobMonitor(report)).manifest == 2
    assert plan(whole)[1] == []
    with pytest.raises(AppendError, match=r"t.parquet, cut into units otherwise; .*unit_bytes"):
        plan(ranges)


def test_of_two_drivers_that_cut_a_table_otherwise_one_adds_it(run, archive, tmp_path):
    table = pa.table({"image": [bmp(picture(60 + n)) for n in range(4)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    plans = [
        plan_job(
            [str(tmp_path / "t.parquet")],
            str(archive),
            source_options=SourceOptions(unit_bytes=unit_bytes),
            append=True,
        )
        for unit_bytes in (1, 1 << 20)
    ]
    job, todo, report = plans[0]
    assert len(todo) == 2
    assert compress_local(job, todo, JobMonitor(report)).manifest == 2
    job, todo, report = plans[1]
    with pytest.raises(CommitFailedError, match="added by another job meanwhile"):
        compress_local(job, todo, JobMonitor(report))
    assert len(keys(run, archive)) == 8
    run("gc", archive, "--grace-hours", "0")
    assert json.loads(run("verify", archive, "--json").stdout)["notes"] == []


def test_of_two_drivers_that_cut_a_table_alike_both_succeed(run, archive, tmp_path):
    table = pa.table({"image": [bmp(picture(60 + n)) for n in range(4)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    shard(tmp_path / "in", 2)
    options, sources = SourceOptions(unit_bytes=1), [str(tmp_path / "t.parquet")]
    more = [*sources, str(tmp_path / "in" / "shard-002.tar")]
    plans = [
        plan_job(each, str(archive), source_options=options, append=True)
        for each in (sources, more)
    ]
    for job, todo, report in plans:
        compress_local(job, todo, JobMonitor(report))
    shown = run("ls", archive, "--columns", "key", "--json").stdout.splitlines()
    assert len(shown) == len(set(shown)) == 10


@pytest.mark.parametrize("command", ["info", "ls", "history", "gc"])
def test_an_address_of_no_kind_of_store_is_told_in_one_line(run, command):
    found = run(command, "foo://x", code=1)
    assert found.stderr.strip() == "error: foo://x cannot be opened: Protocol not known: foo"
    run("verify", "foo://x", code=2)


def test_without_append_another_source_is_refused_as_ever(run, archive, tmp_path):
    shard(tmp_path / "in", 2)
    message = compress(run, tmp_path / "in" / "*.tar", archive, code=1)
    assert "other sources, codec or settings" in message


def test_append_needs_a_finished_archive(run, tmp_path):
    tar = shard(tmp_path / "in", 0)
    assert "no archive at" in compress(run, tar, tmp_path / "none", "--append", code=1)
    assert not (tmp_path / "none").exists()


def test_the_archives_own_codec_stands_in_for_another_default(run, archive, tmp_path, monkeypatch):
    other = Checkpoint(codec_id="cd" * 32, files={})
    monkeypatch.setattr(Checkpoint, "open", classmethod(lambda cls, _: other))
    monkeypatch.setattr(Checkpoint, "load", lambda self, options: FakeCodec())
    tar = shard(tmp_path / "in", 2)
    assert "an archive has one codec" in compress(
        run, tar, archive, "--append", "--checkpoint", "mine/", code=1
    )
    assert compress(run, tar, archive, "--append")["manifest"] == 2
    assert open_snapshot(str(archive)).codec_id == "ab" * 32


def test_history_names_versions_and_what_is_under_way(run, archive, tmp_path):
    compress(run, shard(tmp_path / "in", 2), archive, "--append")
    found = json.loads(run("history", archive, "--json").stdout)
    assert [v["operation"] for v in found["versions"]] == ["create", "append"]
    assert [v["rows"] for v in found["versions"]] == [4, 6]
    lines = run("history", archive).stdout.splitlines()
    assert lines[0].split("\t")[:3] == ["version", "made", "by"]
    assert [line.split("\t")[0] for line in lines[1:]] == ["1", "2"]
    assert run("history", tmp_path / "none", code=1).stderr.startswith("error: no archive at")


def test_compact_and_gc_leave_one_part_and_one_version(run, archive, tmp_path):
    before = run("ls", archive, "--columns", "key,bpp,crc32c").stdout
    assert "would be compacted" in run("compact", archive, "--dry-run").stdout
    report = json.loads(run("compact", archive, "--json").stdout)
    assert (report["parts_before"], report["parts_after"], report["version"]) == (2, 1, 2)
    assert "nothing to compact" in run("compact", archive).stdout
    assert pq.read_table(archive / "data", columns=["key"]).num_rows == 2 * 4, "old and new"
    shown = run("gc", archive).stdout
    assert "deleted            0 objects" in shown
    options = ("--keep-versions", 1, "--keep-days", 0, "--grace-hours", 0)
    shown = run("gc", archive, *options, "--dry-run").stdout
    assert shown.count("would delete\t") == 7, "two parts, two indexes and both joined, two commits"
    report = json.loads(run("gc", archive, *options, "--json").stdout)
    assert (report["given_up"], report["kept_versions"]) == ([1], [2])
    assert len(report["deleted"]) == 7
    assert pq.read_table(archive / "data", columns=["key"]).num_rows == 4
    assert sorted(before.splitlines()) == sorted(
        run("ls", archive, "--columns", "key,bpp,crc32c").stdout.splitlines()
    )
    assert "given up by gc" in run("info", archive, "--version", 1, code=1).stderr
    assert run("verify", archive).stdout.startswith("sound: ")


def test_an_older_version_is_described_listed_and_decoded(run, archive, tmp_path):
    compress(run, shard(tmp_path / "in", 2), archive, "--append")
    assert json.loads(run("info", archive, "--json").stdout)["rows"] == 6
    facts = json.loads(run("info", archive, "--version", 1, "--json").stdout)
    assert (facts["rows"], facts["archive_version"]) == (4, 1)
    out = tmp_path / "out"
    run("decode", archive, "--where", "True", "--version", 1, "-o", out)
    assert len(list(out.iterdir())) == 4
    run("decode", archive, "002-0", "--version", 1, "-o", out, code=1)
    run("decode", archive, "002-0", "-o", out)
    assert "no archive at" in run("ls", archive, "--version", 9, code=1).stderr


def test_an_append_that_stopped_half_way_goes_on_with_the_same_plan(run, archive, tmp_path):
    shard(tmp_path / "in", 2)
    shard(tmp_path / "in", 3)
    sources = [str(tmp_path / "in" / "*.tar")]

    def plan():
        return plan_job(sources, str(archive), append=True)

    job, units, report = plan()
    assert (report.units_total, report.units_resumed) == (2, 0)
    job.run_unit(units[0], FakeCodec())
    again, todo, report = plan()
    assert again.writer.plan == job.writer.plan
    assert (todo, report.units_resumed) == (units[1:], 1)
    with pytest.raises(JobError, match="already holds 1 of 2 units"):
        plan_job(sources, str(archive), append=True, resume=False)
    (waiting,) = json.loads(run("history", archive, "--json").stdout)["open_jobs"]
    assert (waiting["operation"], waiting["committed"], waiting["units"]) == ("append", 1, 2)
    assert "not published: append" in run("history", archive).stdout
    assert compress(run, *sources, archive, "--append")["units_resumed"] == 1
    assert len(keys(run, archive)) == 8
