"""What is measured of a decoded picture, by name, and how each measure goes on a dB axis.

``psnr`` and ``worst_tile_psnr`` (dB) · ``ms_ssim`` (luma) and ``ms_ssim_rgb`` (mean of the three
channels), 0..1 · for each judge ``distance:NAME`` and ``cosine:NAME`` · ``lpips`` where the user
has it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dicmh_ray.bench.judges import FeatureJudge, Features, Lpips
from dicmh_ray.bench.subject import Decoded, Subject
from dicmh_ray.codec import ImageCodec, Quality
from dicmh_ray.vision.nets import NetSpec
from dicmh_ray.vision.onnx_net import Picture

NAMES = {
    "psnr": "PSNR",
    "worst_tile_psnr": "worst tile",
    "ms_ssim": "MS-SSIM",
    "ms_ssim_rgb": "MS-SSIM RGB",
    "lpips": "LPIPS",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NetRecord:
    """A net that took part."""

    name: str
    task: str
    sha256: str
    is_teacher: bool
    """Its features were a loss when the codec was trained: as a judge it is not independent."""

    @property
    def note(self) -> str:
        """What must stand beside its figures."""
        return "teacher: not independent" if self.is_teacher else ""


def record_of(spec: NetSpec, sha256: str, teachers: frozenset[str]) -> NetRecord:
    """A net's record; ``teachers`` are digests of weights that the codec was trained with."""
    return NetRecord(
        name=spec.name,
        task=spec.task,
        sha256=sha256,
        is_teacher=bool(teachers & {sha256, spec.same_as_sha256}),
    )


def label(metric: str) -> str:
    """A metric's name for people."""
    kind, _, net = metric.partition(":")
    return f"{net} {kind}" if net else NAMES[metric]


def text(metric: str, value: float | None) -> str:
    """A value with the digits that mean something."""
    if value is None:
        return "-"
    return f"{value:.2f}" if "psnr" in metric else f"{value:.4f}"


def is_curve(metric: str) -> bool:
    """Whether a metric has curves and BD-rates; cosines say what distances say."""
    return metric != "worst_tile_psnr" and not metric.startswith("cosine:")


def decibels(metric: str, value: float) -> float:
    """A value on a scale where more is better and equal steps look equal.

    PSNR as it is; ``-10 log10(1 - x)`` of a likeness x; ``-10 log10(x)`` of a distance x.
    """
    if "psnr" in metric:
        return value
    distance = 1 - value if metric.startswith(("ms_ssim", "cosine:")) else value
    return -10 * math.log10(max(distance, 1e-10))


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the pictures that have it (small ones have no MS-SSIM)."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


class Gauge:
    """Measures decoded pictures; one for all threads, as nothing in it changes."""

    def __init__(
        self,
        codec: ImageCodec,
        *,
        judges: Sequence[FeatureJudge] = (),
        lpips: Lpips | None = None,
    ) -> None:
        self._codec = codec
        self.judges, self._lpips = tuple(judges), lpips

    def records(self, teachers: frozenset[str]) -> tuple[NetRecord, ...]:
        """Of the judges."""
        return tuple(record_of(one.spec, one.net.sha256, teachers) for one in self.judges)

    def look_at(self, subject: Subject) -> "Yardstick":
        """Prepare to compare with one picture."""
        return Yardstick(self, subject)

    def measure(self, original: Picture, other: Picture) -> dict[str, float]:
        """Everything but what the judges say."""
        (quality,) = self._codec.measure([original], [other])
        found = {"psnr": quality.psnr, "worst_tile_psnr": quality.worst_tile_psnr}
        if quality.ms_ssim is not None:
            found["ms_ssim"] = quality.ms_ssim
            channels = [one.ms_ssim for one in self._channel_qualities(original, other)]
            found["ms_ssim_rgb"] = float(np.mean([one for one in channels if one is not None]))
        if self._lpips is not None:
            found["lpips"] = self._lpips.compare(original, other)
        return found

    def _channel_qualities(self, original: Picture, other: Picture) -> list[Quality]:
        """The luma of a grey picture is its channel: so one definition serves all."""
        originals, others = (
            [np.repeat(image[..., i : i + 1], 3, axis=2) for i in range(3)]
            for image in (original, other)
        )
        return self._codec.measure(originals, others)


class Yardstick:
    """Compares with one picture, whose own features are computed once."""

    def __init__(self, gauge: Gauge, subject: Subject) -> None:
        self._gauge, self._subject = gauge, subject
        self._features: list[Features] | None = None

    def measure(self, method: str, setting: str, decoded: Decoded) -> dict[str, float]:
        """All metrics of what a method shows at a setting; measured once for a subject."""
        known = self._subject.metrics
        if (method, setting) not in known:
            known[method, setting] = self._measure(decoded.image)
        return known[method, setting]

    def _measure(self, image: Picture) -> dict[str, float]:
        judges = self._gauge.judges
        if self._features is None:
            self._features = [judge.features(self._subject.image) for judge in judges]
        found = self._gauge.measure(self._subject.image, image)
        for judge, reference in zip(judges, self._features, strict=True):
            likeness = judge.compare(reference, judge.features(image))
            found[f"distance:{judge.spec.name}"] = likeness.distance
            found[f"cosine:{judge.spec.name}"] = likeness.cosine
        return found
