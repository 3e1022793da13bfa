"""Bytes of one object on any fsspec store, read on after transient errors.

``RetryingFile`` hides the weather: a dropped connection, a short reply, a busy server. It opens the
object again at the byte where the last good read ended, so nothing is lost or read twice, and gives
up after ``num_retries`` failures in a row. It also notices an object that is replaced meanwhile.
"""

import datetime
import inspect
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import fsspec
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.implementations.local import LocalFileSystem

from dicmh_ray.errors import SourceAddressError, SourceChangedError
from dicmh_ray.source.options import SourceOptions

logger = logging.getLogger(__name__)

_MAX_PAUSE_S = 10.0
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# HTTP and cloud clients raise errors of their own that are no OSError; importing them to name them
# would make each a dependency.
_CLIENT_PACKAGES = frozenset(
    ["aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"]
)
_IDENTITY_FIELDS = (
    "ETag", "etag", "md5Hash", "checksum", "LastModified", "last_modified", "updated", "mtime",
    "modified", "created",
)  # fmt: skip
_SCHEME = re.compile(r"[a-z][a-z0-9+.\-]*://", re.IGNORECASE)
_PASSWORD = re.compile(_SCHEME.pattern + r"[^/@]*:[^/@]*@", re.IGNORECASE)

T = TypeVar("T")


class _Address(NamedTuple):
    """A URI by its layers: ``simplecache::`` ``s3://b/x.jpg``, or ``zip://x.jpg`` ``::s3://b/y``."""

    before: str
    """The layers that have no path of their own, with their ``::``."""

    own: str
    """What names the object."""

    behind: str
    """The layers below one that has, from their ``::``."""


def open_filesystem(uri: str, options: SourceOptions) -> tuple[Any, str]:
    """The fsspec filesystem of ``uri`` and the path inside it.

    Layers are chained with ``::`` as in fsspec, outermost first. Anywhere else two colons are part
    of a name, as in ``s3://b/10::30.jpg``.

    Raises:
        SourceAddressError: the URL carries a password, or no filesystem can be had for it.
    """
    if not uri:  # to fsspec it is the current folder
        raise SourceAddressError("a source", "is empty, as an unset variable of a shell is")
    before, own, behind = _address(uri)
    if _PASSWORD.match(own) or _PASSWORD.search(behind):
        raise SourceAddressError(
            "a source URL", "carries a password, wanted that in storage_options"
        )
    link = own.partition("::")[0]
    try:
        fs, path = fsspec.core.url_to_fs(before + link + behind, **options.storage_options)
        # fsspec takes every "::" for a link of a chain: what is none is shown to the store only.
        path = str(path if link == own else fs._strip_protocol(own))
        return fs, plain_path(path) if isinstance(fs, LocalFileSystem) else path
    except (ImportError, TypeError, ValueError) as exc:
        raise SourceAddressError(
            uri, f"wanted a path, or a URL that fsspec can open: {exc}"
        ) from exc


def plain_path(path: str) -> str:
    """A local path without ``.``, ``..`` and doubled slashes: one file has one address."""
    plain = os.path.normpath(path)
    if ".." in path.split("/"):
        real = os.path.realpath(path)
        # Behind a link to a folder, ``..`` leads elsewhere than its letters say.
        return plain if os.path.realpath(plain) == real else real
    return plain


def uri_like(uri: str, fs: Any, path: str) -> str:
    """The URI that opens ``path`` of the filesystem ``fs`` through the layers of ``uri``."""
    before, own, behind = _address(uri)
    if not before and not behind:
        return str(fs.unstrip_protocol(path))
    protocol = own.partition("://")[0] if "://" in own else "file"
    return f"{before}{protocol}://{path}{behind}"


def identity(info: Mapping[str, Any]) -> str:
    """One line that changes when the object does: size, and ETag or time of modification."""
    mark = next((info[name] for name in _IDENTITY_FIELDS if info.get(name) is not None), "")
    # A listing and a single look-up of one store may spell one mark in two ways.
    if isinstance(mark, datetime.datetime):
        mark = mark.timestamp()
    text = f"{mark:.6f}" if isinstance(mark, int | float) else str(mark)
    return f"{info.get('size')}:{text.removeprefix('W/').strip(chr(34))}"


def is_transient(exc: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(exc, OSError):
        return not isinstance(exc, _PERMANENT)
    return type(exc).__module__.partition(".")[0] in _CLIENT_PACKAGES


def retry(action: Callable[[], T], *, what: str, options: SourceOptions) -> T:
    """Run ``action``, again after transient errors.

    Raises:
        OSError: the last error, after ``num_retries`` more attempts; a client's own, that is none,
            in a ConnectionError.
    """
    attempt = 0
    while True:
        try:
            return action()
        except Exception as exc:
            if not is_transient(exc):
                raise
            if attempt >= options.num_retries:
                _give_up(exc, what)
            _pause(what, attempt, exc, options)
            attempt += 1


def _give_up(exc: Exception, what: str) -> NoReturn:
    """Raise a transient error for good; a job retries units on an OSError, not on a client's own."""
    if isinstance(exc, OSError):
        raise exc
    raise ConnectionError(f"{what}: {type(exc).__name__}: {exc}") from exc


def _pause(what: str, attempt: int, exc: Exception, options: SourceOptions) -> None:
    pause_s = min(_MAX_PAUSE_S, options.retry_base_s * 2**attempt) * random.uniform(0.5, 1.0)
    logger.warning("%s: %s, again in %.1f s", what, type(exc).__name__, pause_s)
    time.sleep(pause_s)


class RetryingFile(io.RawIOBase):
    """A read-only, seekable view of one object.

    Args:
        uri: of the object.
        options: how to reach it and how often to try.
        etag: what :func:`identity` said when the plan was made; None trusts what is found now.

    Raises:
        FileNotFoundError: the object is gone.
        SourceChangedError: it is not the one that was planned.
    """

    def __init__(
        self,
        uri: str,
        options: SourceOptions,
        *,
        etag: str | None = None,
    ) -> None:
        self.uri = uri
        self.failure: Exception | None = None
        """The error that exhausted the attempts: tells a bad store from bad data."""
        self._options = options
        self._file: Any = None
        self._has_failed = False
        self._offset = 0
        self._fs, self._path = open_filesystem(uri, options)
        info = retry(self._open_first, what=uri, options=options)
        self.size_bytes: int | None = info.get("size")
        self._identity = identity(info)
        if etag is not None and etag != self._identity:
            raise SourceChangedError(uri, "after the plan was made")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def size(self) -> int:
        """Bytes of the object (Arrow asks for it); 0 where the store does not know."""
        return self.size_bytes or 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self.size()}[whence]
        self._offset = max(0, base + offset)
        return self._offset

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        """Exactly ``size`` bytes, fewer at the end only; -1 for all that is left."""
        if size is None or size < 0:
            size = max(0, self.size() - self._offset)
        chunks = []
        while size > 0 and (chunk := self._read_some(min(size, self._options.block_bytes))):
            chunks.append(chunk)
            size -= len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read_some(self, size: int) -> bytes:
        """At least one byte, or ``b""`` at the true end."""
        if self.size_bytes is not None and self._offset >= self.size_bytes:
            return b""
        attempt = 0
        while True:
            try:
                data = self._read_once(size)
            except Exception as exc:
                self._drop()
                self._has_failed = True
                if not is_transient(exc) or attempt >= self._options.num_retries:
                    self.failure = exc
                    if not is_transient(exc):
                        raise
                    _give_up(exc, self.uri)
                _pause(f"{self.uri} at byte {self._offset}", attempt, exc, self._options)
                attempt += 1
            else:
                self._offset += len(data)
                return data

    def _read_once(self, size: int) -> bytes:
        if self._file is None:
            self._file = self._open()
        if self._file.seekable():
            # Every time, not only after opening: memory:// hands all readers one file object.
            self._file.seek(self._offset)
        data = bytes(self._file.read(size))
        if not data and self.size_bytes is not None:
            raise OSError(f"{self.uri} ended at byte {self._offset} of {self.size_bytes}")
        return data

    def _open_first(self) -> Mapping[str, Any]:
        """Open, and return what the store says of the object; most looked it up to open it."""
        self._drop()
        self._file = self._open()
        found: Mapping[str, Any] = getattr(self._file, "details", None) or self._fs.info(self._path)
        return found

    def _open(self) -> Any:
        if self._has_failed:
            self._check_same()
        # The callers read in blocks; a cache below them would fetch and hold the same bytes twice.
        file = self._fs.open(
            self._path, "rb", block_size=self._options.block_bytes, cache_type="none"
        )
        if not file.seekable():
            skipped = 0
            while skipped < self._offset:
                chunk = file.read(min(self._offset - skipped, self._options.block_bytes))
                if not chunk:
                    raise OSError(f"{self.uri} ended at byte {skipped} while skipping")
                skipped += len(chunk)
        return file

    def _check_same(self) -> None:
        self._fs.invalidate_cache()
        if identity(self._fs.info(self._path)) != self._identity:
            raise SourceChangedError(self.uri, "while it was read")

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                logger.debug("%s: closing a broken file failed", self.uri, exc_info=True)


def _address(uri: str) -> _Address:
    """Take a URI apart. Two colons end a layer only behind the protocol of a layer."""
    before, own = "", uri
    while "::" in own:
        head, _, rest = own.partition("::")
        protocol, slashes, _ = head.partition("://")
        if not _is_layer(protocol):
            break
        if slashes:
            at = _end_of_layer(own)
            return _Address(before, own[:at], own[at:])
        before, own = f"{before}{head}::", rest
    return _Address(before, own, "")


def _end_of_layer(url: str) -> int:
    """Where ``::`` ends the outermost layer: before a URL, else the last one before a local path."""
    for match in re.finditer("::", url):
        rest = url[match.end() :]
        if _SCHEME.match(rest) or _is_layer(rest.partition("::")[0]):
            return match.start()
    return url.rindex("::")


def _is_layer(protocol: str) -> bool:
    """Whether its filesystem shows what another one holds, as caches and archives do."""
    try:
        kind: Any = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError):
        return False
    is_chained = issubclass(kind, ChainedFileSystem)
    return is_chained or "fo" in inspect.signature(kind.__init__).parameters
