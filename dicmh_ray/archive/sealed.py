"""The archive's JSON objects: canonical bytes that carry their own SHA-256.

One body has one byte representation, and a reader accepts no other: a flipped bit anywhere in a
plan, commit or manifest makes it no JSON, not canonical, or not what its digest says.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from dicmh_ray.errors import CorruptObjectError, SchemaVersionError

DIGEST_FIELD = "sha256"


def canonical_json(value: Any) -> bytes:
    """UTF-8, keys sorted by code point, no spaces, no NaN; floats as Python's ``repr``."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest(body: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) of the canonical body."""
    return hashlib.sha256(canonical_json(body)).hexdigest()


def seal(kind: str, version: int, body: Mapping[str, Any]) -> bytes:
    """The object's bytes: the body with ``format``, ``version`` and the digest of all that."""
    named = {**body, "format": kind, "version": version}
    return canonical_json({**named, DIGEST_FIELD: digest(named)})


def unseal(name: str, data: bytes, kind: str, version: int | Collection[int]) -> dict[str, Any]:
    """The body of an object written by :func:`seal`; ``sha256`` stays in it.

    Raises:
        CorruptObjectError: the bytes are not exactly what :func:`seal` writes for any body.
        SchemaVersionError: sound, but of a version this package does not read.
    """
    try:
        value = json.loads(data)
        canonical = canonical_json(value)
    except (ValueError, RecursionError) as exc:
        raise CorruptObjectError(name, f"not a JSON object of this format: {exc}") from exc
    if not isinstance(value, dict) or canonical != data:
        raise CorruptObjectError(name, "not canonical JSON: the bytes were changed")
    body = {field: v for field, v in value.items() if field != DIGEST_FIELD}
    if value.get(DIGEST_FIELD) != digest(body):
        raise CorruptObjectError(name, "content does not match its SHA-256")
    if value.get("format") != kind:
        raise CorruptObjectError(name, f"is a {value.get('format')!r}, wanted {kind!r}")
    known = (version,) if isinstance(version, int) else version
    if value.get("version") not in known:
        raise SchemaVersionError(name, value.get("version"), version)
    return value
