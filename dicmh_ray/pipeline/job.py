"""A collection -> an archive, unit by unit: what every runtime runs, and what it reports.

    plan_job ── create_archive(plan) ── units not committed yet
                                             │  for each, anywhere, in any order, any number of times:
                                             └─ Job.run_unit: read_unit ─ encode_images ─ commit_unit

The commit of a unit is the only state. A unit that is run twice commits once; a job that was killed
goes on from the list of commits. The runtimes (:func:`compress_local` here, actors in
``ray_plugin``) only decide where ``run_unit`` is called, and tell a :class:`JobMonitor` what came
of it.
"""

import dataclasses
import hashlib
import logging
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dicmh_ray.archive import (
    ArchiveWriter,
    Commit,
    EncodedImage,
    Plan,
    Snapshot,
    append_to_archive,
    create_archive,
    open_snapshot,
    published_units,
    unit_identity,
)
from dicmh_ray.codec import (
    DEFAULT_CHECKPOINT,
    ImageCodec,
    ImageTagger,
    load_codec,
    read_checkpoint,
)
from dicmh_ray.codec.checkpoint import TAGGER_FILE
from dicmh_ray.codec.image_taggers import TaggerSpec, load_image_tagger
from dicmh_ray.errors import (
    CodecMismatchError,
    DicmhError,
    FailureBudgetError,
    JobError,
    MissingExtraError,
    PlanConflictError,
    SourceFormatError,
    SourceImageError,
    TaggerError,
    WeightsError,
)
from dicmh_ray.pipeline.encode import (
    DAMAGED_SOURCE,
    FAILURE_CAUSES,
    EncodeOptions,
    EncodePolicy,
    encode_images,
)
from dicmh_ray.source import SourceImage, SourceOptions, Unit, plan_units, read_unit

_log = logging.getLogger(__name__)

FATAL_ERRORS = (
    CodecMismatchError, MissingExtraError, PlanConflictError, TaggerError, WeightsError
)  # fmt: skip
"""Errors that no other unit and no second attempt will be free of: the job stops at once."""

MAX_ATTEMPTS = 3
"""Calls of one unit that may end in an error before the job gives it up."""

BUDGET_GRACE_IMAGES = 100
"""A failure budget that is a fraction is not judged on fewer images than these until the end."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A codec that can be sent to another machine and loaded there."""

    codec_id: str
    """What the archive is written with; a worker that loads another one refuses."""

    files: Mapping[str, bytes] = field(repr=False)
    """Relative name -> content, to bundle in the archive; also what workers load where the
    checkpoint is not the package's own."""

    factory: Callable[[], ImageCodec] | None = None
    """Makes the codec in place of ``load_codec``; must pickle."""

    is_default: bool = False
    """Whether every worker has it in its installed package."""

    @classmethod
    def open(cls, codec: "str | Path | Callable[[], ImageCodec]") -> "Checkpoint":
        """Read a checkpoint by name or directory, or ask a factory for its codec's identity.

        Raises:
            WeightsError: the checkpoint is missing or incomplete.
        """
        if callable(codec):
            return cls(codec_id=codec().codec_id, files={}, factory=codec)
        found = read_checkpoint(codec)
        is_default = codec == DEFAULT_CHECKPOINT
        return cls(codec_id=found.codec_id, files=found.files, is_default=is_default)

    def tagger_sha256(self) -> str:
        """Digest of the checkpoint's tagger. Raises WeightsError when it has none."""
        if TAGGER_FILE not in self.files:
            raise WeightsError(self.codec_id[:16], "it has no tagger that could suggest tags")
        return hashlib.sha256(self.files[TAGGER_FILE]).hexdigest()

    def load(self, options: EncodeOptions) -> ImageCodec:
        """The codec, in this process. Raises CodecMismatchError when it is not the job's."""
        if self.factory is not None:
            codec = self.factory()
        elif self.is_default:
            codec = load_codec(device=options.device, threads=options.threads)
        else:
            with tempfile.TemporaryDirectory(prefix="dicmh-codec-") as folder:
                for name, content in self.files.items():
                    path = Path(folder, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                codec = load_codec(folder, device=options.device, threads=options.threads)
        if codec.codec_id != self.codec_id:
            raise CodecMismatchError(self.codec_id, codec.codec_id)
        return codec


@dataclass(kw_only=True, slots=True)
class Tally:
    """Sums over the rows of committed units."""

    images: int = 0
    ok: int = 0
    kept_original: int = 0
    failed: int = 0
    bytes_in: int = 0
    """Bytes of the source images."""

    bytes_out: int = 0
    """Bytes of the parts, with all their columns."""

    stream_bytes: int = 0
    stream_pixels: int = 0
    psnr_sum: float = 0.0
    causes: Counter[str] = field(default_factory=Counter)
    """Cause (the word before the colon in ``error``) -> rows."""

    @classmethod
    def of_commit(cls, commit: Commit) -> "Tally":
        """What a commit says of its rows, whoever made it."""
        facts = commit.statistics
        return cls(
            images=facts.rows,
            ok=facts.ok,
            kept_original=facts.kept_original,
            failed=facts.failed,
            bytes_in=facts.bytes_in,
            bytes_out=facts.bytes_out,
            stream_bytes=facts.ok_bitstream_bytes,
            stream_pixels=facts.ok_pixels,
            psnr_sum=commit.info.get("psnr_sum", 0.0),
            causes=Counter(commit.info.get("causes", {})),
        )

    def merge(self, other: "Tally") -> None:
        """Add another tally to this one."""
        for entry in dataclasses.fields(self):
            if entry.name == "causes":
                self.causes.update(other.causes)
            else:
                total = getattr(self, entry.name) + getattr(other, entry.name)
                setattr(self, entry.name, total)

    @property
    def failures(self) -> int:
        """Rows that count against the failure budget, original bytes kept or not."""
        return sum(count for cause, count in self.causes.items() if cause in FAILURE_CAUSES)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitResult:
    """What one committed unit came to."""

    unit: str
    tally: Tally
    seconds: float
    cpu_seconds: float
    """Processor time of the worker process during the unit, all its threads."""

    worker: str
    """``host:pid``"""


@dataclass(kw_only=True, slots=True)
class JobReport:
    """The state of a job: what a progress bar shows while it runs, what is left when it ends."""

    archive: str
    runtime: str
    codec_id: str
    units_total: int = 0
    units_resumed: int = 0
    """Units an earlier run had committed; the counts below are those of this run."""

    units_done: int = 0
    units_failed: list[str] = field(default_factory=list)
    source_bytes_total: int = 0
    """Bytes of the source objects still to do when this run began."""

    source_bytes_done: int = 0
    images_in_flight: int = 0
    """Rows of units that are not committed yet, as far as the driver sees them (local runtime)."""

    workers: int = 1
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    manifest: int | None = None
    """Version of the manifest once the archive is complete."""

    @property
    def images_per_s(self) -> float:
        """Images of this run over its wall-clock seconds, start of the workers included."""
        return self.tally.images / self.seconds if self.seconds else 0.0

    @property
    def mean_bpp(self) -> float | None:
        """All bits of the streams over all their pixels."""
        tally = self.tally
        return 8 * tally.stream_bytes / tally.stream_pixels if tally.stream_pixels else None

    @property
    def mean_psnr(self) -> float | None:
        """Mean over the ``ok`` rows, dB; None where none was measured: imported streams."""
        return self.tally.psnr_sum / self.tally.ok if self.tally.psnr_sum else None

    def to_dict(self) -> dict[str, Any]:
        """The report as flat JSON."""
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name != "tally"
        }
        for entry in dataclasses.fields(Tally):
            if entry.name not in ("causes", "psnr_sum", "stream_bytes", "stream_pixels"):
                values[entry.name] = getattr(self.tally, entry.name)
        return values | {
            "failures": self.tally.failures,
            "causes": dict(sorted(self.tally.causes.items())),
            "images_per_s": self.images_per_s,
            "mean_bpp": self.mean_bpp,
            "mean_psnr": self.mean_psnr,
        }


class Progress(Protocol):
    """Whoever wants to see a job run. Called in the driver, at most a few times a second."""

    def __call__(self, report: JobReport) -> None:
        """Show the report; it is the live object and changes later."""


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
        on_row: Callable[[EncodedImage], None] | None = None,
    ) -> UnitResult:
        """Read, encode and commit one unit. Running it twice publishes it once.

        Args:
            unit: one of the plan's.
            codec: what :meth:`Checkpoint.load` returned in this process.
            tagger: what :meth:`load_tagger` returned in this process.
            quarantine: positions of images that killed a worker, see :func:`encode_images`.
            on_row: called with each row before it is written.
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        worker = f"{socket.gethostname()}:{os.getpid()}"
        info: dict[str, Any] = {"worker": worker}

        def watched(rows: Iterable[EncodedImage]) -> Iterator[EncodedImage]:
            causes: Counter[str] = Counter()
            psnr_sum = 0.0
            for row in rows:
                if row.error is not None:
                    causes[row.error.partition(":")[0]] += 1
                if row.status == "ok":
                    psnr_sum += row.psnr or 0.0
                if on_row is not None:
                    on_row(row)
                yield row
            # The commit is written after its last row: what it says of them is known by then.
            info.update(causes=dict(sorted(causes.items())), psnr_sum=psnr_sum)

        rows = self.rows(unit, codec, tagger=tagger, quarantine=quarantine)
        commit = self.writer.commit_unit(unit.name, watched(rows), info=info)
        return UnitResult(
            unit=unit.name,
            tally=Tally.of_commit(commit),
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu_started,
            worker=worker,
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
                source_uri=uri,
                source_offset=last_offset,
                error=SourceImageError(f"{DAMAGED_SOURCE}: {exc.reason}"),
            )


class JobMonitor:
    """The driver's side of a job, the same for every runtime: counts, budget, progress.

    Args:
        report: what is kept up to date.
        failure_budget: failed images that are tolerated: a whole number counts them, a float below
            1 is their share of the images done (judged once 100 are done, and at the end).
        progress: shown the report from time to time.
    """

    def __init__(
        self,
        report: JobReport,
        *,
        failure_budget: float = 0.1,
        progress: Progress | None = None,
    ) -> None:
        if failure_budget < 0 or (isinstance(failure_budget, float) and failure_budget > 1):
            raise ValueError(f"failure_budget is {failure_budget}: a count, or a share up to 1.0")
        self.report = report
        self._budget = failure_budget
        self._progress = progress
        self._started = time.perf_counter()
        self._shown = 0.0
        self._attempts: Counter[str] = Counter()

    def done(self, unit: Unit, result: UnitResult) -> None:
        """Count a committed unit. Raises FailureBudgetError when the budget is spent."""
        report = self.report
        report.units_done += 1
        report.images_in_flight = 0
        report.source_bytes_done += unit.num_bytes
        report.cpu_seconds += result.cpu_seconds
        report.tally.merge(result.tally)
        _log.info(
            "unit %s: %d images in %.1f s on %s",
            unit.name, result.tally.images, result.seconds, result.worker,
        )  # fmt: skip
        self.show(is_due=True)
        if report.tally.images >= BUDGET_GRACE_IMAGES or isinstance(self._budget, int):
            self._check_budget()

    def saw(self, row: EncodedImage) -> None:
        """Count a row of the unit that runs in this process, for the display only."""
        self.report.images_in_flight += 1
        self.show()

    def wants_retry(self, unit: Unit, error: Exception) -> bool:
        """Count an attempt that ended in an error; False once the unit is given up.

        Raises:
            DicmhError: an error that the next attempt would meet again, in every unit.
        """
        if isinstance(error, FATAL_ERRORS):
            raise error
        self.report.images_in_flight = 0
        self._attempts[unit.name] += 1
        attempt = self._attempts[unit.name]
        _log.warning("unit %s, attempt %d of %d: %s", unit.name, attempt, MAX_ATTEMPTS, error)
        if attempt < MAX_ATTEMPTS:
            return True
        self.give_up(unit)
        return False

    def give_up(self, unit: Unit) -> None:
        """Leave a unit uncommitted; the job goes on and says so at its end."""
        self.report.units_failed.append(unit.name)
        self.show(is_due=True)

    def show(self, *, is_due: bool = False) -> None:
        """Refresh the progress display, at most five times a second unless it is due."""
        now = time.perf_counter()
        self.report.seconds = now - self._started
        if self._progress is not None and (is_due or now - self._shown > 0.2):
            self._shown = now
            self._progress(self.report)

    def finish(self, job: Job) -> JobReport:
        """Publish the manifest when every unit is committed, then judge.

        Raises:
            JobError: units could not be run; everything else is committed.
            FailureBudgetError: the archive is complete, but too many of its images failed.
        """
        report = self.report
        if not report.units_failed:
            report.manifest = job.writer.finalize().version
        self.show(is_due=True)
        if report.units_failed:
            names = ", ".join(report.units_failed[:5])
            raise JobError(
                f"{len(report.units_failed)} of {report.units_total} units could not be run "
                f"({names}); the others are committed, run the job again to retry these"
            )
        self._check_budget()
        return report

    def _check_budget(self) -> None:
        tally = self.report.tally
        is_count = isinstance(self._budget, int)
        allowed = self._budget if is_count else self._budget * tally.images
        if tally.failures > allowed:
            raise FailureBudgetError(tally.failures, tally.images, self._budget)


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
        PlanConflictError: the archive was begun with other sources, codec or policy.
        ArchiveNotFoundError: ``append``, and there is no archive.
        AppendError: ``append``, and the archive is unfinished or was written with another codec.
        JobError: ``resume`` is False and the archive has commits.
        WeightsError: the checkpoint is missing or incomplete, or should suggest tags and cannot.
        TaggerError: the tagger is not there.
    """
    policy = policy or EncodePolicy()
    source_options = source_options or SourceOptions()
    base = open_snapshot(archive, storage_options=storage_options) if append else None
    checkpoint = Checkpoint.open(codec)
    if base is None:
        units = plan_units(sources, options=source_options)
    else:
        units = plan_append(sources, base, source_options)
        if codec == DEFAULT_CHECKPOINT and checkpoint.codec_id != base.codec_id:
            checkpoint = Checkpoint(codec_id=base.codec_id, files=base.codec_files())
    parameters: dict[str, Any] = {"policy": policy.to_dict(), "source": source_options.to_dict()}
    if policy.suggest_tags and checkpoint.factory is None:
        # The codec_id does not cover the tagger, but rows depend on it.
        parameters["tagger_sha256"] = checkpoint.tagger_sha256()
    if tagger is not None:
        tagger = tagger.pinned()
        parameters["tagger"] = tagger.identity()
    plan = Plan(
        units=[unit.to_dict() for unit in units],
        codec_id=checkpoint.codec_id,
        parameters=parameters,
    )
    writer, todo, report = open_job(
        archive, plan, checkpoint, units, resume=resume, base=base, storage_options=storage_options
    )
    job = Job(
        writer=writer,
        checkpoint=checkpoint,
        policy=policy,
        source_options=source_options,
        encode_options=encode_options or EncodeOptions(),
        tagger=tagger,
    )
    return job, todo, report


def plan_append(sources: Sequence[str], base: Snapshot, options: SourceOptions) -> list[Unit]:
    """The units of what ``sources`` name and an archive does not have yet.

    A tar or Parquet file that was changed since is new. An image file is known by its address: its
    address is its key, and a key does not change its picture.

    Raises:
        AppendError: the archive is unfinished.
    """
    known = published_units(base)
    files = {
        uri for unit in known if unit.get("kind") == "files" for uri in Unit.from_dict(unit).uri
    }
    present = {unit_identity(unit) for unit in known}
    units = plan_units(sources, options=options, known_files=files)
    return [unit for unit in units if unit_identity(unit.to_dict()) not in present]


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
    if committed and not resume:
        raise JobError(
            f"{archive} already holds {len(committed)} of {len(units)} units: "
            "resume it, or choose another address"
        )
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


def compress_local(job: Job, units: Sequence[Unit], monitor: JobMonitor) -> JobReport:
    """Run the units in this process, one after the other.

    An image that kills the process kills the job; on Ray it would be isolated. Everything else is
    as on Ray: the same commits, the same retries, the same budget.

    Raises:
        DicmhError: see :meth:`JobMonitor.finish` and :meth:`JobMonitor.wants_retry`.
    """
    monitor.report.runtime = "local"
    codec = job.checkpoint.load(job.encode_options) if units else None
    tagger = job.load_tagger() if units else None
    for unit in units:
        while codec is not None:
            try:
                result = job.run_unit(unit, codec, tagger=tagger, on_row=monitor.saw)
            except (DicmhError, OSError) as exc:
                if not monitor.wants_retry(unit, exc):
                    break
            else:
                monitor.done(unit, result)
                break
    return monitor.finish(job)
