"""JSON-like values as YAML text, with comments. Writing only, a few lines: no YAML library is needed.

Reading YAML is where the trouble is (tags that build objects, anchors that explode), so nothing in
this package does it. What is written here uses block mappings and sequences, plain words where
every YAML parser of version 1.1 and 1.2 reads the same word, and double quotes everywhere else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9._/-]*(:[A-Za-z0-9][A-Za-z0-9._/-]*)?\Z")
"""Words that no parser takes for a number, a date or an indicator."""

_NOT_STRINGS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}
"""Words that some parser takes for a truth value or nothing, in any case of letters."""

_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
"""What YAML wants escaped and JSON leaves as it is."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A value of a mapping with the reason for it, which becomes comment lines above its key."""

    value: Any
    note: str


def yaml_documents(documents: Sequence[Mapping[str, Any]]) -> str:
    """The documents of one file or stream.

    Args:
        documents: mappings with string keys of mappings, sequences, strings, whole numbers, truth
            values and None; :class:`Noted` around any value of a mapping.
    """
    return "---\n".join("".join(_mapping(document, "")) or "{}\n" for document in documents)


def without_notes(value: Any) -> Any:
    """The value alone, as a parser of the text would give it back."""
    if isinstance(value, Noted):
        return without_notes(value.value)
    if isinstance(value, Mapping):
        return {key: without_notes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_notes(item) for item in value]
    return value


def _mapping(mapping: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in mapping.items():
        if isinstance(value, Noted):
            lines += [f"{indent}# {line}\n" for line in value.note.splitlines()]
            value = value.value
        lines += _item(f"{indent}{_string(key)}:", value, indent)
    return lines


def _item(start: str, value: Any, indent: str) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [f"{start}\n", *_mapping(value, indent + "  ")]
    if isinstance(value, (list, tuple)) and value:
        return [f"{start}\n", *(line for item in value for line in _element(item, indent + "  "))]
    return [f"{start} {_scalar(value)}\n"]


def _element(value: Any, indent: str) -> list[str]:
    if isinstance(value, (list, tuple)) and value:
        raise TypeError("sequences of sequences are not written")
    if not (isinstance(value, Mapping) and value):
        return [f"{indent}- {_scalar(value)}\n"]
    lines = _mapping(value, indent + "  ")
    first = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
    lines[first] = f"{indent}- {lines[first].removeprefix(indent + '  ')}"
    # Comments above the first key stand above the dash.
    return [line.replace(indent + "  ", indent, 1) for line in lines[:first]] + lines[first:]


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, (list, tuple)):
        return "[]"
    if value is None or isinstance(value, (bool, int)):
        return json.dumps(value)
    raise TypeError(f"{type(value).__name__} is not written")


def _string(text: str) -> str:
    if _PLAIN.match(text) and text.lower() not in _NOT_STRINGS:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", quoted)
