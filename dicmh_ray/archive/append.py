"""Add a job to a finished archive: other sources, the same codec, one more version.

The job has a plan of its own beside ``plan.json``. Any number of them may run at once; each is
published when it is complete, on top of whatever the newest version is by then.
"""

from collections.abc import Mapping
from typing import Any

from dicmh_ray.archive.codec_files import write_codec_files
from dicmh_ray.archive.commit import Commit
from dicmh_ray.archive.later import LaterWriter, open_for_later, put_plan
from dicmh_ray.archive.manifest import Manifest, next_manifest
from dicmh_ray.archive.part import PartOptions
from dicmh_ray.archive.plan import Plan, later_plan_name, unit_identity
from dicmh_ray.archive.snapshot import Snapshot
from dicmh_ray.archive.versions import OPERATION_FIELD, overlapping_unit, published_plans
from dicmh_ray.archive.writer import ArchiveWriter, create_archive
from dicmh_ray.errors import AppendError, CommitFailedError


class AppendWriter(LaterWriter):
    """One writer of an appended job."""

    def derive(self, newest: Manifest, commits: Mapping[str, Commit]) -> Manifest:
        """The newest version's rows, then this job's; source objects that are there stay out.

        Raises:
            CommitFailedError: another job has published some pictures of a unit of this one, and not
                the unit. A plan that is made now leaves them out, or is refused.
        """
        published = [*published_plans(self._store, newest)]
        overlapping = overlapping_unit(self.plan, published)
        if overlapping is not None:
            reason = (
                f"some pictures of unit {overlapping['name']} were added by another job "
                "meanwhile; run the same command again: it adds what is left, or says why not"
            )
            raise CommitFailedError(later_plan_name(self.plan.plan_id), reason)
        present = {unit_identity(unit) for plan in published for unit in plan.units}
        units = {str(unit["name"]): unit for unit in self.plan.units}
        added = {
            name: commit
            for name, commit in commits.items()
            if unit_identity(units[commit.unit]) not in present
        }
        return next_manifest(newest, "append", self.plan.plan_id, {**newest.commits, **added})


def append_to_archive(
    uri: str,
    *,
    plan: Plan,
    codec_files: Mapping[str, bytes],
    storage_options: Mapping[str, Any] | None = None,
    options: PartOptions | None = None,
) -> ArchiveWriter:
    """Start a job that adds rows to a finished archive, or continue it with an equal plan.

    With the plan the archive was begun with, this is :func:`create_archive`: nothing is added.

    Args:
        uri: address of the archive.
        plan: what is to be added.
        codec_files: the checkpoint's files by relative name; companions that the archive lacks
            are stored with the others only in a new archive.
        storage_options: for the fsspec file system; written nowhere.
        options: sizes of parts and row groups.

    Raises:
        ArchiveNotFoundError: there is no archive.
        AppendError: it is unfinished, was written with another codec, or its store ignores
            conditional puts.
        ValueError: the plan is that of a compaction.
    """
    if OPERATION_FIELD in plan.parameters:
        raise ValueError(f"the parameter {OPERATION_FIELD!r} is not for appends")
    store, newest = open_for_later(uri, storage_options)
    if plan.plan_id == newest.plan_id:
        return create_archive(
            uri,
            plan=plan,
            codec_files=codec_files,
            storage_options=storage_options,
            options=options,
        )
    check_codec(store.uri, newest.codec_id, plan)
    write_codec_files(store, plan.codec_id, codec_files)
    put_plan(store, plan)
    return AppendWriter(store, plan, options)


def check_codec(uri: str, codec_id: str, plan: Plan) -> None:
    """Raises AppendError when a plan has another codec than the archive that it is to be added to."""
    if plan.codec_id != codec_id:
        raise AppendError(
            uri,
            f"it was written with codec {codec_id[:16]}, this job has "
            f"{plan.codec_id[:16]}; an archive has one codec",
        )


def published_units(snapshot: Snapshot) -> list[Mapping[str, Any]]:
    """The units of every job in a snapshot of a finished archive, as they were planned.

    Raises:
        AppendError: the archive is unfinished.
        CorruptObjectError: a plan is missing or damaged.
    """
    if snapshot.manifest is None:
        raise AppendError(snapshot.uri, "its first job is unfinished; finish that one first")
    plans = published_plans(snapshot.store, snapshot.manifest)
    return [unit for plan in plans for unit in plan.units]
