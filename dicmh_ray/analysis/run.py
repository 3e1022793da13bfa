"""An analysis of an archive: unit by unit, anywhere, in any order, any number of times.

    plan_analysis ─> units without results
                        │  for each: read rows ─ views in batches ─ task ─ one table ─> put if absent
                        └─> Results

The file of a unit is the only state: an analysis that was killed goes on from the listing of files,
and one of an archive that has grown looks at what is new. Rows that cannot be read or that the task
fails on have a row too, with the reason in ``error``.
"""

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from dicmh_ray.analysis.results import ResultFolder, Results, read_results, unit_file
from dicmh_ray.analysis.task import (
    ERROR,
    KEY,
    PICTURES,
    Batch,
    Task,
    check_task,
    describe,
    keyed_schema,
    result_id,
    result_schema,
)
from dicmh_ray.archive import Commit, EncodedImage, Snapshot
from dicmh_ray.archive.where import parse_where
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import CodecMismatchError, FailureBudgetError, TaskError
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.views import codec_of, decode_views
from dicmh_ray.views.decode import blobs_for, error_of, states_for

_log = logging.getLogger(__name__)

READ_ROWS = 128
"""Rows that are read while those before them are looked at."""

BATCH_PIXELS = 32_000_000
"""Pixels of a batch of pictures; a larger one is a batch of its own."""

FEW_ROWS = 100
"""A failure budget judges a unit of fewer rows as if it had so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisOptions:
    """How an analysis runs; results do not depend on it."""

    device: str = "auto"
    """Of the codec: ``cpu``, ``cuda``, ``auto``."""

    threads: int | None = None
    """Of the codec on a CPU; None leaves it to torch, and on Ray to the cluster's layout."""

    batch_size: int = 16
    """Rows that the task is given at once."""

    failure_budget: float = 0.1
    """Share of the rows of a unit that the task may fail on; beyond, the unit has no results and
    the job ends. What is damaged in the archive does not count."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, wanted 1 or more")
        if not 0 <= self.failure_budget <= 1:
            raise ValueError(f"failure_budget is {self.failure_budget}, wanted 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitOutcome:
    """What came of one unit."""

    unit: str
    rows: int
    """Looked at: those that the filter selects."""

    causes: Mapping[str, int]
    """Rows with an error, by its first words."""

    seconds: float
    is_ours: bool
    """False when another attempt was first; its results are the ones that count."""

    worker: str
    """Host and process."""


@dataclass(kw_only=True)
class AnalysisReport:
    """A run so far."""

    archive: str
    task: str
    """Name of the results' folder."""

    runtime: str = ""
    units_total: int = 0
    units_resumed: int = 0
    """With results from earlier runs."""

    units_done: int = 0
    rows: int = 0
    """Looked at in this run."""

    causes: Counter[str] = field(default_factory=Counter)
    """Rows with an error, by its first words."""

    workers: int = 0
    seconds: float = 0.0

    @property
    def errors(self) -> int:
        """Rows with an error."""
        return self.causes.total()

    def add(self, outcome: UnitOutcome) -> None:
        """Count a unit."""
        self.units_done += 1
        self.rows += outcome.rows
        self.causes.update(outcome.causes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "causes": dict(sorted(self.causes.items())), "errors": self.errors}


Progress = Callable[[AnalysisReport], None]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything a worker needs to look at any unit. Pickles; knows no unit but the one it is given."""

    snapshot: Snapshot
    """Of the archive, without its commits."""

    task: Task
    where: str | None
    options: AnalysisOptions
    codec: ImageCodec | None = None
    """None loads the archive's where a view needs one."""

    @property
    def folder(self) -> ResultFolder:
        """Where the results go."""
        description = describe(self.task, codec_id=self.snapshot.codec_id, where=self.where)
        return ResultFolder(self.snapshot.store, result_id(description))

    def setup(self) -> None:
        """Load the task, in the process that will run it.

        Raises:
            DicmhError: what the task needs is not there.
        """
        self.task.setup()
        self.task.meet(self.load_codec)

    def load_codec(self) -> ImageCodec:
        """The archive's codec in this process."""
        if self.codec is not None:
            return self.codec
        return codec_of(self.snapshot, device=self.options.device, threads=self.options.threads)

    def run_unit(self, commit: Commit) -> UnitOutcome:
        """Look at one unit and let its results appear. Running it twice gives them once.

        Raises:
            FailureBudgetError: the task fails on too many rows; nothing appeared.
            CodecError: the archive's checkpoint is missing or another.
        """
        started = time.perf_counter()
        tables: list[pa.Table] = []
        causes: Counter[str] = Counter()
        tried = failed = 0
        for batch in self._batches(commit):
            looked = self._look(batch)
            tables.append(looked.table)
            causes.update(looked.causes)
            tried += looked.tried
            failed += looked.failed
            self._check_budget(failed, max(tried, FEW_ROWS), looked.last_error)
        if tried and failed == tried and self.options.failure_budget < 1:
            raise FailureBudgetError(failed, tried, self.options.failure_budget)
        schema = result_schema(self.task)
        table = pa.concat_tables([schema.empty_table(), *tables])
        is_ours = self.folder.commit(unit_file(commit), table)
        return UnitOutcome(
            unit=commit.unit,
            rows=len(table),
            causes=dict(causes),
            seconds=time.perf_counter() - started,
            is_ours=is_ours,
            worker=f"{socket.gethostname()}:{os.getpid()}",
        )

    def _check_budget(self, failed: int, of: int, error: str | None) -> None:
        if failed > self.options.failure_budget * of:
            _log.error("task %s: %s", self.task.name, error)
            raise FailureBudgetError(failed, of, self.options.failure_budget)

    def _batches(self, commit: Commit) -> Iterator["_Rows"]:
        """The unit's rows, small batches of them, the next ones read while one is looked at."""
        reader = ArchiveReader(replace(self.snapshot, commits=(commit,), manifest=None))
        numbers = reader.matching(self.where, on_error="skip")
        keys = np.array(list(reader.keys()), object)
        blobs = blobs_for(self.task.reads)
        facts = self.task.facts if self.task.reads in ("tags", "latent") else "all"

        def read(start: int) -> _Rows:
            wanted = numbers[start : start + READ_ROWS]
            found = reader.read_rows(
                wanted,
                blobs,
                states_for(self.task.reads, self.task.states),
                facts,
                on_error="skip",
                spare_originals=self.task.reads != "original",
            )
            lost = sorted(set(range(len(wanted))) - {place for place, _ in found})
            reasons = {fault.key: fault.reason for fault in reader.faults}
            general = reader.faults[-1].reason if reader.faults else "damaged"
            return _Rows(
                rows=[row for _, row in found],
                lost={key: reasons.get(key, general) for key in keys[wanted[lost]]},
            )

        starts = range(0, len(numbers), READ_ROWS)
        if not starts:
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = [ahead.submit(read, start) for start in starts[:1]]
            for following in [*starts[1:], None]:
                rows = coming.pop().result()
                if following is not None:
                    coming.append(ahead.submit(read, following))
                yield from rows.batches(self.options.batch_size)

    def _look(self, batch: "_Rows") -> "_Looked":
        """Views of the rows, and what the task says of them."""
        errors = dict(batch.lost)
        values = decode_views(
            batch.rows, self.task.reads, self.task.states, self.load_codec, on_error="return"
        )
        sound: list[EncodedImage] = []
        seen: list[Any] = []
        for row, value in zip(batch.rows, values, strict=True):
            error = error_of(value)
            if error is None:
                sound.append(row)
                seen.append(value)
            else:
                errors[row.key] = str(error)
        tables, failures = self._call(sound, seen)
        errors |= failures
        schema = result_schema(self.task)
        empty = [pa.nulls(len(errors), field.type) for field in self.task.schema]
        table = pa.table(
            [pa.array(errors, pa.string()), *empty, pa.array(errors.values(), pa.string())],
            schema=schema,
        )
        good = [
            one.append_column(ERROR, pa.nulls(len(one), pa.string())).cast(schema) for one in tables
        ]
        return _Looked(
            table=pa.concat_tables([*good, table]),
            causes=Counter(_cause(key, error) for key, error in errors.items()),
            tried=len(sound),
            failed=len(failures),
            last_error=next(reversed(failures.values()), None) if failures else None,
        )

    def _call(
        self, rows: Sequence[EncodedImage], values: Sequence[Any]
    ) -> tuple[list[pa.Table], dict[str, str]]:
        """The task's tables, and the errors of the rows that it fails on, by key."""
        if not rows:
            return [], {}
        schema = keyed_schema(self.task)
        batch = Batch(rows=[_bare(row) for row in rows], values=values, schema=schema)
        try:
            table = self.task(batch)
        except Exception as exc:  # noqa: BLE001  a user's code: anything may come out of it
            if len(rows) == 1:
                return [], {rows[0].key: f"{type(exc).__name__}: {exc}"}
            _log.debug("task %s: %s: each row alone", self.task.name, exc)
            tables: list[pa.Table] = []
            errors: dict[str, str] = {}
            for row, value in zip(rows, values, strict=True):
                more, wrong = self._call([row], [value])
                tables += more
                errors |= wrong
            return tables, errors
        if not isinstance(table, pa.Table) or not table.schema.equals(schema):
            found = table.schema if isinstance(table, pa.Table) else type(table).__name__
            raise TaskError(self.task.name, f"gives {found}, wanted {schema}")
        if table[KEY].to_pylist() != batch.keys:
            raise TaskError(self.task.name, "does not give one row for each key, in their order")
        return [table], {}


def _cause(key: str, error: str) -> str:
    """What an error has in common with those of other rows."""
    return error.removeprefix(repr(key)).lstrip(": ").partition(":")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Rows as they were read."""

    rows: list[EncodedImage]
    lost: Mapping[str, str]
    """Key -> what is damaged."""

    def batches(self, size: int) -> Iterator["_Rows"]:
        """At most ``size`` rows each, and pictures of at most :data:`BATCH_PIXELS`."""
        batch: list[EncodedImage] = []
        total = 0
        lost: Mapping[str, str] = self.lost
        for row in self.rows:
            pixels = (row.width or 1) * (row.height or 1)
            if batch and (len(batch) == size or total + pixels > BATCH_PIXELS):
                yield _Rows(rows=batch, lost=lost)
                batch, total, lost = [], 0, {}
            batch.append(row)
            total += pixels
        if batch or lost:
            yield _Rows(rows=batch, lost=lost)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Looked:
    """What came of one batch."""

    table: pa.Table
    causes: Counter[str]
    tried: int
    failed: int
    last_error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What an analysis would do."""

    results: str
    """Name of their folder."""

    units: int
    """Without results."""

    units_resumed: int
    rows: int
    """That the filter selects, of those units."""

    bytes_to_read: int
    """Of bitstreams, up to the states that the task reads."""

    originals: int
    """Rows without a bitstream, whose originals are read where the task wants pictures."""


def plan_analysis(
    snapshot: Snapshot,
    task: Task,
    *,
    where: str | None = None,
    options: AnalysisOptions | None = None,
    codec: ImageCodec | None = None,
) -> tuple[Analysis, list[Commit], AnalysisReport]:
    """Find what is left to do.

    Returns:
        the analysis, the units without results in the order of the archive, and a report.

    Raises:
        ValueError: the task is not as documented.
        CodecMismatchError: the task understands the latents of another checkpoint.
        WhereError: the filter cannot be understood.
    """
    check_task(task)
    if task.codec_id not in (None, snapshot.codec_id):
        raise CodecMismatchError(snapshot.codec_id, task.codec_id)
    if where is not None:
        parse_where(where)
    analysis = Analysis(
        snapshot=replace(snapshot, commits=(), manifest=None),
        task=task,
        where=where,
        options=options or AnalysisOptions(),
        codec=codec,
    )
    folder = analysis.folder
    present = folder.files()
    todo = [commit for commit in snapshot.commits if unit_file(commit) not in present]
    report = AnalysisReport(
        archive=snapshot.uri,
        task=folder.name,
        units_total=len(snapshot.commits),
        units_resumed=len(snapshot.commits) - len(todo),
    )
    return analysis, todo, report


def forecast(analysis: Analysis, todo: Sequence[Commit], report: AnalysisReport) -> Forecast:
    """What a run of a plan would read, from the indexes alone. Writes nothing."""
    rows = num_bytes = originals = 0
    for commit in todo:
        reader = ArchiveReader(replace(analysis.snapshot, commits=(commit,), manifest=None))
        numbers = reader.matching(analysis.where, on_error="skip")
        rows += len(numbers)
        states = states_for(analysis.task.reads, analysis.task.states)
        for _, row in reader.read_rows(numbers, (), None, "index", on_error="skip"):
            if row.prefix_bytes and analysis.task.reads != "tags":
                num_bytes += row.prefix_bytes[: states or len(row.prefix_bytes)][-1]
            originals += not row.prefix_bytes and analysis.task.reads in (*PICTURES, "original")
    return Forecast(
        results=analysis.folder.name,
        units=len(todo),
        units_resumed=report.units_resumed,
        rows=rows,
        bytes_to_read=num_bytes,
        originals=originals,
    )


def begin(analysis: Analysis) -> None:
    """Say what the results will depend on, where they will lie."""
    analysis.folder.describe(
        describe(analysis.task, codec_id=analysis.snapshot.codec_id, where=analysis.where)
    )


def analyze_local(
    analysis: Analysis,
    todo: Sequence[Commit],
    report: AnalysisReport,
    progress: Progress | None = None,
) -> AnalysisReport:
    """Look at the units in this process, one after the other.

    Raises:
        FailureBudgetError: the task fails on too many rows of a unit.
        DicmhError: what the task needs is not there.
    """
    started = time.perf_counter()
    report.runtime, report.workers = "local", 1
    begin(analysis)
    if todo:
        analysis.setup()
    for commit in todo:
        report.add(analysis.run_unit(commit))
        report.seconds = time.perf_counter() - started
        if progress is not None:
            progress(report)
    return report


def results_of(snapshot: Snapshot, analysis: Analysis) -> Results:
    """What is there of an analysis, for the rows of a snapshot."""
    return read_results(snapshot, analysis.task, where=analysis.where)


def _bare(row: EncodedImage) -> EncodedImage:
    """The row without the bytes that its view was made of."""
    return replace(row, base=b"", detail=b"", original=b"")
