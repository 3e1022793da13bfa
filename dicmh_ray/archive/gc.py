"""Delete what no version of an archive that is kept, and no job under way, has any use for.

    list everything ─> newest manifest ─> open plans and their commits ─> manifests ─> delete

The order of reading is what makes it safe beside running jobs. An object that appears after the
listing is not looked at. One that a job committed before its commits were listed is found there;
if the job was published since, the manifests, read last, have it. What is left are parts that
were put and not committed: they are spared for a grace period, and a writer does not commit what it
put longer ago than half of that (:data:`dicmh_ray.archive.writer.COMMIT_LEASE_S`).
"""

import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from dicmh_ray.archive.commit import (
    COMMIT_PREFIX,
    PARALLEL_REQUESTS,
    Commit,
    commit_names,
    job_commit_names,
    job_prefix,
)
from dicmh_ray.archive.manifest import (
    MANIFEST_PREFIX,
    Expired,
    Manifest,
    is_expired,
    manifest_name,
    manifest_versions,
)
from dicmh_ray.archive.plan import LATER_PLAN_PREFIX, Plan, later_plan_ids, later_plan_name
from dicmh_ray.archive.staged import staged_units
from dicmh_ray.archive.store import SCRATCH, SEGMENT, Store, StoredObject, open_store
from dicmh_ray.archive.versions import newest_manifest, open_plans, read_plan

DAY_S = 86400

# In this order they are deleted: what names, before what is named.
_KINDS = (
    re.compile(r"plan/[0-9a-f]{64}\.json"),
    re.compile(rf"(commit|job)(/{SEGMENT})+\.json"),
    re.compile(rf"index/{SEGMENT}\.(parquet|bin)"),
    re.compile(rf"data/part-{SEGMENT}\.parquet"),
    re.compile(rf"{SCRATCH}{SEGMENT}(/{SEGMENT})*"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GcOptions:
    """What is kept. A version stays if any of its conditions holds."""

    keep_versions: int = 10
    """So many of the newest versions."""

    keep_s: float = 7 * DAY_S
    """Versions younger than this, in seconds: readers that have one open can go on."""

    grace_s: float = DAY_S
    """What belongs to nothing is spared so long after it was put, in seconds: a running job may be
    about to commit it. Twice the writers' limit is safe; less only while nothing is written."""

    def __post_init__(self) -> None:
        if self.keep_versions < 1:
            raise ValueError(f"keep_versions is {self.keep_versions}: the newest always stays")
        if self.keep_s < 0 or self.grace_s < 0:
            raise ValueError(f"ages must not be negative: {self}")


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What was deleted, or would be."""

    uri: str
    """Address of the archive, without credentials."""

    is_dry_run: bool
    """Whether everything is still there."""

    kept_versions: tuple[int, ...]
    """Versions that can be opened."""

    given_up: tuple[int, ...]
    """Versions that no longer can, from this run on."""

    deleted: tuple[StoredObject, ...]
    """Objects, with their sizes."""

    spared: tuple[StoredObject, ...]
    """Objects that belong to nothing and are younger than the grace period."""

    @property
    def num_bytes(self) -> int:
        """Bytes of what was deleted."""
        return sum(stored.num_bytes for stored in self.deleted)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **asdict(self),
            "deleted": [{"name": s.name, "num_bytes": s.num_bytes} for s in self.deleted],
            "spared": [{"name": s.name, "num_bytes": s.num_bytes} for s in self.spared],
            "num_bytes": self.num_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class _Versions:
    """What ``manifest/`` holds, and what becomes of it."""

    kept: tuple[Manifest, ...]
    ending: tuple[Expired, ...]
    """Given up by this run, or by one that died before it had deleted the objects."""
    given_up: tuple[int, ...]


def collect_garbage(
    uri: str,
    *,
    options: GcOptions | None = None,
    dry_run: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> GcReport:
    """Give up old versions and delete whatever belongs to nothing any more.

    Objects whose names are not of this format are never touched. Safe while jobs run, are killed,
    or another collector is at work; a run that died is finished by the next one.

    Args:
        uri: address of the archive.
        options: which versions stay, and how long strays are spared.
        dry_run: only say what would be deleted. Nothing is written, so ages are told by the clock
            of this machine instead of the store's.
        storage_options: for the fsspec file system; written nowhere.

    Raises:
        ArchiveNotFoundError: there is no archive.
        CorruptObjectError: a plan, commit or manifest is damaged; nothing was deleted, because
            nobody knows what it names.
    """
    options = options or GcOptions()
    store = open_store(uri, storage_options)
    plan = read_plan(store)
    # A dry run writes nothing; what its own clock gets wrong is what it says, and nothing else.
    now = time.time() if dry_run else store.now()
    listed = [*store.list_objects("")]
    newest = newest_manifest(store, plan)
    needed = _of_open_jobs(store, plan, newest)
    versions = _sort_versions(store, plan, options, now)
    for manifest in versions.kept:
        needed |= manifest.object_names()
    needed |= _needed_plans(store, versions.kept)
    freed = {name for expired in versions.ending for name in expired.objects} - needed
    garbage = [o for o in listed if o.name not in needed and _kind(o.name) is not None]
    garbage.sort(key=lambda o: (_kind(o.name), o.name))
    old = [o for o in garbage if o.name in freed or now - o.modified >= options.grace_s]
    taken = {o.name for o in old}
    spared = tuple(o for o in garbage if o.name not in taken)
    leftovers = store.leftovers(now - options.grace_s)
    if not dry_run:
        ending = [
            replace(expired, objects=tuple(sorted(freed & set(expired.objects))))
            for expired in versions.ending
        ]
        _end_versions(store, ending)
        _delete_strays(store, [o for o in old if o.name not in freed])
        for leftover in leftovers:
            store.delete_leftover(leftover)
    return GcReport(
        uri=store.uri,
        is_dry_run=dry_run,
        kept_versions=tuple(manifest.version for manifest in versions.kept),
        given_up=versions.given_up,
        deleted=(*old, *leftovers),
        spared=spared,
    )


def _kind(name: str) -> int | None:
    """Place in the order of deletion; None for what is not ours to delete."""
    return next((i for i, kind in enumerate(_KINDS) if kind.fullmatch(name)), None)


def _of_open_jobs(store: Store, first: Plan, newest: Manifest | None) -> set[str]:
    """Everything that jobs under way have committed or staged, whichever attempt will count."""
    names: list[str] = []
    for plan in open_plans(store, newest):
        names += job_commit_names(store.list(job_prefix(plan.plan_id)), plan).values()
    needed: set[str] = set()
    if newest is None:
        names += commit_names(store.list(COMMIT_PREFIX))
        for staged in staged_units(first):
            needed.update(object.name for object in staged.objects)
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        commits = list(pool.map(lambda name: Commit.from_bytes(name, store.get(name)), names))
    needed.update(names)
    for commit in commits:
        needed.update([commit.index.name, *(part.name for part in commit.parts)])
    return needed


def _needed_plans(store: Store, kept: Iterable[Manifest]) -> set[str]:
    """Names of the later plans that stay: all but those of compactions that are of the past."""
    kept = list(kept)
    newest = kept[-1] if kept else None
    stored = set(later_plan_ids(store.list(LATER_PLAN_PREFIX)))
    compactions = {
        version.plan_id
        for version in (newest.history if newest is not None else ())
        if version.operation == "compact"
    }
    used = {commit.plan_id for manifest in kept for commit in manifest.commits.values()}
    published = {v.plan_id for v in (newest.history if newest is not None else ())}
    waiting = {plan.plan_id for plan in open_plans(store, newest)}
    ids = (published - compactions) | (compactions & used) | waiting
    return {later_plan_name(plan_id) for plan_id in stored & ids}


def _sort_versions(store: Store, plan: Plan, options: GcOptions, now: float) -> _Versions:
    listed = {o.name: o for o in store.list_objects(MANIFEST_PREFIX)}
    numbers = manifest_versions(list(listed))
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        contents = list(pool.map(lambda n: store.get(manifest_name(n)), numbers))
    expired: list[Expired] = []
    manifests: list[Manifest] = []
    for number, data in zip(numbers, contents, strict=True):
        name = manifest_name(number)
        if is_expired(data):
            expired.append(Expired.from_bytes(name, data))
        else:
            manifests.append(Manifest.from_bytes(name, data, plan))
    last = set(numbers[-options.keep_versions :])
    kept = [
        m for m in manifests if m.version in last or now - listed[m.name].modified < options.keep_s
    ]
    ended = [
        Expired(
            version=m.version,
            manifest_sha256=m.sha256,
            created_at=int(listed[m.name].modified),
            objects=tuple(sorted(m.object_names())),
        )
        for m in manifests
        if m not in kept
    ]
    return _Versions(
        kept=tuple(kept),
        ending=(*(each for each in expired if each.objects), *ended),
        given_up=tuple(each.version for each in ended),
    )


def _end_versions(store: Store, ending: list[Expired]) -> None:
    """Give versions up, then delete what only they named, then say that it is deleted."""
    for expired in ending:
        store.put(expired.name, expired.to_bytes())
    names = {name for expired in ending for name in expired.objects}
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        for kind in range(len(_KINDS)):
            list(pool.map(store.delete, sorted(n for n in names if _kind(n) == kind)))
    for expired in ending:
        if expired.objects:
            store.put(expired.name, replace(expired, objects=()).to_bytes())


def _delete_strays(store: Store, strays: list[StoredObject]) -> None:
    """Delete what belongs to nothing, unless it was put again since it was listed."""

    def delete(stray: StoredObject) -> None:
        modified = store.modified(stray.name)
        # Listings and single answers of one store may round to the second, or not.
        if modified is not None and modified < stray.modified + 1:
            store.delete(stray.name)

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        for kind in range(len(_KINDS)):
            list(pool.map(delete, [stray for stray in strays if _kind(stray.name) == kind]))
