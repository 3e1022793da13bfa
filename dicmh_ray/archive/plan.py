"""What a job will do, fixed before it does any of it: units, codec, parameters."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dicmh_ray.archive.sealed import canonical_json, digest, seal, unseal
from dicmh_ray.errors import CorruptObjectError

PLAN_NAME = "plan.json"
LATER_PLAN_PREFIX = "plan/"
PLAN_FORMAT = "dicmh.archive.plan"
PLAN_VERSION = 1

UNIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
"""What a unit may be called."""

_NOT_IDENTITY = frozenset({"name", "key_prefix"})
_CODEC_ID = re.compile(r"[0-9a-f]{64}")
_LATER_PLAN_NAME = re.compile(r"plan/([0-9a-f]{64})\.json")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The units of work of an archive. Two jobs with equal plans continue each other's work."""

    units: Sequence[Mapping[str, Any]]
    """One JSON object a unit, with a ``name`` that is fit for a file name and unique ignoring
    case; whatever else the source layer needs to read the unit again."""

    codec_id: str
    """SHA-256 of the checkpoint, 64 hex digits."""

    parameters: Mapping[str, Any]
    """Everything else that decides what the rows are: policy, source options."""

    def __post_init__(self) -> None:
        if not _CODEC_ID.fullmatch(self.codec_id):
            raise ValueError(f"codec_id {self.codec_id!r} is not 64 hex digits")
        seen: set[str] = set()
        for name in self.unit_names:
            if not UNIT_NAME.fullmatch(name) or name.lower() in seen:
                raise ValueError(f"unit name {name!r} is not fit for a file name, or not unique")
            seen.add(name.lower())
        if _has_storage_options([*self.units, self.parameters]):
            raise ValueError("storage_options may hold credentials: they are not written")

    @cached_property
    def unit_names(self) -> tuple[str, ...]:
        """Names of all units, in plan order."""
        return tuple(str(unit["name"]) for unit in self.units)

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """Place of each unit in plan order, by name."""
        return {name: number for number, name in enumerate(self.unit_names)}

    @cached_property
    def plan_id(self) -> str:
        """SHA-256 of the canonical plan, 64 hex digits."""
        return digest({**self._body(), "format": PLAN_FORMAT, "version": PLAN_VERSION})

    def to_bytes(self) -> bytes:
        """The bytes of ``plan.json``."""
        return seal(PLAN_FORMAT, PLAN_VERSION, self._body())

    @classmethod
    def from_bytes(cls, data: bytes, name: str = PLAN_NAME) -> "Plan":
        """Read ``plan.json``, or another plan by its object name.

        Raises:
            CorruptObjectError: the bytes are not a plan as :meth:`to_bytes` writes it.
            SchemaVersionError: a plan of another version.
        """
        body = unseal(name, data, PLAN_FORMAT, PLAN_VERSION)
        try:
            plan = cls(
                units=tuple(body["units"]),
                codec_id=body["codec_id"],
                parameters=body["parameters"],
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise CorruptObjectError(name, f"not a plan: {exc!r}") from exc
        if name not in (PLAN_NAME, later_plan_name(plan.plan_id)):
            raise CorruptObjectError(name, f"holds plan {plan.plan_id[:16]}")
        return plan

    def _body(self) -> dict[str, Any]:
        return {
            "units": [dict(unit) for unit in self.units],
            "codec_id": self.codec_id,
            "parameters": dict(self.parameters),
        }


def later_plan_name(plan_id: str) -> str:
    """Object name of the plan of an append or a compaction."""
    return f"{LATER_PLAN_PREFIX}{plan_id}.json"


def later_plan_ids(names: Iterable[str]) -> list[str]:
    """Plans in a listing of ``plan/``, sorted."""
    return sorted(match[1] for name in names if (match := _LATER_PLAN_NAME.fullmatch(name)))


def unit_identity(unit: Mapping[str, Any]) -> bytes:
    """What a unit reads: equal for two units that read the same bytes of the same objects."""
    return canonical_json({key: unit[key] for key in unit if key not in _NOT_IDENTITY})


def unit_members(unit: Mapping[str, Any]) -> frozenset[str]:
    """What only equal units may share: the image files that one groups, the table that it cuts.

    Empty for a unit that is always a whole object.
    """
    uris = unit.get("uri")
    if isinstance(uris, list | tuple):
        return frozenset(f"{unit.get('root', '')}{uri}" for uri in uris)
    return frozenset([f"{uris} {unit.get('etag')}"] if unit.get("kind") == "parquet" else [])


def _has_storage_options(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value.get("storage_options")) or any(map(_has_storage_options, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_storage_options, value))
    return False
