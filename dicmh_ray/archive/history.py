"""What has become of an archive: its versions, and the jobs that may become the next ones."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from dicmh_ray.archive.commit import (
    COMMIT_PREFIX,
    PARALLEL_REQUESTS,
    job_commit_names,
    job_prefix,
    winning_names,
)
from dicmh_ray.archive.manifest import (
    MANIFEST_PREFIX,
    Expired,
    Manifest,
    Version,
    is_expired,
    manifest_name,
)
from dicmh_ray.archive.plan import Plan
from dicmh_ray.archive.store import Store, StoredObject, open_store
from dicmh_ray.archive.versions import is_compaction, newest_manifest, open_plans, read_plan

_HEAD_BYTES = 64
_MANIFEST_HEAD = b'"codec_id":'
"""The second field of a manifest, in canonical order; an expired one has none of that name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionFacts:
    """One version of an archive, for people."""

    version: Version
    """Its line of the history."""

    created_at: float
    """When its manifest was put, seconds of the epoch by the store's clock."""

    is_kept: bool
    """Whether it can be opened; False once it was given up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenJob:
    """A job whose rows are not part of the archive yet."""

    plan_id: str
    """Its plan."""

    operation: str
    """``create``, ``append`` or ``compact``."""

    units: int
    """Units in its plan."""

    committed: int
    """Those that are done."""


@dataclass(frozen=True, kw_only=True)
class History:
    """The versions of an archive, and the jobs that may become the next ones."""

    uri: str
    """Address of the archive, without credentials."""

    versions: tuple[VersionFacts, ...]
    """Oldest first; none while the first job is unfinished."""

    open_jobs: tuple[OpenJob, ...]
    """Unfinished, or finished and not published yet."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        versions = [
            {**asdict(facts.version), "created_at": facts.created_at, "is_kept": facts.is_kept}
            for facts in self.versions
        ]
        jobs = [asdict(job) for job in self.open_jobs]
        return {"uri": self.uri, "versions": versions, "open_jobs": jobs}


def read_history(uri: str, *, storage_options: Mapping[str, Any] | None = None) -> History:
    """What has become of an archive, version by version.

    Reads the newest manifest, which knows them all, and a few bytes of the others.

    Raises:
        ArchiveNotFoundError: there is no archive.
        CorruptObjectError: a plan or the newest manifest is damaged.
    """
    store = open_store(uri, storage_options)
    plan = read_plan(store)
    newest = newest_manifest(store, plan)
    jobs = []
    if newest is None:
        committed = set(winning_names(store.list(COMMIT_PREFIX))) & set(plan.positions)
        jobs.append(_open_job("create", plan, len(committed)))
    for later in open_plans(store, newest):
        done = job_commit_names(store.list(job_prefix(later.plan_id)), later)
        operation = "compact" if is_compaction(later) else "append"
        jobs.append(_open_job(operation, later, len(done)))
    return History(uri=store.uri, versions=_versions(store, newest), open_jobs=tuple(jobs))


def _open_job(operation: str, plan: Plan, committed: int) -> OpenJob:
    units = len(plan.units)
    return OpenJob(plan_id=plan.plan_id, operation=operation, units=units, committed=committed)


def _versions(store: Store, newest: Manifest | None) -> tuple[VersionFacts, ...]:
    if newest is None:
        return ()
    listed = {stored.name: stored for stored in store.list_objects(MANIFEST_PREFIX)}
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        facts = pool.map(
            lambda version: _facts(
                store, version, listed.get(manifest_name(version.archive_version))
            ),
            newest.history,
        )
        return tuple(facts)


def _facts(store: Store, version: Version, stored: StoredObject | None) -> VersionFacts:
    if stored is None:
        return VersionFacts(version=version, created_at=0.0, is_kept=False)
    head = store.get_range(stored.name, 0, min(_HEAD_BYTES, stored.num_bytes))
    if _MANIFEST_HEAD in head:
        return VersionFacts(version=version, created_at=stored.modified, is_kept=True)
    data = store.get(stored.name)
    created_at = Expired.from_bytes(stored.name, data).created_at if is_expired(data) else 0
    return VersionFacts(version=version, created_at=float(created_at), is_kept=False)
