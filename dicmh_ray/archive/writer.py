"""Write an archive: start it, commit its units in any order from anywhere, finish it."""

import logging
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from dicmh_ray.archive.codec_files import files_name, write_codec_files
from dicmh_ray.archive.commit import (
    ANALYSIS_PREFIX,
    COMMIT_PREFIX,
    Commit,
    ObjectFacts,
    PartFacts,
    UnitStatistics,
    commit_name,
    created_by,
    new_attempt,
    read_commit,
    read_commits,
    winning_names,
)
from dicmh_ray.archive.joined_index import put_joined_index
from dicmh_ray.archive.manifest import (
    MANIFEST_PREFIX,
    Manifest,
    first_manifest,
    manifest_name,
    manifest_versions,
)
from dicmh_ray.archive.part import (
    INDEX_SCHEMA,
    PART_PREFIX,
    PartOptions,
    write_index,
    write_parts,
)
from dicmh_ray.archive.plan import PLAN_NAME, Plan
from dicmh_ray.archive.schema import EncodedImage
from dicmh_ray.archive.store import Store, open_store, probe
from dicmh_ray.archive.versions import newest_manifest
from dicmh_ray.errors import CommitFailedError, CommitUnknownError, PlanConflictError

logger = logging.getLogger(__name__)

INDEX_PREFIX = "index/"

_TABLE = re.compile(
    rf"({PART_PREFIX}part-|{INDEX_PREFIX}|{ANALYSIS_PREFIX}[^/]+/)[^/]*-[0-9a-f]{{16}}\.parquet"
)

COMMIT_LEASE_S = 6 * 3600
"""Parts that were put longer ago may be about to be deleted as garbage: they are not committed."""


def is_archive_table(name: str) -> bool:
    """Whether an object of an archive is a part, a row index or results, by its name."""
    return _TABLE.fullmatch(name) is not None


class ArchiveWriter:
    """One writer of an archive. Send it to as many workers as there are: it pickles.

    Nothing is held between calls but the address; a worker that dies loses its unit, no more.
    """

    def __init__(self, store: Store, plan: Plan, options: PartOptions | None = None) -> None:
        self.plan = plan
        """What the archive will hold."""
        self._store = store
        self._options = options or PartOptions()

    @property
    def uri(self) -> str:
        """Address of the archive, without credentials."""
        return self._store.uri

    @property
    def conditional(self) -> bool:
        """Whether the store honours conditional puts; if not, commits are named by attempt."""
        return self._store.conditional

    def committed_units(self) -> set[str]:
        """Names of the units that are done. Two listings.

        After a compaction a finished plan's commits may be gone; the manifest says that it is done.
        """
        if manifest_versions(self._store.list(MANIFEST_PREFIX)):
            return set(self.plan.positions)
        return set(winning_names(self._store.list(COMMIT_PREFIX))) & set(self.plan.positions)

    def commit_unit(
        self, unit_name: str, rows: Iterable[EncodedImage], *, info: Mapping[str, Any] | None = None
    ) -> Commit:
        """Store a unit's rows and publish them, all or nothing, once.

        When the unit is committed already, ``rows`` is not even iterated; when another attempt
        commits first, these rows become orphans. Either way the commit that counts is returned:
        calling again after any error is safe.

        Args:
            unit_name: one of the plan's.
            rows: the unit's rows, in any order; they are sorted. Keys must be unique.
            info: JSON-able facts about the attempt (host, seconds). Never credentials.

        Raises:
            ValueError: the plan has no such unit, or a row is not one the format can hold.
            CommitFailedError: nothing was published.
            CommitUnknownError: the store did not say whether it was.
        """
        if unit_name not in self.plan.positions:
            raise ValueError(f"the plan has no unit {unit_name!r}")
        done = self._find_commit(unit_name)
        if done is not None:
            return done
        attempt = new_attempt()
        kept = list(rows)
        started = _clocks()
        stored = self._put_parts(unit_name, kept)
        if stored is None:
            stored = self._put_parts(unit_name, kept, {"dicmh.attempt": attempt})
        facts, indexes = stored or ([], [])
        commit = Commit(
            unit=unit_name,
            plan_id=self.plan.plan_id,
            codec_id=self.plan.codec_id,
            attempt=attempt,
            parts=tuple(facts),
            index=self._put_index(unit_name, indexes),
            statistics=UnitStatistics.of(kept, sum(part.num_bytes for part in facts)),
            info=dict(info or {}),
            created_by=created_by(),
        )
        if max(now - then for then, now in zip(started, _clocks(), strict=True)) > COMMIT_LEASE_S:
            reason = f"its parts were put more than {COMMIT_LEASE_S // 3600} hours ago"
            raise CommitFailedError(self._commit_name(unit_name), reason)
        return self._publish(commit)

    def finalize(self) -> Manifest:
        """Write the manifest of the complete archive. Doing it again changes nothing.

        Raises:
            CommitFailedError: some units are not committed.
        """
        name = manifest_name(1)
        newest = newest_manifest(self._store, self.plan)
        if newest is not None:
            return newest
        commits = read_commits(self._store, self.plan)
        missing = len(self.plan.unit_names) - len(commits)
        if missing:
            reason = f"{missing} of {len(self.plan.unit_names)} units are not committed"
            raise CommitFailedError(name, reason)
        listing = ObjectFacts.of("files.json", self._store.get(files_name(self.plan.codec_id)))
        manifest = first_manifest(self.plan, commits, listing.sha256)
        put_joined_index(self._store, manifest)
        if self._store.put_once(name, manifest.to_bytes()):
            return manifest
        return Manifest.from_bytes(name, self._store.get(name), self.plan)

    def _put_parts(
        self, unit: str, rows: list[EncodedImage], extra: Mapping[str, str] | None = None
    ) -> tuple[list[PartFacts], list[pa.Table]] | None:
        """Store a unit's parts. None if a stray of that name is so old that it may be deleted."""
        footer = {
            "dicmh.plan_id": self.plan.plan_id,
            "dicmh.unit": unit,
            "dicmh.codec_id": self.plan.codec_id,
            "dicmh.created_by": created_by(),
            **(extra or {}),
        }
        facts, indexes = [], []
        for part in write_parts(unit, rows, footer=footer, options=self._options):
            before = self._store.modified(part.name) if extra is None else None
            self._store.put(part.name, part.data)
            if before is not None:
                after = self._store.modified(part.name)
                if after is None or after - before > COMMIT_LEASE_S:
                    return None
            facts.append(PartFacts.of(part))
            indexes.append(part.index)
        return facts, indexes

    def _commit_name(self, unit: str) -> str:
        """Where the unit's commit is put, if absent."""
        return commit_name(unit)

    def _put_index(self, unit: str, tables: list[pa.Table]) -> ObjectFacts:
        table = pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()
        data = write_index(table)
        facts = ObjectFacts.of("", data)
        name = f"{INDEX_PREFIX}{unit}-{facts.sha256[:16]}.parquet"
        self._store.put(name, data)
        return ObjectFacts.of(name, data)

    def _publish(self, commit: Commit) -> Commit:
        if self._store.conditional:
            if self._store.put_if_absent(self._commit_name(commit.unit), commit.to_bytes()):
                return commit
            logger.info("unit %s was committed by another attempt", commit.unit)
        else:
            self._store.put(commit_name(commit.unit, commit.attempt), commit.to_bytes())
        winner = self._find_commit(commit.unit)
        if winner is None:
            raise CommitUnknownError(self._commit_name(commit.unit), "it was there and is gone")
        return winner

    def _find_commit(self, unit: str) -> Commit | None:
        if self._store.conditional:
            try:
                return read_commit(self._store, self._commit_name(unit), self.plan)
            except FileNotFoundError:
                return None
        names = winning_names(
            [
                *self._store.list(f"{COMMIT_PREFIX}{unit}/"),
                *(n for n in self._store.list(COMMIT_PREFIX) if n == commit_name(unit)),
            ]
        )
        return read_commit(self._store, names[unit], self.plan) if unit in names else None


def create_archive(
    uri: str,
    *,
    plan: Plan,
    codec_files: Mapping[str, bytes],
    storage_options: Mapping[str, Any] | None = None,
    options: PartOptions | None = None,
) -> ArchiveWriter:
    """Start an archive, or continue one that was started with an equal plan.

    Args:
        uri: folder or prefix on any fsspec store; it need not exist.
        plan: what the archive will hold.
        codec_files: the checkpoint's files by relative name; they are stored with the rows.
        storage_options: for the fsspec file system; written nowhere.
        options: sizes of parts and row groups.

    Raises:
        PlanConflictError: the archive was started with another plan.
    """
    store = open_store(uri, storage_options)
    if not probe(store):
        store = open_store(uri, storage_options, conditional=False)
    data = plan.to_bytes()
    if not store.put_once(PLAN_NAME, data):
        found = Plan.from_bytes(store.get(PLAN_NAME))
        raise PlanConflictError(store.uri, plan.plan_id, found.plan_id)
    write_codec_files(store, plan.codec_id, codec_files)
    return ArchiveWriter(store, plan, options)


def _clocks() -> tuple[float, float]:
    """Two clocks: one may stand still while a machine sleeps, the other may be set."""
    return time.monotonic(), time.time()
