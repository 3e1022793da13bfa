"""Every store: atomic put, one winner, and an honest answer when the network gave none."""

import errno
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow.fs
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper

from dicmh_ray.archive.store import (
    MemoryStore,
    Store,
    check_name,
    open_store,
    probe,
    public_uri,
)
from dicmh_ray.errors import (
    CommitFailedError,
    CommitUnknownError,
    CorruptObjectError,
    MissingExtraError,
    StoreAddressError,
)
from tests.archive.conftest import KEY, SECRET


class TestEveryStore:
    def test_an_object_comes_back_whole_and_in_ranges(self, place):
        store = place.store()
        store.put("data/x.bin", b"0123456789")
        assert store.get("data/x.bin") == b"0123456789"
        assert store.get_range("data/x.bin", 3, 4) == b"3456"
        assert store.get_range("data/x.bin", 3, 0) == b""
        assert store.size("data/x.bin") == 10

    def test_a_put_replaces(self, place):
        store = place.store()
        store.put("x", b"one")
        store.put("x", b"two")
        assert store.get("x") == b"two"

    def test_a_range_past_the_end_is_damage(self, place):
        store = place.store()
        store.put("x", b"0123456789")
        for start, length in [(8, 4), (10, 1), (20, 5)]:
            with pytest.raises(CorruptObjectError, match="ends at byte"):
                store.get_range("x", start, length)

    def test_a_missing_object_is_file_not_found(self, place):
        store = place.store()
        for read in (store.get, store.size, lambda name: store.get_range(name, 0, 1)):
            with pytest.raises(FileNotFoundError):
                read("nothing")
        assert store.list("") == []
        assert store.list("data/") == []
        store.delete("nothing")

    def test_a_listing_has_full_names_in_order(self, place):
        store = place.store()
        for name in ("b/2", "a", "b/1", "b/c/3", "bb/4"):
            store.put(name, b"")
        assert store.list("") == ["a", "b/1", "b/2", "b/c/3", "bb/4"]
        assert store.list("b/") == ["b/1", "b/2", "b/c/3"]
        store.delete("b/1")
        assert store.list("b/") == ["b/2", "b/c/3"]

    def test_only_the_first_put_if_absent_writes(self, place):
        store = place.store()
        assert store.put_if_absent("commit/a.json", b"first")
        assert not store.put_if_absent("commit/a.json", b"second")
        assert store.get("commit/a.json") == b"first"
        assert store.put_if_absent("commit/a.json", b"first"), "own content is a won race"

    def test_of_sixteen_racers_one_wins(self, place):
        store = place.store()
        contents = [b"racer %d" % i for i in range(16)]
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda data: store.put_if_absent("commit/a", data), contents))
        assert won.count(True) == 1
        assert store.get("commit/a") == contents[won.index(True)]

    def test_the_probe_finds_the_condition_honoured_and_leaves_nothing(self, place):
        store = place.store()
        assert probe(store)
        assert store.list("") == []

    def test_a_store_survives_pickle_and_shows_no_credentials(self, place):
        store = place.store()
        store.put("x", b"1")
        again = pickle.loads(pickle.dumps(store))
        assert type(again) is type(store)
        assert again.get("x") == b"1"
        assert KEY not in repr(again)
        assert SECRET not in repr(again)

    @pytest.mark.parametrize("name", ["../x", "a/../b", "/x", "a//b", ".hidden", "a\\b", "a\n", ""])
    def test_no_name_leaves_the_folder(self, place, name):
        with pytest.raises(CorruptObjectError, match="not a legal object name"):
            place.store().get(name)


class Answering(MemoryStore):
    """A store whose conditional put answers wrongly: before the effect, or after it."""

    def __init__(self, uri, *, before=None, after=None, unreadable=None):
        super().__init__(uri)
        self.before, self.after, self.unreadable = before, after, unreadable
        self.tries = 0

    def _create(self, path, data):
        self.tries += 1
        if self.before is not None:
            raise self.before
        super()._create(path, data)
        if self.after is not None:
            raise self.after

    def get(self, name):
        if self.unreadable is not None:
            raise self.unreadable
        return super().get(name)


class HttpError(Exception):
    """As botocore's ClientError."""

    def __init__(self, status):
        super().__init__(status)
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


AMBIGUOUS = [TimeoutError(), ConnectionResetError(), HttpError(500), HttpError(503)]


@pytest.fixture
def address(tmp_path):
    return f"memory://{tmp_path.as_posix().strip('/')}"


@pytest.mark.parametrize("error", AMBIGUOUS, ids=repr)
def test_a_put_whose_answer_was_lost_is_recognised_as_own(address, error):
    assert Answering(address, after=error).put_if_absent("c", b"mine")


@pytest.mark.parametrize("error", AMBIGUOUS, ids=repr)
def test_a_put_without_effect_is_known_to_have_failed(address, error):
    with pytest.raises(CommitFailedError, match="c was not published"):
        Answering(address, before=error).put_if_absent("c", b"mine")


@pytest.mark.parametrize("error", AMBIGUOUS, ids=repr)
def test_a_lost_answer_with_another_content_is_a_lost_race(address, error):
    open_store(address).put("c", b"theirs")
    assert not Answering(address, before=error).put_if_absent("c", b"mine")


def test_a_store_that_answers_nothing_leaves_the_outcome_unknown(address):
    store = Answering(address, after=TimeoutError("put"), unreadable=TimeoutError("get"))
    with pytest.raises(CommitUnknownError, match=r"put.*get"):
        store.put_if_absent("c", b"mine")


def test_a_conflict_with_nobody_is_tried_again(address):
    store = Answering(address, before=HttpError(409))
    with pytest.raises(CommitFailedError, match="tried 4 times"):
        store.put_if_absent("c", b"mine")
    assert store.tries == 4


def test_a_refused_permission_is_not_renamed(address):
    with pytest.raises(PermissionError):
        Answering(address, before=PermissionError("no")).put_if_absent("c", b"mine")


class Lying(MemoryStore):
    """Takes conditional puts and ignores the condition, as some S3 look-alikes do."""

    def _create(self, path, data):
        self._fs.pipe_file(path, data)


def test_the_probe_catches_a_store_that_ignores_the_condition(address):
    assert not probe(Lying(address))


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EPERM])
def test_the_probe_catches_a_disk_without_hard_links(tmp_path, monkeypatch, number):
    def link(source, target):
        raise OSError(number, "no links here")

    monkeypatch.setattr("os.link", link)
    assert not probe(open_store(str(tmp_path)))
    assert list(tmp_path.rglob("*")) == [tmp_path / "scratch"]


class LooksThenWrites(ArrowFSWrapper):
    """A folder through fsspec's own ``pipe_file``, as HDFS is."""

    protocol = "looksthenwrites"

    def __init__(self, **options):
        super().__init__(pyarrow.fs.LocalFileSystem(), **options)

    @classmethod
    def _strip_protocol(cls, path):
        return path.partition("://")[2] or path


def test_the_probe_catches_a_client_that_looks_before_it_writes(tmp_path):
    fsspec.register_implementation(LooksThenWrites.protocol, LooksThenWrites, clobber=True)
    (tmp_path / "scratch").mkdir()
    store = open_store(f"{LooksThenWrites.protocol}://{tmp_path}")
    assert not probe(store)
    with pytest.raises(NotImplementedError, match="LooksThenWrites has no conditional put"):
        store.put_if_absent("x", b"1")
    assert store.list("") == []


def test_an_address_that_can_only_be_read_is_no_place_for_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("x", b"")
    address = f"zip://archive::{tmp_path}/a.zip"
    with pytest.raises(StoreAddressError, match="ZipFileSystem cannot write there"):
        probe(open_store(address))


class TestPutOnce:
    @pytest.fixture(params=["conditional", "probed", "not probed"])
    def store(self, request, tmp_path):
        if request.param != "conditional":
            request.getfixturevalue("no_hard_links")
        return open_store(str(tmp_path), conditional=request.param != "probed")

    def test_what_is_there_stays(self, store):
        assert store.put_once("x", b"first")
        assert not store.put_once("x", b"second")
        assert store.put_once("x", b"first")
        assert store.get("x") == b"first"


def test_a_foreign_exception_becomes_a_connection_error(address):
    class Broken(Store):
        def get(self, name):
            with self._boundary(name):
                raise HttpError(500)

    with pytest.raises(ConnectionError, match=r"memory://.*HttpError") as caught:
        Broken(address).get("x")
    assert isinstance(caught.value.__cause__, HttpError)


def test_a_killed_local_put_leaves_no_object(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    for write in (store.put, store.put_if_absent):
        with pytest.raises(KeyboardInterrupt):
            write("x", b"data")
    assert store.list("") == []
    with pytest.raises(FileNotFoundError):
        store.get("x")


def test_credentials_in_an_address_are_not_shown():
    assert public_uri("s3://key:secret@bucket/a?token=1") == "s3://bucket/a"
    assert public_uri("/data/archive") == "/data/archive"
    assert check_name("codec/ab/x.safetensors") == "codec/ab/x.safetensors"


def test_a_missing_client_library_says_how_to_get_it(monkeypatch):
    def missing(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(MissingExtraError, match=r"dicmh_ray\[s3\]"):
        open_store("s3://bucket/archive")
    with pytest.raises(StoreAddressError, match=r"gs://bucket/a cannot be opened: gs"):
        open_store("gs://user:secret@bucket/a")


def test_an_empty_address_is_not_the_current_folder():
    with pytest.raises(StoreAddressError, match="without a name"):
        open_store("")


def test_an_address_of_no_kind_of_store_is_refused_by_name():
    with pytest.raises(StoreAddressError, match=r"foo://x cannot be opened: Protocol not known"):
        open_store("foo://user:secret@x")
