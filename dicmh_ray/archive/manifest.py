"""The record that a plan is complete: every commit, whole, under one root digest.

It is derived from the commits alone (no clock, no host), so that any number of finishers write
the same bytes. A reader of a finished archive needs the plan and the manifest: three requests.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dicmh_ray.archive.commit import Commit, check_commit, created_by
from dicmh_ray.archive.plan import Plan
from dicmh_ray.archive.sealed import canonical_json, seal, unseal
from dicmh_ray.archive.store import check_name
from dicmh_ray.errors import CorruptObjectError

MANIFEST_PREFIX = "manifest/"
MANIFEST_FORMAT = "dicmh.archive.manifest"
MANIFEST_VERSION = 1

_MANIFEST_NAME = re.compile(r"manifest/(\d{6})\.json")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete archive."""

    version: int
    """Of the archive's content, from 1; the manifest's name says it too."""

    plan_id: str
    """Plan that is complete."""

    codec_id: str
    """Checkpoint of all bitstreams."""

    codec_sha256: str
    """Of ``codec/<codec_id>/files.json``, which lists the checkpoint's files."""

    commits: Mapping[str, Commit]
    """By object name, in plan order."""

    created_by: str
    """Software and version."""

    @property
    def root(self) -> str:
        """SHA-256 over the lines ``<commit name> <SHA-256 of its bytes>``, in plan order."""
        hashed = hashlib.sha256()
        for name, commit in self.commits.items():
            hashed.update(f"{name} {hashlib.sha256(commit.to_bytes()).hexdigest()}\n".encode())
        return hashed.hexdigest()

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
        return seal(MANIFEST_FORMAT, MANIFEST_VERSION, body)

    @classmethod
    def from_bytes(cls, name: str, data: bytes, plan: Plan | None) -> "Manifest":
        """Read a manifest and check that it belongs to ``plan``, if that is known.

        Raises:
            CorruptObjectError: the bytes are not such a manifest.
            SchemaVersionError: a manifest of another version.
        """
        body = unseal(name, data, MANIFEST_FORMAT, MANIFEST_VERSION)
        try:
            manifest = cls(
                version=body["archive_version"],
                plan_id=body["plan_id"],
                codec_id=body["codec_id"],
                codec_sha256=body["codec_sha256"],
                commits={
                    check_name(entry["name"]): Commit.from_bytes(
                        entry["name"], canonical_json(entry["commit"])
                    )
                    for entry in body["commits"]
                },
                created_by=body["created_by"],
            )
            wanted = (manifest_name(manifest.version), body["root"])
        except (KeyError, TypeError) as exc:
            raise CorruptObjectError(name, f"not a manifest: {exc!r}") from exc
        if (name, manifest.root) != wanted:
            raise CorruptObjectError(name, f"is manifest {manifest.version}, or its root is wrong")
        for commit_object, commit in manifest.commits.items():
            check_commit(commit_object, commit, plan)
        if plan is None:
            return manifest
        if manifest.plan_id != plan.plan_id:
            raise CorruptObjectError(name, f"was made under plan {manifest.plan_id[:16]}")
        if [c.unit for c in manifest.commits.values()] != list(plan.unit_names):
            raise CorruptObjectError(name, "does not list every unit of the plan")
        return manifest


def manifest_name(version: int) -> str:
    """Object name of a manifest."""
    return f"{MANIFEST_PREFIX}{version:06d}.json"


def manifest_versions(names: list[str]) -> list[int]:
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
    )
