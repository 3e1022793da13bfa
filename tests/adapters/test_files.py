"""Archived images as files, seen by fsspec itself, by Pillow, and by fsspec's own test suite."""

import errno
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.tests.abstract import AbstractFixtures, AbstractGetTests
from PIL import Image

from dicmh_ray.adapters.files import ArchiveFileSystem
from dicmh_ray.archive import create_archive
from dicmh_ray.errors import ArchiveNotFoundError
from dicmh_ray.views import read_mark
from tests.adapters.conftest import key_of
from tests.archive.rows import CODEC_FILES, kept_row, ok_row, plan_of
from tests.fake_codec import FakeCodec


class CountingCodec(FakeCodec):
    """Remembers how many pictures all of its kind decoded."""

    decoded = 0

    def decode(self, bitstreams, *, states=None, view="machine"):
        CountingCodec.decoded += len(bitstreams)
        return super().decode(bitstreams, states=states, view=view)


@pytest.fixture
def fs(archive_uri):
    CountingCodec.decoded = 0
    return ArchiveFileSystem(archive_uri, codec=CountingCodec, skip_instance_cache=True)


@pytest.fixture
def url(archive_uri):
    """A file of the archive, its own system named after it."""
    return f"dicmh://{key_of(7)}.png::file://{archive_uri}"


def test_pillow_opens_an_archived_image_through_a_url(url, pictures):
    with fsspec.open(url, codec=FakeCodec) as file, Image.open(file) as image:
        assert image.format == "PNG"
        assert (np.asarray(image) == pictures[key_of(7)]).all()


def test_one_path_through_the_archive_is_a_url_too(archive_uri, pictures):
    url = f"dicmh::file://{archive_uri}/{key_of(7)}.png"
    with fsspec.open(url, codec=FakeCodec) as file, Image.open(file) as image:
        assert (np.asarray(image) == pictures[key_of(7)]).all()
    fs, path = fsspec.core.url_to_fs(url, codec=FakeCodec)
    assert path == f"{archive_uri}/{key_of(7)}.png"
    assert fs.ls(f"{archive_uri}/2", detail=False)[0] == archive_uri.strip("/") + "/2/img-012.png"
    assert fs.isdir(archive_uri)


def test_a_url_may_be_a_pattern(archive_uri, pictures):
    files = fsspec.open_files(f"dicmh://1/*.png::file://{archive_uri}", codec=FakeCodec)
    assert [file.path for file in files] == [f"{key_of(n)}.png" for n in range(6, 12)]
    with files[1] as file, Image.open(file) as image:
        assert (np.asarray(image) == pictures[key_of(7)]).all()


def test_options_reach_the_file_system_by_its_name(url, pictures):
    with fsspec.open(url, dicmh={"codec": FakeCodec, "states": 1}) as file:
        coarse = np.asarray(Image.open(file)).astype(int)
    assert 0 < np.abs(coarse - pictures[key_of(7)]).max() < 64


def test_a_listing_decodes_nothing(fs, pictures):
    assert [info["name"] for info in fs.ls("")] == ["0", "1", "2"]
    assert sorted(fs.find("")) == [f"{key}.png" for key in sorted(pictures)]
    assert fs.glob("*/img-01?.png") == [f"{key_of(n)}.png" for n in range(10, 18)]
    assert fs.isfile(f"{key_of(0)}.png")
    assert fs.isdir("0")
    assert fs.exists("dicmh://0/")
    assert not fs.exists("0/img-999.png")
    assert not fs.isfile("0")
    assert fs.ls(f"{key_of(0)}.png") == [{"name": f"{key_of(0)}.png", "size": None, "type": "file"}]
    assert CountingCodec.decoded == 0


def test_a_size_is_that_of_the_file_and_costs_one_decode(fs):
    path = f"{key_of(3)}.png"
    size = fs.info(path)["size"]
    assert size == len(fs.cat_file(path)) == fs.size(path)
    assert [info["size"] for info in fs.ls("0") if info["name"] == path] == [size]
    assert CountingCodec.decoded == 1


@pytest.mark.parametrize(
    ("start", "end"), [(0, 8), (10, None), (None, 5), (-4, None), (-9, -4), (5, 5), (0, 10**9)]
)
def test_ranges_are_those_of_the_file(fs, start, end):
    path = f"{key_of(3)}.png"
    assert fs.cat_file(path, start, end) == fs.cat_file(path)[start:end]


def test_a_file_can_be_sought_in_and_read_by_parts(fs):
    whole = fs.cat_file(f"{key_of(3)}.png")
    with fs.open(f"{key_of(3)}.png") as file:
        assert file.size == len(whole)
        file.seek(-10, io.SEEK_END)
        assert file.read() == whole[-10:]
        file.seek(1)
        assert file.read(3) == b"PNG"
    assert fs.read_block(f"{key_of(3)}.png", 0, 8) == whole[:8]
    assert fs.cat_ranges([f"{key_of(3)}.png"] * 2, [0, 4], [4, 8]) == [whole[:4], whole[4:8]]
    assert fs.head(f"{key_of(3)}.png", 4) == whole[:4]
    assert fs.tail(f"{key_of(3)}.png", 4) == whole[-4:]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "PNG"])
def test_the_suffix_chooses_the_format(fs, pictures, suffix):
    with fs.open(f"{key_of(4)}.{suffix}") as file, Image.open(file) as image:
        assert image.format == {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "PNG": "PNG"}[suffix]
        assert image.size == (32, 24)


def test_a_human_view_says_in_its_file_that_it_is_generated(archive_uri):
    for view in ("human", "machine"):
        fs = ArchiveFileSystem(archive_uri, view=view, codec=FakeCodec)
        for suffix in ("png", "jpg", "webp"):
            mark = read_mark(fs.cat_file(f"{key_of(4)}.{suffix}"))
            assert mark.is_generated == (view == "human")
        facts = json.loads(fs.cat_file(f"{key_of(4)}.json"))
        assert facts["decoded"] == {"view": view, "states": 3, "generated": view == "human"}


def test_thumbnails_can_be_files_too(archive_uri):
    fs = ArchiveFileSystem(archive_uri, view="thumbnail", codec=FakeCodec)
    assert Image.open(fs.open(f"{key_of(4)}.png")).size == (32, 24)
    assert json.loads(fs.cat_file(f"{key_of(4)}.json"))["decoded"]["states"] == 1


def test_npy_is_the_latent(fs, pictures):
    latent = np.load(fs.open(f"{key_of(4)}.npy"))
    assert (latent.dtype, latent.shape) == (np.float16, (3, 24, 32))
    assert CountingCodec.decoded == 0


def test_json_is_what_is_known_of_the_row(fs):
    with fs.open(f"{key_of(9)}.json", "rt") as file:
        facts = json.load(file)
    assert (facts["key"], facts["tags"], facts["metadata"]["number"]) == (key_of(9), ["dog"], 9)
    assert facts["decoded"] == {"view": "machine", "states": 2, "generated": False}
    assert json.loads(fs.cat("2/img-broken.json"))["status"] == "failed"
    assert CountingCodec.decoded == 0


def test_a_row_without_a_picture_is_no_picture_file(fs):
    assert "2/img-broken.png" not in fs.find("")
    with pytest.raises(FileNotFoundError):
        fs.open("2/img-broken.png")


def test_a_listing_is_of_the_format_asked_for(archive_uri, pictures):
    fs = ArchiveFileSystem(archive_uri, format="json")
    assert sorted(fs.find("")) == sorted([*(f"{k}.json" for k in pictures), "2/img-broken.json"])
    with pytest.raises(ValueError, match="format is 'tiff'"):
        ArchiveFileSystem(archive_uri, format="tiff")
    with pytest.raises(ValueError, match="format is 'original'"):
        ArchiveFileSystem(archive_uri, format="original")


def test_without_suffixes_a_name_is_a_key(archive_uri, pictures):
    fs = ArchiveFileSystem(archive_uri, suffix=False, codec=FakeCodec)
    assert sorted(fs.find("")) == sorted(pictures)
    assert Image.open(fs.open(key_of(5))).format == "PNG"


@pytest.mark.parametrize("path", ["", "0", "nothing", "0/nothing.png", f"{key_of(0)}.gif", "0/"])
def test_what_is_no_file_cannot_be_opened(fs, path):
    error = IsADirectoryError if path in ("", "0", "0/") else FileNotFoundError
    with pytest.raises(error):
        fs.open(path)
    if error is FileNotFoundError:
        with pytest.raises(FileNotFoundError):
            fs.info(path)
        with pytest.raises(FileNotFoundError):
            fs.ls(path)


def test_nothing_can_be_written(fs, tmp_path):
    path = f"{key_of(0)}.png"
    (tmp_path / "x").write_bytes(b"x")
    writes = [
        lambda: fs.open(path, "wb"),
        lambda: fs.open("new.png", "xb"),
        lambda: fs.pipe_file("new.png", b""),
        lambda: fs.pipe({"new.png": b""}),
        lambda: fs.put(str(tmp_path / "x"), "new.png"),
        lambda: fs.touch("new.png"),
        lambda: fs.mkdir("new"),
        lambda: fs.makedirs("new/er", exist_ok=True),
        lambda: fs.rmdir("0"),
        lambda: fs.rm(path),
        lambda: fs.rm("0", recursive=True),
        lambda: fs.cp_file(path, "copy.png"),
        lambda: fs.mv(path, "moved.png"),
    ]
    for write in writes:
        with pytest.raises(OSError, match="read-only") as caught:
            write()
        assert caught.value.errno == errno.EROFS
    assert fs.exists(path)


def test_made_files_are_kept_up_to_a_number_of_bytes(archive_uri):
    CountingCodec.decoded = 0
    paths = [f"{key_of(n)}.png" for n in (1, 3, 5)]
    sizes = ArchiveFileSystem(archive_uri, codec=FakeCodec).cat(paths)
    room = sum(map(len, sizes.values())) - 1
    fs = ArchiveFileSystem(archive_uri, codec=CountingCodec, cache_bytes=room)
    for path in (paths[0], paths[1], paths[0], paths[1]):
        fs.cat_file(path)
    assert CountingCodec.decoded == 2
    fs.cat_file(paths[2])
    fs.cat_file(paths[1])
    assert CountingCodec.decoded == 3
    fs.cat_file(paths[0])
    assert CountingCodec.decoded == 4


def test_many_threads_make_each_file_once(fs, pictures):
    paths = [f"{key_of(n % 3)}.png" for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fs.cat_file, paths))
    assert found == [fs.cat_file(path) for path in paths]
    assert CountingCodec.decoded == 3


def test_it_pickles_and_reads_on(fs):
    copy = pickle.loads(pickle.dumps(fs))
    assert copy.cat_file(f"{key_of(2)}.png") == fs.cat_file(f"{key_of(2)}.png")
    with fsspec.core.OpenFile(copy, f"{key_of(2)}.png") as file:
        assert pickle.loads(pickle.dumps(copy)).size(file.path) == file.size


def test_keys_that_are_no_file_names_are_written_so_that_they_are(tmp_path):
    keys = ["/root", "a//b", "../up", "..", ".", "a::b", "50%", "plain/x.y", "a b/ü", "a/", "%2F"]
    writer = create_archive(str(tmp_path), plan=plan_of("0"), codec_files=CODEC_FILES)
    writer.commit_unit("0", [kept_row(key, original=key.encode()) for key in keys])
    writer.finalize()
    fs = ArchiveFileSystem(str(tmp_path), format="original", suffix=False)
    found = fs.find("")
    assert sorted(fs.cat_file(path).decode() for path in found) == sorted(keys)
    assert {"plain/x.y", "a b/ü", "50%25"} <= set(found)


def test_where_there_is_no_archive_the_error_says_so(tmp_path):
    with pytest.raises(ArchiveNotFoundError):
        fsspec.open(f"dicmh://x.png::file://{tmp_path}").open()


def test_it_answers_as_a_file_system_that_holds_the_files(fs):
    """The same questions to fsspec's own memory file system, with the made files put into it."""
    # Instances are shared by all of the process: one that is not, with files of its own.
    twin = MemoryFileSystem(skip_instance_cache=True)
    twin.store, twin.pseudo_dirs = {}, [""]
    for path in fs.find(""):
        twin.pipe_file("/" + path, fs.cat_file(path))

    def plain(paths):
        return sorted(path.strip("/") for path in paths)

    for path in ("", "0", "1/"):
        assert plain(fs.ls(path, detail=False)) == plain(twin.ls(path, detail=False))
        assert plain(fs.find(path)) == plain(twin.find(path))
        assert plain(fs.find(path, withdirs=True)) == plain(twin.find(path, withdirs=True))
        assert fs.du(path) == twin.du(path)
    for pattern in (
        "*",
        "**",
        "*/*",
        "?/img-00*",
        "[01]/*5.png",
        "1/**",
        "*.png",
        "**/img-017.png",
    ):
        assert plain(fs.glob(pattern)) == plain(twin.glob("/" + pattern)), pattern
    walked = [(root.strip("/"), dirs, files) for root, dirs, files in fs.walk("")]
    assert walked == [(root.strip("/"), dirs, files) for root, dirs, files in twin.walk("/")]
    path = f"{key_of(8)}.png"
    assert fs.cat_ranges([path], [3], [9]) == twin.cat_ranges(["/" + path], [3], [9])
    assert (fs.info(path)["size"], fs.info(path)["type"]) == (twin.info(path)["size"], "file")


class PreparedArchive(ArchiveFileSystem):
    """The suite writes what it wants to read. Here it is there already: writing only checks that."""

    def mkdir(self, path, create_parents=True, **_):
        assert self.isdir(path)

    def touch(self, path, truncate=True, **_):
        assert self.isfile(path)


def hashed(number):
    """As the suite names its ten files."""
    return md5(str(number).encode()).hexdigest()


SCENARIOS = {
    "bulk": "file1 file2 subdir/subfile1 subdir/subfile2 subdir/nesteddir/nestedfile",
    "globs": """file1 file2
        subdir0/subfile1 subdir0/subfile2 subdir0/nesteddir/nestedfile
        subdir1/subfile1 subdir1/subfile2 subdir1/nesteddir/nestedfile""",
    "prefix": "subdir.txt subdir/subfile.txt",
    "hashed": " ".join(f"{hashed(number)}.txt" for number in range(10)),
}
"""What the suite's fixtures would write, each below ``source``."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """An archive whose kept originals are the files that the suite reads."""
    uri = str(tmp_path_factory.mktemp("suite") / "archive")
    files = {
        f"home/{scenario}/source/{name}": b"x"
        for scenario, names in SCENARIOS.items()
        for name in names.split()
    }
    files["home/src/file"] = b"x"
    files |= {f"home/hashed/source/{hashed(n)}.txt": str(n).encode() for n in range(10)}
    writer = create_archive(uri, plan=plan_of("0"), codec_files=CODEC_FILES)
    rows = [kept_row(key, original=data) for key, data in files.items()]
    writer.commit_unit("0", [*rows, ok_row("coded/not-shown")])
    writer.finalize()
    return uri


class TestTheAbstractSuiteOfFsspec(AbstractFixtures, AbstractGetTests):
    """Everything in the suite that reads: it copies files, folders, patterns and lists to disk."""

    @pytest.fixture
    def fs(self, prepared):
        return PreparedArchive(prepared, format="original", suffix=False)

    @pytest.fixture
    def local_fs(self):
        """The suite's own is a class method, which pytest no longer takes for a fixture."""
        return LocalFileSystem(auto_mkdir=True)

    @pytest.fixture
    def fs_path(self):
        return "home"

    @pytest.fixture
    def fs_join(self):
        return lambda *args: "/".join(arg for arg in args if arg)

    @pytest.fixture
    def fs_bulk_operations_scenario_0(self):
        return "home/bulk/source"

    @pytest.fixture
    def fs_glob_edge_cases_files(self):
        return "home/globs/source"

    @pytest.fixture
    def fs_dir_and_file_with_same_name_prefix(self):
        return "home/prefix/source"

    @pytest.fixture
    def fs_10_files_with_hashed_names(self):
        return "home/hashed/source"
