"""Sidecars and columns -> one JSON-able dict per image.

* ``json``: an object's fields stand at top level, unless one has the name of another sidecar of the
  same image: then the whole object stands under ``json``, as does JSON that is no object.
* ``cls``: an integer where it is one.
* other sidecars: text under their extension (``txt``, ``caption``, ``seg.txt``, ...); what is not
  UTF-8 text stands as base64 under ``__base64__``, by extension.
* ``__dropped__``: extension or column -> bytes, of what exceeded the limit. Nothing goes silently.
"""

import base64
import datetime
import decimal
import json
import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from dicmh_ray.source.image import valid_text

_MAX_DEPTH = 32


def sidecar_metadata(
    sidecars: Iterable[tuple[str, bytes | None, int]], *, max_bytes: int
) -> dict[str, Any]:
    """Merge the sidecars of one image.

    Args:
        sidecars: (extension in lower case, bytes or None where they were not read, size).
        max_bytes: of all sidecars kept; later ones are listed under ``__dropped__``.
    """
    fields: dict[str, Any] = {}
    encoded: dict[str, str] = {}
    dropped: dict[str, int] = {}
    merged: Any = None
    kept_bytes = 0
    for extension, data, size in sidecars:
        name = extension or "file"
        if data is None or kept_bytes + size > max_bytes:
            dropped[name] = size
            continue
        kept_bytes += size
        if name == "json":
            merged = _parse_json(data)
        elif (text := _as_text(data)) is None:
            encoded[name] = base64.b64encode(data).decode()
        else:
            fields[name] = _as_class(text) if name == "cls" else text
    if encoded:
        fields["__base64__"] = encoded
    if dropped:
        fields["__dropped__"] = dropped
    if merged is None:
        return fields
    if isinstance(merged, dict) and not merged.keys() & fields.keys():
        return merged | fields
    return {"json": merged} | fields


def json_value(value: Any, *, depth: int = 0) -> Any:
    """The JSON-able form of a Python value as Arrow or ``json`` give it.

    Dates and times become ISO 8601, durations seconds, decimals and UUIDs text, bytes base64,
    numbers that are not finite their names.

    Raises:
        ValueError: nested deeper than 32, or of a type with no such form.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    match value:
        case None | bool() | int():
            return value
        case str():
            return valid_text(value)
        case float():
            return value if math.isfinite(value) else str(value)
        case bytes():
            return base64.b64encode(value).decode()
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case decimal.Decimal() | uuid.UUID():
            return str(value)
        case Mapping():
            return {
                valid_text(str(name)): json_value(item, depth=depth + 1)
                for name, item in value.items()
            }
        case list() | tuple():
            return [json_value(item, depth=depth + 1) for item in value]
        case _:
            raise ValueError(f"a {type(value).__name__} has no JSON form")


def _parse_json(data: bytes) -> Any:
    """The parsed and cleaned value; the text itself where it is no JSON (or a nested bomb)."""
    try:
        return json_value(json.loads(data))
    except (ValueError, RecursionError):
        return valid_text(data.decode("utf-8", "backslashreplace"))


def _as_text(data: bytes) -> str | None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return None if "\x00" in text else text


def _as_class(text: str) -> int | str:
    number = text.strip()
    is_integer = len(number) <= 18 and number.removeprefix("-").isdecimal() and number.isascii()
    return int(number) if is_integer else text
