"""A job after the first: it commits under a plan of its own, and publishes the next version."""

from collections.abc import Mapping
from typing import Any

from dicmh_ray.archive.commit import (
    Commit,
    job_commit_name,
    job_commit_names,
    job_prefix,
    read_job_commits,
)
from dicmh_ray.archive.joined_index import put_joined_index
from dicmh_ray.archive.manifest import Manifest
from dicmh_ray.archive.plan import Plan, later_plan_name
from dicmh_ray.archive.store import Store, open_store, probe
from dicmh_ray.archive.versions import newest_manifest, publish, read_plan
from dicmh_ray.archive.writer import ArchiveWriter
from dicmh_ray.errors import AppendError, CommitFailedError, CorruptObjectError


class LaterWriter(ArchiveWriter):
    """One writer of a later job. Send it to as many workers as there are: it pickles."""

    def committed_units(self) -> set[str]:
        """Names of the units that are done; all of them once the job is published."""
        newest = newest_manifest(self._store, None)
        if newest is not None and newest.has_published(self.plan.plan_id):
            return set(self.plan.positions)
        return set(job_commit_names(self._store.list(job_prefix(self.plan.plan_id)), self.plan))

    def finalize(self) -> Manifest:
        """Publish the job as the archive's next version. Doing it again changes nothing.

        Returns:
            The newest manifest: this job's, or one after it.

        Raises:
            CommitFailedError: some units are not committed, or what the job was about is gone.
            CommitUnknownError: the store did not say whether it was published; call again.
        """
        manifest = self.publish()
        if manifest is None:
            reason = "another compaction has rewritten what this one was about"
            raise CommitFailedError(later_plan_name(self.plan.plan_id), reason)
        return manifest

    def publish(self) -> Manifest | None:
        """As :meth:`finalize`; None when the job can no longer be published."""
        first = read_plan(self._store)
        newest = newest_manifest(self._store, first)
        if newest is not None and newest.has_published(self.plan.plan_id):
            return newest
        commits = read_job_commits(self._store, self.plan)
        missing = len(self.plan.units) - len(commits)
        if missing:
            reason = f"{missing} of {len(self.plan.units)} units are not committed"
            raise CommitFailedError(later_plan_name(self.plan.plan_id), reason)

        def derive(newest: Manifest) -> Manifest | None:
            made = self.derive(newest, commits)
            if made is not None:
                put_joined_index(self._store, made)
            return made

        return publish(self._store, first, self.plan.plan_id, derive)

    def derive(self, newest: Manifest, commits: Mapping[str, Commit]) -> Manifest | None:
        """The version after ``newest`` in which these commits are published; None: impossible."""
        raise TypeError(f"{type(self).__name__} does not say what it publishes")

    def _commit_name(self, unit: str) -> str:
        return job_commit_name(self.plan.plan_id, unit)


def open_for_later(uri: str, storage_options: Mapping[str, Any] | None) -> tuple[Store, Manifest]:
    """The store and the newest version of an archive that another job may be added to.

    Raises:
        ArchiveNotFoundError: there is no archive.
        AppendError: its first job is unfinished, or its store ignores conditional puts.
    """
    store = open_store(uri, storage_options)
    newest = newest_manifest(store, read_plan(store))
    if newest is None:
        raise AppendError(store.uri, "its first job is unfinished; finish that one first")
    if not probe(store):
        raise AppendError(store.uri, "its store ignores conditional puts, versions could be lost")
    return store, newest


def put_plan(store: Store, plan: Plan) -> None:
    """Announce a later job: until it is published its commits are no garbage.

    Raises:
        CorruptObjectError: other bytes are stored under the plan's name.
    """
    name = later_plan_name(plan.plan_id)
    if not store.put_if_absent(name, plan.to_bytes()):
        raise CorruptObjectError(name, "holds other bytes than its name says")
