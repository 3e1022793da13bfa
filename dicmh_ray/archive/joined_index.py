"""The row indexes of all units of a version in one object: its readers ask once, not once a unit.

The object is the index objects one behind the other, in the order of the manifest's commits, which
say how long each is and what its SHA-256 must be. Nothing else needs to know or to trust it: where
it is missing, or a stretch of it is not what was committed, readers turn to the unit's own index.
"""

import logging
from concurrent.futures import ThreadPoolExecutor

from dicmh_ray.archive.commit import PARALLEL_REQUESTS, Commit, ObjectFacts
from dicmh_ray.archive.manifest import Manifest
from dicmh_ray.archive.store import Store
from dicmh_ray.errors import CorruptObjectError

MAX_JOINED_BYTES = 2**30
"""No joined index is longer: its writer holds it in memory, twice, and a store takes 5 GiB at once."""

logger = logging.getLogger(__name__)


def put_joined_index(store: Store, manifest: Manifest) -> None:
    """Write the joined index of a version that is about to be published.

    A version of one unit needs none. One whose indexes cannot be read, or are too large, goes
    without.
    """
    commits = list(manifest.commits.values())
    if len(commits) < 2:
        return
    num_bytes = sum(commit.index.num_bytes for commit in commits)
    if num_bytes > MAX_JOINED_BYTES:
        logger.info("no joined index is written: it would have %d bytes", num_bytes)
        return
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        try:
            found = list(pool.map(lambda commit: _index_of(store, commit), commits))
        except FileNotFoundError as exc:
            logger.warning("no joined index is written: %s is missing", exc)
            return
    for commit, data in zip(commits, found, strict=True):
        if ObjectFacts.of(commit.index.name, data) != commit.index:
            logger.warning("no joined index is written: %s is damaged", commit.index.name)
            return
    store.put(manifest.joined_index, b"".join(found))


def check_joined_index(manifest: Manifest, data: bytes) -> None:
    """Check the bytes of a joined index.

    Raises:
        CorruptObjectError: a stretch is not the index that its commit names.
    """
    start = 0
    for commit in manifest.commits.values():
        stop = start + commit.index.num_bytes
        if ObjectFacts.of(commit.index.name, data[start:stop]) != commit.index:
            reason = f"bytes {start} to {stop} are not {commit.index.name}"
            raise CorruptObjectError(manifest.joined_index, reason)
        start = stop
    if start != len(data):
        raise CorruptObjectError(manifest.joined_index, f"has {len(data) - start} bytes too many")


def _index_of(store: Store, commit: Commit) -> bytes:
    return store.get(commit.index.name)
