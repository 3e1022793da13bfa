"""Image files of a unit, with their sidecars, in order; remote ones fetched a few at a time."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any

from dicmh_ray.errors import SourceImageError, UnreadableImageError
from dicmh_ray.source.image import (
    SourceImage,
    UniqueKeys,
    key_text,
    printable_text,
    tags_from_metadata,
)
from dicmh_ray.source.metadata import sidecar_metadata
from dicmh_ray.source.options import SourceOptions
from dicmh_ray.source.store import RetryingFile, open_filesystem

SIDECAR_EXTENSIONS = frozenset({"json", "txt", "cls"})
_NUM_PARALLEL_READS = 8


def stem_of(uri: str) -> str:
    """The URI without its last extension: what an image and its sidecars share."""
    folder, slash, base = uri.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)


def read_files(
    uris: Sequence[str],
    *,
    sidecars: Sequence[str],
    root: str,
    key_prefix: str,
    options: SourceOptions,
) -> Iterator[SourceImage]:
    """Yield one image per URI, in order.

    Keys are the URIs without ``root``, extension included, so that ``a.jpg`` and ``a.png`` differ.
    A file that is gone or may not be read is a row with an error.

    Raises:
        OSError: the store kept failing.
    """
    by_stem: dict[str, list[str]] = {}
    for uri in sidecars:
        by_stem.setdefault(stem_of(uri), []).append(uri)
    keys = UniqueKeys()

    def read(uri: str) -> SourceImage:
        data, error = _read_image(uri, options)
        metadata = sidecar_metadata(
            [_read_sidecar(name, options) for name in by_stem.get(stem_of(uri), [])],
            max_bytes=options.max_metadata_bytes,
        )
        return SourceImage(
            key=key_prefix + key_text(uri.removeprefix(root)),
            data=data,
            source_uri=printable_text(uri),
            metadata=metadata,
            tags=tags_from_metadata(
                metadata,
                options.tag_fields,
                max_tags=options.max_tags,
                max_tag_bytes=options.max_tag_bytes,
            ),
            error=error,
        )

    for image in _ordered(read, uris, options):
        key = keys.claim(image.key)
        yield image if key == image.key else dataclasses.replace(image, key=key)


def _ordered(read: Any, uris: Sequence[str], options: SourceOptions) -> Iterator[SourceImage]:
    """``map(read, uris)``; a few ahead in threads where a read is a round trip to a store."""
    fs, _ = open_filesystem(uris[0], options)
    if "file" in fs.protocol or "memory" in fs.protocol:
        yield from map(read, uris)
        return
    with ThreadPoolExecutor(_NUM_PARALLEL_READS, thread_name_prefix="dicmh-files") as pool:
        waiting = iter(uris)
        pending: deque[Future[SourceImage]] = deque(
            pool.submit(read, uri) for uri in islice(waiting, _NUM_PARALLEL_READS)
        )
        try:
            while pending:
                image = pending.popleft().result()
                pending.extend(pool.submit(read, uri) for uri in islice(waiting, 1))
                yield image
        finally:
            for future in pending:
                future.cancel()


def _read_image(uri: str, options: SourceOptions) -> tuple[bytes, SourceImageError | None]:
    try:
        with closing(RetryingFile(uri, options)) as file:
            if file.size() > options.max_image_bytes:
                return b"", UnreadableImageError("larger than max_image_bytes")
            # A store that does not tell sizes is read up to the limit and one byte.
            data = file.read(options.max_image_bytes + 1)
    except FileNotFoundError:
        return b"", UnreadableImageError("file is missing")
    except (PermissionError, IsADirectoryError):
        return b"", UnreadableImageError("file cannot be opened")
    if len(data) > options.max_image_bytes:
        return b"", UnreadableImageError("larger than max_image_bytes")
    return data, None if data else UnreadableImageError("empty")


def _read_sidecar(uri: str, options: SourceOptions) -> tuple[str, bytes | None, int]:
    extension = uri.rpartition(".")[2].lower()
    try:
        with closing(RetryingFile(uri, options)) as file:
            data = file.read(options.max_metadata_bytes + 1)
            num_bytes = max(file.size(), len(data))
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return extension, None, 0
    return extension, data if len(data) <= options.max_metadata_bytes else None, num_bytes
