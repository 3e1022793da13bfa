"""An archive whose units are known only when they are written: stage first, publish all at once.

    stage_unit (any worker, any number of times) ─> parts and index, in no archive yet
    publish_staged (one caller, at the end)      ─> plan.json, put if absent ─> commits ─> manifest

The plan carries the record of every staged unit. Its put is the one step that counts: before it
there is no archive, and after it anybody can do the rest, again if need be, from the plan alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import pyarrow as pa

from dicmh_ray.archive.codec_files import write_codec_files
from dicmh_ray.archive.commit import (
    Commit,
    ObjectFacts,
    PartFacts,
    UnitStatistics,
    created_by,
    new_attempt,
)
from dicmh_ray.archive.manifest import Manifest
from dicmh_ray.archive.part import INDEX_SCHEMA, PART_PREFIX, PartOptions, write_index, write_parts
from dicmh_ray.archive.plan import PLAN_NAME, Plan
from dicmh_ray.archive.schema import EncodedImage
from dicmh_ray.archive.store import Store, open_store
from dicmh_ray.archive.versions import read_plan
from dicmh_ray.archive.writer import INDEX_PREFIX, ArchiveWriter, create_archive
from dicmh_ray.errors import CorruptObjectError

_STAGED = "staged"


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedUnit:
    """Rows that are stored, and belong to no archive until it is published. Pickles small."""

    name: str
    """Of the unit it will be; part names start with it."""

    parts: tuple[PartFacts, ...]
    """Parts in row order."""

    index: ObjectFacts
    """The row index."""

    statistics: UnitStatistics
    """Sums over the rows."""

    @property
    def objects(self) -> tuple[PartFacts | ObjectFacts, ...]:
        """What must be stored when the unit is published."""
        return (*self.parts, self.index)

    def to_unit(self) -> dict[str, Any]:
        """As a unit of a plan."""
        return {
            "name": self.name,
            _STAGED: {
                "parts": [_jsonable(part) for part in self.parts],
                "index": asdict(self.index),
                "statistics": asdict(self.statistics),
            },
        }

    @classmethod
    def from_unit(cls, unit: Mapping[str, Any]) -> Self:
        """Out of a plan.

        Raises:
            CorruptObjectError: the unit was not staged.
        """
        try:
            body = unit[_STAGED]
            return cls(
                name=unit["name"],
                parts=tuple(PartFacts.from_dict(part) for part in body["parts"]),
                index=ObjectFacts(**body["index"]),
                statistics=UnitStatistics(**body["statistics"]),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise CorruptObjectError(PLAN_NAME, f"not a plan of staged units: {exc!r}") from exc


def staged_units(plan: Plan) -> list[StagedUnit]:
    """The units of a plan that were stored before it was.

    Raises:
        CorruptObjectError: one of them is not described as it must be.
    """
    return [StagedUnit.from_unit(unit) for unit in plan.units if _STAGED in unit]


def stage_unit(
    store: Store,
    name: str,
    rows: Sequence[EncodedImage],
    *,
    codec_id: str,
    options: PartOptions | None = None,
) -> StagedUnit:
    """Store rows below an archive's address. The same rows give the same objects.

    Args:
        store: of the archive.
        name: fit for a file name; no other unit of the archive may have it.
        rows: in any order; keys must be unique.
        codec_id: checkpoint that wrote the bitstreams.
        options: sizes of parts and row groups.

    Raises:
        ValueError: a row is not one the format can hold.
    """
    footer = {"dicmh.unit": name, "dicmh.codec_id": codec_id, "dicmh.created_by": created_by()}
    facts, indexes = [], []
    for part in write_parts(name, rows, footer=footer, options=options):
        store.put(part.name, part.data)
        facts.append(PartFacts.of(part))
        indexes.append(part.index)
    data = write_index(pa.concat_tables([INDEX_SCHEMA.empty_table(), *indexes]))
    index = ObjectFacts.of("", data)
    index_name = f"{INDEX_PREFIX}{name}-{index.sha256[:16]}.parquet"
    store.put(index_name, data)
    return StagedUnit(
        name=name,
        parts=tuple(facts),
        index=ObjectFacts.of(index_name, data),
        statistics=UnitStatistics.of(rows, sum(part.num_bytes for part in facts)),
    )


def publish_staged(
    uri: str,
    units: Iterable[StagedUnit],
    *,
    codec_id: str,
    codec_files: Mapping[str, bytes],
    parameters: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Manifest:
    """Make an archive of staged units.

    Args:
        uri: address below which they were staged.
        units: in row order.
        codec_id: checkpoint that wrote the bitstreams.
        codec_files: its files by relative name.
        parameters: anything that says how the rows came about.
        storage_options: for the fsspec file system; written nowhere.

    Raises:
        PlanConflictError: there is an archive at that address, of other units.
        CorruptObjectError: some of what was staged is gone; no unit was published.
    """
    plan = Plan(
        units=[unit.to_unit() for unit in units], codec_id=codec_id, parameters=parameters or {}
    )
    # Before the plan: whoever finishes the work from the plan alone need not have them.
    write_codec_files(open_store(uri, storage_options), codec_id, codec_files)
    writer = create_archive(
        uri, plan=plan, codec_files=codec_files, storage_options=storage_options
    )
    return _finish(writer, plan, uri, storage_options)


def finish_staged(uri: str, *, storage_options: Mapping[str, Any] | None = None) -> Manifest:
    """Do what is left of a :func:`publish_staged` that was cut off behind its plan. Idempotent.

    Raises:
        ArchiveNotFoundError: no plan was put: nothing was published.
        CorruptObjectError: the archive was not made of staged units, or some of what they name is
            gone; nothing more was published.
    """
    plan = read_plan(open_store(uri, storage_options))
    writer = create_archive(uri, plan=plan, codec_files={}, storage_options=storage_options)
    return _finish(writer, plan, uri, storage_options)


class _StagedWriter(ArchiveWriter):
    """Commits what is stored already."""

    def commit_staged(self, staged: StagedUnit) -> Commit:
        done = self._find_commit(staged.name)
        if done is not None:
            return done
        return self._publish(
            Commit(
                unit=staged.name,
                plan_id=self.plan.plan_id,
                codec_id=self.plan.codec_id,
                attempt=new_attempt(),
                parts=staged.parts,
                index=staged.index,
                statistics=staged.statistics,
                info={},
                created_by=created_by(),
            )
        )


def _finish(
    writer: ArchiveWriter, plan: Plan, uri: str, storage_options: Mapping[str, Any] | None
) -> Manifest:
    store = open_store(uri, storage_options, conditional=writer.conditional)
    staged = _StagedWriter(store, plan)
    committed = staged.committed_units()
    units = [StagedUnit.from_unit(unit) for unit in plan.units if unit["name"] not in committed]
    _check_stored(store, units)
    for unit in units:
        staged.commit_staged(unit)
    return staged.finalize()


def _check_stored(store: Store, units: Iterable[StagedUnit]) -> None:
    """Check that nothing of what is about to be published is gone. Two listings."""
    wanted = {stored.name: stored.num_bytes for unit in units for stored in unit.objects}
    prefixes = (PART_PREFIX, INDEX_PREFIX) if wanted else ()
    found = {o.name: o.num_bytes for prefix in prefixes for o in store.list_objects(prefix)}
    for name, num_bytes in wanted.items():
        if name not in found:
            raise CorruptObjectError(name, "was staged and is missing: nothing is published")
        if found[name] != num_bytes:
            reason = f"has {found[name]} bytes, {num_bytes} were staged: nothing is published"
            raise CorruptObjectError(name, reason)


def _jsonable(part: PartFacts) -> dict[str, Any]:
    body = asdict(part)
    groups = [
        {**group, "chunk_crc32c": list(group["chunk_crc32c"])} for group in body["row_groups"]
    ]
    return {**body, "row_groups": groups}
