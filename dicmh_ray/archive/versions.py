"""The versions of an archive on its store: which there are, and how one more is published.

A version is published by a conditional put of the next manifest. Whoever loses starts again from
the winner's: two appends at once are two versions, one after the other. No name below
``manifest/`` ever becomes free again, so that a writer that slept cannot publish into the past.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dicmh_ray.archive.manifest import (
    MANIFEST_PREFIX,
    Expired,
    Manifest,
    is_expired,
    manifest_name,
    manifest_versions,
)
from dicmh_ray.archive.plan import (
    LATER_PLAN_PREFIX,
    PLAN_NAME,
    Plan,
    later_plan_ids,
    later_plan_name,
    unit_identity,
    unit_members,
)
from dicmh_ray.archive.store import Store, check_name
from dicmh_ray.errors import (
    ArchiveNotFoundError,
    CommitUnknownError,
    CorruptObjectError,
    VersionExpiredError,
)

logger = logging.getLogger(__name__)

COMPACT = "compact"
OPERATION_FIELD = "operation"
"""Parameter of a plan that is no append."""


def read_plan(store: Store) -> Plan:
    """The archive's first plan.

    Raises:
        ArchiveNotFoundError: there is none.
        CorruptObjectError: it is damaged.
    """
    try:
        return Plan.from_bytes(store.get(PLAN_NAME))
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise ArchiveNotFoundError(store.uri) from exc


def read_later_plan(store: Store, plan_id: str) -> Plan:
    """The plan of an append or a compaction.

    Raises:
        FileNotFoundError: there is none.
        CorruptObjectError: it is damaged.
    """
    name = later_plan_name(plan_id)
    return Plan.from_bytes(store.get(name), name)


def is_compaction(plan: Plan) -> bool:
    """Whether a later plan rewrites what is there instead of adding to it."""
    return plan.parameters.get(OPERATION_FIELD) == COMPACT


def read_manifest(store: Store, version: int, plan: Plan | None) -> Manifest:
    """One version's manifest.

    Raises:
        ArchiveNotFoundError: there never was such a version.
        VersionExpiredError: it was given up.
        CorruptObjectError: the manifest is damaged.
    """
    name = manifest_name(version)
    try:
        data = store.get(name)
    except FileNotFoundError as exc:
        raise ArchiveNotFoundError(f"{store.uri} version {version}") from exc
    if is_expired(data):
        raise VersionExpiredError(store.uri, Expired.from_bytes(name, data).version)
    return Manifest.from_bytes(name, data, plan)


def newest_manifest(store: Store, plan: Plan | None) -> Manifest | None:
    """The archive as it is now; None while its first job is unfinished.

    Raises:
        CorruptObjectError: the manifest is damaged.
    """
    last = 0
    while versions := manifest_versions(store.list(MANIFEST_PREFIX)):
        try:
            return read_manifest(store, versions[-1], plan)
        except VersionExpiredError:
            # A newer one was published, and this one given up, since the listing.
            if versions[-1] == last:
                raise
            last = versions[-1]
    return None


def publish(
    store: Store, plan: Plan, plan_id: str, derive: Callable[[Manifest], Manifest | None]
) -> Manifest | None:
    """Publish a later plan as the archive's next version, once.

    Args:
        store: of the archive.
        plan: the archive's first plan.
        plan_id: what is published.
        derive: the next manifest, from the newest; called again when another writer was faster.
            None gives up.

    Returns:
        The newest manifest, in which the plan is published, or None if ``derive`` gave up.

    Raises:
        CommitFailedError: nothing was published.
        CommitUnknownError: the store did not say whether it was; calling again is safe.
    """
    last = 0
    while True:
        newest = newest_manifest(store, plan)
        if newest is None or newest.version <= last:
            raise CommitUnknownError(manifest_name(last + 1), "it was there and is gone")
        if newest.has_published(plan_id):
            return newest
        made = derive(newest)
        if made is None:
            return None
        if store.put_if_absent(made.name, made.to_bytes()):
            return made
        logger.info("version %d was published by another job: trying again", made.version)
        last = newest.version


def open_plans(store: Store, newest: Manifest | None) -> list[Plan]:
    """Later plans that no version has published, and that one may still publish.

    A compaction of which a source is gone can never be published, nor an append that groups image
    files, or cuts a table, otherwise than a job that was published before it.

    Raises:
        CorruptObjectError: a plan is damaged.
    """
    waiting = [
        plan_id
        for plan_id in later_plan_ids(store.list(LATER_PLAN_PREFIX))
        if newest is None or not newest.has_published(plan_id)
    ]
    plans = []
    for plan_id in waiting:
        try:
            plan = read_later_plan(store, plan_id)
        except FileNotFoundError:
            continue  # it was garbage, and is gone since the listing
        if newest is None:
            is_open = not is_compaction(plan)
        elif is_compaction(plan):
            is_open = can_be_compacted(newest, plan)
        else:
            is_open = overlapping_unit(plan, published_plans(store, newest)) is None
        if is_open:
            plans.append(plan)
    return plans


def published_plans(store: Store, manifest: Manifest) -> Iterator[Plan]:
    """The plans whose rows a version has; not those of compactions.

    Raises:
        CorruptObjectError: a plan is missing or damaged.
    """
    yield read_plan(store)
    for version in manifest.history:
        if version.operation == "append":
            try:
                yield read_later_plan(store, version.plan_id)
            except FileNotFoundError as exc:
                raise CorruptObjectError(later_plan_name(version.plan_id), "is missing") from exc


def overlapping_unit(plan: Plan, published: Iterable[Plan]) -> Mapping[str, Any] | None:
    """A unit of an append that shares pictures with published units, and is none of them itself.

    To publish it would add those pictures twice; to leave it out, the others never.
    """
    groups = {unit_identity(unit): mine for unit in plan.units if (mine := unit_members(unit))}
    if not groups:
        return None
    added: set[str] = set()
    for other in published:
        for unit in other.units:
            theirs = unit_members(unit)
            if theirs and groups.pop(unit_identity(unit), None) is None:
                added |= theirs
    overlapping = next((i for i, mine in groups.items() if not mine.isdisjoint(added)), None)
    return next((unit for unit in plan.units if unit_identity(unit) == overlapping), None)


def can_be_compacted(newest: Manifest, plan: Plan) -> bool:
    """Whether everything that a compaction rewrites is still there."""
    return all(source in newest.commits for unit in plan.units for source in source_names(unit))


def source_names(unit: Mapping[str, Any]) -> list[str]:
    """The commits that one unit of a compaction rewrites, in their order.

    Raises:
        CorruptObjectError: the unit is not one of a compaction.
    """
    try:
        return [check_name(source["name"]) for source in unit["commits"]]
    except (KeyError, TypeError) as exc:
        raise CorruptObjectError(f"unit {unit.get('name')}", f"no compaction: {exc!r}") from exc
