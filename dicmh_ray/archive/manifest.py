"""The record of one version of an archive: every commit, whole, under one root digest.

It is derived from the commits and the version before it alone (no clock, no host), so that any
number of finishers write the same bytes. A reader of an archive needs the plan and the manifest:
three requests. The first manifest says that the plan is complete; each append and each compaction
publishes one more, which carries the history of all of them.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from dicmh_ray.archive.commit import (
    Commit,
    check_commit,
    commit_name,
    created_by,
    job_commit_name,
)
from dicmh_ray.archive.plan import Plan
from dicmh_ray.archive.sealed import canonical_json, seal, unseal
from dicmh_ray.archive.store import check_name
from dicmh_ray.errors import CorruptObjectError

MANIFEST_PREFIX = "manifest/"
MANIFEST_FORMAT = "dicmh.archive.manifest"
MANIFEST_VERSION = 1
LATER_MANIFEST_VERSION = 2
"""Of manifests after the first: they have a history."""

EXPIRED_FORMAT = "dicmh.archive.expired"
EXPIRED_VERSION = 1

Operation = Literal["create", "append", "compact"]

_MANIFEST_NAME = re.compile(r"manifest/(\d{6,})\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """What one version of an archive was, in one line of the history."""

    archive_version: int
    """From 1."""

    operation: Operation
    """What made it of the version before."""

    plan_id: str
    """Plan that it published."""

    parent_sha256: str
    """Of the bytes of the manifest before it; empty for the first."""

    units: int
    """Units whose rows it has: of this whole version, as the numbers below."""

    parts: int
    """Parts."""

    rows: int
    """Rows of any status."""

    num_bytes: int
    """Bytes of the parts."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One version of an archive, whole."""

    version: int
    """Of the archive's content, from 1; the manifest's name says it too."""

    plan_id: str
    """The archive's first plan, ``plan.json``."""

    codec_id: str
    """Checkpoint of all bitstreams."""

    codec_sha256: str
    """Of ``codec/<codec_id>/files.json``, which lists the checkpoint's files."""

    commits: Mapping[str, Commit]
    """By object name, in the order of their rows."""

    created_by: str
    """Software and version."""

    history: tuple[Version, ...]
    """Every version up to this one."""

    @property
    def name(self) -> str:
        """Object name."""
        return manifest_name(self.version)

    @property
    def joined_index(self) -> str:
        """Object that has the row indexes of all units; versions of one unit have none."""
        return f"index/joined-{self.root[:16]}.bin"

    @cached_property
    def root(self) -> str:
        """SHA-256 over the lines ``<commit name> <SHA-256 of its bytes>``, in order."""
        hashed = hashlib.sha256()
        for name, commit in self.commits.items():
            hashed.update(f"{name} {hashlib.sha256(commit.to_bytes()).hexdigest()}\n".encode())
        return hashed.hexdigest()

    @property
    def sha256(self) -> str:
        """Of the object's bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def has_published(self, plan_id: str) -> bool:
        """Whether this version, or one before it, made the plan's rows part of the archive."""
        return any(version.plan_id == plan_id for version in self.history)

    def object_names(self) -> set[str]:
        """The commits, the parts and indexes that they name, and the joined index."""
        names = {*self.commits, self.joined_index}
        for commit in self.commits.values():
            names.update([commit.index.name, *(part.name for part in commit.parts)])
        return names

    def to_bytes(self) -> bytes:
        """The object's bytes."""
        entries = []
        for name, commit in self.commits.items():
            data = commit.to_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            entries.append({"name": name, "sha256": sha256, "commit": json.loads(data)})
        body = {
            "archive_version": self.version,
            "plan_id": self.plan_id,
            "codec_id": self.codec_id,
            "codec_sha256": self.codec_sha256,
            "commits": entries,
            "root": self.root,
            "created_by": self.created_by,
        }
        if self.version == 1:
            return seal(MANIFEST_FORMAT, MANIFEST_VERSION, body)
        body["history"] = [asdict(version) for version in self.history]
        return seal(MANIFEST_FORMAT, LATER_MANIFEST_VERSION, body)

    @classmethod
    def from_bytes(cls, name: str, data: bytes, plan: Plan | None) -> "Manifest":
        """Read a manifest and check that it belongs to an archive begun with ``plan``, if known.

        Raises:
            CorruptObjectError: the bytes are not such a manifest.
            SchemaVersionError: a manifest of another version.
        """
        known = (MANIFEST_VERSION, LATER_MANIFEST_VERSION)
        body = unseal(name, data, MANIFEST_FORMAT, known)
        try:
            commits = {
                check_name(entry["name"]): Commit.from_bytes(
                    entry["name"], canonical_json(entry["commit"])
                )
                for entry in body["commits"]
            }
            manifest = cls(
                version=body["archive_version"],
                plan_id=body["plan_id"],
                codec_id=body["codec_id"],
                codec_sha256=body["codec_sha256"],
                commits=commits,
                created_by=body["created_by"],
                history=_read_history(body, commits),
            )
            wanted = (manifest_name(manifest.version), body["root"])
        except (KeyError, TypeError, ValueError) as exc:
            raise CorruptObjectError(name, f"not a manifest: {exc!r}") from exc
        if (name, manifest.root) != wanted or (manifest.version == 1) != (body["version"] == 1):
            raise CorruptObjectError(name, f"is manifest {manifest.version}, or its root is wrong")
        _check_history(name, manifest)
        for commit_object, commit in manifest.commits.items():
            _check_commit(name, manifest, commit_object, commit, plan)
        if plan is None:
            return manifest
        if manifest.plan_id != plan.plan_id:
            raise CorruptObjectError(name, f"was made under plan {manifest.plan_id[:16]}")
        units = [c.unit for c in manifest.commits.values()]
        if manifest.version == 1 and units != list(plan.unit_names):
            raise CorruptObjectError(name, "does not list every unit of the plan")
        return manifest


def manifest_name(version: int) -> str:
    """Object name of a manifest."""
    return f"{MANIFEST_PREFIX}{version:06d}.json"


def manifest_versions(names: Collection[str]) -> list[int]:
    """Versions in a listing of ``manifest/``, ascending."""
    return sorted(int(m[1]) for name in names if (m := _MANIFEST_NAME.fullmatch(name)))


def first_manifest(plan: Plan, commits: Mapping[str, Commit], codec_sha256: str) -> Manifest:
    """The manifest of a plan all of whose units are committed."""
    return Manifest(
        version=1,
        plan_id=plan.plan_id,
        codec_id=plan.codec_id,
        codec_sha256=codec_sha256,
        commits=commits,
        created_by=created_by(),
        history=(_version_of(1, "create", plan.plan_id, "", commits),),
    )


def next_manifest(
    newest: Manifest, operation: Operation, plan_id: str, commits: Mapping[str, Commit]
) -> Manifest:
    """The version after ``newest``, that publishes a plan."""
    number = newest.version + 1
    made = _version_of(number, operation, plan_id, newest.sha256, commits)
    return Manifest(
        version=number,
        plan_id=newest.plan_id,
        codec_id=newest.codec_id,
        codec_sha256=newest.codec_sha256,
        commits=commits,
        created_by=created_by(),
        history=(*newest.history, made),
    )


@dataclass(frozen=True, kw_only=True)
class Expired:
    """What stands in the place of a manifest whose version was given up."""

    version: int
    """Version that is no more."""

    manifest_sha256: str
    """Of the bytes of the manifest that was here."""

    created_at: int
    """When that one was put, seconds of the epoch by the store's clock."""

    objects: tuple[str, ...]
    """What only it named and is to be deleted; none once that is done."""

    @property
    def name(self) -> str:
        """Object name: the manifest's."""
        return manifest_name(self.version)

    def to_bytes(self) -> bytes:
        """The object's bytes."""
        body = {
            "archive_version": self.version,
            "manifest_sha256": self.manifest_sha256,
            "created_at": self.created_at,
            "objects": list(self.objects),
        }
        return seal(EXPIRED_FORMAT, EXPIRED_VERSION, body)

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> "Expired":
        """Read one.

        Raises:
            CorruptObjectError: the bytes are not such an object.
            SchemaVersionError: one of another version.
        """
        body = unseal(name, data, EXPIRED_FORMAT, EXPIRED_VERSION)
        try:
            found = cls(
                version=body["archive_version"],
                manifest_sha256=body["manifest_sha256"],
                created_at=body["created_at"],
                objects=tuple(check_name(each) for each in body["objects"]),
            )
        except (KeyError, TypeError) as exc:
            raise CorruptObjectError(name, f"not an expired manifest: {exc!r}") from exc
        if not isinstance(found.version, int) or found.name != name:
            raise CorruptObjectError(name, f"is expired manifest {found.version}")
        return found


def is_expired(data: bytes) -> bool:
    """Whether an object below ``manifest/`` says that its version was given up.

    Damage is for whoever reads the object next.
    """
    try:
        value = json.loads(data)
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("format") == EXPIRED_FORMAT


def _version_of(
    number: int,
    operation: Operation,
    plan_id: str,
    parent_sha256: str,
    commits: Mapping[str, Commit],
) -> Version:
    return Version(
        archive_version=number,
        operation=operation,
        plan_id=plan_id,
        parent_sha256=parent_sha256,
        units=len(commits),
        parts=sum(len(commit.parts) for commit in commits.values()),
        rows=sum(commit.statistics.rows for commit in commits.values()),
        num_bytes=sum(commit.num_bytes for commit in commits.values()),
    )


def _read_history(body: Mapping[str, Any], commits: Mapping[str, Commit]) -> tuple[Version, ...]:
    if body["version"] == MANIFEST_VERSION:
        return (_version_of(body["archive_version"], "create", body["plan_id"], "", commits),)
    history = tuple(Version(**entry) for entry in body["history"])
    for version in history:
        if version.operation not in get_args(Operation):
            raise ValueError(f"operation {version.operation!r} is unknown")
    return history


def _check_history(name: str, manifest: Manifest) -> None:
    history = manifest.history
    numbers = [version.archive_version for version in history]
    if numbers != list(range(1, manifest.version + 1)) or history[0].plan_id != manifest.plan_id:
        raise CorruptObjectError(name, "its history is not that of this version")
    last = history[-1]
    if last != _version_of(
        manifest.version, last.operation, last.plan_id, last.parent_sha256, manifest.commits
    ):
        raise CorruptObjectError(name, "its history does not agree with its commits")


def _check_commit(
    name: str, manifest: Manifest, commit_object: str, commit: Commit, plan: Plan | None
) -> None:
    if manifest.version == 1 or commit.plan_id == manifest.plan_id:
        right = {commit_name(commit.unit), commit_name(commit.unit, commit.attempt)}
        check_commit(commit_object, commit, plan)
    else:
        right = {job_commit_name(commit.plan_id, commit.unit)}
    if (
        commit_object not in right
        or commit.codec_id != manifest.codec_id
        or not manifest.has_published(commit.plan_id)
    ):
        raise CorruptObjectError(name, f"has the commit {commit_object}, which is not its own")
