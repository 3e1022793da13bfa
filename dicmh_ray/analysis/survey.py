"""What a survey is: one class that looks at a whole snapshot, or at a task's results for it, and
gives tables that sum it up.

    <archive>/analysis/<survey>-<hash>/_record.json      what they depend on, the rows included
    <archive>/analysis/<survey>-<hash>/<table>.parquet

It runs in one process, on what the index says or on what a :class:`Task` found; the hash covers the
parts of the snapshot, so that a survey of an archive that has grown is another one.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from dicmh_ray.analysis.results import ResultFolder, Results, read_results
from dicmh_ray.analysis.task import Described, Task, check_name, describe, result_id
from dicmh_ray.archive import Snapshot
from dicmh_ray.archive.where import parse_where
from dicmh_ray.errors import ResultsError
from dicmh_ray.reader import ArchiveReader


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """What a survey looks at."""

    reader: ArchiveReader
    """Of the snapshot."""

    where: str | None
    """Filter of the rows."""

    results: Results | None
    """Of the task it needs: one row for each row that the filter selects."""


class Survey(Described):
    """A snapshot in, a few tables out."""

    tables: ClassVar[tuple[str, ...]]
    """Their names."""

    def needs(self) -> Task | None:
        """The task whose results it looks at; None if the index is enough."""
        return None

    @abstractmethod
    def __call__(self, ground: Ground) -> Mapping[str, pa.Table]:
        """The tables, by name."""


def survey_id(survey: Survey, snapshot: Snapshot, where: str | None) -> str:
    """Name of the folder of a survey's results."""
    return result_id(describe_survey(survey, snapshot, where))


def describe_survey(survey: Survey, snapshot: Snapshot, where: str | None) -> dict[str, Any]:
    """What the tables depend on, as JSON."""
    check_name(survey)
    task = survey.needs()
    rows = hashlib.sha256("".join(part.sha256 for part in snapshot.parts).encode())
    return {
        "task": survey.name,
        "version": survey.version,
        "parameters": dict(survey.parameters()),
        "tables": list(survey.tables),
        "where": where,
        "codec_id": snapshot.codec_id,
        "rows_sha256": rows.hexdigest(),
        "needs": None
        if task is None
        else result_id(describe(task, codec_id=snapshot.codec_id, where=where)),
    }


def run_survey(survey: Survey, snapshot: Snapshot, *, where: str | None = None) -> str:
    """Make the tables, unless they are there. Running it twice makes them once.

    Returns:
        Name of the folder.

    Raises:
        ResultsError: the task it needs was not run, or not for all units.
        WhereError: the filter cannot be understood.
    """
    if where is not None:
        parse_where(where)
    description = describe_survey(survey, snapshot, where)
    folder = ResultFolder(snapshot.store, result_id(description))
    files = {name: f"{name}.parquet" for name in survey.tables}
    if set(files.values()) <= folder.files():
        return folder.name
    task = survey.needs()
    results = None if task is None else read_results(snapshot, task, where=where)
    if results is not None and not results.is_complete:
        raise ResultsError(
            snapshot.uri, results.folder.name, f"{len(results.missing)} units are not done"
        )
    ground = Ground(reader=ArchiveReader(snapshot), where=where, results=results)
    tables = survey(ground)
    folder.describe(description)
    for name, file in files.items():
        folder.commit(file, tables[name])
    return folder.name


def read_survey(
    snapshot: Snapshot, survey: Survey | str, *, where: str | None = None
) -> dict[str, pa.Table]:
    """The tables of a survey, by name.

    Args:
        snapshot: of the archive.
        survey: the survey, or the name of its folder.
        where: the filter it was made with; of a name it is known already.

    Raises:
        ResultsError: it was not made, or not to its end.
    """
    name = survey if isinstance(survey, str) else survey_id(survey, snapshot, where)
    folder = ResultFolder(snapshot.store, name)
    description = folder.description()
    tables = {}
    for table in description.get("tables", ()):
        try:
            tables[table] = folder.read(f"{table}.parquet")
        except FileNotFoundError as exc:
            raise ResultsError(snapshot.uri, name, f"table {table} is missing") from exc
    return tables
