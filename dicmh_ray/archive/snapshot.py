"""What an archive holds at one moment: a fixed list of commits, whatever is written meanwhile."""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from dicmh_ray.archive.codec_files import read_codec_files
from dicmh_ray.archive.commit import (
    PARALLEL_REQUESTS,
    Commit,
    ObjectFacts,
    PartFacts,
    UnitStatistics,
    read_commits,
)
from dicmh_ray.archive.manifest import Manifest
from dicmh_ray.archive.part import INDEX_SCHEMA, index_part, read_index, write_index
from dicmh_ray.archive.plan import Plan
from dicmh_ray.archive.store import Store, open_store
from dicmh_ray.archive.versions import newest_manifest, read_manifest, read_plan
from dicmh_ray.errors import CommitFailedError, CorruptObjectError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveStatistics(UnitStatistics):
    """Sums over the whole snapshot, and where it comes from."""

    units: int
    """Units in the plan; of a finished archive those of this version."""

    committed: int
    """Units whose rows are in this snapshot."""

    mean_bpp: float | None
    """Bits of all ``ok`` bitstreams over all their pixels; None without such rows."""

    codec_id: str
    """Checkpoint, 64 hex digits."""

    plan_id: str
    """Plan, 64 hex digits."""

    parameters: Mapping[str, Any]
    """The plan's parameters."""

    archive_version: int | None
    """Of this snapshot; None while the archive is unfinished."""

    created_by: str
    """Software that wrote the newest record."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An immutable list of committed units. Pickles small; workers read from it alone."""

    store: Store
    """Where the objects are."""

    plan: Plan
    """What the archive was begun with."""

    commits: tuple[Commit, ...]
    """Committed units: in plan order, then those that were appended."""

    manifest: Manifest | None
    """None while the archive is unfinished."""

    @property
    def uri(self) -> str:
        """Address of the archive, without credentials."""
        return self.store.uri

    @property
    def is_complete(self) -> bool:
        """Whether a manifest says that every unit of the plan is here."""
        return self.manifest is not None

    @property
    def codec_id(self) -> str:
        """Checkpoint that wrote the bitstreams."""
        return self.plan.codec_id

    @cached_property
    def parts(self) -> tuple[PartFacts, ...]:
        """All parts in row order."""
        return tuple(part for commit in self.commits for part in commit.parts)

    @cached_property
    def statistics(self) -> ArchiveStatistics:
        """Sums over all commits; no request."""
        total = sum((commit.statistics for commit in self.commits), start=UnitStatistics())
        makers: list[Manifest | Commit] = [*self.commits[:1]]
        if self.manifest is not None:
            makers.insert(0, self.manifest)
        return ArchiveStatistics(
            **asdict(total),
            units=len(self.plan.units if self.manifest is None else self.commits),
            committed=len(self.commits),
            mean_bpp=8 * total.ok_bitstream_bytes / total.ok_pixels if total.ok_pixels else None,
            codec_id=self.plan.codec_id,
            plan_id=self.plan.plan_id,
            parameters=self.plan.parameters,
            archive_version=None if self.manifest is None else self.manifest.version,
            created_by=makers[0].created_by if makers else "",
        )

    def codec_files(self) -> dict[str, bytes]:
        """The checkpoint's files by relative name, verified."""
        return read_codec_files(self.store, self.codec_id)

    def read_index(self, commit: Commit) -> pa.Table:
        """The row index of one unit, verified; one request.

        An index that is missing or damaged is taken from the parts again, which reads them whole;
        a warning says so.

        Raises:
            CorruptObjectError: a part is needed, and is missing or damaged too.
        """
        try:
            return read_index(commit.index.name, read_object(self.store, commit.index))
        except CorruptObjectError as exc:
            logger.warning("%s; reading the parts of unit %s instead", exc, commit.unit)
            return rebuild_index(self.store, commit)

    def read_indexes(self) -> list[pa.Table]:
        """The row index of every unit, in plan order."""
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return list(pool.map(self.read_index, self.commits))


def rebuild_index(store: Store, commit: Commit) -> pa.Table:
    """A unit's row index from its parts alone.

    Raises:
        CorruptObjectError: a part is missing or damaged.
    """
    tables = [index_part(part.name, read_object(store, part)) for part in commit.parts]
    return pa.concat_tables([INDEX_SCHEMA.empty_table(), *tables])


def reindex(uri: str, *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Write every missing or damaged row index again, from the parts.

    Returns:
        Names of the objects that were restored.

    Raises:
        CommitFailedError: this Parquet library writes an index with other bytes than were
            committed. Readers do without the object.
        CorruptObjectError: a part is damaged too.
    """
    snapshot = open_snapshot(uri, storage_options=storage_options)
    restored = []
    for commit in snapshot.commits:
        try:
            read_object(snapshot.store, commit.index)
        except CorruptObjectError:
            data = write_index(rebuild_index(snapshot.store, commit))
            if ObjectFacts.of(commit.index.name, data) != commit.index:
                reason = "rebuilt with other bytes than were committed; readers rebuild it"
                raise CommitFailedError(commit.index.name, reason) from None
            snapshot.store.put(commit.index.name, data)
            restored.append(commit.index.name)
    return restored


def read_object(store: Store, facts: ObjectFacts | PartFacts) -> bytes:
    """A whole object, its SHA-256 verified.

    Raises:
        CorruptObjectError: it is missing or damaged.
    """
    try:
        data = store.get(facts.name)
    except FileNotFoundError as exc:
        raise CorruptObjectError(facts.name, "is missing") from exc
    check_object(facts, data)
    return data


def check_object(facts: ObjectFacts | PartFacts, data: bytes) -> None:
    """Check that these are the bytes of a stored object.

    Raises:
        CorruptObjectError: they are not those that were committed.
    """
    found = ObjectFacts.of(facts.name, data)
    if found.num_bytes != facts.num_bytes:
        raise CorruptObjectError(
            facts.name, f"has {found.num_bytes} bytes, {facts.num_bytes} were committed"
        )
    if found.sha256 != facts.sha256:
        raise CorruptObjectError(facts.name, "content does not match its SHA-256")


def open_snapshot(
    uri: str, *, version: int | None = None, storage_options: Mapping[str, Any] | None = None
) -> Snapshot:
    """Open an archive, finished or not.

    Args:
        uri: address of the archive.
        version: of the archive, from 1; None is the newest, or what is committed so far. What a
            version holds never changes, whatever is appended or compacted after it.
        storage_options: for the fsspec file system.

    Raises:
        ArchiveNotFoundError: there is no plan, or no such version.
        VersionExpiredError: the version was given up.
        CorruptObjectError: a plan, commit or manifest is damaged.
    """
    store = open_store(uri, storage_options)
    plan = read_plan(store)
    if version is None:
        manifest = newest_manifest(store, plan)
    else:
        manifest = read_manifest(store, version, plan)
    if manifest is None:
        commits = tuple(read_commits(store, plan).values())
        return Snapshot(store=store, plan=plan, commits=commits, manifest=None)
    return Snapshot(
        store=store, plan=plan, commits=tuple(manifest.commits.values()), manifest=manifest
    )
