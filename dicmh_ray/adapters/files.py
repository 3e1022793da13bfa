"""``dicmh://``: an archive as a read-only fsspec file system of ordinary image files.

    fsspec.open("dicmh://0/img-007.png::s3://bucket/archive")     an archive, and a file in it
    fsspec.open("dicmh::s3://bucket/archive/0/img-007.png")       the same as one path

A file is made when it is opened or its size is asked for: ``.png``, ``.jpg``, ``.webp`` are the
row's picture, ``.npy`` its latent, ``.json`` its tags, metadata and measurements. A listing shows
one file a row, in the format of the options, and decodes nothing.
"""

import errno
import io
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import fsspec
import numpy as np
from fsspec.implementations.chained import ChainedFileSystem

from dicmh_ray.adapters.handle import ArchiveHandle
from dicmh_ray.adapters.samples import facts_of, json_bytes
from dicmh_ray.archive import EncodedImage
from dicmh_ray.archive.plan import PLAN_NAME
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import RowNotFoundError
from dicmh_ray.views import Archive
from dicmh_ray.views.saving import FORMATS as PICTURE_FORMATS

_ORIGINAL = "original"
FORMATS = (*PICTURE_FORMATS, "npy", "json")
"""What a file's suffix may ask for."""

_LISTED = {"npy": "num_states > 0", "json": None, _ORIGINAL: "status == 'kept_original'"}
_WITH_PICTURE = "status != 'failed'"

DEFAULT_CACHE_BYTES = 64 * 2**20


class _Asked(NamedTuple):
    """One file: which row, in which format."""

    key: str
    format: str


class ArchivedFile(io.BytesIO):
    """A file that was made; all of it is in memory."""

    def __init__(self, data: bytes, path: str) -> None:
        super().__init__(data)
        self.path = path
        self.name = path
        self.size = len(data)


class ArchiveFileSystem(ChainedFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """The pictures of one archive as files. Thread-safe; pickles as its options.

    A file's name is its row's key and a suffix. Keys that are no relative path of plain names
    (``/x``, ``a//b``, ``..``) are percent-encoded, ``/`` and all.
    """

    protocol = "dicmh"
    root_marker = ""

    def __init__(
        self,
        fo: str = "",
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        *,
        version: int | None = None,
        view: str = "machine",
        states: int | None = None,
        format: str = "png",
        suffix: bool = True,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        codec: Callable[[], ImageCodec] | None = None,
        device: str = "cpu",
        **storage_options: Any,
    ) -> None:
        """An archive's files; nothing is read yet.

        Args:
            fo: address of the archive, or of a file in it: the folder with ``plan.json`` is found.
            target_protocol: of ``fo`` when that has none; fsspec's chaining gives it.
            target_options: for the archive's own file system.
            version: of the archive; None is the newest when it is first looked at.
            view: ``machine``, ``thumbnail``, or ``human`` where the archive's codec draws it: such
                a file says in its metadata that it is generated.
            states: decode from the first ones only; None is all.
            format: of the files in a listing: one of :data:`FORMATS`.
            suffix: False: a file's name is its row's key and nothing else, and all files are of
                ``format``, which may then be ``original`` too: kept source bytes, verbatim.
            cache_bytes: made files that are kept, the least recently used go first.
            codec: makes the codec; None loads the archive's own.
            device: where that one runs.
            storage_options: fsspec's own, for this file system.

        Raises:
            ValueError: ``format`` is not one of those.
        """
        super().__init__(**storage_options)
        if format not in FORMATS and not (format == _ORIGINAL and not suffix):
            raise ValueError(f"format is {format!r}, wanted one of {', '.join(FORMATS)}")
        self.view, self.states, self.format = view, states, format
        self._fo = fo if "://" in fo or not target_protocol else f"{target_protocol}://{fo}"
        self._options = dict(target_options or {})
        self._version = version
        self._suffix = suffix
        self._codec = codec
        self._device = device
        self._cache = _BytesCache(cache_bytes)
        self._sizes: dict[_Asked, int] = {}
        self._lock = threading.Lock()
        self._decoding = threading.Lock()
        self._found: tuple[ArchiveHandle, str] | None = None
        self._tree: dict[str, dict[str, bool]] | None = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        stripped = super()._strip_protocol(path)
        return [p.strip("/") for p in stripped] if isinstance(path, list) else stripped.strip("/")

    # What is there

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Files and folders in a folder. The size of a file that was not made yet is None."""
        prefix, inner = self._inside(path)
        folder = self._folders().get(inner)
        if folder is None:
            asked = self._asked(path, inner)
            return [self._file_info(prefix + inner, asked)] if detail else [prefix + inner]
        names = sorted(f"{inner}/{name}" if inner else name for name in folder)
        if not detail:
            return [prefix + name for name in names]
        return [
            self._folder_info(prefix, name)
            if folder[posixpath.basename(name)]
            else self._file_info(prefix + name, self._listed(name))
            for name in names
        ]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, type and exact size of one file or folder. The file is made, if it was not."""
        prefix, inner = self._inside(path)
        asked = self._asked_or_none(inner)
        if asked is not None:
            self._bytes(path)
            return self._file_info(prefix + inner, asked)
        if inner in self._folders():
            return self._folder_info(prefix, inner)
        raise FileNotFoundError(errno.ENOENT, "no such file in the archive", path)

    def isfile(self, path: str) -> bool:
        """Whether this is a file. Nothing is decoded."""
        return self._asked_or_none(self._inside(path)[1]) is not None

    def isdir(self, path: str) -> bool:
        """Whether this is a folder. Nothing is decoded."""
        inner = self._inside(path)[1]
        return self._asked_or_none(inner) is None and inner in self._folders()

    def exists(self, path: str, **_: Any) -> bool:
        """Whether this is a file or a folder. Nothing is decoded."""
        inner = self._inside(path)[1]
        return self._asked_or_none(inner) is not None or inner in self._folders()

    def ukey(self, path: str) -> str:
        """Changes when the bytes of a file may change."""
        _, inner = self._inside(path)
        asked = self._asked(path, inner)
        row = self._archive().reader.get(asked.key, blobs=(), columns="index")
        facts = (self._archive().codec_id, row.key, row.crc32c, asked.format)
        return str(fsspec.utils.tokenize(*facts, self.view, self.states))

    # What is in it

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Bytes of a file, or a range of them."""
        return self._bytes(path)[start:end]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> ArchivedFile:
        if mode != "rb":
            raise _read_only(path)
        return ArchivedFile(self._bytes(path), path)

    # What cannot be done

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Refused."""
        del create_parents
        raise _read_only(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Refused."""
        del exist_ok
        raise _read_only(path)

    def rmdir(self, path: str) -> None:
        """Refused."""
        raise _read_only(path)

    def _rm(self, path: str) -> None:
        raise _read_only(path)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Refused."""
        del path1
        raise _read_only(path2)

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        """Refused."""
        del path2
        raise _read_only(path1)

    # How

    def _place(self) -> tuple[ArchiveHandle, str]:
        """The archive, at one version, and its path as the outer path of a chain spells it."""
        with self._lock:
            if self._found is None:
                uri, root = _find_root(self._fo, self._options)
                handle = ArchiveHandle(
                    uri=uri,
                    version=self._version,
                    storage_options=self._options,
                    codec=self._codec,
                    device=self._device,
                )
                self._found = handle.pinned(), root
            return self._found

    def _archive(self) -> Archive:
        return self._place()[0].archive()

    def _inside(self, path: str) -> tuple[str, str]:
        """What a path has before its place in the archive, and that place."""
        path = self._strip_protocol(path)
        root = self._place()[1]
        if path == root:
            return root, ""
        if root and path.startswith(root + "/"):
            return root + "/", path[len(root) + 1 :]
        return "", path

    def _asked_or_none(self, inner: str) -> _Asked | None:
        stem, format_ = inner, self.format
        if self._suffix:
            stem, _, suffix = inner.rpartition(".")
            format_ = suffix.lower()
            if format_ not in FORMATS:
                return None
        key = unquote(stem)
        known = key and _name_of(key) == stem and self._holds(key, format_)
        return _Asked(key, format_) if known else None

    def _asked(self, path: str, inner: str) -> _Asked:
        asked = self._asked_or_none(inner)
        if asked is None:
            if inner in self._folders():
                raise IsADirectoryError(errno.EISDIR, "is a folder", path)
            raise FileNotFoundError(errno.ENOENT, "no such file in the archive", path)
        return asked

    def _holds(self, key: str, format_: str) -> bool:
        """Whether a row can be a file of a format, as far as the index tells."""
        try:
            row = self._archive().reader.get(key, blobs=(), columns="index")
        except RowNotFoundError:
            return False
        if format_ == "npy":
            return bool(row.prefix_bytes)
        return format_ in ("json", _ORIGINAL) or row.status != "failed"

    def _folders(self) -> dict[str, dict[str, bool]]:
        """Folder -> name -> whether that is a folder too. Made of the index alone, once."""
        archive = self._archive()
        with self._lock:
            if self._tree is not None:
                return self._tree
            tree: dict[str, dict[str, bool]] = {"": {}}
            ending = f".{self.format}" if self._suffix else ""
            where = _LISTED.get(self.format, _WITH_PICTURE)
            for batch in archive.reader.scan(["key"], where):
                for key in batch["key"].to_pylist():
                    name = _name_of(key) + ending
                    is_folder = False
                    while name:
                        parent, _, base = name.rpartition("/")
                        siblings = tree.setdefault(parent, {})
                        if base in siblings:
                            break
                        siblings[base] = is_folder
                        name, is_folder = parent, True
            self._tree = tree
            return tree

    def _listed(self, inner: str) -> _Asked:
        """Of a name that a listing gave."""
        stem = inner[: -len(self.format) - 1] if self._suffix else inner
        return _Asked(unquote(stem), self.format)

    def _file_info(self, name: str, asked: _Asked) -> dict[str, Any]:
        return {"name": name, "size": self._sizes.get(asked), "type": "file"}

    def _folder_info(self, prefix: str, inner: str) -> dict[str, Any]:
        name = prefix + inner if inner else prefix.rstrip("/")
        return {"name": name, "size": 0, "type": "directory"}

    def _bytes(self, path: str) -> bytes:
        asked = self._asked(path, self._inside(path)[1])
        data = self._cache.get(asked)
        if data is None:
            with self._decoding:  # a codec serves one thread at a time
                data = self._cache.get(asked)
                if data is None:
                    data = self._make(asked, path)
                    self._sizes[asked] = len(data)
                    self._cache.put(asked, data)
        return data

    def _make(self, asked: _Asked, path: str) -> bytes:
        archive = self._archive()
        if asked.format == "json":
            row = archive.reader.get(asked.key, blobs=())
            return json_bytes(facts_of(row, view=self.view, states=self.states))
        image = archive[asked.key]
        if asked.format == _ORIGINAL:
            if not image.original:
                raise FileNotFoundError(errno.ENOENT, "the original was not kept", path)
            return image.original
        states = _states_of(image.row, self.states)
        sink = io.BytesIO()
        if asked.format == "npy":
            np.save(sink, image.latent(states), allow_pickle=False)
        else:
            image.save(sink, self.view, states=states, format=asked.format)
        return sink.getvalue()


class _BytesCache:
    """The files that were asked for last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._held: OrderedDict[_Asked, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, asked: _Asked) -> bytes | None:
        with self._lock:
            if asked in self._held:
                self._held.move_to_end(asked)
            return self._held.get(asked)

    def put(self, asked: _Asked, data: bytes) -> None:
        if len(data) > self._max_bytes:
            return
        with self._lock:
            self._num_bytes += len(data) - len(self._held.pop(asked, b""))
            self._held[asked] = data
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= len(self._held.popitem(last=False)[1])


def _states_of(row: EncodedImage, states: int | None) -> int | None:
    """A row may have fewer states than are asked for of all."""
    return None if states is None else min(states, max(1, len(row.prefix_bytes)))


def _name_of(key: str) -> str:
    """A file name for a key; two keys never share one."""
    normal = key == posixpath.normpath(key) and key not in (".", "..")
    if normal and not key.startswith(("/", "../")) and "::" not in key:
        return key.replace("%", "%25")
    return quote(key, safe="").replace(".", "%2E")


def _find_root(address: str, options: Mapping[str, Any]) -> tuple[str, str]:
    """The archive that an address names or lies in: its address, and its path without slashes."""
    fs, path = fsspec.core.url_to_fs(address, **options)
    candidate = path.rstrip("/")
    while candidate:
        if fs.exists(f"{candidate}/{PLAN_NAME}"):
            return fs.unstrip_protocol(candidate), candidate.strip("/")
        parent = posixpath.dirname(candidate)
        candidate = "" if parent == candidate else parent
    return address, path.strip("/")


def _read_only(path: str) -> OSError:
    return OSError(errno.EROFS, "an archive's files are read-only", path)
