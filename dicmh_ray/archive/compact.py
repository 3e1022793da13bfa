"""Rewrite many small parts into few large ones, as a new version: same rows, fewer objects.

A compaction is a job like an append: it has a plan (which commits become which), commits group by
group, may die anywhere and be continued by the next call, and is published in one step. No
stream is encoded again; a row keeps every byte and its checksum. Older versions keep the old parts
until :mod:`dicmh_ray.archive.gc` removes them.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from dicmh_ray.archive.commit import (
    PARALLEL_REQUESTS,
    Commit,
    UnitStatistics,
    job_commit_name,
)
from dicmh_ray.archive.later import LaterWriter, open_for_later, put_plan
from dicmh_ray.archive.manifest import Manifest, next_manifest
from dicmh_ray.archive.part import PartOptions, open_part
from dicmh_ray.archive.plan import Plan
from dicmh_ray.archive.schema import EncodedImage, from_batch, row_crc32c
from dicmh_ray.archive.snapshot import Snapshot, open_snapshot, read_object
from dicmh_ray.archive.store import Store
from dicmh_ray.archive.versions import (
    COMPACT,
    OPERATION_FIELD,
    can_be_compacted,
    is_compaction,
    newest_manifest,
    open_plans,
    read_plan,
    source_names,
)
from dicmh_ray.errors import AppendError, CorruptObjectError, CorruptRowError

logger = logging.getLogger(__name__)

TARGET_BYTES = 256 * 2**20
TARGET_FIELD = "target_bytes"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompactReport:
    """What a compaction did, or would do."""

    uri: str
    """Address of the archive, without credentials."""

    version: int
    """Newest version of the archive afterwards."""

    groups: int
    """Groups of units that were rewritten, each into one."""

    units_before: int
    """Units in the newest version before."""

    units_after: int
    """And after."""

    parts_before: int
    """Parts in the newest version before."""

    parts_after: int
    """And after; an estimate in a dry run."""

    bytes_rewritten: int
    """Bytes of the parts that were read and written again."""

    is_superseded: bool = False
    """Another compaction was faster: nothing was published."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class CompactWriter(LaterWriter):
    """Runs one compaction's plan."""

    def derive(self, newest: Manifest, commits: Mapping[str, Commit]) -> Manifest | None:
        """The newest version with each group in the place of its sources."""
        made = {commit.unit: commit for commit in commits.values()}
        kept_at: dict[str, str] = {}
        gone: set[str] = set()
        for unit in self.plan.units:
            sources = self.sources(newest, unit)
            if sources is None:
                return None
            commit = made[str(unit["name"])]
            total = sum((source.statistics for source in sources), start=UnitStatistics())
            if replace(total, bytes_out=0) != replace(commit.statistics, bytes_out=0):
                name = job_commit_name(self.plan.plan_id, commit.unit)
                raise CorruptObjectError(name, "does not have the rows of what it replaces")
            gone.update(source_names(unit))
            kept_at[source_names(unit)[0]] = commit.unit
        replaced: dict[str, Commit] = {}
        for name, commit in newest.commits.items():
            if name not in gone:
                replaced[name] = commit
            elif name in kept_at:
                group = kept_at[name]
                replaced[job_commit_name(self.plan.plan_id, group)] = made[group]
        return next_manifest(newest, "compact", self.plan.plan_id, replaced)

    def sources(self, newest: Manifest, unit: Mapping[str, Any]) -> list[Commit] | None:
        """The commits that a unit rewrites; None when one is no longer there."""
        found = [newest.commits.get(name) for name in source_names(unit)]
        digests = [source.get("sha256") for source in unit["commits"]]
        sound = [commit for commit in found if commit is not None]
        if [hashlib.sha256(commit.to_bytes()).hexdigest() for commit in sound] != digests:
            return None
        return sound

    def run(self, progress: Callable[[int, int], None] | None = None) -> int | None:
        """Rewrite every group that is not yet, and publish.

        Returns:
            Bytes of the parts that were replaced, or None: another compaction was faster.
        """
        store, units = self._store, self.plan.units
        first = read_plan(store)
        newest = newest_manifest(store, first)
        if newest is None or newest.has_published(self.plan.plan_id):
            return 0
        num_bytes = 0
        for number, unit in enumerate(units):
            sources = self.sources(newest, unit)
            if sources is None:
                return None
            try:
                self.rewrite(unit, sources)
            except CorruptObjectError:
                # Somebody else's version may be out, and our sources be garbage by now.
                now = newest_manifest(store, first)
                if now is not None and can_be_compacted(now, self.plan):
                    raise
                return None
            num_bytes += sum(commit.num_bytes for commit in sources)
            if progress is not None:
                progress(number + 1, len(units))
        if self.publish() is None:
            logger.info("another compaction was faster than %s", self.plan.plan_id[:16])
            return None
        return num_bytes

    def rewrite(self, unit: Mapping[str, Any], sources: list[Commit]) -> Commit:
        """Write one group's rows again and commit them, unless that is done."""
        causes: Counter[str] = Counter()
        for source in sources:
            causes.update(source.info.get("causes", {}))
        psnr_sum = sum(source.info.get("psnr_sum", 0.0) for source in sources)
        info = {"causes": dict(sorted(causes.items())), "psnr_sum": psnr_sum}
        return self.commit_unit(str(unit["name"]), read_rows(self._store, sources), info=info)


def read_rows(store: Store, commits: list[Commit]) -> Iterator[EncodedImage]:
    """Every row of some units, whole, part by part and checked.

    Raises:
        CorruptObjectError: a part is missing or damaged.
        CorruptRowError: a row does not match its checksum.
    """
    for commit in commits:
        for part in commit.parts:
            file = open_part(pa.BufferReader(read_object(store, part)), part.name)
            for group in range(file.num_row_groups):
                rows = from_batch(file.read_row_group(group, use_threads=False))
                for number, row in enumerate(rows):
                    if row_crc32c(row) != row.crc32c:
                        what = "CRC-32C is wrong though the part is not damaged"
                        raise CorruptRowError(part.name, group, number, row.key, what)
                    yield row


def compact_archive(
    uri: str,
    *,
    target_bytes: int = TARGET_BYTES,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> CompactReport:
    """Rewrite neighbouring small units into one each, and publish that as a new version.

    A compaction that was interrupted, or that another process is at, is finished first. Needs the
    memory of one group: a few times ``target_bytes``.

    Args:
        uri: address of a finished archive.
        target_bytes: size of a part to aim for. What has half of it stays as it is.
        dry_run: only say what would be done.
        progress: called with the number of groups that are done, and of all.
        storage_options: for the fsspec file system; written nowhere.

    Raises:
        ArchiveNotFoundError: there is no archive.
        AppendError: it is unfinished, or its store ignores conditional puts.
        CorruptObjectError: a part is damaged; nothing is published.
        ValueError: ``target_bytes`` is below 1.
    """
    if target_bytes < 1:
        raise ValueError(f"target_bytes is {target_bytes}, wanted 1 or more")
    if dry_run:
        return _foretell(open_snapshot(uri, storage_options=storage_options), target_bytes)
    store, before = open_for_later(uri, storage_options)
    options = PartOptions(part_bytes=target_bytes)
    groups = num_bytes = 0
    rewritten: int | None = 0
    for plan in _plans(store, before, target_bytes):
        rewritten = CompactWriter(store, plan, options).run(progress)
        if rewritten is None:
            break
        groups += len(plan.units)
        num_bytes += rewritten
    return _report(
        store.uri,
        before,
        newest_manifest(store, None),
        groups=groups,
        num_bytes=num_bytes,
        is_superseded=rewritten is None,
    )


def _plans(store: Store, newest: Manifest, target_bytes: int) -> Iterator[Plan]:
    """What is to be run, one after the other: first what somebody began."""
    yield from (plan for plan in open_plans(store, newest) if is_compaction(plan))
    first = read_plan(store)
    manifest = newest_manifest(store, first) or newest
    commits = tuple(manifest.commits.values())
    snapshot = Snapshot(store=store, plan=first, commits=commits, manifest=manifest)
    plan = plan_compaction(snapshot, target_bytes)
    if plan.units:
        put_plan(store, plan)
        yield plan


def _foretell(snapshot: Snapshot, target_bytes: int) -> CompactReport:
    if snapshot.manifest is None:
        raise AppendError(snapshot.uri, "its first job is unfinished; finish that one first")
    groups = plan_compaction(snapshot, target_bytes).units
    commits = snapshot.manifest.commits
    sources = [commits[name] for group in groups for name in source_names(group)]
    num_bytes = [sum(commits[n].num_bytes for n in source_names(group)) for group in groups]
    new_parts = sum(-(-size // target_bytes) for size in num_bytes)
    report = _report(
        snapshot.uri,
        snapshot.manifest,
        None,
        groups=len(groups),
        num_bytes=sum(num_bytes),
        is_superseded=False,
    )
    return replace(
        report,
        units_after=len(commits) - len(sources) + len(groups),
        parts_after=report.parts_before - sum(len(c.parts) for c in sources) + new_parts,
    )


def plan_compaction(snapshot: Snapshot, target_bytes: int) -> Plan:
    """Which units of a snapshot become one; the same answer for the same snapshot.

    Only neighbours are joined, and only as long as no key repeats: the order in which equal keys
    come is what a point read goes by.
    """
    if snapshot.manifest is None:
        raise AppendError(snapshot.uri, "its first job is unfinished; finish that one first")
    groups: list[list[str]] = []
    group: list[str] = []
    seen: set[str] = set()
    num_bytes = 0
    commits = snapshot.manifest.commits
    for name, commit, keys in _with_keys(snapshot, target_bytes):
        joins = keys is not None and num_bytes + commit.num_bytes <= target_bytes
        if not joins or seen & (keys or set()):
            groups.append(group)
            group, seen, num_bytes = [], set(), 0
        if keys is not None:
            group.append(name)
            seen |= keys
            num_bytes += commit.num_bytes
    groups.append(group)
    worth = [
        group
        for group in groups
        if len(group) > 1 or (group and _is_fragmented(commits[group[0]], target_bytes))
    ]
    units = [
        {
            "name": f"{number:06d}",
            "commits": [
                {"name": name, "sha256": hashlib.sha256(commits[name].to_bytes()).hexdigest()}
                for name in group
            ],
        }
        for number, group in enumerate(worth)
    ]
    parameters = {OPERATION_FIELD: COMPACT, TARGET_FIELD: target_bytes}
    return Plan(units=units, codec_id=snapshot.codec_id, parameters=parameters)


def _with_keys(
    snapshot: Snapshot, target_bytes: int
) -> Iterator[tuple[str, Commit, set[str] | None]]:
    """Each commit with the keys of its rows; None for one that is large enough to stay."""

    def keys(commit: Commit) -> set[str] | None:
        is_small = 2 * commit.num_bytes <= target_bytes
        if not is_small and not _is_fragmented(commit, target_bytes):
            return None
        return set(snapshot.read_index(commit)["key"].to_pylist())

    entries = list(snapshot.manifest.commits.items()) if snapshot.manifest is not None else []
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        for start in range(0, len(entries), PARALLEL_REQUESTS):
            some = entries[start : start + PARALLEL_REQUESTS]
            for (name, commit), found in zip(
                some, pool.map(keys, [commit for _, commit in some]), strict=True
            ):
                yield name, commit, found


def _is_fragmented(commit: Commit, target_bytes: int) -> bool:
    """Whether a unit has more than twice the parts that its rows need."""
    return len(commit.parts) > 2 * max(1, -(-commit.num_bytes // target_bytes))


def _report(
    uri: str,
    before: Manifest,
    after: Manifest | None,
    *,
    groups: int,
    num_bytes: int,
    is_superseded: bool,
) -> CompactReport:
    after = after or before
    return CompactReport(
        uri=uri,
        version=after.version,
        groups=groups,
        units_before=before.history[-1].units,
        units_after=after.history[-1].units,
        parts_before=before.history[-1].parts,
        parts_after=after.history[-1].parts,
        bytes_rewritten=num_bytes,
        is_superseded=is_superseded,
    )
