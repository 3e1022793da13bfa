"""What a job came to: sums over committed units, rates, and the report that has them."""

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dicmh_ray.archive import Commit
from dicmh_ray.pipeline.encode import FAILURE_CAUSES
from dicmh_ray.pipeline.histogram import Histogram, Scale
from dicmh_ray.pipeline.summary import RowSummary

UNIT_SECONDS = Scale(0.25, is_log=True)
"""Of the times of units: bins a fifth wider than the one before."""


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

    summary: RowSummary = field(default_factory=RowSummary)

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
            summary=RowSummary.of_info(commit.info) or RowSummary(),
        )

    def merge(self, other: "Tally") -> None:
        """Add another tally to this one."""
        for entry in dataclasses.fields(self):
            if entry.name == "causes":
                self.causes.update(other.causes)
            elif entry.name == "summary":
                self.summary.merge(other.summary)
            else:
                total = getattr(self, entry.name) + getattr(other, entry.name)
                setattr(self, entry.name, total)

    @property
    def failures(self) -> int:
        """Rows that count against the failure budget, original bytes kept or not."""
        return sum(count for cause, count in self.causes.items() if cause in FAILURE_CAUSES)

    @property
    def bytes_saved(self) -> int:
        """Of the source images' bytes; negative where the archive is larger."""
        return self.bytes_in - self.bytes_out

    @property
    def mean_bpp(self) -> float | None:
        """All bits of the streams over all their pixels."""
        return 8 * self.stream_bytes / self.stream_pixels if self.stream_pixels else None

    @property
    def mean_psnr(self) -> float | None:
        """Mean over the ``ok`` rows, dB; None where none was measured: imported streams."""
        return self.psnr_sum / self.ok if self.ok and self.psnr_sum else None


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

    by_another: bool = False
    """The commit is another worker's: of another driver, or of one that did not live to say so."""


@dataclass(kw_only=True, slots=True)
class JobReport:
    """The state of a job: what a progress bar shows while it runs, what is left when it ends."""

    archive: str
    runtime: str
    codec_id: str
    started_at: float = 0.0
    """Seconds of the epoch."""

    units_total: int = 0
    units_resumed: int = 0
    """Units an earlier run had committed; the counts below are those of this run."""

    units_done: int = 0
    units_failed: list[str] = field(default_factory=list)
    units_retried: int = 0
    """Attempts at units that ended in an error and were followed by another one."""

    workers_died: int = 0
    """Worker processes that ended in the middle of a unit."""

    source_bytes_total: int = 0
    """Bytes of the source objects still to do when this run began."""

    source_bytes_done: int = 0
    images_in_flight: int = 0
    """Rows of units that are not committed yet, as far as the driver sees them (local runtime)."""

    workers: int = 1
    """The most that there were at once."""

    seconds: float = 0.0
    connect_seconds: float | None = None
    """Until there was a connection to Ray, its start included where it was started for the job."""

    codec_load_seconds: float | None = None
    """In the slowest of the workers; each loads codec and tagger once."""

    first_unit_seconds: float | None = None
    """From the job's start, planning excluded, until the first unit was begun."""

    eta_s: float | None = None
    """Seconds to go at the rate of the last minutes; None before the first unit is committed."""

    cpu_seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    unit_seconds: Histogram = field(default_factory=lambda: Histogram(scale=UNIT_SECONDS))
    """Wall-clock time of the units that were committed."""

    manifest: int | None = None
    """Version of the manifest once the archive is complete."""

    @property
    def images_per_s(self) -> float:
        """Images of this run over its wall-clock seconds, start of the workers included."""
        return self.tally.images / self.seconds if self.seconds else 0.0

    @property
    def bytes_in_per_s(self) -> float:
        """Bytes of source images over the same seconds."""
        return self.tally.bytes_in / self.seconds if self.seconds else 0.0

    @property
    def mean_bpp(self) -> float | None:
        """All bits of the streams over all their pixels."""
        return self.tally.mean_bpp

    @property
    def mean_psnr(self) -> float | None:
        """Mean over the ``ok`` rows, dB; None where none was measured: imported streams."""
        return self.tally.mean_psnr

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON: flat but for histograms, worst images and examples."""
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name not in ("tally", "unit_seconds")
        }
        hidden = ("causes", "psnr_sum", "stream_pixels", "summary")
        for entry in dataclasses.fields(Tally):
            if entry.name not in hidden:
                values[entry.name] = getattr(self.tally, entry.name)
        quantiles = {f"p{n}": self.unit_seconds.quantile(n / 100) for n in (50, 90, 99)}
        return values | {
            "bytes_saved": self.tally.bytes_saved,
            "failures": self.tally.failures,
            "causes": dict(sorted(self.tally.causes.items())),
            "images_per_s": self.images_per_s,
            "bytes_in_per_s": self.bytes_in_per_s,
            "mean_bpp": self.mean_bpp,
            "mean_psnr": self.mean_psnr,
            "unit_seconds": {"mean": self.unit_seconds.mean, **quantiles},
            **self.tally.summary.to_dict(),
        }
