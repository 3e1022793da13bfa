"""A collection -> an archive, unit by unit: what every runtime runs, and what it reports.

    plan_job ── create_archive(plan) ── units not committed yet
                                             │  for each, anywhere, in any order, any number of times:
                                             └─ Job.run_unit: read_unit ─ encode_images ─ commit_unit

The commit of a unit is the only state. A unit that is run twice commits once; a job that was killed
goes on from the list of commits. The runtimes (:func:`compress_local` here, actors in
``ray_plugin``) only decide where ``run_unit`` is called, and tell a :class:`JobMonitor` what came
of it.
"""

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dicmh_ray.archive import (
    ArchiveWriter,
    EncodedImage,
    Plan,
    Snapshot,
    append_to_archive,
    create_archive,
    is_archive_table,
    open_snapshot,
    published_units,
    unit_identity,
)
from dicmh_ray.codec import DEFAULT_CHECKPOINT, ImageCodec, ImageTagger
from dicmh_ray.codec.image_taggers import TaggerSpec, load_image_tagger
from dicmh_ray.errors import (
    AppendError,
    DicmhError,
    JobError,
    JobStoppedError,
    SourceFormatError,
    SourceImageError,
)
from dicmh_ray.pipeline.checkpoint import Checkpoint
from dicmh_ray.pipeline.encode import (
    DAMAGED_SOURCE,
    EncodeOptions,
    EncodePolicy,
    encode_images,
)
from dicmh_ray.pipeline.monitor import JobMonitor
from dicmh_ray.pipeline.report import JobReport, Tally, UnitResult
from dicmh_ray.pipeline.stopping import GRACE_S, listening_for_stop
from dicmh_ray.pipeline.summary import SUMMARY_FIELD, RowSummary, cause_of
from dicmh_ray.pipeline.units_queue import UnitsQueue
from dicmh_ray.source import SourceImage, SourceOptions, Target, Unit, plan_units, read_unit
from dicmh_ray.source.image import printable_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a worker needs to run any unit of a job. Pickles."""

    writer: ArchiveWriter
    checkpoint: Checkpoint
    policy: EncodePolicy
    source_options: SourceOptions
    encode_options: EncodeOptions
    tagger: TaggerSpec | None = None

    def load_tagger(self) -> ImageTagger | None:
        """The job's tagger, in this process. Raises TaggerError when it is not there or another."""
        if self.tagger is None:
            return None
        return load_image_tagger(self.tagger, device=self.encode_options.device)

    def run_unit(
        self,
        unit: Unit,
        codec: ImageCodec,
        *,
        tagger: ImageTagger | None = None,
        quarantine: Collection[int] = (),
        rows: Iterable[EncodedImage] | None = None,
        on_row: Callable[[EncodedImage], None] | None = None,
    ) -> UnitResult:
        """Read, encode and commit one unit. Running it twice publishes it once.

        Args:
            unit: one of the plan's.
            codec: what :meth:`Checkpoint.load` returned in this process.
            tagger: what :meth:`load_tagger` returned in this process.
            quarantine: positions of images that killed a worker, see :func:`encode_images`.
            rows: the unit's rows, where something else than :meth:`rows` makes them.
            on_row: called with each row before it is written; what it raises ends the attempt.
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        worker = f"{socket.gethostname()}:{os.getpid()}"
        info: dict[str, Any] = {"worker": worker}

        def watched(rows: Iterable[EncodedImage]) -> Iterator[EncodedImage]:
            causes: Counter[str] = Counter()
            psnr_sum = 0.0
            summary = RowSummary()
            for row in rows:
                if row.error is not None:
                    causes[cause_of(row.error)] += 1
                if row.status == "ok":
                    psnr_sum += row.psnr or 0.0
                summary.add(row, max_bytes=self.policy.max_bytes)
                if on_row is not None:
                    on_row(row)
                yield row
            # The commit is written after its last row: what it says of them is known by then.
            info.update(causes=dict(sorted(causes.items())), psnr_sum=psnr_sum)
            info[SUMMARY_FIELD] = summary.packed()

        if rows is None:
            rows = self.rows(unit, codec, tagger=tagger, quarantine=quarantine)
        commit = self.writer.commit_unit(unit.name, watched(rows), info=info)
        return UnitResult(
            unit=unit.name,
            tally=Tally.of_commit(commit),
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu_started,
            worker=worker,
            by_another=commit.info.get("worker") != worker,
        )

    def rows(
        self,
        unit: Unit,
        codec: ImageCodec,
        *,
        tagger: ImageTagger | None = None,
        quarantine: Collection[int] = (),
    ) -> Iterator[EncodedImage]:
        """The unit's rows: what another kind of job makes in another way. See :meth:`run_unit`."""
        return encode_images(
            self.read(unit),
            codec,
            self.policy,
            options=self.encode_options,
            quarantine=quarantine,
            tagger=tagger,
        )

    def read(self, unit: Unit) -> Iterator[SourceImage]:
        """The unit's images; damage that ends the unit early comes as one more, broken image.

        A tar whose headers stop making sense cannot be read on. What came before it is kept, and
        the key ``<unit>#damaged-at-<offset>`` says where reading ended (offset of the last image
        that was read, 0 when none was), so that the loss is in the archive and in its statistics.

        Raises:
            SourceChangedError: the source is not the one that was planned: no part of it is kept.
            SourceColumnsError: a table's columns are not what the options say: it is no damage.
        """
        last_offset = 0
        try:
            for image in read_unit(unit, options=self.source_options):
                last_offset = image.source_offset or 0
                yield image
        except SourceFormatError as exc:
            _log.warning("unit %s is damaged after offset %d: %s", unit.name, last_offset, exc)
            uri = unit.uri if isinstance(unit.uri, str) else unit.uri[0]
            yield SourceImage(
                key=f"{unit.name}#damaged-at-{last_offset}",
                data=b"",
                source_uri=printable_text(uri),
                source_offset=last_offset,
                error=SourceImageError(f"{DAMAGED_SOURCE}: {exc.reason}"),
            )


def plan_job(
    sources: Sequence[str],
    archive: str,
    *,
    codec: str | Path | Callable[[], ImageCodec] = DEFAULT_CHECKPOINT,
    policy: EncodePolicy | None = None,
    source_options: SourceOptions | None = None,
    encode_options: EncodeOptions | None = None,
    tagger: TaggerSpec | None = None,
    resume: bool = True,
    append: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[Job, list[Unit], JobReport]:
    """Plan the units, create or reopen the archive, and find what is left to do.

    Args:
        sources: tars, Parquet files, folders, globs, brace expressions, on any fsspec store.
        archive: its address.
        codec: checkpoint name or directory, or a picklable factory of an ImageCodec.
        policy: rate and originals; part of the plan.
        source_options: how sources are read; part of the plan.
        encode_options: device, threads, batches; not part of the plan.
        tagger: says what pictures show, besides their own tags; part of the plan.
        resume: go on with an archive that has commits; False refuses it.
        append: add to a finished archive what it does not have yet, as its next version. The
            package's default codec then stands for the archive's own.
        storage_options: for the archive's store. Never written anywhere.

    Returns:
        the job, its units without a commit in order, and a report that has the totals.

    Raises:
        SourceNotFoundError: a source names nothing.
        SourceAddressError: no filesystem can be had for a source.
        SourceColumnsError: it is not clear which column of a Parquet file holds the images.
        PlanConflictError: the archive was begun with other sources, codec or policy.
        ArchiveNotFoundError: ``append``, and there is no archive.
        AppendError: ``append``, and the archive is unfinished or was written with another codec.
        JobError: ``resume`` is False and the archive has commits.
        WeightsError: the checkpoint is missing or incomplete, or should suggest tags and cannot.
        TaggerError: the tagger is not there.
    """
    policy = policy or EncodePolicy()
    source_options = source_options or SourceOptions()
    tagger = None if tagger is None else tagger.pinned()
    planned = plan_work(
        sources,
        archive,
        codec=codec,
        policy=policy,
        source_options=source_options,
        tagger=tagger,
        append=append,
        storage_options=storage_options,
    )
    writer, todo, report = open_job(
        archive,
        planned.plan,
        planned.checkpoint,
        planned.units,
        resume=resume,
        base=planned.base,
        storage_options=storage_options,
    )
    job = Job(
        writer=writer,
        checkpoint=planned.checkpoint,
        policy=policy,
        source_options=source_options,
        encode_options=encode_options or EncodeOptions(),
        tagger=tagger,
    )
    return job, todo, report


class Planned(NamedTuple):
    """What a job is to do; nothing of it is written yet."""

    checkpoint: Checkpoint
    units: list[Unit]
    plan: Plan
    base: Snapshot | None
    """The archive that it is added to."""


def plan_work(
    sources: Sequence[str],
    archive: str,
    *,
    codec: str | Path | Callable[[], ImageCodec],
    policy: EncodePolicy,
    source_options: SourceOptions,
    tagger: TaggerSpec | None,
    append: bool,
    storage_options: Mapping[str, Any] | None,
) -> Planned:
    """The part of :func:`plan_job` that only reads. ``tagger`` is pinned; else as there."""
    base = open_snapshot(archive, storage_options=storage_options) if append else None
    checkpoint = choose_checkpoint(codec, base)
    if base is None:
        units = plan_units(
            sources, options=source_options, target=Target(archive, is_archive_table)
        )
    else:
        units = plan_append(sources, base, source_options)
    parameters: dict[str, Any] = {"policy": policy.to_dict(), "source": source_options.to_dict()}
    if policy.suggest_tags and checkpoint.factory is None:
        # The codec_id does not cover the tagger, but rows depend on it.
        parameters["tagger_sha256"] = checkpoint.tagger_sha256()
    if tagger is not None:
        parameters["tagger"] = tagger.identity()
    plan = Plan(
        units=[unit.to_dict() for unit in units],
        codec_id=checkpoint.codec_id,
        parameters=parameters,
    )
    return Planned(checkpoint, units, plan, base)


def choose_checkpoint(
    codec: str | Path | Callable[[], ImageCodec], base: Snapshot | None
) -> Checkpoint:
    """The codec of a job; one that adds to an archive takes the archive's where none is named.

    Raises:
        WeightsError: the checkpoint is missing or incomplete.
    """
    checkpoint = Checkpoint.open(codec)
    if base is not None and codec == DEFAULT_CHECKPOINT and checkpoint.codec_id != base.codec_id:
        return Checkpoint(codec_id=base.codec_id, files=base.codec_files())
    return checkpoint


def plan_append(sources: Sequence[str], base: Snapshot, options: SourceOptions) -> list[Unit]:
    """The units of what ``sources`` name and an archive does not have yet.

    A tar or Parquet file that was changed since is new. An image file is known by its address: its
    address is its key, and a key does not change its picture.

    Raises:
        AppendError: the archive is unfinished, or has a table's rows in other units than these.
        SourceError: see :func:`plan_units`.
    """
    known = published_units(base)
    files = {
        uri for unit in known if unit.get("kind") == "files" for uri in Unit.from_dict(unit).uri
    }
    present = {unit_identity(unit) for unit in known}
    target = Target(base.uri, is_archive_table)
    units = plan_units(sources, options=options, known_files=files, target=target)
    new = [unit for unit in units if unit_identity(unit.to_dict()) not in present]
    tables = {(unit["uri"], unit["etag"]) for unit in known if unit.get("kind") == "parquet"}
    for unit in new:
        if unit.kind == "parquet" and (unit.to_dict()["uri"], unit.etag) in tables:
            raise AppendError(
                base.uri,
                f"it has rows of {unit.uri}, cut into units otherwise; "
                "wanted the unit_bytes of the job that added them",
            )
    return new


def open_job(
    archive: str,
    plan: Plan,
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    *,
    resume: bool,
    base: Snapshot | None = None,
    storage_options: Mapping[str, Any] | None,
) -> tuple[ArchiveWriter, list[Unit], JobReport]:
    """Create or reopen the archive of a plan: its writer, the units without a commit, a report.

    With ``base``, the plan is added to that archive; one without units adds no version.

    Raises:
        PlanConflictError: the archive was begun with another plan.
        AppendError: the archive takes no such job.
        JobError: ``resume`` is False and the archive has commits.
    """
    if base is not None and not units:
        writer = ArchiveWriter(base.store, base.plan)
    else:
        start = create_archive if base is None else append_to_archive
        writer = start(
            archive, plan=plan, codec_files=checkpoint.files, storage_options=storage_options
        )
    committed = writer.committed_units() & {unit.name for unit in units}
    if not resume:
        refuse_begun(archive, committed, units)
    todo = [unit for unit in units if unit.name not in committed]
    report = JobReport(
        archive=archive,
        runtime="",
        codec_id=checkpoint.codec_id,
        units_total=len(units),
        units_resumed=len(units) - len(todo),
        source_bytes_total=sum(unit.num_bytes for unit in todo),
    )
    return writer, todo, report


def refuse_begun(archive: str, committed: set[str], units: Sequence[Unit]) -> None:
    """Raises JobError when a job that is not to be resumed has committed units."""
    if committed:
        raise JobError(
            f"{archive} already holds {len(committed)} of {len(units)} units: "
            "resume it, or choose another address"
        )


def compress_local(
    job: Job, units: Sequence[Unit], monitor: JobMonitor, *, grace_s: float = GRACE_S
) -> JobReport:
    """Run the units in this process, one after the other.

    An image that kills the process kills the job; on Ray it would be isolated. Everything else is
    as on Ray: the same commits, the same retries, the same budget. Told to stop (SIGTERM), it
    finishes the unit it is at, or abandons it after ``grace_s``.

    Raises:
        JobStoppedError: told to stop.
        DicmhError: see :meth:`JobMonitor.finish` and :meth:`JobMonitor.wants_retry`.
    """
    monitor.report.runtime = "local"
    if not units:
        return monitor.finish(job)
    started = time.perf_counter()
    codec = job.checkpoint.load(job.encode_options)
    tagger = job.load_tagger()
    monitor.report.codec_load_seconds = time.perf_counter() - started
    monitor.first_unit()
    queue = UnitsQueue(units)
    with listening_for_stop(grace_s=grace_s) as notice:

        def saw(row: EncodedImage) -> None:
            notice.check(len(queue) + 1)
            monitor.saw(row)

        while len(queue):
            if notice.is_given:
                raise JobStoppedError(len(queue))
            unit = queue.take()
            if unit is None:
                time.sleep(min(queue.wait_s(), 1.0))
                continue
            try:
                result = job.run_unit(unit, codec, tagger=tagger, on_row=saw)
            except JobStoppedError:
                raise
            except (DicmhError, OSError) as exc:
                if monitor.wants_retry(unit, exc):
                    queue.put(unit, delay_s=monitor.retry_delay_s(unit))
            else:
                monitor.done(unit, result)
                if result.by_another:
                    queue.mix()
    return monitor.finish(job)
