"""Where results lie, how they appear, and how they are read again.

    <archive>/analysis/<task>-<hash>/_record.json           what they depend on
    <archive>/analysis/<task>-<hash>/<unit>-<hash>.parquet  the rows of one unit of the archive

A unit's file is put where none may exist, under a name that follows from the rows it is about: of any
number of attempts one appears, whole, and any Parquet engine that reads the folder reads each row
once. The archive's own readers, its collector of garbage and its check leave the folder alone.

After a compaction units are others: what was computed of the old ones stays, and is read with the
version of the archive that has them.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dicmh_ray.analysis.task import Task, describe, result_id
from dicmh_ray.archive import Commit, Snapshot, Store
from dicmh_ray.archive.commit import ANALYSIS_PREFIX
from dicmh_ray.archive.sealed import seal, unseal
from dicmh_ray.errors import CorruptObjectError, ResultsError

RECORD_NAME = "_record.json"
"""Engines that read a folder of Parquet files leave out what begins so."""
RECORD_FORMAT = "dicmh.analysis.record"
RECORD_VERSION = 1

_RESULT_ID = re.compile(r"[a-z][a-z0-9_-]*-[0-9a-f]{16}")
_ROW_GROUP_ROWS = 64_000


def unit_file(commit: Commit) -> str:
    """Name of the file of one unit: the unit's, and 16 hex digits over its parts."""
    hashed = hashlib.sha256("".join(part.sha256 for part in commit.parts).encode())
    return f"{commit.unit}-{hashed.hexdigest()[:16]}.parquet"


class ResultFolder:
    """The results of one task, filter and checkpoint in an archive."""

    def __init__(self, store: Store, name: str) -> None:
        """
        Args:
            store: of the archive.
            name: of the folder, from :func:`result_id`.

        Raises:
            ValueError: no folder of results has such a name.
        """
        if not _RESULT_ID.fullmatch(name):
            raise ValueError(f"{name!r} is no name of results: wanted TASK-<16 hex digits>")
        self.store = store
        self.name = name

    @property
    def prefix(self) -> str:
        """Of its objects' names."""
        return f"{ANALYSIS_PREFIX}{self.name}/"

    def describe(self, description: Mapping[str, Any]) -> None:
        """Say what the results depend on; saying it again changes nothing."""
        self.store.put_once(
            self.prefix + RECORD_NAME, seal(RECORD_FORMAT, RECORD_VERSION, description)
        )

    def description(self) -> dict[str, Any]:
        """What the results depend on.

        Raises:
            ResultsError: there are no such results.
            CorruptObjectError: the record is damaged.
        """
        name = self.prefix + RECORD_NAME
        try:
            data = self.store.get(name)
        except FileNotFoundError as exc:
            raise ResultsError(self.store.uri, self.name, "there are none") from exc
        return unseal(name, data, RECORD_FORMAT, RECORD_VERSION)

    def files(self) -> set[str]:
        """Names of the result files, in the folder. One listing."""
        names = self.store.list(self.prefix)
        return {name[len(self.prefix) :] for name in names if name.endswith(".parquet")}

    def commit(self, file: str, table: pa.Table) -> bool:
        """Let a file appear, whole. False when another attempt's is there: that one counts."""
        return self.store.put_once(self.prefix + file, _parquet(table))

    def read(self, file: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a file.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptObjectError: it is damaged.
        """
        name = self.prefix + file
        data = self.store.get(name)
        try:
            parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            wanted = None if columns is None else list(columns)
            return parquet.read(columns=wanted, use_threads=False)
        except (OSError, pa.ArrowException) as exc:
            raise CorruptObjectError(name, str(exc)) from exc


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of one task for the rows of a snapshot."""

    folder: ResultFolder

    files: tuple[str, ...]
    """In the order of the archive's rows; only those that are there."""

    missing: tuple[str, ...]
    """Units whose rows were not looked at yet."""

    @property
    def is_complete(self) -> bool:
        """Whether every unit of the snapshot was looked at."""
        return not self.missing

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """One table a unit, in the order of the archive's rows."""
        for file in self.files:
            yield self.folder.read(file, columns)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows: ``key``, the task's columns, ``error``.

        Raises:
            ResultsError: nothing was computed yet.
        """
        tables = list(self.tables(columns))
        if not tables:
            raise ResultsError(self.folder.store.uri, self.folder.name, "no unit is done")
        return pa.concat_tables(tables)


def read_results(snapshot: Snapshot, task: Task | str, *, where: str | None = None) -> Results:
    """What a task found in an archive.

    Args:
        snapshot: whose rows; results of rows that it does not have are left out.
        task: the task, or the name of the results' folder.
        where: the filter that the task was run with; of a name it is known already.

    Raises:
        ResultsError: there are none.
    """
    if isinstance(task, str):
        name = task
    else:
        name = result_id(describe(task, codec_id=snapshot.codec_id, where=where))
    folder = ResultFolder(snapshot.store, name)
    folder.description()
    present = folder.files()
    wanted = {commit.unit: unit_file(commit) for commit in snapshot.commits}
    return Results(
        folder=folder,
        files=tuple(f for f in map(unit_file, snapshot.commits) if f in present),
        missing=tuple(unit for unit, file in wanted.items() if file not in present),
    )


def list_results(snapshot: Snapshot) -> list[str]:
    """Names of the folders of results that an archive has. One listing."""
    names = snapshot.store.list(ANALYSIS_PREFIX)
    folders = {name[len(ANALYSIS_PREFIX) :].partition("/")[0] for name in names}
    return sorted(folder for folder in folders if _RESULT_ID.fullmatch(folder))


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=_ROW_GROUP_ROWS,
        write_page_checksum=True,
        store_schema=True,
    )
    return sink.getvalue()
