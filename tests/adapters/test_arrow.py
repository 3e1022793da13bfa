"""Latents in Arrow, and SQL over the tags of raw parts, each with the real engine."""

import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dicmh_ray.adapters.arrow import LatentType, latent_array, part_uris, scan_latents
from dicmh_ray.views import open_archive
from tests.adapters.conftest import key_of
from tests.fake_codec import FakeCodec


@pytest.fixture
def latents():
    rng = np.random.default_rng(0)
    shapes = [(4, 3, 5), (4, 1, 1), (2, 2, 2)]
    return [rng.standard_normal(shape).astype(np.float16) for shape in shapes]


@pytest.fixture
def archive(archive_uri):
    return open_archive(archive_uri, codec=FakeCodec())


def equal(found, wanted):
    return [None if x is None else x.tobytes() for x in found] == [
        None if x is None else x.tobytes() for x in wanted
    ] and [None if x is None else x.shape for x in found] == [
        None if x is None else x.shape for x in wanted
    ]


def test_latents_come_back_as_they_went_in(latents):
    column = latent_array([*latents, None])
    assert column.type == LatentType()
    assert column.null_count == 1
    assert equal(column.to_latents(), [*latents, None])
    assert equal([scalar.as_py() for scalar in column], [*latents, None])
    assert column.to_latents()[0].base is not None


def test_a_slice_is_of_its_own_rows(latents):
    column = latent_array([None, *latents])
    assert equal(column.slice(2).to_latents(), latents[1:])
    assert equal(column.slice(0, 2).to_latents(), [None, latents[0]])


def test_no_latents_are_a_column_too():
    assert latent_array([]).to_latents() == []
    assert latent_array([None]).to_latents() == [None]


@pytest.mark.parametrize("bad", [np.zeros((1, 2, 2), np.float32), np.zeros((2, 2), np.float16)])
def test_what_is_no_latent_is_refused(bad):
    with pytest.raises(ValueError, match=r"a latent is float16 \[C, h, w\]"):
        latent_array([bad])


def test_parquet_and_ipc_keep_the_type(latents, tmp_path):
    table = pa.table({"latent": latent_array([*latents, None])})
    pq.write_table(table, tmp_path / "latents.parquet")
    assert pq.read_table(tmp_path / "latents.parquet").schema.equals(table.schema)
    read = pq.read_table(tmp_path / "latents.parquet")["latent"].chunk(0)
    assert equal(read.to_latents(), [*latents, None])

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (batch,) = pa.ipc.open_stream(sink.getvalue())
    assert equal(batch["latent"].to_latents(), [*latents, None])
    assert pickle.loads(pickle.dumps(table)).equals(table)


def test_a_program_without_the_type_sees_values_and_shape(latents, tmp_path):
    pq.write_table(pa.table({"latent": latent_array(latents)}), tmp_path / "latents.parquet")
    code = (
        "import sys, pyarrow.parquet as pq; t = pq.read_table(sys.argv[1]);"
        "print(t.schema.field('latent').type, t['latent'][1].as_py()['shape'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "latents.parquet")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.startswith("struct<data: list<")
    assert found.stdout.endswith("[4, 1, 1]\n")


def test_a_type_of_that_name_with_another_storage_is_refused():
    with pytest.raises(TypeError, match=r"dicmh\.latent is stored as"):
        LatentType.__arrow_ext_deserialize__(pa.int8(), b"")


def test_a_scan_gives_the_latents_of_matching_rows(archive, pictures):
    (batch, *rest) = scan_latents(archive, where="'dog' in tags", states=1)
    assert batch.schema.names == ["key", "tags", "latent"]
    keys = [key for found in (batch, *rest) for key in found["key"].to_pylist()]
    assert keys == [key for key in sorted(pictures) if int(key[-3:]) % 3 == 0]
    assert batch["latent"].to_latents()[0].shape == (3, 24, 32)
    assert archive.codec.num_decoded == 0


def test_rows_without_a_bitstream_have_no_latent(archive, pictures):
    keys = [key for batch in scan_latents(archive) for key in batch["key"].to_pylist()]
    assert sorted(keys) == sorted(pictures)


def test_duckdb_counts_tags_in_the_raw_parts(archive_uri):
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as db:
        found = db.execute(
            """SELECT tag, count(*), avg(psnr) FROM
               (SELECT unnest(tags) AS tag, psnr FROM read_parquet($parts) WHERE status = 'ok')
               GROUP BY tag ORDER BY tag""",
            {"parts": part_uris(archive_uri)},
        ).fetchall()
        assert [(tag, n) for tag, n, _ in found] == [("cat", 12), ("dog", 6)]
        assert all(psnr > 30 for _, _, psnr in found)
        numbers = db.execute(
            """SELECT key FROM read_parquet($parts)
               WHERE list_contains(tags, 'dog') AND (metadata->>'number')::INT > 8 ORDER BY key""",
            {"parts": part_uris(archive_uri)},
        ).fetchall()
    assert numbers == [(key_of(n),) for n in (9, 12, 15)]


def test_polars_filters_by_tag_in_the_raw_parts(archive_uri):
    pl = pytest.importorskip("polars")
    found = (
        pl.scan_parquet(part_uris(archive_uri))
        .filter(pl.col("tags").list.contains("dog"))
        .select("key", "width", "bpp")
        .sort("key")
        .collect()
    )
    assert found["key"].to_list() == [key_of(n) for n in range(0, 18, 3)]
    assert found["width"].to_list() == [32] * 6


def test_pandas_reads_the_small_columns_of_the_raw_parts(archive_uri):
    pd = pytest.importorskip("pandas")
    frames = [
        pd.read_parquet(part, columns=["key", "tags", "psnr"]) for part in part_uris(archive_uri)
    ]
    frame = pd.concat(frames)
    counts = frame.explode("tags").groupby("tags")["psnr"].count()
    assert counts.to_dict() == {"cat": 12, "dog": 6}


def test_duckdb_joins_results_that_lie_beside_the_archive_by_key(archive_uri, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    pq.write_table(
        pa.table({"key": [key_of(0), key_of(1)], "score": [0.25, 0.75]}), tmp_path / "r.parquet"
    )
    with duckdb.connect() as db:
        found = db.execute(
            """SELECT key, tags[1], score FROM read_parquet($parts) AS rows
               JOIN read_parquet($results) AS results USING (key) ORDER BY key""",
            {"parts": part_uris(archive_uri), "results": str(tmp_path / "r.parquet")},
        ).fetchall()
    assert found == [(key_of(0), "dog", 0.25), (key_of(1), "cat", 0.75)]
