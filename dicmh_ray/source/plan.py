"""What a job reads, cut into units that are planned, read, committed and retried as one.

A tar is one unit; a Parquet file is one or more ranges of row groups; image files are grouped.

Keys must be unique in an archive, and a unit must know its keys without asking the others. So the
plan gives each unit what makes them so, under ``key_prefix="auto"``:

* image files: the path below the folder that all arguments share, extension included;
* one tar or Parquet file alone: the keys it holds, unchanged;
* several: ``<path of the file below that folder, without extension>/<key it holds>``; the
  extension stays where two differ in nothing else, where one would be a folder of another
  (``train.tar`` and ``train/extra.tar``), and where image files are read beside them.

With ``key_prefix="none"`` tars and Parquet files give the keys they hold. Duplicates inside one unit
become ``key~2`` either way. What no unit can see is one key in two units of one Parquet file (or,
with "none", of two files): name a unique ``key_column`` there.
"""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Self

from dicmh_ray.errors import SourceFormatError
from dicmh_ray.source.expand import Found, Target, expand_sources
from dicmh_ray.source.files import read_files
from dicmh_ray.source.image import SourceImage, key_text
from dicmh_ray.source.options import SourceOptions
from dicmh_ray.source.parquet import RowGroups, plan_row_groups, read_parquet
from dicmh_ray.source.webdataset import read_tar

_EXTENSION = re.compile(r"(\.tar\.gz|\.tgz|\.tar|\.parquet|\.pq)$", re.IGNORECASE)
_NUM_PARALLEL_FOOTERS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A part of the source that one worker reads at a time."""

    name: str
    """Place in the plan, six digits or more: safe in a file name."""

    kind: Literal["tar", "parquet", "files"]
    uri: str | tuple[str, ...]
    """The tar or Parquet file; for ``files``, all of them."""

    start: int | None = None
    """First row group; None for the whole file."""

    stop: int | None = None
    """Row group after the last one."""

    etag: str
    """Changes when the source's bytes do. Tars and Parquet files are checked against it."""

    num_bytes: int
    """Bytes to read, about; for Parquet those of the row groups."""

    key_prefix: str = ""
    """Stands before every key of the unit."""

    root: str = ""
    """For ``files``: what is taken off a URI to make a key."""

    sidecars: tuple[str, ...] = ()
    """For ``files``: json, txt and cls files beside the images."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; file URIs stand relative to ``root``. Valid UTF-8 whatever the names."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        uris = (self.uri,) if isinstance(self.uri, str) else self.uri
        relative = [_to_text(uri.removeprefix(self.root)) for uri in uris]
        return values | {
            "uri": relative[0] if isinstance(self.uri, str) else relative,
            "root": _to_text(self.root),
            "sidecars": [_to_text(uri.removeprefix(self.root)) for uri in self.sidecars],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: a key is unknown or missing, or a value has the wrong type.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - fields.keys()):
            raise ValueError(f"unknown keys in a unit: {', '.join(unknown)}")
        if missing := sorted({"name", "kind", "uri", "etag", "num_bytes"} - set(values)):
            raise ValueError(f"a unit lacks {', '.join(missing)}")
        root = _from_text(values.get("root", ""))
        uri = values["uri"]
        if (values["kind"] == "files") == isinstance(uri, str):
            raise ValueError(f"a unit of kind {values['kind']!r} has the uri {uri!r}")
        if values["kind"] not in ("tar", "parquet", "files"):
            raise ValueError(f"unknown kind of unit {values['kind']!r}")
        return cls(
            **{
                **values,
                "root": root,
                "uri": root + _from_text(uri)
                if isinstance(uri, str)
                else tuple(root + _from_text(item) for item in uri),
                "sidecars": tuple(root + _from_text(item) for item in values.get("sidecars", ())),
            }
        )


def plan_units(
    sources: Sequence[str],
    *,
    options: SourceOptions | None = None,
    known_files: Collection[str] = (),
    target: Target | None = None,
) -> list[Unit]:
    """Find everything ``sources`` name and cut it into units; the same answer every time.

    Args:
        sources: paths or fsspec URLs of tars (``.tar``, ``.tar.gz``, ``.tgz``), Parquet files,
            images and folders; braces and globs are expanded (:mod:`dicmh_ray.source.expand`).
        options: the same object later goes to :func:`read_unit`.
        known_files: URIs of image files that are left out; the keys of the others are as with them.
        target: what is to be written. The next run would find it where it lies in a folder of its
            sources.

    Returns:
        Units in the order of the arguments; inside one argument, of sorted paths. Image files
        come where the first of them does.

    Raises:
        SourceNotFoundError: an argument matches nothing.
        SourceFormatError: a file is of a kind that cannot be read.
        SourceColumnsError: it is not clear which column of a Parquet file holds the images.
        SourceAddressError: a URL carries a password, or no filesystem can be had for it.
    """
    options = options or SourceOptions()
    found = expand_sources(sources, options, target=target)
    if not found:
        return []
    prefixes = _container_prefixes(found, options)
    root = _shared_folder([item.root for item in found])
    units: list[Unit] = []
    files = [item for item in found if item.kind == "file" and item.uri not in known_files]
    row_groups = _row_groups([item for item in found if item.kind == "parquet"], options)
    for item in found:
        if item.kind == "tar":
            units.append(_whole(item, "tar", prefixes[item.uri]))
        elif item.kind == "parquet":
            units += _parquet_units(item, row_groups[item.uri], prefixes[item.uri])
        elif files and item is files[0]:
            units += _file_units(files, root, options)
    return [dataclasses.replace(unit, name=f"{i:06d}") for i, unit in enumerate(units)]


def read_unit(unit: Unit, *, options: SourceOptions | None = None) -> Iterator[SourceImage]:
    """Yield the images of one unit in a fixed order, undecoded, in bounded memory.

    What is wrong with one image is in its ``error``; a row comes for it all the same.

    Raises:
        SourceChangedError: the file is no longer the planned one.
        SourceFormatError: the file is damaged from some byte on; the images before the damage have
            been yielded.
        SourceColumnsError: the columns of a Parquet file are not what the options say.
        OSError: the store kept failing, or a planned tar or Parquet file is gone.
    """
    options = options or SourceOptions()
    if unit.kind == "files":
        return read_files(
            unit.uri if isinstance(unit.uri, tuple) else (unit.uri,),
            sidecars=unit.sidecars,
            root=unit.root,
            key_prefix=unit.key_prefix,
            options=options,
        )
    uri = unit.uri if isinstance(unit.uri, str) else unit.uri[0]
    if unit.kind == "tar":
        return read_tar(uri, etag=unit.etag, key_prefix=unit.key_prefix, options=options)
    return read_parquet(
        uri,
        start=unit.start,
        stop=unit.stop,
        etag=unit.etag,
        key_prefix=unit.key_prefix,
        options=options,
    )


def _whole(item: Found, kind: Literal["tar", "parquet"], key_prefix: str) -> Unit:
    return Unit(
        name="",
        kind=kind,
        uri=item.uri,
        etag=item.etag,
        num_bytes=item.num_bytes,
        key_prefix=key_prefix,
    )


def _row_groups(
    tables: Sequence[Found], options: SourceOptions
) -> dict[str, list[RowGroups] | None]:
    """Ranges of the Parquet files; None for one that is no larger than a unit.

    Every footer is looked at, so that a job whose columns are not clear ends before it begins.
    """

    def ranges(item: Found) -> list[RowGroups] | None:
        is_small = 0 < item.num_bytes <= options.unit_bytes
        try:
            found = plan_row_groups(item.uri, options)
        except (SourceFormatError, OSError):
            if not is_small:
                raise
            return None  # reading the unit will tell, and the other units are none the worse
        return None if is_small else found

    with ThreadPoolExecutor(_NUM_PARALLEL_FOOTERS, thread_name_prefix="dicmh-plan") as pool:
        uris = [item.uri for item in tables]
        return dict(zip(uris, pool.map(ranges, tables), strict=True))


def _parquet_units(item: Found, ranges: list[RowGroups] | None, key_prefix: str) -> list[Unit]:
    whole = _whole(item, "parquet", key_prefix)
    if ranges is None:
        return [whole]
    return [
        dataclasses.replace(whole, start=part.start, stop=part.stop, num_bytes=part.num_bytes)
        for part in ranges
    ]


def _file_units(files: Sequence[Found], root: str, options: SourceOptions) -> list[Unit]:
    units: list[Unit] = []
    group: list[Found] = []
    num_bytes = 0
    for item in files:
        is_full = len(group) >= options.files_per_unit
        if group and (is_full or num_bytes + item.num_bytes > options.unit_bytes):
            units.append(_file_unit(group, root))
            group, num_bytes = [], 0
        group.append(item)
        num_bytes += item.num_bytes
    units.append(_file_unit(group, root))
    return units


def _file_unit(group: Sequence[Found], root: str) -> Unit:
    identities = "\n".join(f"{_to_text(item.uri)} {item.etag}" for item in group)
    sidecars = dict.fromkeys(sidecar for item in group for sidecar in item.sidecars)
    return Unit(
        name="",
        kind="files",
        uri=tuple(item.uri for item in group),
        etag=hashlib.sha256(identities.encode()).hexdigest(),
        num_bytes=sum(item.num_bytes for item in group),
        root=root,
        sidecars=tuple(sidecars),
    )


def _container_prefixes(found: Sequence[Found], options: SourceOptions) -> dict[str, str]:
    containers = [item for item in found if item.kind != "file"]
    has_files = len(containers) < len(found)
    if options.key_prefix == "none" or (len(containers) == 1 and not has_files):
        return {item.uri: "" for item in containers}
    root = _shared_folder([item.root for item in found])
    labels = names = {item.uri: item.uri.removeprefix(root) for item in containers}
    if not has_files:
        labels = _short_labels(names)
    return {uri: key_text(label) + "/" for uri, label in labels.items()}


def _short_labels(names: Mapping[str, str]) -> dict[str, str]:
    """Names without extension, but for those under which two files could give one key."""
    labels = {uri: _EXTENSION.sub("", name) for uri, name in names.items()}
    while True:
        clashing = _clashing(labels.values())
        long = {
            uri: names[uri]
            for uri, label in labels.items()
            if label in clashing and label != names[uri]
        }
        if not long:
            return labels
        labels |= long


def _clashing(labels: Iterable[str]) -> set[str]:
    """Labels that come twice, those that are a folder of another, and that other."""
    counts = Counter(labels)
    clashing = {label for label, count in counts.items() if count > 1}
    for label in counts:
        folders = {label[: slash.start()] for slash in re.finditer("/", label)} & counts.keys()
        if folders:
            clashing |= folders | {label}
    return clashing


def _shared_folder(folders: Sequence[str]) -> str:
    """The longest common start of URIs that ends in a slash, protocol and all; else ``""``."""
    first, last = min(folders), max(folders)
    length = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    shared = first[: first.rfind("/", 0, length) + 1]
    return "" if shared.endswith("://") and len(set(folders)) > 1 else shared


def _to_text(uri: str) -> str:
    """Local names that are not UTF-8 hold lone surrogates, which no JSON should: NUL and hex."""
    return re.sub("[\udc80-\udcff]", lambda match: f"\x00{ord(match.group()) - 0xDC00:02x}", uri)


def _from_text(text: str) -> str:
    return re.sub("\x00([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), text)
