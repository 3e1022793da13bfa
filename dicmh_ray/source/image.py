"""One image as its source holds it, and the two texts that travel with it: key and tags.

Keys are data and never paths. Whatever bytes a tar, a Parquet file or a folder names its images by,
:func:`key_text` makes valid, printable, bounded UTF-8 of them, the same every time.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dicmh_ray.errors import SourceImageError

MAX_KEY_BYTES = 1024
"""UTF-8 length of a key before a suffix for duplicates."""

MAX_TAGS_BYTES = 4000
"""UTF-8 length of an image's tags together, two bytes of framing each: they must fit a bitstream."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceImage:
    """The undecoded bytes of one image, where they lie, and what the source says about them."""

    key: str
    """Identity in the collection: unique, valid UTF-8 without control characters, bounded."""

    data: bytes = field(repr=False)
    """The source's bytes, untouched; ``b""`` where ``error`` is set."""

    source_uri: str
    """The tar, Parquet file or image file, as :func:`printable_text` shows it."""

    source_offset: int | None = None
    """First byte of the image in the (unpacked) tar; row number in Parquet; None for a file."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able: sidecar fields or the other columns; see :mod:`dicmh_ray.source.metadata`."""

    tags: tuple[str, ...] = ()
    """From the metadata fields that the options name."""

    error: SourceImageError | None = None
    """Why there are no bytes; the row is kept so that every key is accounted for."""


def key_text(name: str | bytes) -> str:
    """Turn a source's own name for an image into a key.

    Bytes that are not UTF-8 (also as surrogate escapes) and control characters, NUL among them,
    become ``%XX``; leading ``./`` goes; a name over :data:`MAX_KEY_BYTES` is cut and ends in
    ``~`` and 32 hex digits of the whole name's SHA-256; an empty name is ``_``. ``..``, a leading
    ``/`` and backslashes stay: nothing ever opens a key as a path.
    """
    text = printable_text(name)
    while text.startswith("./"):
        text = text[2:].lstrip("/")
    data = text.encode()
    if len(data) > MAX_KEY_BYTES:
        digest = "~" + hashlib.sha256(data).hexdigest()[:32]
        text = data[: MAX_KEY_BYTES - len(digest)].decode(errors="ignore") + digest
    return text or "_"


def printable_text(name: str | bytes) -> str:
    """Valid UTF-8 text of any name: what cannot be shown becomes ``%XX`` of its bytes."""
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    return _LONE_SURROGATE.sub(_percent, _CONTROL.sub(_percent, text))


def valid_text(text: str) -> str:
    """``text`` with lone surrogates written as ``\\udXXX``, so that it encodes to UTF-8."""
    if not _LONE_SURROGATE.search(text):
        return text
    return text.encode("utf-8", "backslashreplace").decode()


def tags_from_metadata(
    metadata: Mapping[str, Any], fields: Sequence[str], *, max_tags: int, max_tag_bytes: int
) -> tuple[str, ...]:
    """Collect tags from the named fields: strings, integers, or lists of these, in order.

    A field is looked up by its whole name, else by its parts between dots; a leading ``json.`` may
    name what a JSON sidecar merged at top level. Tags are stripped of surrounding space and of
    control characters, cut at ``max_tag_bytes`` of UTF-8, and kept once.
    """
    tags: dict[str, None] = {}
    num_bytes = 0
    for name in fields:
        value = _lookup(metadata, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool) or not isinstance(item, str | int):
                continue
            tag = _tag_text(str(item), max_tag_bytes)
            if not tag or tag in tags:
                continue
            num_bytes += len(tag.encode()) + 2
            if num_bytes > MAX_TAGS_BYTES:
                return tuple(tags)
            tags[tag] = None
            if len(tags) == max_tags:
                return tuple(tags)
    return tuple(tags)


class UniqueKeys:
    """Gives the second bearer of a key the name ``key~2``, the third ``key~3``; forgets nothing.

    Digests are kept, not keys: a hostile million of 1-kB keys costs 100 MB, not 1 GB.
    """

    def __init__(self) -> None:
        self._next_suffix: dict[bytes, int] = {}

    def claim(self, key: str) -> str:
        """``key`` if nobody has it yet, else the first free ``key~N``."""
        digest = _digest(key)
        if digest not in self._next_suffix:
            self._next_suffix[digest] = 2
            return key
        number = self._next_suffix[digest]
        while _digest(f"{key}~{number}") in self._next_suffix:
            number += 1
        self._next_suffix[digest] = number + 1
        self._next_suffix[_digest(f"{key}~{number}")] = 2
        return f"{key}~{number}"

    def claim_all(self, keys: Iterable[str]) -> list[str]:
        """:meth:`claim` for each."""
        return [self.claim(key) for key in keys]


def _percent(match: re.Match[str]) -> str:
    character = match.group()
    if "\udc80" <= character <= "\udcff":
        return f"%{ord(character) - 0xDC00:02X}"
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _lookup(metadata: Mapping[str, Any], name: str) -> Any:
    if name in metadata:
        return metadata[name]
    parts = name.split(".")
    if parts[0] == "json" and "json" not in metadata:
        parts = parts[1:]
    value: Any = metadata
    for part in parts:
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _tag_text(text: str, max_tag_bytes: int) -> str:
    text = _CONTROL.sub(" ", unicodedata.normalize("NFC", valid_text(text)))
    text = " ".join(text.split())
    return text.encode()[:max_tag_bytes].decode(errors="ignore").strip()
