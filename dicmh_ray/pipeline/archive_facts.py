"""The sums over an archive, from its commits; from the rows of those commits that carry none."""

import dataclasses

from dicmh_ray.archive import Commit, Snapshot
from dicmh_ray.pipeline.report import Tally
from dicmh_ray.pipeline.summary import RowSummary
from dicmh_ray.reader import ArchiveReader


def tally_of(snapshot: Snapshot) -> Tally:
    """Sums over a snapshot.

    Reads nothing when every commit has a summary. Units that were committed before there were
    summaries, or rewritten by a compaction, have their small columns read; never a blob.

    Raises:
        CorruptObjectError: such a unit is damaged.
    """
    max_bytes = snapshot.plan.parameters.get("policy", {}).get("max_bytes")
    total = Tally()
    bare: list[Commit] = []
    for commit in snapshot.commits:
        total.merge(Tally.of_commit(commit))
        if RowSummary.of_info(commit.info) is None:
            bare.append(commit)
    if bare:
        reader = ArchiveReader(dataclasses.replace(snapshot, commits=tuple(bare)))
        for row in reader.rows():
            total.summary.add(row, max_bytes=max_bytes)
    return total
