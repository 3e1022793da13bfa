"""Bulk decode: each row once, whatever dies, in the formats that others read."""

import gc
import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from dicmh_ray.archive import open_store
from dicmh_ray.errors import JobError, PlanConflictError, UnreadableImageError
from dicmh_ray.ray_plugin import compress
from dicmh_ray.views import open_archive, read_mark
from dicmh_ray.views.bulk import BulkOptions, plan_bulk_decode
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
