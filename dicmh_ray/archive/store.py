"""Objects under one address, on any fsspec file system, with the one operation commits rest on.

``put_if_absent`` is the only primitive of which two callers can never both be told "yours is the
object": the local disk does it with a hard link, S3 with ``If-None-Match: *``. Everything else
here is a plain put (atomic: a reader sees all of an object or none of it), a get or a listing.
A disk without hard links has no such put, nor has a file system whose client only looks before it
writes (fsspec's default, and so HDFS and FTP).

An error that may pass is met by trying again (:mod:`dicmh_ray.archive.retrying`), here and not in
the client libraries, so that the number of tries is known and two layers do not multiply. Every
operation may be tried twice: puts are of content-addressed or equal bytes, a conditional put
settles by reading what it cannot tell.

A store may take a conditional put and ignore the condition. :func:`probe` finds out, once, at
the start of a job; a store that failed it says so in ``conditional`` and commits are then named
by attempt (see :mod:`dicmh_ray.archive.commit`).
"""

import contextlib
import errno
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from dicmh_ray.archive import retrying
from dicmh_ray.archive.retrying import RetryPolicy, http_status, lacks_credentials, may_pass
from dicmh_ray.errors import (
    CommitFailedError,
    CommitUnknownError,
    CorruptObjectError,
    DicmhError,
    MissingExtraError,
    StoreAccessError,
    StoreAddressError,
    StoreUnavailableError,
)

logger = logging.getLogger(__name__)

SCRATCH = "scratch/"
"""Objects below this prefix belong to probes: no reader looks at them."""

SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._=+-]*"
"""Pattern of each part of a name between slashes."""

_TEMPORARY = ".tmp-"
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
_SECRET_OPTION = re.compile(r"key|secret|token|password|passwd|credential|sas", re.IGNORECASE)
_SHORTEST_SECRET = 6
_S3_SCHEMES = ("s3", "s3a")
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_NAME = re.compile(rf"{SEGMENT}(/{SEGMENT})*")
_memory_lock = threading.Lock()
_T = TypeVar("_T")


class StoredObject(NamedTuple):
    """One line of a listing."""

    name: str
    """In the store."""

    num_bytes: int
    """Length."""

    modified: float
    """When it was put, seconds of the epoch by the store's clock; infinite if it does not say."""


def check_name(name: str) -> str:
    """Return ``name`` if it stays inside a store: plain segments, none of them ``..`` or hidden.

    Names are also read from objects that somebody else may have written.

    Raises:
        CorruptObjectError: the name could leave the archive's folder.
    """
    if not _NAME.fullmatch(name):
        raise CorruptObjectError(name, "not a legal object name")
    return name


def public_uri(uri: str) -> str:
    """``uri`` without a user, a password or a query: fit for messages and logs."""
    parts = urlsplit(uri)
    if not parts.scheme or not parts.netloc:
        return uri
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class Store:
    """Named objects below one address. Thread-safe; pickles as its address and its options.

    Errors of the file system arrive as ``OSError`` (``FileNotFoundError`` for a missing object);
    whatever else a client library raises is wrapped in ``ConnectionError``. Two are named: every
    operation may raise ``StoreUnavailableError`` when its tries are spent, and ``StoreAccessError``
    when the store refuses. No message holds a credential.
    """

    def __init__(
        self,
        uri: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        conditional: bool = True,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.uri = public_uri(uri)
        """The address, without credentials."""
        self.conditional = conditional
        """Whether ``put_if_absent`` is honoured; what :func:`probe` said."""
        self.retry = retrying.DEFAULT_RETRY if retry is None else retry
        """How often a request is tried."""
        self._given_uri = uri
        self._storage_options = dict(storage_options or {})
        self._secrets = tuple(_secrets_in(uri, self._storage_options))
        # A listing that another worker has outdated would hide its commits.
        self._fs, self._root = url_to_fs(
            uri, use_listings_cache=False, **self._client_options(self._storage_options)
        )
        self._root = self._root.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._given_uri, self._storage_options, self.conditional, self.retry)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def get(self, name: str) -> bytes:
        """All bytes of an object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        path = self._path(name)
        return self._tried(name, lambda: self._read(path))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes from byte ``start``, in one request.

        Raises:
            FileNotFoundError: there is no such object.
            CorruptObjectError: the object ends earlier.
        """
        if length == 0:
            return b""
        path = self._path(name)

        def read() -> bytes:
            try:
                return bytes(self._fs.cat_file(path, start=start, end=start + length))
            except OSError as exc:
                if http_status(exc) != retrying.RANGE_NOT_SATISFIABLE:
                    raise
                return b""

        data = self._tried(name, read)
        if len(data) != length:
            # An answer cut short on its way is no damage: the object itself is asked once more.
            data = self._tried(name, read)
        if len(data) != length:
            found = start + len(data)
            raise CorruptObjectError(name, f"ends at byte {found}, wanted {start + length}")
        return data

    def put(self, name: str, data: bytes) -> None:
        """Write an object, replacing one of that name."""
        path = self._path(name)
        self._tried(name, lambda: self._fs.pipe_file(path, data))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one. True when the stored bytes are these.

        An answer that does not tell (a timeout, a reset connection, a server error) is settled by
        reading the object back: own content was written by this call, or by an equal one. So is a
        refusal, since a client may have sent the request twice, and the first one arrived. Where
        nothing is there the request is made again; it cannot undo what arrives late, as that has
        the same bytes.

        Returns:
            False when the object exists with other bytes: somebody else was first.

        Raises:
            NotImplementedError: the store has no conditional put; see :meth:`put_once`.
            CommitFailedError: nothing was written; trying again is safe.
            CommitUnknownError: the store did not answer the question either.
            StoreAccessError: the store refuses to be written to.
        """
        path = self._path(name)
        error: OSError = FileNotFoundError(name)
        tried = 0
        for tried in self.retry.attempts():
            try:
                with self._boundary(name):
                    self._create(path, data)
            except PermissionError:
                raise
            except OSError as exc:
                error = exc
                try:
                    return self.get(name) == data
                except FileNotFoundError:
                    # 409: another conditional request for this name was under way and may have
                    # failed. A 412 for nothing: what it saw is gone, or the answer is wrong.
                    lost = http_status(exc) == retrying.PRECONDITION_FAILED
                    if not (lost or isinstance(exc, FileExistsError) or may_pass(exc)):
                        break
                except OSError as unreadable:
                    reason = f"{self._describe(exc)}; then {self._describe(unreadable)}"
                    raise CommitUnknownError(name, reason) from exc
                logger.debug("%s: put of %s: try %d: %s", self.uri, name, tried, exc)
            else:
                return True
        raise CommitFailedError(name, f"{self._describe(error)} (tried {tried} times)") from error

    def put_once(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one. True when the stored bytes are these.

        As :meth:`put_if_absent`, also on a store without conditional puts. Of two callers that come
        at the same time both may write there; the object is one of theirs, whole.
        """
        if self.conditional:
            with contextlib.suppress(NotImplementedError):  # of a store that was not probed
                return self.put_if_absent(name, data)
        try:
            return self.get(name) == data
        except FileNotFoundError:
            self.put(name, data)
        return self.get(name) == data

    def list(self, prefix: str) -> list[str]:
        """Sorted names of all objects whose name starts with ``prefix`` (``""`` or ``"x/"``)."""
        folder = f"{self._root}/{prefix}".rstrip("/")
        try:
            paths = self._tried(prefix, lambda: self._fs.find(folder))
        except FileNotFoundError:
            return []
        names = [path[len(self._root) + 1 :] for path in paths]
        return sorted(name for name in names if f"/{_TEMPORARY}" not in f"/{name}")

    def list_objects(self, prefix: str) -> Sequence[StoredObject]:
        """What :meth:`list` names, with sizes and times."""
        folder = f"{self._root}/{prefix}".rstrip("/")
        try:
            found = self._tried(prefix, lambda: self._fs.find(folder, detail=True))
        except FileNotFoundError:
            return []
        objects = [
            StoredObject(path[len(self._root) + 1 :], int(info["size"]), _modified(info))
            for path, info in found.items()
        ]
        return sorted(o for o in objects if f"/{_TEMPORARY}" not in f"/{o.name}")

    def modified(self, name: str) -> float | None:
        """When an object was put, by the store's clock; None if there is no such object."""
        path = self._path(name)
        try:
            return _modified(self._tried(name, lambda: self._fs.info(path)))
        except FileNotFoundError:
            return None

    def now(self) -> float:
        """The time by the store's clock, seconds of the epoch: of an object put for the purpose.

        Ages must be told by one clock, and the machines that write have one each.
        """
        name = f"{SCRATCH}clock-{uuid.uuid4().hex}"
        self.put(name, b"")
        try:
            found = self.modified(name)
        finally:
            self.delete(name)
        return time.time() if found is None or found == float("inf") else found

    def leftovers(self, before: float) -> Sequence[StoredObject]:
        """What puts that were killed left behind, before a time; no listing shows it."""
        del before
        return ()

    def delete_leftover(self, leftover: StoredObject) -> None:
        """Delete one of :meth:`leftovers`."""
        raise FileNotFoundError(leftover.name)

    def size(self, name: str) -> int:
        """Length of an object in bytes.

        Raises:
            FileNotFoundError: there is no such object.
        """
        path = self._path(name)
        return int(self._tried(name, lambda: self._fs.info(path))["size"])

    def delete(self, name: str) -> None:
        """Remove an object; one that is gone already is no error."""
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError):
            self._tried(name, lambda: self._fs.rm_file(path))

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _create(self, path: str, data: bytes) -> None:
        """Write an object that must not exist; FileExistsError or HTTP 409/412 where it does."""
        if getattr(self._fs.pipe_file, "__func__", None) is AbstractFileSystem.pipe_file:
            # It looks, then writes: two writers that look at the same time both find nothing.
            raise NotImplementedError(f"{type(self._fs).__name__} has no conditional put")
        self._fs.pipe_file(path, data, mode="create")

    def _read(self, path: str) -> bytes:
        return bytes(self._fs.cat_file(path))

    def _client_options(self, storage_options: Mapping[str, Any]) -> dict[str, Any]:
        """What the file system is opened with."""
        return dict(storage_options)

    def _tried(self, name: str, request: Callable[[], _T]) -> _T:
        """The result of a request, made again while its error may pass.

        Raises:
            StoreAddressError: the client has no such request, as those that only read.
            StoreUnavailableError: all tries are spent.
        """
        error: OSError | None = None
        for tried in self.retry.attempts():
            try:
                with self._boundary(name):
                    return request()
            except NotImplementedError as exc:
                client = type(self._fs).__name__
                raise StoreAddressError(self.uri, f"{client} cannot write there") from exc
            except OSError as exc:
                if not may_pass(exc):
                    raise
                error = exc
                logger.debug("%s: %s: try %d: %s", self.uri, name, tried, exc)
        reason = "" if error is None else self._describe(error)
        raise StoreUnavailableError(self.uri, name, self.retry.tries, reason) from error

    @contextlib.contextmanager
    def _boundary(self, name: str) -> Iterator[None]:
        """Let no client library's own exception class out."""
        try:
            yield
        except (DicmhError, NotImplementedError, TypeError):
            raise
        except PermissionError as exc:
            raise StoreAccessError(self.uri, name, self._describe(exc)) from exc
        except Exception as exc:
            # botocore's timeouts are OSErrors, but of no class that says what happened.
            if isinstance(exc, OSError) and type(exc).__module__ == "builtins":
                raise
            if lacks_credentials(exc):
                raise StoreAccessError(self.uri, name, self._describe(exc)) from exc
            raise ConnectionError(f"{self.uri}: {name}: {self._describe(exc)}") from exc

    def _describe(self, exc: BaseException) -> str:
        """Class and message of an error, without the credentials that were given."""
        text = f"{type(exc).__name__}: {exc}"
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class LocalStore(Store):
    """A folder. Objects are durable when a put returns: file and folder are both synced."""

    def put(self, name: str, data: bytes) -> None:
        path = Path(self._path(name))
        temporary = self._write_temporary(path, data)
        try:
            temporary.replace(path)
        except OSError:
            temporary.unlink()
            raise
        _sync_folder(path.parent)

    def get_range(self, name: str, start: int, length: int) -> bytes:
        # The file system object's own cat_file would read through a 5 MB buffer.
        with open(self._path(name), "rb", buffering=0) as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            found = start + len(data)
            raise CorruptObjectError(name, f"ends at byte {found}, wanted {start + length}")
        return data

    def leftovers(self, before: float) -> Sequence[StoredObject]:
        found = []
        for path in sorted(Path(self._root).rglob(f"{_TEMPORARY}*")):
            with contextlib.suppress(FileNotFoundError):  # its put went on meanwhile
                facts = path.stat()
                name = path.relative_to(self._root).as_posix()
                found.append(StoredObject(name, facts.st_size, facts.st_mtime))
        return [each for each in found if each.modified <= before]

    def delete_leftover(self, leftover: StoredObject) -> None:
        folder, _, name = f"{self._root}/{leftover.name}".rpartition("/")
        if not name.startswith(_TEMPORARY):
            raise FileNotFoundError(leftover.name)
        Path(folder, name).unlink(missing_ok=True)

    def _create(self, path: str, data: bytes) -> None:
        temporary = self._write_temporary(Path(path), data)
        try:
            # link() fails where the name exists; rename() would replace it.
            os.link(temporary, path)
        except OSError as exc:
            if exc.errno in _NO_HARD_LINKS:
                raise NotImplementedError(f"{self.uri} has no hard links") from exc
            raise
        finally:
            temporary.unlink()
        _sync_folder(Path(path).parent)

    @staticmethod
    def _write_temporary(path: Path, data: bytes) -> Path:
        _make_folder(path.parent)
        temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


class S3Store(Store):
    """A bucket, or a prefix in one, through s3fs.

    The client's own retries are off unless ``config_kwargs`` of the storage options name some:
    s3fs makes 5 tries of botocore's 5, so that one call could become 25 requests.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._fs.retries = 1

    def _client_options(self, storage_options: Mapping[str, Any]) -> dict[str, Any]:
        options = dict(storage_options)
        config = {"retries": {"total_max_attempts": 1}, **options.get("config_kwargs", {})}
        return {**options, "config_kwargs": config}

    def _read(self, path: str) -> bytes:
        # Otherwise s3fs asks for the length first, and joins large objects of many requests.
        return bytes(self._fs.cat_file(path, max_concurrency=1))


class MemoryStore(Store):
    """Objects in this process, for tests. One lock makes its conditional put one step."""

    def _create(self, path: str, data: bytes) -> None:
        with _memory_lock:
            if self._fs.exists(path):
                raise FileExistsError(path)
            self._fs.pipe_file(path, data)


def open_store(
    uri: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    conditional: bool = True,
    retry: RetryPolicy | None = None,
) -> Store:
    """The store at ``uri``: a path, ``memory://``, ``s3://``, or any other fsspec address.

    Args:
        uri: folder, bucket or prefix that holds the objects. It need not exist.
        storage_options: passed to the fsspec file system; they are kept in memory and in pickles
            of the store, and written nowhere.
        conditional: what :func:`probe` said about this store.
        retry: how often a request is tried; None is :data:`retrying.DEFAULT_RETRY`.

    Raises:
        MissingExtraError: the address is on S3 and s3fs is not installed.
        StoreAddressError: there is no such kind of store, or its client library is not installed.
    """
    if not uri:  # to fsspec it is the current folder
        raise StoreAddressError("an archive without a name", "wanted a path or a URL")
    # Only the scheme decides: building the file system twice would open two sessions.
    scheme = uri.split("://", 1)[0] if "://" in uri else "file"
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as exc:
        if scheme in _S3_SCHEMES:
            raise MissingExtraError("s3fs", "s3") from exc
        raise StoreAddressError(public_uri(uri), str(exc)) from exc
    except ValueError as exc:
        raise StoreAddressError(public_uri(uri), str(exc)) from exc
    if issubclass(kind, LocalFileSystem):
        return LocalStore(uri, storage_options, conditional=conditional, retry=retry)
    if issubclass(kind, MemoryFileSystem):
        return MemoryStore(uri, storage_options, conditional=conditional, retry=retry)
    if scheme in _S3_SCHEMES:
        return S3Store(uri, storage_options, conditional=conditional, retry=retry)
    return Store(uri, storage_options, conditional=conditional, retry=retry)


def probe(store: Store) -> bool:
    """Whether the store honours the condition of a conditional put: asked twice, of one name.

    Some S3 look-alikes answer 200 and overwrite. Costs four small requests. Call it once when a
    job starts, and pass the answer on as ``open_store(..., conditional=answer)``.
    """
    name = f"{SCRATCH}probe-{uuid.uuid4().hex}"
    try:
        first = store.put_if_absent(name, b"first")
        second = store.put_if_absent(name, b"second")
        honoured = first and not second and store.get(name) == b"first"
    except NotImplementedError:
        honoured = False
    finally:
        with contextlib.suppress(OSError):
            store.delete(name)
    if not honoured:
        logger.warning("%s ignores conditional puts: commits are named by attempt", store.uri)
    return honoured


def _reopen(
    uri: str, storage_options: Mapping[str, Any], conditional: bool, retry: RetryPolicy
) -> Store:
    return open_store(uri, storage_options, conditional=conditional, retry=retry)


def _secrets_in(uri: str, options: Mapping[str, Any]) -> Iterator[str]:
    """What must not be told: the user part of an address, and options that are named like it."""
    user, _, password = urlsplit(uri).netloc.rpartition("@")[0].partition(":")
    found = [user, password]
    for field, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets_in("", value)
        elif isinstance(value, str) and _SECRET_OPTION.search(field):
            found.append(value)
    yield from (text for text in found if len(text) >= _SHORTEST_SECRET)


def _modified(info: Mapping[str, Any]) -> float:
    for field in _TIMES:
        value = info.get(field)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                continue
        if isinstance(value, datetime):
            return value.timestamp()
    return float("inf")


def _make_folder(folder: Path) -> None:
    """``mkdir -p`` whose new entries survive a power cut."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
