"""Bulk decode: each row once, whatever dies, in the formats that others read."""

import errno
import gc
import io
import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from dicmh_ray.archive import create_archive, open_snapshot, open_store
from dicmh_ray.cli import app
from dicmh_ray.errors import CorruptRowError, JobError, PlanConflictError, UnreadableImageError
from dicmh_ray.ray_plugin import compress
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.views import codecs, open_archive, read_mark
from dicmh_ray.views.bulk import BulkOptions, plan_bulk_decode
from dicmh_ray.views.bulk_local import decode_here
from tests.archive.rows import CODEC_FILES, kept_row, plan_of
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, write_tar


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bulk")
    images = {f"img-{n}": bmp(picture(n)) for n in range(7)} | {"a.b/c": bmp(picture(9))}
    tar = write_tar(folder / "x.tar", images | {"broken": b"junk"}, metadata={"img-1": {"n": 1}})
    compress(tar, str(folder / "a"), codec=FakeCodec, runtime="local", failure_budget=1.0)
    return str(folder / "a")


SOUND = "status == 'ok'"


def planned(archive, output, **options):
    values = {"where": SOUND, "shard_rows": 3, **options}
    return plan_bulk_decode(archive, str(output), BulkOptions(**values))


def finished(job):
    for shard in job.shards_left():
        job.run_shard(shard, FakeCodec())
    return job.finish()


@pytest.mark.parametrize("container", ["webdataset", "parquet", "folder"])
def test_a_folder_without_hard_links_takes_a_decode_and_its_second_run(
    archive, tmp_path, monkeypatch, container
):
    def link(source, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("os.link", link)
    job = planned(archive, tmp_path / "out", container=container)
    assert not job.conditional
    sums = finished(job)
    assert sums["rows"] == 8
    again = planned(archive, tmp_path / "out", container=container)
    assert again.shards_left() == []
    assert again.finish() == sums
    with pytest.raises(PlanConflictError):
        planned(archive, tmp_path / "out", container=container, shard_rows=4)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves it open
def test_tars_are_read_by_webdataset(archive, tmp_path):
    sums = finished(planned(archive, tmp_path / "out"))
    assert (sums["rows"], sums["shards"], sums["faults"]) == (8, 3, 0)
    pattern = str(tmp_path / "out" / "shard-{000000..000002}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8"))
    gc.collect()  # the warnings come now, not in another test
    views = {view.key: view for view in open_archive(archive, codec=FakeCodec())}
    assert sorted(sample["json"]["key"] for sample in samples) == sorted(
        key for key, view in views.items() if view.status == "ok"
    )
    for sample in samples:
        assert np.array_equal(sample["png"], views[sample["json"]["key"]].pixels())
        assert sample["json"]["is_generated"] is False


def test_parquet_holds_the_same_pictures(archive, tmp_path):
    finished(planned(archive, tmp_path, container="parquet", view="human", format="webp"))
    tables = [pq.read_table(path) for path in sorted(tmp_path.glob("shard-*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == 8
    assert all(row["is_generated"] and read_mark(row["data"]).is_generated for row in rows)


def test_a_folder_holds_a_file_for_each_row(archive, tmp_path):
    job = planned(archive, tmp_path, container="folder", view="thumbnail", max_side=8, format="jpg")
    finished(job)
    files = [*tmp_path.glob("0*/*.jpg")]
    assert len(files) == 8
    with Image.open(files[0]) as opened:
        assert opened.size == (8, 6)


def kept(folder, *rows):
    """An archive of originals, one unit a row."""
    units = [f"u{number}" for number in range(len(rows))]
    writer = create_archive(str(folder), plan=plan_of(*units), codec_files=CODEC_FILES)
    for unit, (key, original) in zip(units, rows, strict=True):
        writer.commit_unit(unit, [kept_row(key, original=original)])
    writer.finalize()
    return str(folder)


ORIGINALS = {"view": "original", "where": None}


@pytest.mark.parametrize("key", ["x", "x/1"])
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves it open
def test_rows_with_one_key_have_files_of_their_own(tmp_path, key):
    twins = kept(tmp_path / "a", (key, b"one"), (key, b"two"), (key, b"three"))
    finished(planned(twins, tmp_path / "f", container="folder", **ORIGINALS))
    files = {path.name: path.read_bytes() for path in (tmp_path / "f/000000").iterdir()}
    assert sorted(files.values()) == [b"one", b"three", b"two"]
    assert finished(planned(twins, tmp_path / "w", **ORIGINALS))["rows"] == 3
    tar = str(tmp_path / "w/shard-000000.tar")
    samples = list(webdataset.WebDataset(tar, shardshuffle=False))
    gc.collect()  # the warnings come now, not in another test
    assert {sample["__key__"] + ".jpeg": sample["jpeg"] for sample in samples} == files
    assert {json.loads(sample["json"])["key"] for sample in samples} == {key}
    result = CliRunner().invoke(
        app, ["decode", twins, key, "--where", "True", "--view", "original", "-o", str(tmp_path)]
    )
    paths = [line.split("\t")[1] for line in result.stdout.splitlines()]
    assert len(set(paths)) == 3


def test_a_row_that_is_left_out_does_not_change_the_name_of_another(tmp_path):
    twins = kept(tmp_path / "a", ("x/1", b"one" * 99), ("x/1", b"two" * 99))
    finished(planned(twins, tmp_path / "whole", container="folder", **ORIGINALS))
    for part in (tmp_path / "a/data").iterdir():
        part.write_bytes(part.read_bytes().replace(b"one", b"eno"))
    options = {**ORIGINALS, "container": "folder", "on_error": "skip"}
    assert finished(planned(twins, tmp_path / "left", **options))["rows"] == 1
    (left,) = (tmp_path / "left/000000").iterdir()
    assert left.read_bytes() == (tmp_path / "whole/000000" / left.name).read_bytes()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves it open
def test_keys_of_any_length_fit_into_a_tar(tmp_path):
    keys = ["k" * 95, "k" * 97, "train-000/" + "n" * 82, "long/" * 200]
    archive = kept(tmp_path / "a", *((key, key.encode()) for key in keys))
    finished(planned(archive, tmp_path / "out", shard_rows=4, **ORIGINALS))
    tar = str(tmp_path / "out/shard-000000.tar")
    samples = list(webdataset.WebDataset(tar, shardshuffle=False))
    gc.collect()  # the warnings come now, not in another test
    assert [json.loads(sample["json"])["key"] for sample in samples] == keys
    assert [sample["jpeg"].decode() for sample in samples] == keys


def test_a_job_that_died_goes_on_and_repeats_nothing(archive, tmp_path):
    job = planned(archive, tmp_path)
    job.run_shard(1, FakeCodec())
    with pytest.raises(JobError, match="2 of 3 shards"):
        job.finish()
    store = open_store(str(tmp_path))
    before = store.get("shard-000001.tar")
    # As if it had died between the tar and its record.
    store.delete("_decode/000001.json")
    again = planned(archive, tmp_path)
    assert again.shards_left() == [0, 1, 2]
    finished(again)
    assert store.get("shard-000001.tar") == before
    codec = FakeCodec()
    assert again.run_shard(2, codec) == job.run_shard(2, codec)
    assert codec.num_decoded == 0
    assert finished(again)["rows"] == 8


def test_another_attempts_tar_is_kept_and_described(archive, tmp_path):
    job = planned(archive, tmp_path)
    store = open_store(str(tmp_path))
    job.run_shard(0, FakeCodec())
    other = store.get("shard-000000.tar") + bytes(512)
    store.put("shard-000000.tar", other)
    store.delete("_decode/000000.json")
    record = job.run_shard(0, FakeCodec())
    assert store.get("shard-000000.tar") == other
    assert record.num_bytes == len(other)


def test_another_decode_is_not_mixed_in(archive, tmp_path):
    planned(archive, tmp_path)
    for options in ({"view": "human"}, {"where": None}, {"shard_rows": 4}):
        with pytest.raises(PlanConflictError):
            planned(archive, tmp_path, **options)


def test_rows_without_a_picture_are_raised_or_recorded(archive, tmp_path):
    with pytest.raises(UnreadableImageError):
        finished(planned(archive, tmp_path / "a", where=None))
    sums = finished(planned(archive, tmp_path / "b", where=None, on_error="skip"))
    assert (sums["rows"], sums["faults"]) == (8, 1)
    records = [json.loads(path.read_bytes()) for path in (tmp_path / "b/_decode").glob("0*.json")]
    assert [fault["key"] for record in records for fault in record["faults"]] == ["broken"]


def test_latents_and_originals_are_written_as_they_are(archive, tmp_path):
    finished(planned(archive, tmp_path / "l", view="latent"))
    with tarfile.open(tmp_path / "l" / "shard-000000.tar") as tar:
        names = tar.getnames()
        latent = np.load(io.BytesIO(tar.extractfile(names[0]).read()))
    assert latent.dtype == np.float16
    options = {"view": "original", "where": "key == 'broken'", "container": "folder"}
    finished(planned(archive, tmp_path / "o", **options))
    (path,) = (tmp_path / "o" / "000000").iterdir()
    assert path.read_bytes() == b"junk"
    for wrong in ({"view": "tags"}, {"container": "zip"}, {"format": "gif"}, {"shard_rows": 0}):
        with pytest.raises(ValueError, match=r"\b(is|are)\b"):
            replace(BulkOptions(), **wrong)


def test_a_sample_is_the_same_in_every_attempt(archive, tmp_path):
    job = planned(archive, tmp_path, sample=4, seed=3)
    assert job.num_shards == 2
    assert finished(job)["rows"] == 4
    assert planned(archive, tmp_path, sample=4, seed=3).shards_left() == []
    with pytest.raises(PlanConflictError):
        planned(archive, tmp_path, sample=4, seed=4)


def test_processes_share_the_shards_and_give_the_same_bytes(archive, tmp_path):
    records = []
    for name, workers in (("one", 1), ("two", 2)):
        job = planned(archive, tmp_path / name, where=None, on_error="skip", shard_rows=5)
        decode_here(job, workers=workers, codec=FakeCodec, on_shard=records.append)
        assert job.finish()["faults"] == 1
    assert sorted(record.shard for record in records) == [0, 0, 1, 1]
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("one", "two")
    )
    assert one == two


def test_the_first_shard_that_cannot_be_made_ends_the_call(archive, tmp_path):
    job = planned(archive, tmp_path, where=None)
    with pytest.raises(UnreadableImageError, match="broken"):
        decode_here(job, workers=1, codec=FakeCodec)
    assert job.shards_left()


def test_a_worker_refuses_rows_that_are_not_those_of_the_plan(archive, tmp_path):
    job = planned(archive, tmp_path / "out")
    with pytest.raises(JobError, match="no longer selects"):
        replace(job, rows_sha256="0" * 64).run_shard(0, FakeCodec())


def damaged(archive, folder):
    """A copy with one flipped bit in a stream, and the key of its row."""
    shutil.copytree(archive, folder)
    (part,) = (folder / "data").glob("*.parquet")
    data = bytearray(part.read_bytes())
    row = next(row for row in ArchiveReader.open(archive).rows(SOUND, blobs=("base",)))
    data[data.index(row.base) + len(row.base) // 2] ^= 1
    part.write_bytes(data)
    return str(folder), row.key


def test_a_damaged_row_is_named_and_the_others_are_as_they_were(archive, tmp_path):
    copy, key = damaged(archive, tmp_path / "copy")
    with pytest.raises(CorruptRowError, match=key):
        finished(planned(copy, tmp_path / "raised"))
    finished(planned(archive, tmp_path / "whole", container="folder"))
    sums = finished(planned(copy, tmp_path / "left", container="folder", on_error="skip"))
    assert (sums["rows"], sums["faults"]) == (7, 1)
    whole, left = (
        {p.name: p.read_bytes() for p in (tmp_path / name).glob("0*/*")}
        for name in ("whole", "left")
    )
    assert [name.partition("-")[0] for name in set(whole) - set(left)] == [key.replace("/", "_")]
    assert left.items() <= whole.items()
    shutil.rmtree(f"{copy}/data")
    sums = finished(planned(copy, tmp_path / "gone", where=None, on_error="skip"))
    assert sums["rows"] == 0
    assert sums["faults"] > 0


def test_the_program_decodes_in_bulk_goes_on_and_says_what_it_left_out(
    archive, tmp_path, monkeypatch
):
    monkeypatch.setattr(codecs, "load_codec", lambda *_, **__: FakeCodec())
    monkeypatch.setattr(codecs, "_loaded_codecs", {})

    def run(*arguments, code=0):
        command = ["decode", *map(str, arguments), "-o", str(tmp_path / "out"), "--workers", "1"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == code, result.output
        return result

    bulk = ("--into", "webdataset", "--shard-rows", "3")
    assert "error: 'broken'" in run(archive, *bulk, code=1).stderr
    run(archive, *bulk, "--on-error", "skip", code=1)  # another plan than the one begun
    shutil.rmtree(tmp_path / "out")
    result = run(archive, *bulk, "--on-error", "skip", code=1)
    assert result.stdout.startswith("8 images in 3 shards, ")
    assert "left out: 'broken': not an image" in result.stderr
    again = run(archive, *bulk, "--on-error", "skip", code=1)
    assert again.stderr.startswith("0 of 3 shards to do")
    run(archive, "img-1", *bulk, code=2)
    run(archive, *bulk, "--format", "npy", code=2)


@pytest.mark.parametrize(
    "chosen",
    [
        ("--where", "psnr > 3"),
        ("--sample", "9"),
        ("--sample", "9", "--where", "psnr > 3"),
        ("1/b",),
    ],
)
@pytest.mark.parametrize("lost", ["data/", "index/"])
def test_the_program_decodes_what_is_left_of_an_archive(tmp_path, monkeypatch, chosen, lost):
    monkeypatch.setattr(codecs, "load_codec", lambda *_, **__: FakeCodec())
    monkeypatch.setattr(codecs, "_loaded_codecs", {})
    for number, name in enumerate("ab"):
        write_tar(tmp_path / f"{number}.tar", {name: bmp(picture(number))})
    uri = str(tmp_path / "archive")
    compress(f"{tmp_path}/*.tar", uri, codec=FakeCodec, runtime="local")
    store = open_store(uri)
    store.delete(open_snapshot(uri).parts[0].name)
    for name in store.list("index/") if lost == "index/" else ():
        store.delete(name)
    command = ["decode", uri, *chosen, "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--on-error", "skip"])
    assert result.stdout.split() == ["1/b", str(next((tmp_path / "out").iterdir()))]


def test_the_program_names_damaged_rows_and_goes_on_where_told(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(codecs, "load_codec", lambda *_, **__: FakeCodec())
    monkeypatch.setattr(codecs, "_loaded_codecs", {})
    copy, key = damaged(archive, tmp_path / "copy")
    command = ["decode", copy, "--where", SOUND, "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--on-error", "skip"])
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 7)
    assert f"({key!r}): bitstream" in result.stderr
    assert CliRunner().invoke(app, command).exit_code == 1
    shutil.rmtree(f"{copy}/data")
    listed = CliRunner().invoke(app, ["ls", copy, "--columns", "key,psnr", "--on-error", "skip"])
    assert (listed.exit_code, "is missing" in listed.stderr) == (1, True)
    sampled = CliRunner().invoke(
        app, ["decode", archive, "--sample", "2", "-o", str(tmp_path / "s")]
    )
    assert len(sampled.stdout.splitlines()) == 2
