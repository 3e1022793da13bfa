"""What is worth knowing of many rows in few bytes: histograms, the worst images, why rows failed.

Every unit's summary is in its commit, so that a job's report, and one made years later, is a sum
over commits that reads no row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from dicmh_ray.archive import EncodedImage
from dicmh_ray.pipeline.histogram import Histogram, Scale

SUMMARY_FIELD = "summary"
"""Name in a commit's ``info``."""

SUMMARY_VERSION = 1
"""Of its form and of the scales below; another one's is taken for absent."""

SCALES = {
    "bpp": Scale(0.25, is_log=True),
    "psnr": Scale(1.0),
    "source_bytes": Scale(0.5, is_log=True),
    "stream_bytes": Scale(0.5, is_log=True),
    "states": Scale(1.0, is_whole=True),
}
"""What is counted: bits a pixel, dB and bytes of streams, states, bytes of source images."""

WORST_KEPT, WORST_OF_UNIT = 24, 3
EXAMPLES_KEPT, EXAMPLES_OF_UNIT = 5, 2
"""Images named in a report, and in the summary of each unit."""

MAX_ERROR_CHARS = 160


class WorstImage(NamedTuple):
    """An image with a stream, and how far the stream is from it."""

    psnr: float
    """dB, of the machine view."""

    key: str
    worst_tile_psnr: float | None
    bpp: float | None
    num_states: int | None


class Example(NamedTuple):
    """An image without a stream, or a broken one."""

    key: str
    error: str


def cause_of(error: str) -> str:
    """The word before the colon in a row's ``error``."""
    return error.partition(":")[0]


@dataclass(kw_only=True, slots=True)
class RowSummary:
    """A sum over rows; of several units it is the sum of theirs."""

    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram(scale=scale) for name, scale in SCALES.items()}
    )
    worst: list[WorstImage] = field(default_factory=list)
    """Lowest PSNR first."""

    examples: dict[str, list[Example]] = field(default_factory=dict)
    """Cause -> the first images that have it."""

    over_max_bytes: int = 0
    """Streams of one state that are longer than the policy's ``max_bytes``."""

    def add(self, row: EncodedImage, *, max_bytes: int | None = None) -> None:
        """Count a row."""
        if row.original_bytes:
            self.histograms["source_bytes"].add(row.original_bytes)
        if row.error is not None:
            named = self.examples.setdefault(cause_of(row.error), [])
            if len(named) < EXAMPLES_KEPT:
                named.append(Example(row.key, row.error[:MAX_ERROR_CHARS]))
        if row.status != "ok" or not row.prefix_bytes:
            return
        stream_bytes = row.prefix_bytes[-1]
        self.histograms["stream_bytes"].add(stream_bytes)
        self.over_max_bytes += max_bytes is not None and stream_bytes > max_bytes
        if row.num_states is not None:
            self.histograms["states"].add(row.num_states)
        if row.bpp is not None:
            self.histograms["bpp"].add(row.bpp)
        if row.psnr is not None:
            self.histograms["psnr"].add(row.psnr)
            worst = WorstImage(row.psnr, row.key, row.worst_tile_psnr, row.bpp, row.num_states)
            self._keep_worst([worst])

    def merge(self, other: "RowSummary") -> None:
        """Add another summary to this one."""
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])
        for cause, found in other.examples.items():
            named = self.examples.setdefault(cause, [])
            named.extend(found[: EXAMPLES_KEPT - len(named)])
        self._keep_worst(other.worst)
        self.over_max_bytes += other.over_max_bytes

    def _keep_worst(self, images: Iterable[WorstImage]) -> None:
        limit = self.worst[-1].psnr if len(self.worst) >= WORST_KEPT else None
        wanted = [image for image in images if limit is None or image.psnr < limit]
        if wanted:
            ranked = sorted([*self.worst, *wanted], key=lambda image: (image.psnr, image.key))
            self.worst = ranked[:WORST_KEPT]

    def packed(self) -> dict[str, Any]:
        """As short JSON, for a commit: about half a kilobyte."""
        return {
            "version": SUMMARY_VERSION,
            "histograms": {name: one.packed() for name, one in self.histograms.items()},
            "worst": [_rounded(image) for image in self.worst[:WORST_OF_UNIT]],
            "examples": {
                cause: [list(example) for example in found[:EXAMPLES_OF_UNIT]]
                for cause, found in sorted(self.examples.items())
            },
            "over_max_bytes": self.over_max_bytes,
        }

    @classmethod
    def of_info(cls, info: Mapping[str, Any]) -> Self | None:
        """The summary in a commit's ``info``; None where there is none that can be read."""
        packed = info.get(SUMMARY_FIELD)
        if not isinstance(packed, Mapping) or packed.get("version") != SUMMARY_VERSION:
            return None
        try:
            return cls(
                histograms={
                    name: Histogram.unpacked(scale, packed["histograms"][name])
                    for name, scale in SCALES.items()
                },
                worst=[WorstImage(*image) for image in packed["worst"]],
                examples={
                    cause: [Example(*example) for example in found]
                    for cause, found in packed["examples"].items()
                },
                over_max_bytes=packed["over_max_bytes"],
            )
        except (KeyError, TypeError, ValueError):
            return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON that explains itself, for a report."""
        return {
            "histograms": {
                name: {
                    "count": one.count,
                    "mean": one.mean,
                    "p50": one.quantile(0.5),
                    "bins": [
                        {"from": low, "to": high, "count": count}
                        for low, high, count in one.columns()
                    ],
                }
                for name, one in self.histograms.items()
            },
            "worst": [image._asdict() for image in self.worst],
            "examples": {
                cause: [example._asdict() for example in found]
                for cause, found in sorted(self.examples.items())
            },
            "over_max_bytes": self.over_max_bytes,
        }


def _rounded(image: WorstImage) -> list[Any]:
    return [round(value, 4) if isinstance(value, float) else value for value in image]
