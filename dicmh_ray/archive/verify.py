"""Check an archive to the byte: every object that its plan, commits and manifest name, every row.

A whole-object SHA-256 finds any damage; the row checksums then say which rows it hit, so that a
report names the object, the row group and the row. A damaged plan or commit does not end the
check: what it named is checked through what else names it.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dicmh_ray.archive.codec_files import CODEC_PREFIX, files_name, list_codec_files
from dicmh_ray.archive.commit import (
    ANALYSIS_PREFIX,
    COMMIT_PREFIX,
    Commit,
    ObjectFacts,
    PartFacts,
    UnitStatistics,
    check_commit,
    job_commit_names,
    winning_names,
)
from dicmh_ray.archive.joined_index import check_joined_index
from dicmh_ray.archive.manifest import (
    MANIFEST_PREFIX,
    Expired,
    Manifest,
    is_expired,
    manifest_name,
    manifest_versions,
)
from dicmh_ray.archive.part import (
    check_chunk,
    index_part,
    index_row_group,
    open_part,
    read_index,
    small_chunks,
)
from dicmh_ray.archive.plan import PLAN_NAME, Plan, later_plan_ids, later_plan_name
from dicmh_ray.archive.schema import (
    BLOBS,
    SMALL_COLUMNS,
    EncodedImage,
    from_batch,
    row_crc32c,
)
from dicmh_ray.archive.store import Store, open_store
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.errors import (
    ArchiveError,
    ArchiveNotFoundError,
    BitstreamError,
    CorruptObjectError,
    DicmhError,
)

Decode = Callable[[Sequence[bytes]], object]
_MAX_CHECKS = 3
"""A check that finds damage while a garbage collector deletes is made again."""

_SUBSET = re.compile(r"(\d{1,9})/(\d{1,9})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is not as it was committed."""

    name: str
    """Object."""

    what: str
    """What is wrong with it."""

    row_group: int | None = None
    """In a part, from 0."""

    row: int | None = None
    """In the row group, from 0."""

    key: str | None = None
    """Of the row."""

    def __str__(self) -> str:
        place = self.name
        if self.row_group is not None:
            place += f" row group {self.row_group}"
        if self.row is not None:
            place += f" row {self.row} ({self.key!r})"
        return f"{place}: {self.what}"


@dataclass(kw_only=True)
class VerifyReport:
    """What a check found."""

    uri: str
    """Address of the archive, without credentials."""

    problems: list[Problem] = field(default_factory=list)
    """Damage: what was committed is not what is stored."""

    notes: list[str] = field(default_factory=list)
    """What is worth knowing and no damage: strays, missing units, open jobs, repeated keys."""

    unchecked: str | None = None
    """Why the check could not be made, or not to its end."""

    is_complete: bool = False
    """Whether a sound manifest lists every unit."""

    objects: int = 0
    """Objects read."""

    bytes_read: int = 0
    """Their bytes."""

    rows: int = 0
    """Rows whose checksum was computed."""

    @property
    def exit_code(self) -> int:
        """0: sound. 1: damaged. 2: could not be checked."""
        if self.problems:
            return 1
        return 2 if self.unchecked is not None else 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "exit_code": self.exit_code}


def verify_archive(
    uri: str,
    *,
    subset: str | None = None,
    decode: Decode | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Check every object and every row of an archive, of all its versions.

    Args:
        uri: address of the archive.
        subset: ``"n/t"``: of the units, every ``t``-th from the ``n``-th (1 <= n <= t). All other
            objects are always checked; the subsets 1/t to t/t together are a full check.
        decode: called with a list of one bitstream for each ``ok`` row; raises a ``DicmhError``
            when it cannot decode it.
        storage_options: for the fsspec file system.
    """
    first, step = _parse_subset(subset)
    store = open_store(uri, storage_options)
    for _ in range(_MAX_CHECKS):
        check = _Check(store, VerifyReport(uri=store.uri), decode)
        try:
            check.run(first, step)
            if not check.report.problems or set(check.names) <= set(store.list("")):
                break
        except ArchiveNotFoundError as exc:
            check.report.unchecked = str(exc)
            break
        except OSError as exc:
            check.report.unchecked = f"{store.uri} cannot be read: {exc}"
            break
    return check.report


class _Check:
    """One run: what is known of the archive so far, and what was found."""

    def __init__(self, store: Store, report: VerifyReport, decode: Decode | None) -> None:
        self.store, self.report, self.decode = store, report, decode
        self.names: list[str] = []
        self.known: set[str] = set()
        self.keys: set[str] = set()
        self.is_newest = True

    def run(self, first: int, step: int) -> None:
        self.names = self.store.list("")
        if not self.names:
            raise ArchiveNotFoundError(self.store.uri)
        plan = self.check_plan()
        manifests = self.check_manifests(plan)
        newest = manifests[-1] if manifests else None
        plans = self.check_later_plans(newest)
        if plan is not None:
            plans[plan.plan_id] = plan
        commits = self.check_commits(plan, newest, plans)
        self.check_completeness(plan, newest, commits)
        others = self.check_older_commits(manifests[:-1], commits, plans)
        others |= self.check_open_jobs(newest, plans)
        self.check_joined_indexes(manifests)
        self.check_codec(plan, newest, {**commits, **others})
        for number, (name, commit) in enumerate([*commits.items(), *others.items()]):
            self.known.update([commit.index.name, *(part.name for part in commit.parts)])
            self.is_newest = number < len(commits)
            if number % step == first:
                self.check_unit(name, commit)
        stray = [
            name
            for name in self.names
            if name not in self.known and not name.startswith(ANALYSIS_PREFIX)
        ]
        self.report.notes += [f"{name}: stray object, part of nothing" for name in stray]

    def check_plan(self) -> Plan | None:
        data = self.read(PLAN_NAME)
        if data is None:
            return None
        try:
            return Plan.from_bytes(data)
        except ArchiveError as exc:
            self.damaged(PLAN_NAME, exc)
            return None

    def check_manifests(self, plan: Plan | None) -> list[Manifest]:
        """Every manifest; the sound ones, oldest first."""
        sound: list[Manifest] = []
        digests: dict[int, str] = {}
        versions = manifest_versions([n for n in self.names if n.startswith(MANIFEST_PREFIX)])
        for version in range(1, max(versions, default=0) + 1):
            name = manifest_name(version)
            data = self.read(name)
            if data is None:
                continue
            try:
                if is_expired(data):
                    digests[version] = Expired.from_bytes(name, data).manifest_sha256
                else:
                    sound.append(Manifest.from_bytes(name, data, plan))
                    digests[version] = hashlib.sha256(data).hexdigest()
            except ArchiveError as exc:
                self.damaged(name, exc)
        for entry in sound[-1].history[1:] if sound else ():
            parent = entry.archive_version - 1
            if digests.get(parent, entry.parent_sha256) != entry.parent_sha256:
                what = f"is not the version that manifest {sound[-1].version} follows"
                self.problem(manifest_name(parent), what)
        return sound

    def check_later_plans(self, newest: Manifest | None) -> dict[str, Plan]:
        """The plans of later jobs, by id. Those of appends must be there."""
        stored = set(later_plan_ids(self.names))
        published = newest.history if newest is not None else ()
        wanted = {v.plan_id for v in published if v.operation == "append"}
        plans = {}
        for plan_id in sorted(stored | wanted):
            name = later_plan_name(plan_id)
            data = self.read(name)
            if data is None:
                continue
            try:
                plans[plan_id] = Plan.from_bytes(data, name)
            except ArchiveError as exc:
                self.damaged(name, exc)
        return plans

    def check_commits(
        self, plan: Plan | None, manifest: Manifest | None, plans: Mapping[str, Plan]
    ) -> dict[str, Commit]:
        """The commits of the newest version, or those of an unfinished archive, in plan order."""
        if manifest is not None:
            return self.check_listed(manifest, plans)
        winners = winning_names(n for n in self.names if n.startswith(COMMIT_PREFIX))
        found = self.check_unlisted(sorted(winners.values()), plan)
        order = plan.positions if plan is not None else {}
        return dict(sorted(found.items(), key=lambda item: order.get(item[1].unit, len(order))))

    def check_listed(
        self, manifest: Manifest, plans: Mapping[str, Plan], skip: Collection[str] = ()
    ) -> dict[str, Commit]:
        """Every commit that a manifest lists, against its object."""
        found = {name: commit for name, commit in manifest.commits.items() if name not in skip}
        for name, listed in found.items():
            data = self.read(name)
            if data is None:
                continue
            try:
                commit = Commit.from_bytes(name, data)
                check_commit(name, commit, plans.get(listed.plan_id))
            except ArchiveError as exc:
                self.damaged(name, exc)
                continue
            if data != listed.to_bytes():
                self.problem(name, "is not the commit that the manifest lists")
        return found

    def check_unlisted(self, names: Sequence[str], plan: Plan | None) -> dict[str, Commit]:
        """The sound ones of some commits that no manifest lists."""
        found = {}
        for name in names:
            data = self.read(name)
            if data is None:
                continue
            try:
                commit = Commit.from_bytes(name, data)
                check_commit(name, commit, plan)
            except ArchiveError as exc:
                self.damaged(name, exc)
                continue
            found[name] = commit
        return found

    def check_older_commits(
        self,
        manifests: Sequence[Manifest],
        newest: Mapping[str, Commit],
        plans: Mapping[str, Plan],
    ) -> dict[str, Commit]:
        """The commits of older versions that the newest one has no longer."""
        found: dict[str, Commit] = {}
        for manifest in manifests:
            found |= self.check_listed(manifest, plans, {*newest, *found})
        return found

    def check_open_jobs(
        self, newest: Manifest | None, plans: Mapping[str, Plan]
    ) -> dict[str, Commit]:
        """What later jobs have committed and no version has published yet."""
        found: dict[str, Commit] = {}
        for plan_id, plan in plans.items():
            if newest is None or plan_id == newest.plan_id or newest.has_published(plan_id):
                continue
            done = job_commit_names(self.names, plan)
            found |= self.check_unlisted(list(done.values()), plan)
            self.report.notes.append(
                f"{later_plan_name(plan_id)}: not published, "
                f"{len(plan.units) - len(done)} of {len(plan.units)} units are not committed"
            )
        return found

    def check_completeness(
        self, plan: Plan | None, manifest: Manifest | None, commits: Mapping[str, Commit]
    ) -> None:
        self.report.is_complete = manifest is not None
        if manifest is not None or plan is None:
            return
        missing = len(plan.units) - len({commit.unit for commit in commits.values()})
        if missing:
            self.report.notes.append(
                f"unfinished: {missing} of {len(plan.units)} units are not committed"
            )
        elif not any(name.startswith(MANIFEST_PREFIX) for name in self.names):
            what = "is missing though every unit is committed; resuming the job writes it"
            self.problem(manifest_name(1), what)

    def check_codec(
        self, plan: Plan | None, manifest: Manifest | None, commits: Mapping[str, Commit]
    ) -> None:
        ids = {commit.codec_id for commit in commits.values()}
        if plan is not None:
            ids.add(plan.codec_id)
        for codec_id in sorted(ids):
            name = files_name(codec_id)
            if not commits and name not in self.names:
                self.report.notes.append(f"{name}: not written yet")
                continue
            data = self.read(name)
            if data is None:
                continue
            if manifest is not None and hashlib.sha256(data).hexdigest() != manifest.codec_sha256:
                self.problem(name, "is not the list that the manifest names")
            try:
                files = list_codec_files(codec_id, data)
            except ArchiveError as exc:
                self.damaged(name, exc)
                self.known.update(
                    n for n in self.names if n.startswith(f"{CODEC_PREFIX}{codec_id}/")
                )
                continue
            for facts in files:
                self.read_known(facts)

    def check_joined_indexes(self, manifests: Sequence[Manifest]) -> None:
        """Those that are there: a version may be without, its units have an index each."""
        for manifest in manifests:
            if manifest.joined_index not in self.names or manifest.joined_index in self.known:
                continue
            data = self.read(manifest.joined_index)
            if data is None:
                continue
            try:
                check_joined_index(manifest, data)
            except CorruptObjectError as exc:
                self.damaged(manifest.joined_index, exc)

    def check_unit(self, commit_object: str, commit: Commit) -> None:
        index = self.check_index(commit)
        before = len(self.report.problems)
        total = UnitStatistics(bytes_out=commit.num_bytes)
        derived = []
        for facts in commit.parts:
            data = self.read_known(facts)
            if data is None:
                continue
            rows = None if index is None else index.filter(pc.equal(index["part"], facts.name))
            table = self.check_part(facts, data)
            derived.append(table)
            for row in self.check_rows(facts, data, rows if table is None else table):
                total += UnitStatistics.of([row], bytes_out=0)
        if len(self.report.problems) > before:
            return
        sound = [table for table in derived if table is not None]
        if index is not None and not index.equals(pa.concat_tables([index.slice(0, 0), *sound])):
            self.problem(commit.index.name, "is not the index of the unit's parts")
        if total != commit.statistics:
            self.problem(commit_object, "statistics are not those of the unit's rows")

    def check_index(self, commit: Commit) -> pa.Table | None:
        data = self.read_known(commit.index)
        if data is None or ObjectFacts.of(commit.index.name, data) != commit.index:
            return None
        try:
            return read_index(commit.index.name, data)
        except ArchiveError as exc:
            self.damaged(commit.index.name, exc)
            return None

    def check_part(self, facts: PartFacts, data: bytes) -> pa.Table | None:
        """The part's own index, when the part is sound."""
        if hashlib.sha256(data).hexdigest() != facts.sha256:
            return None
        try:
            return index_part(facts.name, data)
        except CorruptObjectError as exc:
            self.damaged(facts.name, exc)
            return None

    def check_rows(
        self, facts: PartFacts, data: bytes, places: pa.Table | None
    ) -> Iterator[EncodedImage]:
        """The sound rows of a part; the others become problems.

        ``places`` is the index of the part. With it, one damaged blob costs one row, though Parquet
        refuses the whole page that holds it. Parquet never sees bytes that are not as written: its
        C++ reader aborts the process on some.
        """
        start = facts.num_bytes - facts.footer_bytes
        if hashlib.sha256(data[start:]).hexdigest() != facts.footer_sha256:
            self.problem(facts.name, "footer is damaged: its rows cannot be told apart")
            return
        file = open_part(pa.BufferReader(data), facts.name)
        for group in range(len(facts.row_groups)):
            try:
                rows = list(from_batch(self.checked_row_group(facts, data, file, group, places)))
            except (ArchiveError, OSError, pa.ArrowException) as exc:
                what = str(exc).removeprefix(f"{facts.name}: row group {group}: ")
                self.report.problems.append(Problem(name=facts.name, row_group=group, what=what))
                continue
            for number, row in enumerate(rows):
                self.report.rows += 1
                fault = self.fault(row)
                if fault is None:
                    yield row
                    continue
                self.report.problems.append(
                    Problem(name=facts.name, row_group=group, row=number, key=row.key, what=fault)
                )

    def checked_row_group(
        self,
        facts: PartFacts,
        data: bytes,
        file: pq.ParquetFile,
        group: int,
        places: pa.Table | None,
    ) -> pa.Table:
        for column, (start, length) in small_chunks(file.metadata, group).items():
            chunk = data[start : start + length]
            check_chunk(facts.name, group, facts.row_groups[group], column, chunk)
        table = file.read_row_group(group, columns=list(SMALL_COLUMNS), use_threads=False)
        if places is None:
            places = index_row_group(facts.name, data, file.metadata, group, table)
        places = places.filter(pc.equal(places["row_group"], group))
        if len(places) != len(table):
            raise CorruptObjectError(facts.name, "its index has another number of rows")
        for blob in BLOBS:
            offsets = places[f"{blob}_offset"].to_pylist()
            lengths = places[f"{blob}_length"].to_pylist()
            values = [data[o : o + n] for o, n in zip(offsets, lengths, strict=True)]
            table = table.append_column(blob, pa.array(values, pa.binary()))
        return table

    def fault(self, row: EncodedImage) -> str | None:
        """What is wrong with a row, if anything."""
        found = row_crc32c(row)
        if found != row.crc32c:
            return f"CRC-32C is {found:#010x}, the row says {row.crc32c:#010x}"
        if self.is_newest:
            if row.key in self.keys:
                self.report.notes.append(f"{row.key!r}: key of more than one row")
            self.keys.add(row.key)
        if row.original and hashlib.sha256(row.original).hexdigest() != row.original_sha256:
            return "original does not match its SHA-256"
        stream = row.base + row.detail
        try:
            if stream and prefix_bytes(stream) != row.prefix_bytes:
                return "prefix_bytes are not the ends of the bitstream's states"
        except BitstreamError as exc:
            return f"bitstream: {exc}"
        if self.decode is not None and row.status == "ok":
            try:
                self.decode([stream])
            except DicmhError as exc:
                return f"does not decode: {exc}"
        return None

    def read_known(self, facts: ObjectFacts | PartFacts) -> bytes | None:
        """An object whose facts are known. Damage is reported; what there is comes back."""
        data = self.read(facts.name)
        if data is None:
            return None
        if len(data) != facts.num_bytes:
            self.problem(facts.name, f"has {len(data)} bytes, wanted {facts.num_bytes}")
        elif hashlib.sha256(data).hexdigest() != facts.sha256:
            self.problem(facts.name, "content does not match its SHA-256")
        return data

    def read(self, name: str) -> bytes | None:
        """An object that must be there."""
        self.known.add(name)
        try:
            data = self.store.get(name)
        except FileNotFoundError:
            self.problem(name, "is missing")
            return None
        self.report.objects += 1
        self.report.bytes_read += len(data)
        return data

    def problem(self, name: str, what: str) -> None:
        self.report.problems.append(Problem(name=name, what=what))

    def damaged(self, name: str, exc: ArchiveError) -> None:
        self.problem(name, str(exc).removeprefix(f"{name}: "))


def _parse_subset(subset: str | None) -> tuple[int, int]:
    if subset is None:
        return 0, 1
    match = _SUBSET.fullmatch(subset)
    number, step = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= step:
        raise ValueError(f"subset is {subset!r}, wanted n/t with 1 <= n <= t")
    return number - 1, step
