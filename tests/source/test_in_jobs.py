"""Odd sources in whole jobs: what they say of themselves must fit the rows of an archive."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dicmh_ray.errors import SourceColumnsError
from dicmh_ray.pipeline.encode import EncodePolicy
from dicmh_ray.pipeline.job import compress_local, plan_job
from dicmh_ray.pipeline.monitor import JobMonitor
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.source import SourceOptions
from dicmh_ray.testing.fake_codec import FakeCodec
from tests.source.pictures import encoded, photo, tar_bytes

PICTURES = [encoded(photo(seed=seed), "BMP") for seed in range(3)]


def compress(source: object, archive: object, **options: object) -> dict[str, tuple[str, bytes]]:
    """Address and kept original of each row, by key."""
    policy = EncodePolicy(keep_original="always")
    job, units, report = plan_job(
        [str(source)], str(archive), codec=FakeCodec, policy=policy, **options
    )
    compress_local(job, units, JobMonitor(report, failure_budget=1.0))
    rows = ArchiveReader.open(str(archive)).rows(blobs=("original",))
    return {row.key: (row.source_uri, row.original) for row in rows}


def test_names_that_are_no_utf8_are_archived_under_printable_ones(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    root = os.fsencode(folder)
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": [PICTURES[2]]}), table)
    for name, data in (
        (b"\xff.bmp", PICTURES[0]),
        (b"\xff.tar", tar_bytes([("m.bmp", PICTURES[1]), ("n.json", b"{}")])),
        (b"\xff.parquet", table.getvalue().to_pybytes()),
        (b"\xfe.tar", b"no tar" * 999),
    ):
        with open(root + b"/" + name, "wb") as file:
            file.write(data)
    rows = compress(folder, tmp_path / "archive")
    address = f"file://{folder}"
    assert rows.pop("%FF.bmp") == (f"{address}/%FF.bmp", PICTURES[0])
    assert rows.pop("%FF.tar/m") == (f"{address}/%FF.tar", PICTURES[1])
    assert rows.pop("%FF.tar/n") == (f"{address}/%FF.tar", b"")
    assert rows.pop("%FF.parquet/%FF-00000000") == (f"{address}/%FF.parquet", PICTURES[2])
    ((key, row),) = rows.items()
    assert key.endswith("#damaged-at-0")
    assert row == (f"{address}/%FE.tar", b"")


@pytest.mark.parametrize("name", ["archive", "archive/", "../photos/archive"])
def test_an_archive_inside_its_own_source_is_none_of_it(tmp_path, monkeypatch, name):
    folder = tmp_path / "photos"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "a.bmp").write_bytes(PICTURES[0])
    (folder / "t.tar").write_bytes(tar_bytes([("m.bmp", PICTURES[1])]))
    first = compress(folder, name)
    assert first.keys() == {"a.bmp", "t.tar/m"}
    assert compress(folder, name) == first
    (folder / "b.bmp").write_bytes(PICTURES[2])
    assert compress("**", name, append=True).keys() == {"a.bmp", "b.bmp", "t.tar/m"}


def test_sources_may_lie_in_the_folder_of_the_archive(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.bmp").write_bytes(PICTURES[0])
    pq.write_table(pa.table({"image": PICTURES[1:2]}), tmp_path / "data/b.parquet")
    for _ in range(2):
        rows = compress(tmp_path, tmp_path)
        assert rows.keys() == {"data/a.bmp", "data/b.parquet/b-00000000"}


def test_a_column_that_is_not_there_ends_the_job_before_anything_is_written(tmp_path):
    pq.write_table(pa.table({"image": PICTURES}), tmp_path / "a.parquet")
    archive = tmp_path / "archive"
    with pytest.raises(SourceColumnsError, match="imagee"):
        compress(
            tmp_path / "a.parquet", archive, source_options=SourceOptions(image_column="imagee")
        )
    assert not archive.exists()
    rows = compress(tmp_path / "a.parquet", archive)
    assert [original for _, original in rows.values()] == PICTURES


def test_columns_that_changed_since_the_plan_are_no_damage(tmp_path):
    pq.write_table(pa.table({"image": PICTURES}), tmp_path / "a.parquet")
    job, (unit,), _ = plan_job(
        [str(tmp_path / "a.parquet")], str(tmp_path / "archive"), codec=FakeCodec
    )
    pq.write_table(pa.table({"left": PICTURES, "right": PICTURES}), tmp_path / "a.parquet")
    changed = type(unit).from_dict(unit.to_dict() | {"etag": None})
    with pytest.raises(SourceColumnsError):
        list(job.read(changed))
