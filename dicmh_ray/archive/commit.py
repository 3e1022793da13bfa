"""The record whose appearance makes a unit's rows part of the archive.

A commit is put where none may exist: of any number of attempts at a unit, one is committed, and
its objects are never touched again. On a store that ignores the condition, commits are named by
attempt and the smallest name wins; the manifest then freezes the choice.
"""

import hashlib
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dicmh_ray.archive.part import Part, RowGroupFacts
from dicmh_ray.archive.plan import UNIT_NAME, Plan
from dicmh_ray.archive.schema import SMALL_COLUMNS, STATUSES, EncodedImage
from dicmh_ray.archive.sealed import seal, unseal
from dicmh_ray.archive.store import SEGMENT, Store, check_name
from dicmh_ray.errors import CorruptObjectError

COMMIT_PREFIX = "commit/"
JOB_PREFIX = "job/"
"""Of the commits of later jobs: appends and compactions."""

ANALYSIS_PREFIX = "analysis/"
"""Of what was computed from an archive and lies beside it: no part of it, and not ours to delete."""

COMMIT_FORMAT = "dicmh.archive.commit"
COMMIT_VERSION = 1
PARALLEL_REQUESTS = 16
"""Small objects read at once: a listing of 10,000 commits takes seconds, not minutes."""

_COMMIT_NAME = re.compile(
    rf"{COMMIT_PREFIX}(?P<unit>{UNIT_NAME.pattern})(?:/(?P<attempt>{SEGMENT}))?\.json"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectFacts:
    """One stored object as it must be."""

    name: str
    """Name in the archive."""

    num_bytes: int
    """Length."""

    sha256: str
    """Of all bytes, 64 hex digits."""

    @classmethod
    def of(cls, name: str, data: bytes) -> "ObjectFacts":
        """The facts of these bytes."""
        return cls(name=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFacts:
    """One part as it must be."""

    name: str
    """Name in the archive."""

    num_bytes: int
    """Length of the file."""

    sha256: str
    """Of the file, 64 hex digits."""

    footer_bytes: int
    """Length of the footer with its trailer: one request reads it."""

    footer_sha256: str
    """Of those bytes."""

    row_groups: tuple[RowGroupFacts, ...]
    """What each row group must be."""

    @property
    def num_rows(self) -> int:
        """Rows in all row groups."""
        return sum(group.num_rows for group in self.row_groups)

    @classmethod
    def of(cls, part: Part) -> "PartFacts":
        """The facts of a part that was just written."""
        return cls(
            name=part.name,
            num_bytes=len(part.data),
            sha256=part.sha256,
            footer_bytes=part.footer_bytes,
            footer_sha256=part.footer_sha256,
            row_groups=part.row_groups,
        )

    def to_dict(self) -> dict[str, Any]:
        """For a commit's JSON."""
        return {**_fields(self), "row_groups": [_fields(group) for group in self.row_groups]}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> "PartFacts":
        """From a commit's JSON."""
        groups = tuple(
            RowGroupFacts(num_rows=g["num_rows"], chunk_crc32c=tuple(g["chunk_crc32c"]))
            for g in body["row_groups"]
        )
        if any(len(group.chunk_crc32c) != len(SMALL_COLUMNS) for group in groups):
            raise ValueError("a row group has too few or too many column checksums")
        return cls(**{**body, "row_groups": groups})


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitStatistics:
    """Sums over rows; those of several units add up."""

    rows: int = 0
    """Rows of any status."""

    ok: int = 0
    """Rows with status ``ok``."""

    kept_original: int = 0
    """Rows with status ``kept_original``."""

    failed: int = 0
    """Rows with status ``failed``."""

    bytes_in: int = 0
    """Bytes of the source images."""

    bytes_out: int = 0
    """Bytes of the parts, footers and all columns included."""

    ok_bitstream_bytes: int = 0
    """Bytes of the bitstreams of ``ok`` rows."""

    ok_pixels: int = 0
    """Width × height of ``ok`` rows."""

    @classmethod
    def of(cls, rows: Iterable[EncodedImage], bytes_out: int) -> "UnitStatistics":
        """Sums over a unit's rows."""
        rows = list(rows)
        ok = [row for row in rows if row.status == "ok"]
        return cls(
            rows=len(rows),
            **{status: sum(row.status == status for row in rows) for status in STATUSES},
            bytes_in=sum(row.original_bytes for row in rows),
            bytes_out=bytes_out,
            ok_bitstream_bytes=sum(len(row.base) + len(row.detail) for row in ok),
            ok_pixels=sum((row.width or 0) * (row.height or 0) for row in ok),
        )

    def __add__(self, other: "UnitStatistics") -> "UnitStatistics":
        names = [field.name for field in fields(UnitStatistics)]
        return UnitStatistics(
            **{name: getattr(self, name) + getattr(other, name) for name in names}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What one unit became."""

    unit: str
    """Name in the plan."""

    plan_id: str
    """Plan it was made under."""

    codec_id: str
    """Checkpoint that wrote its bitstreams."""

    attempt: str
    """Unique to the attempt, and sorted by its start; how a writer knows its own commit."""

    parts: tuple[PartFacts, ...]
    """Parts in row order; none for a unit without rows."""

    index: ObjectFacts
    """The unit's row index."""

    statistics: UnitStatistics
    """Sums over its rows."""

    info: Mapping[str, Any]
    """What the writer said about itself: host, seconds, attempt number. No reader needs it."""

    created_by: str
    """Software and version."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.num_bytes for part in self.parts)

    def to_bytes(self) -> bytes:
        """The object's bytes."""
        body = {
            **_fields(self),
            "parts": [part.to_dict() for part in self.parts],
            "index": _fields(self.index),
            "statistics": _fields(self.statistics),
        }
        return seal(COMMIT_FORMAT, COMMIT_VERSION, body)

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> "Commit":
        """Read a commit.

        Raises:
            CorruptObjectError: the bytes are not a commit as :meth:`to_bytes` writes it.
            SchemaVersionError: a commit of another version.
        """
        body = unseal(name, data, COMMIT_FORMAT, COMMIT_VERSION)
        try:
            commit = cls(
                unit=body["unit"],
                plan_id=body["plan_id"],
                codec_id=body["codec_id"],
                attempt=body["attempt"],
                parts=tuple(PartFacts.from_dict(part) for part in body["parts"]),
                index=ObjectFacts(**body["index"]),
                statistics=UnitStatistics(**body["statistics"]),
                info=body["info"],
                created_by=body["created_by"],
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise CorruptObjectError(name, f"not a commit: {exc!r}") from exc
        for stored in (*(part.name for part in commit.parts), commit.index.name):
            check_name(stored)
        return commit


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass as they are; ``asdict`` would copy all that is in them, slowly."""
    return {field: getattr(value, field) for field in value.__slots__}


def created_by() -> str:
    """This software, for provenance."""
    try:
        return f"dicmh_ray {version('dicmh_ray')}"
    except PackageNotFoundError:
        return "dicmh_ray"


def new_attempt() -> str:
    """A name no other attempt has; of two, the later one's sorts later (to clock accuracy)."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"


def commit_name(unit: str, attempt: str | None = None) -> str:
    """Object name of a unit's commit; with ``attempt``, on a store without conditional puts."""
    stem = unit if attempt is None else f"{unit}/{attempt}"
    return f"{COMMIT_PREFIX}{stem}.json"


def job_prefix(plan_id: str) -> str:
    """Where a later job's commits are."""
    return f"{JOB_PREFIX}{plan_id}/"


def job_commit_name(plan_id: str, unit: str) -> str:
    """Object name of the commit of a later job's unit."""
    return f"{job_prefix(plan_id)}{unit}.json"


def job_commit_names(names: Iterable[str], plan: Plan) -> dict[str, str]:
    """Unit -> commit, of a later job's units that are done, from a listing; in plan order."""
    present = set(names)
    wanted = {unit: job_commit_name(plan.plan_id, unit) for unit in plan.unit_names}
    return {unit: name for unit, name in wanted.items() if name in present}


def commit_names(names: Iterable[str]) -> list[str]:
    """The first job's commits in a listing, of whichever attempt; what others put there is not."""
    return [name for name in names if _COMMIT_NAME.fullmatch(name)]


def winning_names(names: Iterable[str]) -> dict[str, str]:
    """The commit that counts for each unit, from a listing: the smallest name.

    A conditional commit (``commit/<unit>.json``) goes before any named by attempt.
    """
    winners: dict[str, tuple[str, str]] = {}
    for name in names:
        match = _COMMIT_NAME.fullmatch(name)
        if match is None:
            continue
        candidate = (match["attempt"] or "", name)
        winners[match["unit"]] = min(winners.get(match["unit"], candidate), candidate)
    return {unit: name for unit, (_, name) in winners.items()}


def read_commit(store: Store, name: str, plan: Plan) -> Commit:
    """Read one commit and check that it belongs here.

    Raises:
        FileNotFoundError: there is none of that name.
        CorruptObjectError: it is damaged, or of another unit or plan.
    """
    commit = Commit.from_bytes(name, store.get(name))
    check_commit(name, commit, plan)
    return commit


def check_commit(name: str, commit: Commit, plan: Plan | None) -> None:
    """Check that a sound commit is the one that belongs at ``name``, and under ``plan`` if given.

    Raises:
        CorruptObjectError: it is of another unit, attempt, codec or plan.
    """
    if name not in (
        commit_name(commit.unit),
        commit_name(commit.unit, commit.attempt),
        job_commit_name(commit.plan_id, commit.unit),
    ):
        raise CorruptObjectError(name, f"holds the commit of unit {commit.unit!r}")
    if plan is None:
        return
    if commit.unit not in plan.positions:
        raise CorruptObjectError(name, f"unit {commit.unit!r} is not in the plan")
    if commit.plan_id != plan.plan_id or commit.codec_id != plan.codec_id:
        raise CorruptObjectError(name, f"was made under plan {commit.plan_id[:16]}")


def read_commits(store: Store, plan: Plan) -> dict[str, Commit]:
    """All committed units in plan order, by name of the commit object.

    Raises:
        CorruptObjectError: a commit is damaged or does not belong here.
    """
    winners = winning_names(store.list(COMMIT_PREFIX))
    last = len(plan.positions)
    names = [winners[unit] for unit in sorted(winners, key=lambda u: plan.positions.get(u, last))]
    return _read_all(store, names, plan)


def read_job_commits(store: Store, plan: Plan) -> dict[str, Commit]:
    """The same of a later job's plan."""
    names = job_commit_names(store.list(job_prefix(plan.plan_id)), plan)
    return _read_all(store, list(names.values()), plan)


def _read_all(store: Store, names: list[str], plan: Plan) -> dict[str, Commit]:
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        commits = list(pool.map(lambda name: read_commit(store, name, plan), names))
    return dict(zip(names, commits, strict=True))
