"""From arguments to units: what is found, in which order, under which keys."""

import json
import os
import pickle
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray.bitstream import Header, State, parse_bitstream, write_bitstream
from dicmh_ray.errors import SourceAddressError, SourceFormatError, SourceNotFoundError
from dicmh_ray.source import SourceImage, SourceOptions, Unit, plan_units, read_unit
from dicmh_ray.source.expand import expand_braces
from dicmh_ray.source.image import MAX_KEY_BYTES, UniqueKeys, key_text, tags_from_metadata
from dicmh_ray.source.store import RetryingFile
from tests.source.pictures import jpeg, tar_bytes

JPEG = jpeg()


def put(folder, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".tar"):
            path.write_bytes(tar_bytes([("a.jpg", JPEG), ("b.jpg", JPEG)]))
        elif name.endswith(".parquet"):
            pq.write_table(pa.table({"image": [JPEG], "key": ["a"]}), path)
        else:
            path.write_bytes(JPEG)


def images_of(sources: list[str], **options: object) -> list[SourceImage]:
    settings = SourceOptions(**options)
    return [
        image
        for unit in plan_units(sources, options=settings)
        for image in read_unit(unit, options=settings)
    ]


def keys_of(*sources: object, **options: object) -> list[str]:
    return [image.key for image in images_of([str(source) for source in sources], **options)]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("x", ["x"]),
        ("{000..003}", ["000", "001", "002", "003"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..9..4}", ["0", "4", "8"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("{a,b}-{1..2}.tar", ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]),
        ("{a,b{1,2},}x", ["ax", "b1x", "b2x", "x"]),
        ("{a}", ["{a}"]),
        ("{a}{b,c}", ["{a}b", "{a}c"]),
        ("{a,b", ["{a,b"]),
        ("a}b{", ["a}b{"]),
        ("{}", ["{}"]),
        ("{x{1,2}}", ["{x1}", "{x2}"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, wanted):
    assert list(expand_braces(pattern)) == wanted


@pytest.mark.parametrize("pattern", ["{0..999999999999}", "{0..9999}{0..9999}", "{1,2}" * 40])
def test_too_many_names_are_refused_at_once(pattern):
    with pytest.raises(SourceFormatError, match="expands"):
        expand_braces(pattern)


def test_a_brace_list_must_exist_in_full(tmp_path):
    put(tmp_path, "t-000.tar", "t-001.tar", "t-003.tar")
    assert len(plan_units([f"{tmp_path}/t-{{000..001}}.tar"])) == 2
    with pytest.raises(SourceNotFoundError) as caught:
        plan_units([f"{tmp_path}/t-{{000..003}}.tar"])
    assert caught.value.source == f"{tmp_path}/t-002.tar"


@pytest.mark.parametrize("name", ["nothing.tar", "*.tar", "sub/", "sub", "**/*.jpg", "no.jpg"])
def test_an_argument_that_matches_nothing_is_named(tmp_path, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.md").write_text("no image")
    with pytest.raises(SourceNotFoundError) as caught:
        plan_units([f"{tmp_path}/{name}"])
    assert caught.value.source == f"{tmp_path}/{name}"


@pytest.mark.parametrize("name", ["a.tar.bz2", "a.tar.zst", "a.zip"])
def test_archives_of_other_kinds_are_refused_by_name(tmp_path, name):
    put(tmp_path, name)
    with pytest.raises(SourceFormatError, match="cannot be read"):
        plan_units([f"{tmp_path}/{name}"])


def test_a_folder_gives_images_tars_and_parquet_in_order(tmp_path):
    put(tmp_path, "b/2.jpg", "b/1.PNG", "a.webp", "t/x.tar", "p.parquet", "z.txt", "readme")
    put(tmp_path, ".hidden/1.jpg", ".x.jpg", "__MACOSX/1.jpg")
    units = plan_units([str(tmp_path)])
    assert [unit.kind for unit in units] == ["files", "parquet", "tar"]
    assert keys_of(tmp_path) == [
        "a.webp", "b/1.PNG", "b/2.jpg", "p.parquet/a", "t/x.tar/a", "t/x.tar/b",
    ]  # fmt: skip
    assert keys_of(f"{tmp_path}/") == keys_of(tmp_path)


def test_links_to_folders_are_not_followed_and_links_to_files_are(tmp_path):
    put(tmp_path, "d/1.jpg")
    (tmp_path / "d" / "loop").symlink_to(tmp_path)
    (tmp_path / "d" / "2.jpg").symlink_to(tmp_path / "d" / "1.jpg")
    (tmp_path / "d" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    assert keys_of(tmp_path) == ["d/1.jpg", "d/2.jpg"]


def test_globs_are_sorted_and_names_with_glob_characters_are_taken_as_they_are(tmp_path):
    put(tmp_path, "b.jpg", "a.jpg", "d/c.jpg", "photo[1].jpg", "x{1,2}.jpg", "n.txt")
    assert keys_of(f"{tmp_path}/?.jpg") == ["a.jpg", "b.jpg"]
    assert keys_of(f"{tmp_path}/d*/*") == ["d/c.jpg"]
    assert keys_of(f"{tmp_path}/**/c.jpg") == ["d/c.jpg"]
    assert keys_of(f"{tmp_path}/photo[1].jpg") == ["photo[1].jpg"]
    assert keys_of(f"{tmp_path}/x{{1,2}}.jpg") == ["x{1,2}.jpg"]


def test_globs_pass_over_what_folders_do(tmp_path):
    put(tmp_path, "a/y.jpg", ".thumbs/x.jpg", "a/.b/c/x.jpg", "__MACOSX/z.jpg", "a/.n.jpg")
    for pattern in ("**/*.jpg", "*/*.jpg", "**"):
        assert keys_of(f"{tmp_path}/{pattern}") == keys_of(tmp_path) == ["a/y.jpg"]
    assert keys_of(f"{tmp_path}/.thumbs/*.jpg") == ["x.jpg"]


def test_a_file_that_is_named_outright_needs_no_extension(tmp_path):
    put(tmp_path, "photo", "x.dat")
    assert keys_of(tmp_path / "photo", tmp_path / "x.dat") == ["photo", "x.dat"]


def test_pipes_are_refused_and_passed_over(tmp_path):
    put(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for source in (tmp_path, tmp_path / "*.jpg"):
        assert keys_of(source) == ["a.jpg"]
    with pytest.raises(SourceFormatError, match="pipe, a socket"):
        plan_units([str(tmp_path / "pipe.jpg")])


def test_an_object_named_twice_is_read_once(tmp_path, monkeypatch):
    put(tmp_path, "a.jpg", "b.jpg", "t.tar")
    monkeypatch.chdir(tmp_path)
    sources = ["b.jpg", str(tmp_path), "*.jpg", f"file://{tmp_path}/t.tar", "./t.tar"]
    assert keys_of(*sources) == ["b.jpg", "a.jpg", "t.tar/a", "t.tar/b"]


def test_a_file_has_one_address_however_its_path_is_spelled(tmp_path, monkeypatch):
    put(tmp_path, "photos/a.jpg", "photos/t.tar", "work/b.jpg", "far/near/c.jpg", "far/d.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "far/near")
    monkeypatch.chdir(tmp_path / "work")
    folder, plain = tmp_path / "photos", f"file://{tmp_path}/photos"
    spellings = [
        "../photos",
        f"{folder}//",
        f"{tmp_path}/./photos",
        "../photos/*",
        f"{folder}/../photos",
    ]
    for sources in ([spelling] for spelling in spellings):
        assert [unit.uri for unit in plan_units(sources)] == [(f"{plain}/a.jpg",), f"{plain}/t.tar"]
    assert keys_of(*spellings, folder) == ["a.jpg", "t.tar/a", "t.tar/b"]
    assert keys_of("../link/../d.jpg", "../far/d.jpg") == ["d.jpg"]


def test_sidecars_beside_files_become_metadata(tmp_path):
    put(tmp_path, "a.jpg", "a.b.jpg", "c.jpg")
    (tmp_path / "a.json").write_text('{"labels": ["x"]}')
    (tmp_path / "a.txt").write_text("caption")
    (tmp_path / "a.b.cls").write_text("4")
    wanted = {
        "a.jpg": {"labels": ["x"], "txt": "caption"},
        "a.b.jpg": {"cls": 4},
        "c.jpg": {},
    }
    for source in (str(tmp_path), f"{tmp_path}/*.jpg", f"{tmp_path}/{{a,a.b,c}}.jpg"):
        images = images_of([source], tag_fields=("labels", "cls"))
        assert {image.key: image.metadata for image in images} == wanted
        assert {image.key: image.tags for image in images}["a.jpg"] == ("x",)


def test_one_tar_keeps_its_keys_and_several_are_told_apart(tmp_path):
    put(tmp_path, "s/000.tar", "s/001.tar", "v/000.tar")
    assert keys_of(tmp_path / "s/000.tar") == ["a", "b"]
    assert keys_of(f"{tmp_path}/s/*.tar") == ["000/a", "000/b", "001/a", "001/b"]
    assert keys_of(tmp_path)[::2] == ["s/000/a", "s/001/a", "v/000/a"]
    assert keys_of(f"{tmp_path}/s/{{000..001}}.tar", key_prefix="none") == ["a", "b", "a", "b"]


def test_keys_are_unique_whatever_is_read_together(tmp_path):
    put(tmp_path, "x/1.tar", "x/1.parquet", "x/1.jpg", "x/1/a.jpg", "y/1.tar", "1.tar")
    found = keys_of(tmp_path, tmp_path / "x/1.jpg", f"{tmp_path}/y/*.tar")
    assert len(found) == len(set(found)) == 9
    found = keys_of(f"{tmp_path}/x/1.{{tar,parquet}}")
    assert found == ["1.tar/a", "1.tar/b", "1.parquet/a"]


def test_a_tar_does_not_take_the_keys_of_one_in_a_folder_of_its_name(tmp_path):
    put(tmp_path, "train/extra.tar", "train-2.tar", "val/a/0.tar", "val.tar.tar")
    (tmp_path / "train.tar").write_bytes(tar_bytes([("extra/a.jpg", JPEG), ("b.jpg", JPEG)]))
    assert keys_of(tmp_path) == [
        "train-2/a", "train-2/b", "train.tar/extra/a", "train.tar/b",
        "train/extra.tar/a", "train/extra.tar/b", "val.tar/a", "val.tar/b", "val/a/0/a", "val/a/0/b",
    ]  # fmt: skip
    put(tmp_path, "val.tar", "val.parquet")
    found = keys_of(tmp_path)
    assert len(found) == len(set(found)) == 13
    assert [key for key in found if key.startswith("val")] == [
        "val.parquet/a", "val.tar/a", "val.tar/b", "val.tar.tar/a", "val.tar.tar/b",
        "val/a/0.tar/a", "val/a/0.tar/b",
    ]  # fmt: skip


def test_files_are_grouped_by_count_and_bytes(tmp_path):
    put(tmp_path, *(f"{i:02d}.jpg" for i in range(10)))
    for options, sizes in (
        (SourceOptions(files_per_unit=4), [4, 4, 2]),
        (SourceOptions(unit_bytes=3 * len(JPEG)), [3, 3, 3, 1]),
        (SourceOptions(unit_bytes=1), [1] * 10),
    ):
        units = plan_units([str(tmp_path)], options=options)
        assert [len(unit.uri) for unit in units] == sizes
        assert [unit.name for unit in units] == [f"{i:06d}" for i in range(len(sizes))]
        assert sum(unit.num_bytes for unit in units) == 10 * len(JPEG)
        found = [image.key for unit in units for image in read_unit(unit, options=options)]
        assert found == [f"{i:02d}.jpg" for i in range(10)]


def test_plans_are_the_same_every_time_and_change_with_their_source(tmp_path):
    put(tmp_path, "a.jpg", "t/1.tar", "t/2.tar", "p.parquet", "b.jpg")
    first = plan_units([str(tmp_path)])
    assert plan_units([str(tmp_path)]) == first
    (tmp_path / "a.jpg").write_bytes(JPEG + b"more")
    second = plan_units([str(tmp_path)])
    assert second[0].etag != first[0].etag
    assert second[1:] == first[1:]


def test_units_and_options_survive_json_and_pickle(tmp_path):
    put(tmp_path, "a.jpg", "t/1.tar", "p.parquet")
    (tmp_path / "a.txt").write_text("t")
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(name, "wb") as file:
        file.write(JPEG)
    units = plan_units([str(tmp_path)])
    for unit in units:
        text = json.dumps(unit.to_dict(), ensure_ascii=False)
        assert Unit.from_dict(json.loads(text.encode().decode())) == unit
        assert pickle.loads(pickle.dumps(unit)) == unit
    assert keys_of(tmp_path)[:2] == ["a.jpg", "caf%E9.jpg"]
    options = SourceOptions(
        tag_fields=("a", "b"), max_tags=3, key_prefix="none", storage_options={"secret": "canary"}
    )
    values = json.loads(json.dumps(options.to_dict()))
    again = SourceOptions.from_dict(values, storage_options={"secret": "canary"})
    assert again == options
    assert "canary" not in repr(options) + json.dumps(values)


def test_unknown_and_missing_keys_are_refused(tmp_path):
    put(tmp_path, "1.tar")
    values = plan_units([f"{tmp_path}/1.tar"])[0].to_dict()
    for broken in (
        values | {"new": 1},
        {name: value for name, value in values.items() if name != "etag"},
        values | {"kind": "files"},
        values | {"kind": "zip"},
    ):
        with pytest.raises(ValueError, match="unit"):
            Unit.from_dict(broken)
    with pytest.raises(ValueError, match="unknown source options: colour"):
        SourceOptions.from_dict({"colour": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"unit_bytes": 0},
        {"num_retries": -1},
        {"key_prefix": "x"},
        {"max_tag_bytes": 300},
        {"max_tags": 300},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"wanted|at most"):
        SourceOptions(**options)


def test_an_empty_source_is_not_the_current_folder():
    with pytest.raises(SourceAddressError, match="is empty"):
        plan_units([""])


@pytest.mark.parametrize("scheme", ["", "simplecache::", "zip://x.tar::simplecache::"])
def test_passwords_in_urls_are_refused_without_being_repeated(scheme):
    with pytest.raises(SourceAddressError, match="password") as caught:
        plan_units([f"{scheme}ftp://user:hunter2@host/x.tar"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [("foo://x/1.tar", "foo"), ("needs-a-package://x", "pip install it")],
)
def test_addresses_that_no_filesystem_serves_are_named(source, reason):
    fsspec.register_implementation(
        "needs-a-package", "dicmh_ray.nowhere.Fs", clobber=True, errtxt="pip install it"
    )
    with pytest.raises(SourceAddressError, match=reason) as caught:
        plan_units([source])
    assert caught.value.source == source


def test_a_file_that_vanishes_or_grows_is_a_row_with_an_error(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    options = SourceOptions(max_image_bytes=100_000)
    (unit,) = plan_units([str(tmp_path)], options=options)
    (tmp_path / "b.jpg").unlink()
    (tmp_path / "c.jpg").write_bytes(bytes(100_001))
    (tmp_path / "d.jpg").write_bytes(b"")
    images = list(read_unit(unit, options=options))
    assert [image.error and image.error.reason for image in images] == [
        None, "file is missing", "larger than max_image_bytes", "empty",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["", "{0}/", "file://{0}/", "simplecache::{0}/"])
def test_two_colons_in_a_name_are_a_part_of_it(tmp_path, monkeypatch, form):
    folder = tmp_path / "10::30"
    put(folder, "x::y.tar", "z.tar")
    data = {f"pic.jpg{end}": jpeg(seed) for seed, end in enumerate(("", "::2.jpg", "::zip.jpg"))}
    for name, content in data.items():
        (folder / name).write_bytes(content)
    (folder / "pic.jpg::2.txt").write_text("caption")
    monkeypatch.chdir(folder)
    root = form.format(folder)
    images = images_of([f"{root}*.jpg"])
    assert {image.key: image.data for image in images} == data
    assert images[1].metadata == {"txt": "caption"}
    (image,) = images_of([f"{root}pic.jpg::2.jpg"])
    assert (image.key, image.data) == ("pic.jpg::2.jpg", data["pic.jpg::2.jpg"])
    assert keys_of(f"{root}*.tar") == ["x::y/a", "x::y/b", "z/a", "z/b"]
    if form:
        assert len(keys_of(root)) == 7


def test_members_of_a_zip_are_read_as_they_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for seed, name in enumerate(("a.jpg", "a.jpg::b.jpg")):
            archive.writestr(name, jpeg(seed))
    for target in (f"file://{tmp_path}/x.zip", f"{tmp_path}/x.zip"):
        images = images_of([f"zip://*.jpg::{target}"])
        assert [image.data for image in images] == [jpeg(0), jpeg(1)]


class TestMemoryFileSystem:
    """The same through another store."""

    @pytest.fixture(autouse=True)
    def store(self):
        fs = fsspec.filesystem("memory")
        fs.pipe_file("/box/t/1.tar", tar_bytes([("a.jpg", JPEG), ("b.jpg", JPEG)]))
        fs.pipe_file("/box/t/2.tar", tar_bytes([("a.jpg", JPEG)]))
        fs.pipe_file("/box/i/x.jpg", JPEG)
        fs.pipe_file("/box/i/x.txt", b"hello")
        with fs.open("/box/p.parquet", "wb") as file:
            pq.write_table(pa.table({"image": [JPEG] * 3}), file)
        yield fs
        fs.rm("/box", recursive=True)

    def test_folders_globs_and_braces_work(self):
        everything = ["i/x.jpg", "p.parquet/p-00000000", "p.parquet/p-00000001",
                      "p.parquet/p-00000002", "t/1.tar/a", "t/1.tar/b", "t/2.tar/a"]  # fmt: skip
        assert keys_of("memory://box") == everything
        assert keys_of("memory://box/t/{1..2}.tar") == ["1/a", "1/b", "2/a"]
        assert keys_of("memory://box/*/*.tar") == ["t/1/a", "t/1/b", "t/2/a"]
        (image,) = images_of(["memory://box/i/x.jpg"])
        assert (image.data, image.metadata) == (JPEG, {"txt": "hello"})

    def test_two_colons_are_a_part_of_a_name_here_too(self, store):
        store.pipe_file("/box/t/1::2.tar", tar_bytes([("c.jpg", JPEG)]))
        store.pipe_file("/box/i/x::y.jpg", JPEG)
        assert keys_of("memory://box/t/*2.tar") == ["1::2/c", "2/a"]
        assert keys_of("memory://box/i/*y.jpg") == ["x::y.jpg"]

    def test_two_readers_of_one_tar_do_not_disturb_each_other(self):
        options = SourceOptions(block_bytes=512)
        (unit,) = plan_units(["memory://box/t/1.tar"], options=options)
        pairs = zip(read_unit(unit, options=options), read_unit(unit, options=options), strict=True)
        assert [(a.key, b.key) for a, b in pairs] == [("a", "a"), ("b", "b")]

    def test_local_and_memory_sources_mix(self, tmp_path):
        put(tmp_path, "x.jpg")
        found = keys_of(tmp_path, "memory://box/i/")
        assert len(set(found)) == 2
        assert all(key.endswith("x.jpg") for key in found)

    def test_a_changed_object_has_another_etag(self, store):
        first = plan_units(["memory://box/t/1.tar"])
        store.pipe_file("/box/t/1.tar", tar_bytes([("z.jpg", JPEG), ("b.jpg", JPEG)]))
        assert plan_units(["memory://box/t/1.tar"])[0].etag != first[0].etag


def test_chained_urls_are_opened_as_they_were_found(tmp_path):
    put(tmp_path, "1.tar", "2.tar")
    options = {"storage_options": {"simplecache": {"cache_storage": str(tmp_path / ".cache")}}}
    found = keys_of(f"simplecache::file://{tmp_path}/{{1..2}}.tar", **options)
    assert found == ["1/a", "1/b", "2/a", "2/b"]


class ListsOnce(LocalFileSystem):
    """Goes by what it has listed, as s3fs does, of which all threads share one."""

    protocol = "listsonce"
    listed: ClassVar[set[str]] = set()

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("listsonce://")

    def unstrip_protocol(self, name):
        return f"listsonce://{name}"

    def find(self, path, **options):
        found = super().find(path, **options)
        type(self).listed = self.listed or {*found}
        return found

    def _open(self, path, mode="rb", **options):
        if self.listed and path not in self.listed:
            raise FileNotFoundError(path)
        return super()._open(path, mode, **options)

    def invalidate_cache(self, path=None):
        type(self).listed = set()


def test_an_error_of_a_client_that_is_no_oserror_becomes_one(tmp_path, monkeypatch):
    class NoCredentials(Exception):
        __module__ = "botocore.exceptions"

    def refuse(*_: object, **__: object) -> None:
        raise NoCredentials("no credentials")

    options = SourceOptions(num_retries=0)
    put(tmp_path, "x.tar")
    (unit,) = plan_units([str(tmp_path / "x.tar")])
    monkeypatch.setattr(RetryingFile, "_read_once", refuse)
    with pytest.raises(ConnectionError, match=r"x\.tar: NoCredentials: no credentials"):
        list(read_unit(unit, options=options))
    monkeypatch.setattr(LocalFileSystem, "info", refuse)
    with pytest.raises(ConnectionError, match=r"x\.tar: NoCredentials: no credentials"):
        plan_units([str(tmp_path / "x.tar")], options=options)


def test_a_plan_looks_anew_at_what_was_listed_before(tmp_path):
    fsspec.register_implementation(ListsOnce.protocol, ListsOnce, clobber=True)
    put(tmp_path, "1.jpg")
    assert keys_of(f"listsonce://{tmp_path}") == ["1.jpg"]
    put(tmp_path, "2.jpg")
    errors = [image.error for image in images_of([f"listsonce://{tmp_path}"])]
    assert errors == [None, None]


@pytest.fixture
def http_server(tmp_path):
    """Serves tmp_path with sizes and lists, but without ranges, as many simple servers do."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = tmp_path / self.path.partition("?")[0].lstrip("/")
            data = path.read_bytes() if path.is_file() else b""
            if path.is_dir():
                data = "".join(f'<a href="{item.name}">' for item in path.iterdir()).encode()
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_plain_http_servers_without_ranges_serve_tars_and_images(tmp_path, http_server):
    put(tmp_path, "1.tar", "2.tar", "x.jpg")
    for name in ("{1..2}.tar", "*.tar"):
        assert keys_of(f"{http_server}/{name}") == ["1/a", "1/b", "2/a", "2/b"]
    assert keys_of(f"{http_server}/") == ["1.tar/a", "1.tar/b", "2.tar/a", "2.tar/b", "x.jpg"]
    assert keys_of(f"{http_server}/x.jpg") == ["x.jpg"]
    with pytest.raises(SourceNotFoundError):
        plan_units([f"{http_server}/none.tar"])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=1100))
def test_any_name_becomes_a_valid_bounded_key(name):
    key = key_text(name)
    data = key.encode()
    assert 0 < len(data) <= MAX_KEY_BYTES
    assert key.isprintable() or not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in key)
    assert key_text(name) == key


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "a~2", "a~3", "a~2~2", "b"]), max_size=30))
def test_claimed_keys_are_always_distinct(names):
    found = UniqueKeys().claim_all(names)
    assert len(set(found)) == len(names)
    assert all(key.startswith(name) for key, name in zip(found, names, strict=True))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b"]), JSON_VALUES))
def test_tags_of_any_metadata_fit_a_bitstream(metadata):
    tags = tags_from_metadata(metadata, ("a", "json.b", "a.b"), max_tags=64, max_tag_bytes=128)
    header = Header(codec_id="ab" * 32, width=1, height=1, num_states=1)
    stream = write_bitstream(header, tags, [State(b"x", 0)])
    assert set(parse_bitstream(stream).tags) == set(tags)


def test_many_long_tags_are_bounded_to_what_a_bitstream_holds():
    metadata = {"t": [f"{i}" + "é" * 300 for i in range(500)]}
    tags = tags_from_metadata(metadata, ("t",), max_tags=64, max_tag_bytes=128)
    assert all(len(tag.encode()) <= 128 for tag in tags)
    write_bitstream(
        Header(codec_id="ab" * 32, width=1, height=1, num_states=1), tags, [State(b"x", 0)]
    )
    assert tags_from_metadata({"t": [" a\tb\x00 ", True, None, 1.5, "", "a b"]}, ("t",),
                              max_tags=9, max_tag_bytes=9) == ("a b",)  # fmt: skip
