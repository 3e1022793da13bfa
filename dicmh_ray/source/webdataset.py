"""Tar members -> samples, by webdataset's conventions, so that no image is lost.

A member's key is its path up to the first dot of the base name, the rest is its extension;
consecutive members of one key are a sample. Then:

* the first image whose extension has one part is the sample's row, under the sample's key;
  sidecars become its metadata;
* every further image is a row of its own under its full name (``0001.left.jpg``). With no
  one-part image, all are, each with the sample's sidecars;
* a key that comes back later in the tar is another row, ``key~2``, with whatever it brought;
* a sample without an image, a link, a sparse or oversized member is a row with an error.

An image is what has an image's extension, or no known extension and an image's first bytes.
Passed over, as archivers' litter: directories, devices and links that do not look like images,
``__name__`` members at top level (webdataset's own), ``__MACOSX/``, ``._name`` and ``.DS_Store``.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from dicmh_ray.errors import SourceFormatError, SourceImageError, UnreadableImageError
from dicmh_ray.source.image import (
    SourceImage,
    UniqueKeys,
    key_text,
    printable_text,
    tags_from_metadata,
)
from dicmh_ray.source.magic import IMAGE_EXTENSIONS, sniff_format
from dicmh_ray.source.metadata import sidecar_metadata
from dicmh_ray.source.options import SourceOptions
from dicmh_ray.source.store import RetryingFile
from dicmh_ray.source.tar import NOT_A_FILE, TarMember, iter_members
from dicmh_ray.source.unpack import TarBytes

_MAX_SAMPLE_MEMBERS = 1024
_TOO_LARGE = "larger than max_image_bytes"
_SAMPLE_TOO_LARGE = "sample larger than max_member_bytes"


class _Part(NamedTuple):
    """One member of a sample."""

    member: TarMember
    extension: str
    is_image: bool


def split_name(name: bytes) -> tuple[bytes, str]:
    """(path up to the first dot of the base name, the rest in lower case).

    Leading dots belong to the key: ``d/.x.jpg`` is ``(b"d/.x", "jpg")``.
    """
    folder, slash, base = name.rpartition(b"/")
    stem = base.lstrip(b".")
    num_leading_dots = len(base) - len(stem)
    key, _, extension = stem.partition(b".")
    text = extension.decode("utf-8", "backslashreplace").lower()
    return folder + slash + base[:num_leading_dots] + key, text


def has_image_extension(extension: str) -> bool:
    """Whether the last part of ``extension`` is an image type's."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def read_tar(
    uri: str, *, etag: str | None, key_prefix: str, options: SourceOptions
) -> Iterator[SourceImage]:
    """Yield the images of one tar, plain or gzip (its bytes decide, not its name).

    Raises:
        SourceFormatError: the tar is damaged from some byte on; every member before it has been
            yielded (the last sample may lack what came after).
        OSError: the store kept failing.
    """
    with closing(RetryingFile(uri, options, etag=etag)) as file:
        keys = UniqueKeys()
        sample: list[_Part] = []
        sample_key = b""
        held_bytes = 0

        def wanted(name: bytes, num_bytes: int) -> str | None:
            """Decide before a member is read; runs inside ``iter_members``."""
            if _is_litter(name):
                return "litter"
            key, extension = split_name(name)
            held = held_bytes if sample and key == sample_key else 0
            if has_image_extension(extension):
                if num_bytes > options.max_image_bytes:
                    return _TOO_LARGE
            elif num_bytes > max(options.max_metadata_bytes, options.max_image_bytes):
                return "sidecar too large"
            return _SAMPLE_TOO_LARGE if held + num_bytes > options.max_member_bytes else None

        try:
            for member in iter_members(TarBytes(file, options), options, wanted=wanted):
                key, extension = split_name(member.name)
                is_image = has_image_extension(extension)
                if _is_litter(member.name) or (member.problem in NOT_A_FILE and not is_image):
                    continue
                if sample and (key != sample_key or len(sample) == _MAX_SAMPLE_MEMBERS):
                    yield from _sample_images(sample, sample_key, keys, uri, key_prefix, options)
                    sample, held_bytes = [], 0
                sample_key = key
                part = _classified(member, extension, is_image, options)
                held_bytes += len(part.member.data or b"")
                sample.append(part)
        except SourceFormatError:
            yield from _sample_images(sample, sample_key, keys, uri, key_prefix, options)
            raise
        yield from _sample_images(sample, sample_key, keys, uri, key_prefix, options)


def _is_litter(name: bytes) -> bool:
    base = name.rpartition(b"/")[2]
    while name.startswith(b"./"):
        name = name[2:]
    return (
        base.startswith(b"._")
        or base == b".DS_Store"
        or name.startswith(b"__MACOSX/")
        or (b"/" not in name and len(name) >= 4 and name.startswith(b"__") and name.endswith(b"__"))
    )


def _classified(member: TarMember, extension: str, is_image: bool, options: SourceOptions) -> _Part:
    """Sniff what has no known extension, and let go of what can be neither image nor metadata."""
    data = member.data
    if data is not None and not is_image:
        if sniff_format(data[:64]) is not None:
            is_image = True
            if len(data) > options.max_image_bytes:
                member = member._replace(data=None, problem=_TOO_LARGE)
        elif len(data) > options.max_metadata_bytes:
            member = member._replace(data=None)
    return _Part(member, extension, is_image)


def _sample_images(
    sample: list[_Part],
    sample_key: bytes,
    keys: UniqueKeys,
    uri: str,
    key_prefix: str,
    options: SourceOptions,
) -> Iterator[SourceImage]:
    """The rows of one sample, the main image first; none for an empty one."""
    if not sample:
        return
    images = [part for part in sample if part.is_image]
    metadata = sidecar_metadata(
        (
            (part.extension, part.member.data, part.member.num_bytes)
            for part in sample
            if not part.is_image
        ),
        max_bytes=options.max_metadata_bytes,
    )
    tags = tags_from_metadata(
        metadata, options.tag_fields, max_tags=options.max_tags, max_tag_bytes=options.max_tag_bytes
    )
    main = next((part for part in images if "." not in part.extension), None)
    if main is not None:
        images.remove(main)
        images.insert(0, main)
    if not images:
        yield SourceImage(
            key=keys.claim(key_prefix + key_text(sample_key)),
            data=b"",
            source_uri=printable_text(uri),
            source_offset=sample[0].member.data_offset,
            metadata=metadata,
            tags=tags,
            error=UnreadableImageError("no image in the sample"),
        )
    for part in images:
        member = part.member
        name = sample_key if part is main else member.name
        is_described = part is main or main is None
        error: SourceImageError | None = None
        if member.data is None:
            error = UnreadableImageError(member.problem or "not read")
        elif not member.data:
            error = UnreadableImageError("empty")
        yield SourceImage(
            key=keys.claim(key_prefix + key_text(name)),
            data=member.data or b"",
            source_uri=printable_text(uri),
            source_offset=member.data_offset,
            metadata=metadata if is_described else {},
            tags=tags if is_described else (),
            error=error,
        )
