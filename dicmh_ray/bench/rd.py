"""Rate and distortion of a codec's states, and of its peers, on a folder of images.

Every method codes exactly the same pictures; an image that one of them cannot code is left out for
all and named in the report. Images are taken one at a time, so memory holds one image's sweep.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dicmh_ray.bench.bd_rate import BdRate, bd_rate, load_bjontegaard, ms_ssim_db
from dicmh_ray.bench.environment import Environment, describe_environment
from dicmh_ray.bench.peers import Peer, available_peers
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import EncodeError, SourceImageError, SourceNotFoundError
from dicmh_ray.source import load_pixels

SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

Image = npt.NDArray[np.uint8]
Progress = Callable[[int, int, str], None]
"""Called as ``progress(images done, images in all, name of the image just done)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RdOptions:
    """What is compared, and how."""

    name: str = "dicmh"
    """The codec's name in the report."""

    view: str = "machine"
    """The codec's view that is measured."""

    peers: tuple[Peer, ...] = field(default_factory=available_peers)
    """Compared with. The first is the anchor of the others' BD-rates."""

    headline_bpp: tuple[float, float] = (0.1, 1.0)
    """The rates over which the headline BD-rate averages."""

    max_images: int | None = None
    """Take only the first ones, in order of name."""

    peer_threads: int = 2
    """Peer settings coded at once (Pillow's encoders release the interpreter lock). Seconds are
    honest as long as the machine has that many idle cores; 1 for a quiet measurement."""

    def __post_init__(self) -> None:
        if not 0 < self.headline_bpp[0] < self.headline_bpp[1]:
            raise ValueError(f"headline_bpp is {self.headline_bpp}, wanted 0 < low < high")
        if self.peer_threads < 1 or (self.max_images is not None and self.max_images < 1):
            raise ValueError("peer_threads and max_images are at least 1")
        if self.name in {peer.name for peer in self.peers}:
            raise ValueError(f"{self.name!r} is the name of a peer")


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

    psnr: float
    """dB, RGB."""

    ms_ssim: float | None
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
    psnr: float
    ms_ssim: float | None
    """Mean over the images large enough to have one."""

    encode_s: float
    decode_s: float

    def quality(self, metric: str) -> float | None:
        """The value in dB of ``"psnr"`` or ``"ms_ssim"``."""
        if metric == "psnr":
            return self.psnr
        return None if self.ms_ssim is None else ms_ssim_db(self.ms_ssim)


@dataclass(frozen=True, kw_only=True, slots=True)
class RdReport:
    """All that was measured. ``dataclasses.asdict`` of it is the JSON report."""

    codec: str
    """The codec's name among the methods."""

    codec_id: str
    folder: str
    num_images: int
    skipped: tuple[tuple[str, str], ...]
    """Images left out, each with its reason."""

    headline_bpp: tuple[float, float]
    points: tuple[Point, ...]
    bd_rates: tuple[BdRate, ...]
    environment: Environment
    measurements: tuple[Measurement, ...]


def find_images(folder: str | Path) -> list[Path]:
    """The image files below a folder, by suffix, in order of name.

    Raises:
        SourceNotFoundError: there is none.
    """
    paths = [path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise SourceNotFoundError(str(folder))
    return sorted(path for path in paths if path.is_file())


def evaluate_folder(
    folder: str | Path,
    codec: ImageCodec,
    *,
    options: RdOptions | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> RdReport:
    """Measure a codec at each of its states, and its peers over their sweeps.

    Args:
        folder: holds the images, at any depth.
        codec: all its states are measured.
        options: see :class:`RdOptions`.
        command: what the user typed, for the report.
        progress: called after each image.

    Raises:
        SourceNotFoundError: the folder holds no image that every method can code.
        MissingExtraError: the ``bench`` extra is not installed.
    """
    options = options or RdOptions()
    load_bjontegaard()  # now, not after an hour of measuring
    paths = find_images(folder)[: options.max_images]
    measurements: list[Measurement] = []
    skipped: list[tuple[str, str]] = []
    with ThreadPoolExecutor(options.peer_threads) as pool:
        for done, path in enumerate(paths, start=1):
            name = path.relative_to(folder).as_posix()
            try:
                image = load_pixels(path.read_bytes()).image
                ours = list(_measure_codec(name, image, codec, options))
            except (SourceImageError, EncodeError) as exc:
                skipped.append((name, str(exc)))
            else:
                measurements += ours
                measurements += _measure_peers(name, image, codec, options, pool)
            if progress is not None:
                progress(done, len(paths), name)
    if not measurements:
        raise SourceNotFoundError(str(folder))
    points = average(measurements)
    return RdReport(
        codec=options.name,
        codec_id=codec.codec_id,
        folder=str(folder),
        num_images=len(paths) - len(skipped),
        skipped=tuple(skipped),
        headline_bpp=options.headline_bpp,
        points=points,
        bd_rates=tuple(_compare(points, options)),
        environment=describe_environment(command),
        measurements=tuple(measurements),
    )


def average(measurements: Sequence[Measurement]) -> tuple[Point, ...]:
    """One point for each method and setting, in order of first appearance."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.method, one.setting), []).append(one)
    points = []
    for (method, setting), group in groups.items():
        ms_ssims = [one.ms_ssim for one in group if one.ms_ssim is not None]
        points.append(
            Point(
                method=method,
                setting=setting,
                num_images=len(group),
                bpp=_mean([one.bpp for one in group]),
                psnr=_mean([one.psnr for one in group]),
                ms_ssim=_mean(ms_ssims) if ms_ssims else None,
                encode_s=_mean([one.encode_s for one in group]),
                decode_s=_mean([one.decode_s for one in group]),
            )
        )
    return tuple(points)


def _measure_codec(
    name: str, image: Image, codec: ImageCodec, options: RdOptions
) -> Iterator[Measurement]:
    start = time.perf_counter()
    (stream,) = codec.encode([image], tags=[()], exif_orientations=[1])
    encode_s = time.perf_counter() - start
    for k, end in enumerate(prefix_bytes(stream), start=1):
        start = time.perf_counter()
        (decoded,) = codec.decode([stream[:end]], view=options.view)
        decode_s = time.perf_counter() - start
        (quality,) = codec.measure([image], [decoded])
        yield Measurement(
            method=options.name,
            setting=f"state {k}",
            image=name,
            num_bytes=end,
            num_pixels=image.shape[0] * image.shape[1],
            psnr=quality.psnr,
            ms_ssim=quality.ms_ssim,
            encode_s=encode_s,
            decode_s=decode_s,
        )


def _measure_peers(
    name: str, image: Image, codec: ImageCodec, options: RdOptions, pool: Executor
) -> Iterator[Measurement]:
    settings = [(peer, quality) for peer in options.peers for quality in peer.qualities]
    coded = pool.map(lambda setting: _code_with_peer(image, *setting), settings)
    # Qualities are measured here, between results: a codec belongs to one thread.
    for (peer, setting), (num_bytes, decoded, encode_s, decode_s) in zip(
        settings, coded, strict=True
    ):
        (quality,) = codec.measure([image], [decoded])
        yield Measurement(
            method=peer.name,
            setting=f"q {setting}",
            image=name,
            num_bytes=num_bytes,
            num_pixels=image.shape[0] * image.shape[1],
            psnr=quality.psnr,
            ms_ssim=quality.ms_ssim,
            encode_s=encode_s,
            decode_s=decode_s,
        )


def _code_with_peer(image: Image, peer: Peer, quality: int) -> tuple[int, Image, float, float]:
    start = time.perf_counter()
    data = peer.encode(image, quality)
    middle = time.perf_counter()
    decoded = peer.decode(data)
    return len(data), decoded, middle - start, time.perf_counter() - middle


def _compare(points: Sequence[Point], options: RdOptions) -> Iterator[BdRate]:
    """The codec against every peer, and every other peer against the first."""
    peers = [peer.name for peer in options.peers]
    pairs = [(options.name, peer) for peer in peers] + [(peer, peers[0]) for peer in peers[1:]]
    for test, anchor in pairs:
        for metric in ("psnr", "ms_ssim"):
            curves = [_curve(points, method, metric) for method in (anchor, test)]
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


def _curve(points: Sequence[Point], method: str, metric: str) -> list[tuple[float, float]]:
    curve = []
    for point in points:
        quality = point.quality(metric)
        if point.method == method and quality is not None:
            curve.append((point.bpp, quality))
    return curve


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
