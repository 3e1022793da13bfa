"""Source arguments -> the objects they name, each once, in a fixed order.

    "s3://b/train-{000000..000123}.tar"   braces, as a shell expands them; every name must exist
    "photos/**/*.jpg"                     glob, sorted
    "photos/"                             folder, recursive, sorted
    "one.parquet", "cat.jpg"              a file

Globs and folders take images (by extension), tars and Parquet files; hidden files and folders are
passed over, links to folders are not followed (a link to its own parent would give every image
forty times).
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dicmh_ray.errors import SourceFormatError, SourceNotFoundError
from dicmh_ray.source.files import SIDECAR_EXTENSIONS, stem_of
from dicmh_ray.source.magic import IMAGE_EXTENSIONS
from dicmh_ray.source.options import SourceOptions
from dicmh_ray.source.store import identity, open_filesystem, plain_path, retry, uri_like

MAX_BRACE_NAMES = 1_000_000
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_REFUSED = re.compile(r"\.(tar\.(bz2|xz|zst|lz4)|tbz2?|txz|zip|7z|rar|tfrecords?|mds|lance)$")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_MAGIC = re.compile(r"[*?\[]")
# fsspec's word for pipes, sockets and devices: to open a pipe may wait for ever.
_NO_FILE = "other"
_NUM_PARALLEL_LOOKUPS = 16

Kind = Literal["tar", "parquet", "file"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One object that an argument names."""

    uri: str
    kind: Kind
    etag: str
    num_bytes: int
    root: str
    """URI of the folder the argument looks into, with its last slash: keys are relative to it."""

    sidecars: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """What a job writes to: its own objects are no sources, even in a folder of the sources."""

    address: str
    """Of a folder or prefix."""

    is_own: Callable[[str], bool]
    """Whether an object below it, by its name there, is one that jobs write: there may be others."""


def expand_sources(
    sources: Sequence[str], options: SourceOptions, *, target: Target | None = None
) -> list[Found]:
    """Resolve all arguments; an object named twice is kept where it is named first.

    Raises:
        SourceNotFoundError: an argument, or one name its braces give, matches nothing.
        SourceFormatError: a file is of a kind that cannot be read.
        SourceAddressError: no filesystem can be had for an argument.
    """
    found: dict[str, Found] = {}
    for source in sources:
        # A listing from before an upload would call what is found now missing when it is read.
        open_filesystem(source, options)[0].invalidate_cache()
        names = [source] if _exists(source, options) else list(expand_braces(source))
        for item in _parallel(names, options):
            found.setdefault(item.uri, item)
    if target is None:
        return list(found.values())
    folder = _folder_uri(target.address)
    return [
        item
        for item in found.values()
        if not (item.uri.startswith(folder) and target.is_own(item.uri.removeprefix(folder)))
    ]


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand ``{000..123}``, ``{1..9..2}`` and ``{a,b}``, nested too, in a shell's order.

    Numbers are padded when either end is. Braces that are no such list stay as they are.

    Raises:
        SourceFormatError: over a million names.
    """
    num_names = _num_expansions(pattern)
    if num_names > MAX_BRACE_NAMES:
        raise SourceFormatError(pattern, f"expands to {num_names} names, over {MAX_BRACE_NAMES}")
    return _expansions(pattern)


def kind_of(path: str) -> Kind | None:
    """What a name promises; None for nothing that is a source."""
    name = path.lower()
    if name.endswith(_TAR_SUFFIXES):
        return "tar"
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    return "file" if name.rpartition("/")[2].rpartition(".")[2] in IMAGE_EXTENSIONS else None


def _expansions(text: str) -> Iterator[str]:
    group = _first_list(text)
    if group is None:
        yield text
        return
    start, end, choices = group
    rests = list(_expansions(text[end + 1 :]))
    for choice in choices:
        names = [choice] if isinstance(choices, _Numbers) else _expansions(choice)
        for name in names:
            for rest in rests:
                yield text[:start] + name + rest


def _num_expansions(text: str) -> int:
    group = _first_list(text)
    if group is None:
        return 1
    _, end, choices = group
    is_range = isinstance(choices, _Numbers)
    num_choices = len(choices) if is_range else sum(_num_expansions(part) for part in choices)
    return num_choices * _num_expansions(text[end + 1 :])


class _Numbers:
    """The padded numbers of ``{first..last..step}``."""

    def __init__(self, match: re.Match[str]) -> None:
        first, last = int(match[1]), int(match[2])
        step = abs(int(match[3] or 1)) or 1
        ends = [end.lstrip("-") for end in match.group(1, 2)]
        is_padded = any(len(end) > 1 and end[0] == "0" for end in ends)
        self._width = max(len(match[1]), len(match[2])) if is_padded else 0
        self._range = (
            range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        )

    def __len__(self) -> int:
        # len() of a range fails beyond the machine's word; nobody lists that many.
        return min(sys.maxsize, (self._range[-1] - self._range[0]) // self._range.step + 1)

    def __iter__(self) -> Iterator[str]:
        return (f"{number:0{self._width}d}" for number in self._range)


def _first_list(text: str) -> tuple[int, int, _Numbers | list[str]] | None:
    """Positions of the first braces that hold a range or a comma, and what they list."""
    for start, end in _brace_groups(text):
        inner = text[start + 1 : end]
        if match := _RANGE.fullmatch(inner):
            return start, end, _Numbers(match)
        if len(parts := _split_at_commas(inner)) > 1:
            return start, end, parts
    return None


def _brace_groups(text: str) -> Iterator[tuple[int, int]]:
    """Positions of each opening brace and its partner, from the left."""
    for start, character in enumerate(text):
        if character != "{":
            continue
        depth = 0
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                yield start, end
                break


def _split_at_commas(inner: str) -> list[str]:
    parts, depth = [""], 0
    for character in inner:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parallel(names: list[str], options: SourceOptions) -> Iterator[Found]:
    """Resolve names in order; a brace list over a store is many round trips, so several at once."""
    if len(names) == 1:
        yield from _resolve(names[0], options)
        return
    with ThreadPoolExecutor(_NUM_PARALLEL_LOOKUPS, thread_name_prefix="dicmh-plan") as pool:
        for items in pool.map(lambda name: _resolve(name, options), names):
            yield from items


def _folder_uri(address: str) -> str:
    """What the URIs of the objects below an address begin with."""
    scheme = address.partition("://")[0] if "://" in address else "file"
    try:
        kind: Any = fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        return address  # who opens it says what is wrong with it
    protocol = kind.protocol if isinstance(kind.protocol, str) else kind.protocol[0]
    path = str(kind._strip_protocol(address))
    if issubclass(kind, LocalFileSystem):
        path = plain_path(path)
    return f"{protocol}://{path.rstrip('/')}/"


def _exists(source: str, options: SourceOptions) -> bool:
    """Whether a name with braces is a real one, braces and all."""
    if "{" not in source:
        return True
    fs, path = open_filesystem(source, options)
    return bool(retry(lambda: fs.exists(path), what=source, options=options))


def _resolve(name: str, options: SourceOptions) -> list[Found]:
    fs, path = open_filesystem(name, options)
    if _MAGIC.search(name) and not _is_literal(fs, path, name, options):
        return _resolve_glob(fs, path, name, options)
    try:
        info = retry(lambda: fs.info(path), what=name, options=options)
    except FileNotFoundError as exc:
        raise SourceNotFoundError(name) from exc
    if info["type"] == "directory" or name.endswith("/"):
        return _resolve_folder(fs, path, name, options)
    if info["type"] == _NO_FILE:
        raise SourceFormatError(name, "is no file but a pipe, a socket or a device")
    if match := _REFUSED.search(path.lower()):
        raise SourceFormatError(name, f"{match[0]} files cannot be read, only tar and Parquet")
    root = _parent(path)
    candidates = [f"{stem_of(path)}.{extension}" for extension in sorted(SIDECAR_EXTENSIONS)]
    sidecars = (
        [] if kind_of(path) in ("tar", "parquet") else [p for p in candidates if fs.exists(p)]
    )
    # A file that is named outright is taken for an image whatever its extension: its bytes decide.
    return [_found(fs, name, path, info, kind_of(path) or "file", root, sidecars)]


def _is_literal(fs: Any, path: str, name: str, options: SourceOptions) -> bool:
    """``*``, ``?`` and ``[`` may be characters of a real name, and are part of any HTTP query."""
    if "http" in fs.protocol and "*" not in name and "[" not in name:
        return True
    return bool(retry(lambda: fs.exists(path), what=name, options=options))


def _resolve_glob(fs: Any, path: str, name: str, options: SourceOptions) -> list[Found]:
    root = _parent(path[: _first_magic(path)])
    infos = retry(lambda: fs.glob(path, detail=True), what=name, options=options)
    files = {
        str(match): info
        for match, info in infos.items()
        if info["type"] not in ("directory", _NO_FILE) and not _is_hidden_below(root, str(match))
    }
    siblings: dict[str, Any] = {}
    for folder in sorted({_parent(file).rstrip("/") for file in files if kind_of(file) == "file"}):
        for info in retry(partial(fs.ls, folder, detail=True), what=name, options=options):
            siblings[str(info["name"])] = info
    return _known_files(fs, name, root, files, siblings | files, options)


def _resolve_folder(fs: Any, path: str, name: str, options: SourceOptions) -> list[Found]:
    if "file" in fs.protocol:
        files = {file: fs.info(file) for file in _walk(path)}
    else:
        files = retry(lambda: fs.find(path, detail=True), what=name, options=options)
    root = path.rstrip("/") + "/"
    visible = {
        str(file): info for file, info in files.items() if not _is_hidden_below(root, str(file))
    }
    return _known_files(fs, name, root, visible, visible, options)


def _known_files(
    fs: Any,
    name: str,
    root: str,
    files: Mapping[str, Mapping[str, Any]],
    siblings: Mapping[str, Any],
    options: SourceOptions,
) -> list[Found]:
    """Those of ``files`` that are sources, sorted by path, with their sidecars."""
    sidecars: dict[str, list[str]] = {}
    for file in sorted(siblings):
        if file.rpartition(".")[2].lower() in SIDECAR_EXTENSIONS:
            sidecars.setdefault(stem_of(file), []).append(file)
    found = []
    for file in sorted(files):
        kind = kind_of(file)
        if kind is not None:
            info = files[file]
            if kind != "file" and info.get("size") is None:
                # HTTP lists names only, and what is opened must be what was planned.
                info = retry(partial(fs.info, file), what=file, options=options)
            beside = sidecars.get(stem_of(file), []) if kind == "file" else []
            found.append(_found(fs, name, file, info, kind, root, beside))
    if not found:
        raise SourceNotFoundError(name)
    return found


def _found(
    fs: Any,
    name: str,
    path: str,
    info: Mapping[str, Any],
    kind: Kind,
    root: str,
    sidecars: Sequence[str],
) -> Found:
    uri = uri_like(name, fs, path)
    return Found(
        uri=uri,
        kind=kind,
        etag=identity(info),
        num_bytes=int(info.get("size") or 0),
        root=uri.removesuffix(path.removeprefix(root)),
        sidecars=tuple(uri_like(name, fs, sidecar) for sidecar in sidecars),
    )


def _walk(path: str) -> Iterator[str]:
    for folder, folders, names in os.walk(path, followlinks=False):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in names:
            file = f"{folder.rstrip('/')}/{name}"
            if os.path.isfile(file):
                yield file


def _is_hidden_below(root: str, path: str) -> bool:
    """Whether the file is hidden, or a folder on the way to it: ``root`` itself was asked for."""
    return any(_is_hidden(part) for part in path.removeprefix(root).split("/"))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _parent(path: str) -> str:
    return path.rpartition("/")[0] + "/"


def _first_magic(path: str) -> int:
    match = _MAGIC.search(path)
    return match.start() if match else len(path)
