"""Parquet -> source images: which columns are what, and rows in batches of bounded size.

An image's metadata are all other columns, and what its struct holds besides the bytes, as
``<column>.<field>``. A key column is among them unless its name says that it is nothing else
(``key``, ``__key__``).
"""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dicmh_ray.errors import (
    SourceColumnsError,
    SourceFormatError,
    SourceImageError,
    UnreadableImageError,
)
from dicmh_ray.source.image import (
    SourceImage,
    UniqueKeys,
    key_text,
    printable_text,
    tags_from_metadata,
)
from dicmh_ray.source.metadata import json_value
from dicmh_ray.source.options import SourceOptions
from dicmh_ray.source.store import RetryingFile

_IMAGE_COLUMNS = [
    "image",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "avif",
    "img",
    "image_bytes",
    "bytes",
    "content",
    "data",
]
_KEY_COLUMNS = ["key", "__key__", "id", "image_id", "path", "filename", "file_name"]
_MERE_KEY_COLUMNS = ("key", "__key__")
_BATCH_BYTES = 16 * 2**20
_MAX_BATCH_ROWS = 1024
_COLUMN_BUFFER_BYTES = 2**20
# A footer that asks for more than this to be allocated is no honest one.
_THRIFT_STRING_BYTES = 64 * 2**20
_THRIFT_CONTAINER_ITEMS = 10_000_000


class RowGroups(NamedTuple):
    """Row groups ``start`` up to ``stop`` and the bytes their columns take in the file."""

    start: int
    stop: int
    num_bytes: int


class _Columns(NamedTuple):
    """Roles of a file's columns. The image column may be binary or ``struct<bytes, path, ...>``."""

    image: str
    is_struct: bool
    key: str | None
    metadata: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]
    """Of the struct, all but the bytes, each with its name in the metadata."""


def plan_row_groups(uri: str, options: SourceOptions) -> list[RowGroups]:
    """Split a file at row groups into ranges of about ``unit_bytes``.

    Raises:
        SourceFormatError: not a Parquet file.
        SourceColumnsError: no column or several may hold the images, or the options name others.
    """
    with closing(RetryingFile(uri, options)) as file, _format_errors(file):
        parquet = _open(file)
        _find_columns(uri, parquet.schema_arrow, options)
        ranges: list[RowGroups] = []
        start, num_bytes = 0, 0
        for i in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(i)
            size = sum(group.column(c).total_compressed_size for c in range(group.num_columns))
            if i > start and num_bytes + size > options.unit_bytes:
                ranges.append(RowGroups(start, i, num_bytes))
                start, num_bytes = i, 0
            num_bytes += size
        if parquet.num_row_groups > start:
            ranges.append(RowGroups(start, parquet.num_row_groups, num_bytes))
        return ranges


def read_parquet(
    uri: str,
    *,
    start: int | None,
    stop: int | None,
    etag: str | None,
    key_prefix: str,
    options: SourceOptions,
) -> Iterator[SourceImage]:
    """Yield the images of row groups ``start`` up to ``stop`` (None: of all).

    Keys come from the key column; a null or missing one gives ``<file stem>-<row number>``.
    A key that comes twice in these row groups becomes ``key~2``.

    Raises:
        SourceFormatError: the file is damaged; rows before the damage have been yielded.
        SourceColumnsError: see :func:`plan_row_groups`; nothing has been yielded.
        OSError: the store kept failing.
    """
    with closing(RetryingFile(uri, options, etag=etag)) as file, _format_errors(file):
        parquet = _open(file)
        columns = _find_columns(uri, parquet.schema_arrow, options)
        num_groups = parquet.num_row_groups
        first, last = start or 0, num_groups if stop is None else stop
        if last > num_groups:
            raise SourceFormatError(uri, f"has {num_groups} row groups, the plan says {last}")
        groups = [parquet.metadata.row_group(i) for i in range(last)]
        row = sum(group.num_rows for group in groups[:first])
        keys = UniqueKeys()
        for i in range(first, last):
            for batch in _batches(parquet, i, columns):
                yield from _batch_images(batch, columns, row, uri, key_prefix, keys, options)
                row += batch.num_rows


def _open(file: RetryingFile) -> Any:
    return pq.ParquetFile(
        pa.PythonFile(file, mode="r"),
        buffer_size=_COLUMN_BUFFER_BYTES,
        pre_buffer=False,
        page_checksum_verification=True,
        thrift_string_size_limit=_THRIFT_STRING_BYTES,
        thrift_container_size_limit=_THRIFT_CONTAINER_ITEMS,
    )


@contextmanager
def _format_errors(file: RetryingFile) -> Iterator[None]:
    """Name Arrow's complaints about the data; let a failing store's own errors through.

    Arrow raises plain OSError for both.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as exc:
        if file.failure is not None:
            raise
        reason = str(exc).partition("\n")[0]
        raise SourceFormatError(file.uri, f"cannot be read as Parquet: {reason}") from exc


def _batches(parquet: Any, row_group: int, columns: _Columns) -> Iterator[Any]:
    group = parquet.metadata.row_group(row_group)
    row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
    names = {columns.image, *columns.metadata} | ({columns.key} if columns.key else set())
    wanted = [name for name in parquet.schema_arrow.names if name in names]
    yield from parquet.iter_batches(
        batch_size=max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // row_bytes)),
        row_groups=[row_group],
        columns=wanted,
        use_threads=False,
    )


def _batch_images(
    batch: Any,
    columns: _Columns,
    first_row: int,
    uri: str,
    key_prefix: str,
    keys: UniqueKeys,
    options: SourceOptions,
) -> Iterator[SourceImage]:
    image_column = batch.column(columns.image)
    key_column = batch.column(columns.key) if columns.key else None
    described = [(name, batch.column(name)) for name in columns.metadata]
    stem = uri.rpartition("/")[2].rpartition(".")[0] or "row"
    for i in range(batch.num_rows):
        scalars = [(name, column[i]) for name, column in described]
        image = _storage_scalar(image_column[i])
        path = None
        if columns.is_struct and image.is_valid:
            fields = {name: image[name] for name, _ in columns.fields}
            scalars += [(to, fields[name]) for name, to in columns.fields if fields[name].is_valid]
            path = fields["path"].as_py() if "path" in fields else None
            image = image["bytes"]
        value = image.as_py()
        name = key_column[i].as_py() if key_column is not None else path
        metadata = _row_metadata(scalars, options)
        data, error = _checked(value, options)
        yield SourceImage(
            key=keys.claim(key_prefix + key_text(_key_name(name, stem, first_row + i))),
            data=data,
            source_uri=printable_text(uri),
            source_offset=first_row + i,
            metadata=metadata,
            tags=tags_from_metadata(
                metadata,
                options.tag_fields,
                max_tags=options.max_tags,
                max_tag_bytes=options.max_tag_bytes,
            ),
            error=error,
        )


def _checked(value: bytes | None, options: SourceOptions) -> tuple[bytes, SourceImageError | None]:
    if not value:
        return b"", UnreadableImageError("empty" if value is not None else "null")
    if len(value) > options.max_image_bytes:
        return b"", UnreadableImageError("larger than max_image_bytes")
    return value, None


def _key_name(value: object, stem: str, row: int) -> str | bytes:
    if isinstance(value, str | bytes) and value:
        return value
    if isinstance(value, int):
        return str(value)
    return f"{stem}-{row:08d}"


def _row_metadata(scalars: list[tuple[str, Any]], options: SourceOptions) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    dropped: dict[str, int] = {}
    kept_bytes = 0
    for name, scalar in scalars:
        value, num_bytes = _column_value(scalar)
        if kept_bytes + num_bytes > options.max_metadata_bytes:
            dropped[name] = num_bytes
        else:
            kept_bytes += num_bytes
            metadata[name] = value
    if dropped:
        metadata["__dropped__"] = dropped
    return metadata


def _column_value(scalar: Any) -> tuple[Any, int]:
    """The JSON-able value and about how many bytes it takes."""
    try:
        value = json_value(scalar.as_py())
    except (ValueError, OverflowError, pa.ArrowException):
        # Nanoseconds, years beyond 9999: Python has no such time, Arrow can still print it.
        value = _printed(scalar)
    match value:
        case str():
            return value, len(value)
        case list() | dict():
            return value, len(json.dumps(value))
        case _:
            return value, 8


def _printed(scalar: Any) -> str:
    try:
        return str(scalar.cast(pa.string()).as_py())
    except (ValueError, OverflowError, pa.ArrowException):
        return f"<{scalar.type}>"


def _is_binary(kind: Any) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _storage_type(kind: Any) -> Any:
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def _storage_scalar(scalar: Any) -> Any:
    while isinstance(scalar, pa.ExtensionScalar | pa.DictionaryScalar) and scalar.is_valid:
        scalar = scalar.value
    return scalar


def _holds_images(kind: Any) -> bool:
    kind = _storage_type(kind)
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(_storage_type(kind.field(index).type))
    return _is_binary(kind)


def _find_columns(uri: str, schema: Any, options: SourceOptions) -> _Columns:
    """Give every column its role; unnamed roles go by name first, then by type."""
    names = list(schema.names)
    if len(set(names)) < len(names):
        raise SourceColumnsError(uri, "has two columns of one name")
    candidates = [name for name in names if _holds_images(schema.field(name).type)]
    if not candidates:
        raise SourceColumnsError(uri, f"no column can hold images, leave it out: {names}")
    image = options.image_column
    if image is None:
        by_name = sorted(
            (name for name in candidates if name.lower() in _IMAGE_COLUMNS),
            key=lambda name: _IMAGE_COLUMNS.index(name.lower()),
        )
        if not by_name and len(candidates) != 1:
            raise SourceColumnsError(
                uri, f"which column holds the images? Name one with image_column: {names}"
            )
        image = (by_name or candidates)[0]
    elif image not in candidates:
        raise SourceColumnsError(uri, f"has no binary column {image!r}, only {candidates}")
    key = options.key_column
    if key is None:
        by_name = [name for wanted in _KEY_COLUMNS for name in names if name == wanted != image]
        key = next((name for name in by_name if _is_key(schema.field(name).type)), None)
    elif key not in names or not _is_key(schema.field(key).type):
        raise SourceColumnsError(uri, f"has no text or integer column {key!r}: {names}")
    fields = _struct_fields(schema.field(image).type)
    if len(set(fields)) < len(fields):
        raise SourceColumnsError(uri, f"has two fields of one name in {image!r}")
    metadata = [
        name for name in names if name != image and not (name == key and name in _MERE_KEY_COLUMNS)
    ]
    labels = UniqueKeys()
    labels.claim_all(metadata)
    return _Columns(
        image=image,
        is_struct=bool(fields),
        key=key,
        metadata=tuple(metadata),
        fields=tuple((name, labels.claim(f"{image}.{name}")) for name in fields if name != "bytes"),
    )


def _struct_fields(kind: Any) -> list[str]:
    kind = _storage_type(kind)
    if not pa.types.is_struct(kind):
        return []
    return [kind.field(i).name for i in range(kind.num_fields)]


def _is_key(kind: Any) -> bool:
    kind = _storage_type(kind)
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_integer(kind)
        or _is_binary(kind)
    )
