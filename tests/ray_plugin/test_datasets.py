"""Archives as Ray datasets and Ray datasets as archives, on a real local cluster."""

import datetime
import io
import json
import logging
import os
import uuid

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

ray = pytest.importorskip("ray")

from ray.data.expressions import col, lit

from dicmh_ray.adapters.handle import ArchiveHandle
from dicmh_ray.archive import BLOBS, SMALL_COLUMNS, verify_archive
from dicmh_ray.archive.schema import ARROW_SCHEMA
from dicmh_ray.archive.staged import finish_staged
from dicmh_ray.errors import (
    ArchiveNotFoundError,
    BitstreamError,
    CommitFailedError,
    WhereError,
)
from dicmh_ray.pipeline.checkpoint import Checkpoint
from dicmh_ray.ray_plugin.datasink import ArchiveDatasink, write_archive
from dicmh_ray.ray_plugin.datasource import ArchiveDatasource, read_archive
from dicmh_ray.ray_plugin.decode import Decode, Encode
from dicmh_ray.ray_plugin.pushdown import where_of
from dicmh_ray.views import open_archive
from tests.adapters.conftest import archive_uri, key_of, pictures  # noqa: F401
from tests.adapters.counting_codec import counting
from tests.fake_codec import FakeCodec
from tests.small_collections import picture, poison

pytestmark = [
    pytest.mark.ray,
    # Ray's own, of its progress bars, its blocks and its executor.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NAN = float("nan")
DOGS = [key_of(n) for n in range(0, 18, 3)]


@pytest.fixture(autouse=True)
def _quiet(cluster):
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def keys_of(ds):
    return sorted(row["key"] for row in ds.take_all())


def test_a_dataset_has_the_rows_and_small_columns(archive_uri, pictures):  # noqa: F811
    ds = read_archive(archive_uri)
    assert ds.schema().names == list(SMALL_COLUMNS)
    assert ds.count() == 19
    rows = {row["key"]: row for row in ds.take_all()}
    assert set(rows) == {*pictures, "2/img-broken"}
    assert list(rows[key_of(3)]["tags"]) == ["dog"]
    assert rows["2/img-broken"]["status"] == "failed"
    assert sorted(path.rsplit("/", 2)[1] for path in ds.input_files()) == ["data"] * 3


def test_a_pipeline_with_a_tag_filter_decodes_the_matching_rows_only(
    archive_uri,  # noqa: F811
    pictures,  # noqa: F811
    tmp_path,
):
    codec, counts = counting(tmp_path)
    ds = read_archive(archive_uri, where="'dog' in tags", columns=["key", "tags", *BLOBS])
    ds = ds.map_batches(Decode("machine", codec=codec), batch_size=2)
    ds = ds.map(lambda row: {"key": row["key"], "mean": float(row["image"].mean())})
    found = {row["key"]: row["mean"] for row in ds.take_all()}
    assert found == {key: float(pictures[key].mean()) for key in DOGS}
    assert sum(counts().values()) == len(DOGS)


def test_a_view_is_one_argument(archive_uri, pictures, tmp_path):  # noqa: F811
    codec, counts = counting(tmp_path)
    ds = read_archive(
        archive_uri, where="metadata.number < 4", columns=["key"], view="machine", codec=codec
    )
    rows = ds.take_all()
    assert sorted(row["key"] for row in rows) == [key_of(n) for n in range(4)]
    assert all((row["image"] == pictures[row["key"]]).all() for row in rows)
    assert set(rows[0]) == {"key", "image"}
    assert sum(counts().values()) == 4
    latent = read_archive(archive_uri, view="latent", columns=["key"], states=1, codec=FakeCodec)
    assert latent.take(1)[0]["latent"].shape == (3, 24, 32)


def test_an_actor_decodes_with_a_class(archive_uri):  # noqa: F811
    ds = read_archive(archive_uri, where="'dog' in tags", columns=["key", *BLOBS])
    ds = ds.map_batches(
        Decode,
        fn_constructor_args=("thumbnail",),
        fn_constructor_kwargs={"codec": FakeCodec},
        batch_format="pyarrow",
        batch_size=3,
        num_cpus=0,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    assert keys_of(ds) == DOGS


PREDICATES = [
    (col("width") > 10) & (col("key") < key_of(4)),
    (col("psnr") < 99) | (col("status") == "failed"),
    ~(col("psnr") < 99),
    col("psnr") != 100.0,
    ~((col("psnr") >= 99) & (col("width") == 32)),
    col("psnr").is_null(),
    ~col("psnr").is_null(),
    col("status").is_in(["failed", "kept_original"]),
    col("error").not_in(["nothing"]),
    ~col("status").is_in(["ok"]),
    (col("num_states") == 2) & ~(col("key") == key_of(1)),
    ~((col("num_states") > 2) | (col("key") >= key_of(12))),
    (col("num_states") != 2) & (lit(20) < col("height")),
]


def test_filters_mean_the_same_in_the_reader_and_in_ray(archive_uri):  # noqa: F811
    small = pa.concat_tables(
        [
            pa.Table.from_batches([batch])
            for batch in open_archive(archive_uri).reader.scan(SMALL_COLUMNS)
        ]
    )
    for predicate in PREDICATES:
        where = where_of(predicate)
        assert where is not None, predicate
        scan = open_archive(archive_uri).reader.scan(["key"], where)
        found = [key for batch in scan for key in batch["key"].to_pylist()]
        wanted = small.filter(predicate.to_pyarrow())["key"].to_pylist()
        assert sorted(found) == sorted(wanted), where


@pytest.mark.parametrize(
    "predicate",
    [
        col("width") + 1 > 10,
        col("width") > col("height"),
        col("width") == "text",
        col("base") == "x",
        col("psnr") > NAN,
        col("tags") == "dog",
        col("nothing") == 1,
        col("status").is_in([None, "ok"]),
    ],
    ids=str,
)
def test_a_filter_that_the_reader_has_not_is_left_to_ray(predicate):
    assert where_of(predicate) is None


def test_rays_own_filters_and_projections_reach_the_reader(archive_uri, tmp_path):  # noqa: F811
    codec, counts = counting(tmp_path)
    ds = read_archive(archive_uri, columns=["key", "width", "status", *BLOBS])
    ds = ds.filter(expr=(col("key") >= key_of(15)) & (col("status") == "ok"))
    ds = ds.map_batches(Decode("machine", codec=codec), batch_size=8)
    assert keys_of(ds) == [key_of(n) for n in (15, 16, 17)]
    assert sum(counts().values()) == 3
    assert read_archive(archive_uri).select_columns(["key", "psnr"]).schema().names == [
        "key",
        "psnr",
    ]
    exact = len(list(open_archive(archive_uri).reader.rows("psnr > 99")))
    assert exact == 18
    assert read_archive(archive_uri).filter(expr=col("psnr") > 99).count() == exact
    assert read_archive(archive_uri).limit(5).count() == 5


def test_a_pushed_filter_leaves_nothing_unread_and_reads_nothing_else(archive_uri):  # noqa: F811
    source = datasource(archive_uri, ["key", "base"])
    pushed = source.apply_predicate(col("key") == key_of(7))
    assert source.apply_predicate(col("width") + 1 > 10) is source
    (task,) = pushed.get_read_tasks(8)
    assert task.metadata.num_rows == 1
    assert task.metadata.input_files[0].startswith(archive_uri)
    (table,) = task()
    assert table["key"].to_pylist() == [key_of(7)]
    narrow = pushed.apply_projection({"key": "key"})
    (table,) = narrow.get_read_tasks(1)[0]()
    assert table.column_names == ["key"]
    (table,) = pushed.apply_projection({}).get_read_tasks(1)[0]()
    assert table.num_rows == 1
    assert pushed.apply_predicate(col("status") == "failed").get_read_tasks(4) == []


def datasource(uri, columns, **options):
    return ArchiveDatasource(ArchiveHandle(uri=uri).pinned(), columns=columns, **options)


def test_sizes_are_estimated_from_the_index(archive_uri):  # noqa: F811
    everything = datasource(archive_uri, ARROW_SCHEMA.names)
    dogs = datasource(archive_uri, ARROW_SCHEMA.names, where="'dog' in tags")
    small = datasource(archive_uri, ["key"])
    unknown = datasource(archive_uri, ["key"], where="metadata.number == 1")
    sizes = [s.estimate_inmemory_data_size() for s in (everything, dogs, small)]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    found = sum(batch.nbytes for batch in open_archive(archive_uri).reader.scan(ARROW_SCHEMA.names))
    assert 0.5 < sizes[0] / found < 2
    for parallelism in (1, 2, 3, 50):
        tasks = everything.get_read_tasks(parallelism)
        assert len(tasks) == min(parallelism, 3)
        assert sum(task.metadata.num_rows for task in tasks) == 19
        assert sum(task.metadata.size_bytes for task in tasks) == sizes[0]
    assert [task.metadata.num_rows for task in unknown.get_read_tasks(3)] == [None] * 3


def test_what_cannot_be_read_is_refused_at_once(archive_uri, tmp_path):  # noqa: F811
    with pytest.raises(ArchiveNotFoundError):
        read_archive(str(tmp_path))
    with pytest.raises(WhereError):
        read_archive(archive_uri, where="width >")
    with pytest.raises(ValueError, match=r"no such columns: \['wide'\]"):
        read_archive(archive_uri, columns=["wide"])
    with pytest.raises(ValueError, match="view is 'x'"):
        read_archive(archive_uri, view="x")
    with pytest.raises(ValueError, match="nothing is decoded"):
        Decode("original")


def test_decode_takes_batches_of_numpy_and_arrow_alike(archive_uri, pictures):  # noqa: F811
    (batch, *_) = open_archive(archive_uri).reader.scan(["key", "status", *BLOBS], "status == 'ok'")
    table = pa.Table.from_batches([batch])
    arrays = {name: np.array(table[name].to_pylist(), object) for name in table.column_names}
    decode = Decode("machine", codec=FakeCodec)
    found = decode(arrays)
    assert set(found) == {"key", "status", "image"}
    assert all((i == pictures[k]).all() for k, i in zip(found["key"], found["image"], strict=True))
    assert decode(table).column_names == ["key", "status", "image"]
    assert decode(table.slice(0, 0)).num_rows == 0
    with pytest.raises(ValueError, match="needs the columns"):
        decode(table.select(["key"]))
    lost = table.slice(0, 1).drop_columns(["base", "detail", "original"])
    lost = lost.append_column("base", pa.array([b""]))
    with pytest.raises(ValueError, match="read the column 'original' too"):
        decode(lost)


def test_a_damaged_stream_is_raised_or_left_out(archive_uri):  # noqa: F811
    (batch, *_) = open_archive(archive_uri).reader.scan(["key", *BLOBS], "status == 'ok'")
    table = pa.Table.from_batches([batch])
    streams = table["base"].to_pylist()
    streams[1] = streams[1][:-1] + bytes([streams[1][-1] ^ 1])
    table = table.set_column(1, "base", pa.array(streams))
    with pytest.raises(BitstreamError):
        Decode("machine", codec=FakeCodec)(table)
    assert Decode("machine", codec=FakeCodec, on_error="skip")(table).num_rows == len(table) - 1


def encoded_png(image):
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


def test_pictures_become_an_archive(tmp_path):
    rows = [
        {"key": f"row-{n}", "image": picture(n, step=16), "tags": ["t"], "label": n}
        for n in range(5)
    ]
    uri = str(tmp_path / "archive")
    manifest = write_archive(ray.data.from_items(rows, override_num_blocks=2), uri, codec=FakeCodec)
    assert manifest.version == 1
    archive = open_archive(uri, codec=FakeCodec())
    assert sorted(archive.keys()) == [row["key"] for row in rows]
    assert verify_archive(uri).exit_code == 0
    view = archive["row-3"]
    assert (view.tags, view.metadata) == (("t",), {"label": 3})
    assert (view.pixels() == picture(3, step=16)).all()
    with pytest.raises(CommitFailedError, match="already"):
        write_archive(ray.data.from_items(rows), uri, codec=FakeCodec)
    assert finish_staged(uri) == manifest


def test_files_that_cannot_be_coded_become_rows_too(tmp_path):
    rows = [
        {"key": "sound", "bytes": encoded_png(picture(1))},
        {"key": "broken", "bytes": b"junk"},
        {"key": "poison", "bytes": encoded_png(poison())},
    ]
    uri = str(tmp_path / "archive")
    write_archive(ray.data.from_items(rows), uri, codec=FakeCodec)
    statuses = {view.key: view.status for view in open_archive(uri)}
    assert set(statuses) == {"sound", "broken", "poison"}
    assert statuses["broken"] != "ok"
    with pytest.raises(ValueError, match="wanted the columns"):
        Encode(FakeCodec)({"name": np.array(["x"])})


def test_columns_beside_a_picture_are_metadata_whatever_they_nest():
    day = datetime.datetime(2020, 1, 2)
    row = {
        "key": "a",
        "image": picture(1),
        "tags": "dog",
        "at": np.datetime64(day, "ns"),
        "of": {"boxes": np.ones((1, 2)), "seen": [day], "score": NAN},
        "mask": b"of any size",
    }
    columns = {name: np.empty(2, object) for name in row}
    for name, value in row.items():
        columns[name][:] = [value, None]
    columns["key"][1] = "b"
    first, second = Encode(FakeCodec)(columns).to_pylist()
    assert first["tags"] == ["dog"]
    assert json.loads(first["metadata"]) == {
        "at": day.isoformat(),
        "of": {"boxes": [[1.0, 1.0]], "seen": [day.isoformat()], "score": "nan"},
    }
    assert (second["status"], second["error"]) == ("failed", "unreadable: empty")
    assert (second["tags"], second["metadata"]) == ([], "{}")
    no_tags = {"key": np.array(["c"]), "image": picture(1)[None], "tags": np.array([NAN])}
    assert Encode(FakeCodec)(no_tags).to_pylist()[0]["tags"] == []


def test_nulls_and_integers_of_a_dataset_stay_what_they_are(tmp_path):
    rows = [{"key": str(n), "image": picture(n), "n": n or None, "no": None} for n in range(3)]
    uri = str(tmp_path / "archive")
    write_archive(ray.data.from_items(rows, override_num_blocks=1), uri, codec=FakeCodec)
    metadata = {view.key: view.row.metadata for view in open_archive(uri)}
    assert metadata == {"0": "{}", "1": '{"n":1}', "2": '{"n":2}'}


def test_rows_of_one_archive_become_another(archive_uri, tmp_path):  # noqa: F811
    ds = read_archive(archive_uri, where="'dog' in tags", columns=ARROW_SCHEMA.names)
    uri = str(tmp_path / "dogs")
    write_archive(ds, uri, codec_of=archive_uri)
    old, new = open_archive(archive_uri).reader, open_archive(uri).reader
    assert sorted(new.keys()) == DOGS
    for key in DOGS:
        assert new.get(key) == old.get(key)


def test_a_write_that_fails_leaves_no_archive(archive_uri, tmp_path):  # noqa: F811
    ds = read_archive(archive_uri, columns=ARROW_SCHEMA.names)
    uri = tmp_path / "other"
    with pytest.raises(Exception, match=r"another checkpoint|codec"):
        write_archive(ds, str(uri), codec=lambda: FakeCodec("cd" * 32))
    with pytest.raises(ArchiveNotFoundError):
        open_archive(str(uri))
    assert list(uri.rglob("*.parquet")) == []


PNG = encoded_png(picture(1))


class DyingSink(ArchiveDatasink):
    """Its first worker stores everything, and is gone before it can say so."""

    def __init__(self, uri, marker, **options):
        super().__init__(uri, **options)
        self._marker = marker

    def write(self, blocks, ctx):
        staged = super().write(blocks, ctx)
        if not self._marker.exists():
            self._marker.touch()
            os._exit(1)
        return staged


@pytest.mark.parametrize("same", [True, False], ids=["same rows", "other rows"])
def test_a_write_task_that_ran_twice_is_in_the_archive_once(tmp_path, same):
    def rows(batch):
        names = [f"row-{n}" if same else f"row-{n}-{uuid.uuid4().hex}" for n in batch["id"]]
        return Encode(FakeCodec)(pa.Table.from_pylist([{"key": n, "bytes": PNG} for n in names]))

    uri = str(tmp_path / "archive")
    sink = DyingSink(uri, tmp_path / "died", checkpoint=Checkpoint.open(FakeCodec))
    ray.data.range(6, override_num_blocks=1).map_batches(rows).write_datasink(sink)
    assert (tmp_path / "died").exists()
    assert len(open_archive(uri)) == 6
    report = verify_archive(uri)
    assert report.exit_code == 0
    stored = list((tmp_path / "archive" / "data").glob("*.parquet"))
    assert len(stored) == (1 if same else 2)
