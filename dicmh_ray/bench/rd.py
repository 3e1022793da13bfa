"""Rate and distortion of a codec's states, and of its peers, on a set of pictures.

Every method codes exactly the same pictures; an image that one of them cannot code is left out for
all and named in the report. Pictures are taken a few at a time, so memory holds few sweeps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dicmh_ray.bench.bd_rate import BdRate, bd_rate, load_bjontegaard
from dicmh_ray.bench.environment import Environment, describe_environment
from dicmh_ray.bench.metrics import Gauge, NetRecord, Yardstick, decibels, is_curve, means
from dicmh_ray.bench.peers import Peer, available_peers
from dicmh_ray.bench.subject import (
    Decoded,
    Progress,
    Subject,
    find_images,
    for_each_picture,
    none_coded,
    set_name,
)
from dicmh_ray.codec import ImageCodec


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """What is compared, and how."""

    name: str = "dicmh"
    """The codec's name in the report; other views than the machine's follow it."""

    views: tuple[str, ...] = ("machine",)
    """The codec's views that are measured."""

    peers: tuple[Peer, ...] = field(default_factory=available_peers)
    """Compared with. The first is the anchor of the others' BD-rates."""

    headline_bpp: tuple[float, float] = (0.1, 1.0)
    """The rates over which the headline BD-rate averages."""

    near_bpp: tuple[float, ...] = (0.05, 0.15, 0.3, 0.5)
    """At equal bytes, the states nearest to these mean rates are compared."""

    max_images: int | None = None
    """Take only the first ones, in order of name."""

    threads: int = 2
    """Pictures at once. Seconds are honest as long as the machine has that many idle cores."""

    teachers: frozenset[str] = frozenset()
    """SHA-256 of the weights whose features were a loss when the codec was trained."""

    def __post_init__(self) -> None:
        if not 0 < self.headline_bpp[0] < self.headline_bpp[1]:
            raise ValueError(f"headline_bpp is {self.headline_bpp}, wanted 0 < low < high")
        if self.threads < 1 or (self.max_images is not None and self.max_images < 1):
            raise ValueError("threads and max_images are at least 1")
        if not self.views or not self.near_bpp or min(self.near_bpp) <= 0:
            raise ValueError("views and near_bpp have at least one entry, each rate above 0")
        if set(map(self.method, self.views)) & {peer.name for peer in self.peers}:
            raise ValueError(f"{self.name!r} is the name of a peer")

    def method(self, view: str) -> str:
        """What one of our views is called in reports."""
        return self.name if view == "machine" else f"{self.name} {view}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One image, one method, one setting."""

    method: str
    setting: str
    """``"state 1"`` is the first state alone; ``"q 30"`` a peer's quality."""

    image: str
    """Path inside the folder."""

    num_bytes: int
    """All of them: header, tags and checksums too."""

    num_pixels: int
    """H x W of the unpadded picture."""

    metrics: Mapping[str, float]
    """See :mod:`dicmh_ray.bench.metrics`."""

    encode_s: float
    """For a state, the time of the full stream: the codec writes all states at once."""

    decode_s: float

    @property
    def bpp(self) -> float:
        """Bits per pixel."""
        return 8 * self.num_bytes / self.num_pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The mean over images of one method at one setting."""

    method: str
    setting: str
    num_images: int
    bpp: float
    metrics: Mapping[str, float]
    """Each the mean over the images that have it."""

    metric_bpp: Mapping[str, float]
    """For each metric the mean rate of those images: what its curves are drawn over."""

    encode_s: float
    decode_s: float

    def quality(self, metric: str) -> float | None:
        """A metric in dB, more being better (:func:`dicmh_ray.bench.metrics.decibels`)."""
        value = self.metrics.get(metric)
        return None if value is None else decibels(metric, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class RdReport:
    """All that was measured. ``dataclasses.asdict`` of it is the JSON report."""

    codec: str
    """The codec's name among the methods."""

    codec_id: str
    pictures: str
    """What the set is called."""

    num_images: int
    skipped: tuple[tuple[str, str], ...]
    """Images left out, each with its reason."""

    headline_bpp: tuple[float, float]
    judges: tuple[NetRecord, ...]
    points: tuple[Point, ...]
    bd_rates: tuple[BdRate, ...]
    environment: Environment
    measurements: tuple[Measurement, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that have curves."""
        names = dict.fromkeys(name for point in self.points for name in point.metrics)
        return tuple(name for name in names if is_curve(name))


def evaluate_rd(
    sources: Sequence[str | Path],
    codec: ImageCodec,
    *,
    options: BenchOptions | None = None,
    gauge: Gauge | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> RdReport:
    """Measure a codec at each of its states, and its peers over their sweeps.

    Args:
        sources: image files, and folders that hold some at any depth.
        codec: all its states are measured.
        options: see :class:`BenchOptions`.
        gauge: what is measured beside PSNR and MS-SSIM.
        command: what the user typed, for the report.
        progress: called after each image.

    Raises:
        SourceNotFoundError: a source is no image and holds none.
        SourceFormatError: there is no image that every method can code.
        MissingExtraError: the ``bench`` extra is not installed.
    """
    options, gauge = options or BenchOptions(), gauge or Gauge(codec)
    load_bjontegaard()  # now, not after an hour of measuring
    found, skipped = for_each_picture(
        find_images(sources)[: options.max_images],
        codec,
        lambda subject: sweep(subject, gauge.look_at(subject), options),
        peers=options.peers,
        threads=options.threads,
        progress=progress,
    )
    return rd_report(
        found, skipped, codec, options, gauge, pictures=set_name(sources), command=command
    )


def sweep(subject: Subject, yardstick: Yardstick, options: BenchOptions) -> tuple[Measurement, ...]:
    """Measure one picture at every state of every view, and at every quality of every peer."""
    return tuple(
        Measurement(
            method=method,
            setting=setting,
            image=subject.name,
            num_bytes=decoded.num_bytes,
            num_pixels=subject.num_pixels,
            metrics=yardstick.measure(method, setting, decoded),
            encode_s=decoded.encode_s,
            decode_s=decoded.decode_s,
        )
        for method, setting, decoded in _settings(subject, options)
    )


def rd_report(
    found: Sequence[Sequence[Measurement]],
    skipped: tuple[tuple[str, str], ...],
    codec: ImageCodec,
    options: BenchOptions,
    gauge: Gauge,
    *,
    pictures: str,
    command: str,
) -> RdReport:
    """Average the sweeps of all pictures. Raises SourceFormatError if there are none."""
    if not found:
        raise none_coded(skipped)
    measurements = tuple(one for sweep in found for one in sweep)
    points = average(measurements)
    return RdReport(
        codec=options.name,
        codec_id=codec.codec_id,
        pictures=pictures,
        num_images=len(found),
        skipped=skipped,
        headline_bpp=options.headline_bpp,
        judges=gauge.records(options.teachers),
        points=points,
        bd_rates=tuple(_compare(points, options)),
        environment=describe_environment(command),
        measurements=measurements,
    )


def average(measurements: Sequence[Measurement]) -> tuple[Point, ...]:
    """One point for each method and setting, in order of first appearance."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.method, one.setting), []).append(one)
    return tuple(
        Point(
            method=method,
            setting=setting,
            num_images=len(group),
            bpp=float(np.mean([one.bpp for one in group])),
            metrics=means([one.metrics for one in group]),
            metric_bpp=means([dict.fromkeys(one.metrics, one.bpp) for one in group]),
            encode_s=float(np.mean([one.encode_s for one in group])),
            decode_s=float(np.mean([one.decode_s for one in group])),
        )
        for (method, setting), group in groups.items()
    )


def curve_of(points: Sequence[Point], method: str, metric: str) -> list[tuple[float, float]]:
    """Rate and quality in dB of a method at each of its settings, over the images with the metric."""
    return [
        (point.metric_bpp[metric], quality)
        for point in points
        if point.method == method and (quality := point.quality(metric)) is not None
    ]


def _settings(subject: Subject, options: BenchOptions) -> Iterator[tuple[str, str, Decoded]]:
    for view in options.views:
        for state in range(1, len(subject.prefix_bytes) + 1):
            yield options.method(view), f"state {state}", subject.ours(state, view)
    for peer in options.peers:
        for quality in peer.qualities:
            yield peer.name, f"q {quality}", subject.peer(peer.name, quality)


def _compare(points: Sequence[Point], options: BenchOptions) -> Iterator[BdRate]:
    """Each view against every peer, and every other peer against the first."""
    peers = [peer.name for peer in options.peers]
    ours = [options.method(view) for view in options.views]
    pairs = [(one, peer) for one in ours for peer in peers]
    pairs += [(peer, peers[0]) for peer in peers[1:]]
    metrics = [
        name for name in dict.fromkeys(n for p in points for n in p.metrics) if is_curve(name)
    ]
    for test, anchor in pairs:
        for metric in metrics:
            curves = [curve_of(points, method, metric) for method in (anchor, test)]
            if not all(curves):
                continue
            whole = bd_rate(curves[0], curves[1])
            headline = bd_rate(curves[0], curves[1], bpp_range=options.headline_bpp)
            yield BdRate(
                test=test,
                anchor=anchor,
                metric=metric,
                percent=whole[0] if whole else None,
                quality_range=whole[1] if whole else None,
                headline_percent=headline[0] if headline else None,
                headline_range=headline[1] if headline else None,
            )
