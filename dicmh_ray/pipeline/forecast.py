"""What a job would come to, from a sample of its images: size, time and money for each number of states.

    units ─ draw_sample ─> images of some units ─ the job's own encode_images, once for each policy
                                                      └─> sums ─ scaled by source bytes ─> Forecast

Nothing is written. The ranges say how far a total may be off because only some images were looked
at: 90 % of bootstrap resamples lie within them. They know nothing of machines that are slower than
this one, and of units that are unlike all that were drawn.
"""

import bisect
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dicmh_ray.archive import EncodedImage
from dicmh_ray.archive.part import write_index, write_parts
from dicmh_ray.codec import ImageCodec, ImageTagger, Quality
from dicmh_ray.errors import SourceFormatError
from dicmh_ray.pipeline.encode import EncodeOptions, EncodePolicy, encode_images
from dicmh_ray.pipeline.summary import cause_of
from dicmh_ray.source import SourceImage, SourceOptions, Unit, read_unit

GB = 1e9
"""Of prices and sizes in a forecast: decimal, as stores bill."""

MAX_SAMPLED_UNITS = 64
READ_AHEAD_FACTOR, READ_AHEAD_LEAST = 16, 64
"""Images read of a unit for each one that is drawn, and at least: the rest of the unit stays unread."""

RESAMPLES = 1000
UNITS_TO_RESAMPLE = 8
"""From so many units on, whole units are resampled: images of one unit are like each other."""

INDEX_COPIES = 2
"""Of each unit's row index: its own object, and in the joined one of a finished archive."""

COMMIT_BYTES = 6000
"""Of a unit: commit, entries in plan and manifest, heads of columns, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledUnit:
    """Some images of one unit."""

    unit: Unit
    images: tuple[SourceImage, ...]
    image_bytes: int
    """Of all images that were read to draw these."""

    span_bytes: int
    """Of the unit as far as it was read: headers, padding and other members, too."""


class Range(NamedTuple):
    """An estimate, and where 90 % of the resamples lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A job under one policy."""

    states: int | None
    """Written of every image; None for the policy that was asked for."""

    bpp: float | None
    """Bits of all streams over all their pixels."""

    psnr: float | None
    """Mean over the streams, dB."""

    below_floor: float
    """Share of the images whose decode misses the floor."""

    kept_original: float
    """Share of the images that keep their original bytes instead of a stream."""

    archive_bytes: Range
    """Parts, index and checkpoint, kept originals included."""

    saved_bytes: Range
    """Of the source objects; negative where the archive is larger."""

    hours: Range
    """Wall-clock time with the given workers."""

    compute_price: float | None
    """Of all workers for that time."""

    storage_price_per_month: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a sample says."""

    units: int
    source_bytes: int
    sampled_units: int
    sampled_images: int
    resampled: str
    """``units`` or ``images``: what the ranges are made of."""

    seed: int
    workers: int
    images: Range
    checkpoint_bytes: int
    """Of the codec's files, in every archive once: much of a small one."""

    causes: dict[str, int]
    """Why sampled images have no stream under the policy asked for."""

    asked: Outcome
    by_states: tuple[Outcome, ...]
    """One for each number of states; the floor and the rule for originals are those asked for."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastOptions:
    """What a forecast is made for."""

    sample: int = 40
    """Images to look at."""

    seed: int = 0
    workers: int = 1
    """That run at once, each as fast as this process."""

    price_per_hour: float | None = None
    """Of one worker."""

    price_per_gb_month: float | None = None
    """Of 10^9 bytes stored for a month."""

    def __post_init__(self) -> None:
        for name in ("sample", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 1")
        for name in ("price_per_hour", "price_per_gb_month"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 0 or more")


def draw_sample(
    units: Sequence[Unit], count: int, *, options: SourceOptions, seed: int
) -> list[SampledUnit]:
    """Draw about ``count`` images, spread over the units: the same ones for the same seed.

    Each unit gives images in proportion to its bytes, and at least one; of more units than images
    (or than 64) some are drawn in that proportion, at even distances. Of a large unit only the
    beginning is read, and the images drawn from that.
    """
    rng = random.Random(seed)
    wanted = _images_by_unit([max(1, unit.num_bytes) for unit in units], count, rng)
    drawn = [
        _draw_of_unit(units[i], many, options=options, rng=rng)
        for i, many in sorted(wanted.items())
    ]
    return [one for one in drawn if one.images]


def _images_by_unit(sizes: Sequence[int], count: int, rng: random.Random) -> dict[int, int]:
    """Position of a unit -> images to draw from it."""
    total = sum(sizes)
    if len(sizes) <= min(count, MAX_SAMPLED_UNITS):
        shares = [count * size / total for size in sizes]
        wanted = [int(share) for share in shares]
        by_rest = sorted(range(len(sizes)), key=lambda i: wanted[i] - shares[i])
        for i in by_rest[: count - sum(wanted)]:
            wanted[i] += 1
        return {i: max(1, many) for i, many in enumerate(wanted)}
    ends = list(itertools.accumulate(sizes))
    draws = min(count, MAX_SAMPLED_UNITS)
    drawn: Counter[int] = Counter()
    for number in range(draws):
        position = (number + rng.random()) / draws * total
        chosen = min(bisect.bisect_right(ends, position), len(sizes) - 1)
        drawn[chosen] += count // draws + (number < count % draws)
    return drawn


def _draw_of_unit(
    unit: Unit, count: int, *, options: SourceOptions, rng: random.Random
) -> SampledUnit:
    """A uniform draw from the images at the beginning of a unit, or from all of a small one."""
    limit = max(READ_AHEAD_LEAST, READ_AHEAD_FACTOR * count)
    kept: list[tuple[int, SourceImage]] = []
    num_seen, num_bytes, span = 0, 0, 0
    images = read_unit(unit, options=options)
    try:
        for number, image in enumerate(itertools.islice(images, limit)):
            num_seen = number + 1
            num_bytes += len(image.data)
            if unit.kind == "tar" and image.source_offset is not None:
                span = image.source_offset + len(image.data)
            if len(kept) < count:
                kept.append((number, image))
            elif (slot := rng.randrange(num_seen)) < count:
                kept[slot] = (number, image)
    except SourceFormatError:
        pass  # a job keeps what comes before the damage, too
    if num_seen < limit and unit.num_bytes:
        span = unit.num_bytes
    chosen = tuple(image for _, image in sorted(kept, key=lambda pair: pair[0]))
    return SampledUnit(
        unit=unit, images=chosen, image_bytes=num_bytes, span_bytes=max(1, span or num_bytes)
    )


def forecast(
    units: Sequence[Unit],
    codec: ImageCodec,
    policy: EncodePolicy,
    *,
    options: ForecastOptions,
    source_options: SourceOptions | None = None,
    encode_options: EncodeOptions | None = None,
    tagger: ImageTagger | None = None,
    checkpoint_bytes: int = 0,
) -> Forecast | None:
    """Encode a sample as the job would, under the policy and with each number of states.

    Args:
        units: those still to do.
        codec: loaded as the job's workers load it, so that its speed is theirs.
        policy: what is asked for.
        options: how many images, and what workers and storage cost.
        source_options: how sources are read.
        encode_options: batches and threads.
        tagger: the job's.
        checkpoint_bytes: of the codec's files, which every archive carries once.

    Returns:
        None when the units have no image.

    Raises:
        SourceError: a drawn unit cannot be read.
        CodecError: the codec is unusable.
    """
    source_options = source_options or SourceOptions()
    drawn = draw_sample(units, options.sample, options=source_options, seed=options.seed)
    images = [image for one in drawn for image in one.images]
    if not images:
        return None
    trial = _Trial(images, codec, encode_options or EncodeOptions(), tagger)
    scale = _Scale(units, drawn, options, checkpoint_bytes)
    asked = trial.run(policy)
    outcome = scale.outcome(asked, policy)
    by_states = []
    for states in range(codec.num_states, 0, -1):
        # Without originals every image has its stream, and the figures of it.
        variant = replace(
            policy,
            states=states,
            target_bpp=None,
            max_bytes=None,
            keep_original="never",
            suggest_tags=False,
        )
        by_states.append(scale.outcome(trial.run(variant), policy, states=states))
    causes = Counter(cause_of(row.error) for row in asked.rows if row.error is not None)
    return Forecast(
        units=len(units),
        source_bytes=sum(unit.num_bytes for unit in units),
        sampled_units=len(drawn),
        sampled_images=len(images),
        resampled="units" if scale.by_unit else "images",
        seed=options.seed,
        workers=options.workers,
        images=scale.images(),
        checkpoint_bytes=checkpoint_bytes,
        causes=dict(sorted(causes.items())),
        asked=outcome,
        by_states=tuple(reversed(by_states)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """The sample under one policy."""

    rows: list[EncodedImage]
    seconds: float


class _Trial:
    """Runs the sample under policies; an image is encoded once for all of them."""

    def __init__(
        self,
        images: Sequence[SourceImage],
        codec: ImageCodec,
        options: EncodeOptions,
        tagger: ImageTagger | None,
    ) -> None:
        self._images, self._options, self._tagger = images, options, tagger
        self._codec = codec
        self._remembering = _RememberingCodec(codec)
        # The first call of a codec is slower than all others.
        list(encode_images(images[:1], codec, EncodePolicy(), options=options))

    def run(self, policy: EncodePolicy) -> _Run:
        """Rows in the order of the images, and the time a worker would need for them."""
        codec = self._codec if policy.suggest_tags else self._remembering
        known_s = self._remembering.encode_seconds
        started = time.perf_counter()
        rows = list(
            encode_images(self._images, codec, policy, options=self._options, tagger=self._tagger)
        )
        seconds = time.perf_counter() - started
        if not policy.suggest_tags:
            spent = self._remembering.encode_seconds - known_s
            seconds += max(0.0, self._remembering.encode_seconds - spent)
        return _Run(rows=rows, seconds=seconds)


class _RememberingCodec:
    """A codec that encodes the same picture once. The rest is the codec's."""

    def __init__(self, codec: ImageCodec) -> None:
        self._codec = codec
        self.codec_id = codec.codec_id
        self.num_states = codec.num_states
        self.latent_channels = codec.latent_channels
        self.views = codec.views
        self.encode_seconds = 0.0
        self._known: dict[tuple[Any, ...], bytes] = {}

    def encode(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        tags: Sequence[Sequence[str]],
        exif_orientations: Sequence[int],
    ) -> list[bytes]:
        """Full streams; those of known pictures from memory."""
        names = [
            (hash(image.tobytes()), image.shape, tuple(words), turned)
            for image, words, turned in zip(images, tags, exif_orientations, strict=True)
        ]
        new = [i for i, name in enumerate(names) if name not in self._known]
        if new:
            started = time.perf_counter()
            streams = self._codec.encode(
                [images[i] for i in new],
                tags=[tags[i] for i in new],
                exif_orientations=[exif_orientations[i] for i in new],
            )
            self.encode_seconds += time.perf_counter() - started
            self._known.update({names[i]: s for i, s in zip(new, streams, strict=True)})
        return [self._known[name] for name in names]

    def decode(
        self, bitstreams: Sequence[bytes], *, states: int | None = None, view: str = "machine"
    ) -> list[npt.NDArray[np.uint8]]:
        """The codec's."""
        return self._codec.decode(bitstreams, states=states, view=view)

    def decode_latent(
        self, bitstreams: Sequence[bytes], *, states: int | None = None
    ) -> list[npt.NDArray[np.float16]]:
        """The codec's."""
        return self._codec.decode_latent(bitstreams, states=states)

    def measure(
        self,
        originals: Sequence[npt.NDArray[np.uint8]],
        decoded: Sequence[npt.NDArray[np.uint8]],
    ) -> list[Quality]:
        """The codec's."""
        return self._codec.measure(originals, decoded)


class _Scale:
    """From sums over the sample to totals over the units, by the bytes of the sources."""

    def __init__(
        self,
        units: Sequence[Unit],
        drawn: Sequence[SampledUnit],
        options: ForecastOptions,
        checkpoint_bytes: int,
    ) -> None:
        self._options = options
        self._num_units = len(units)
        self._source_bytes = sum(unit.num_bytes for unit in units)
        self._checkpoint_bytes = checkpoint_bytes
        self.by_unit = len(drawn) >= UNITS_TO_RESAMPLE
        sizes = [len(one.images) for one in drawn]
        self._group = np.repeat(np.arange(len(drawn)), sizes)
        self._image_bytes = np.array(
            [len(image.data) for one in drawn for image in one.images], np.float64
        )
        spans = np.array([[one.image_bytes, one.span_bytes] for one in drawn], np.float64)
        rng = np.random.default_rng(options.seed)
        count = len(drawn) if self.by_unit else len(self._group)
        picks = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        # The first row is the sample as it is; the others are resamples of it.
        self._weights = np.vstack([np.ones((1, count)), picks])
        read, span = (self._weights @ spans).T if self.by_unit else spans.sum(axis=0)
        share = read / span
        per_byte = self._weights @ self._items(self._image_bytes)
        self._factor = self._source_bytes * share / np.maximum(per_byte, 1.0)

    def images(self) -> Range:
        """All images of the units."""
        return _range(self._total(np.ones_like(self._image_bytes)))

    def outcome(self, run: _Run, policy: EncodePolicy, *, states: int | None = None) -> Outcome:
        """Totals of a run; with ``states``, of one without originals, as if they were kept."""
        options = self._options
        rows = run.rows
        streams = np.array([len(row.base) + len(row.detail) for row in rows], np.float64)
        if states is None:
            is_kept = np.array([row.status == "kept_original" for row in rows])
            blobs = streams + [len(row.original) for row in rows]
            is_below = np.array(
                [row.tier == "none" and row.status == "ok" for row in rows]
            ) | np.array([(row.error or "").startswith("below-floor") for row in rows])
        else:
            has_stream = streams > 0
            is_below = has_stream & np.array([row.tier == "none" for row in rows])
            is_kept = ~has_stream | is_below | (streams >= self._image_bytes)
            is_kept &= policy.keep_original != "never"
            originals = is_kept | (policy.keep_original == "always")
            blobs = np.where(is_kept, 0, streams) + np.where(originals, self._image_bytes, 0)
        per_row, per_unit = _overhead(rows)
        fixed = self._num_units * per_unit + self._checkpoint_bytes
        archive = self._total(blobs + per_row) + fixed
        pixels = np.array([(row.width or 0) * (row.height or 0) for row in rows], np.float64)
        pixels = np.maximum(pixels, 1.0)
        seconds = self._total(run.seconds * pixels / pixels.sum())
        hours = _range(seconds / 3600 / options.workers)
        ok = [row for row in rows if row.status == "ok"]
        area = sum((row.width or 0) * (row.height or 0) for row in ok)
        price = options.price_per_hour
        per_month = options.price_per_gb_month
        size = _range(archive)
        return Outcome(
            states=states,
            bpp=8 * float(streams.sum()) / area if area else None,
            psnr=float(np.mean([row.psnr or 0.0 for row in ok])) if ok else None,
            below_floor=float(is_below.mean()),
            kept_original=float(is_kept.mean()),
            archive_bytes=size,
            saved_bytes=_range(self._source_bytes - archive),
            hours=hours,
            compute_price=None if price is None else price * hours.value * options.workers,
            storage_price_per_month=None if per_month is None else per_month * size.value / GB,
        )

    def _items(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What is resampled: sums by unit, or the values themselves."""
        return (
            np.bincount(self._group, weights=values).astype(np.float64) if self.by_unit else values
        )

    def _total(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The total of a quantity over all units, for the sample and for each resample of it."""
        totals: npt.NDArray[np.float64] = (self._weights @ self._items(values)) * self._factor
        return totals


def _range(totals: npt.NDArray[np.float64]) -> Range:
    low, high = np.quantile(totals[1:], [0.05, 0.95])
    value = float(totals[0])
    return Range(value, min(value, float(low)), max(value, float(high)))


def _overhead(rows: Sequence[EncodedImage]) -> tuple[float, float]:
    """Bytes besides blobs: of a row, in part and index, and of a unit, whatever its rows."""
    unique = [replace(row, key=f"{i:06d} {row.key}") for i, row in enumerate(rows)]
    parts = list(write_parts("forecast", unique, footer={}))
    blobs = sum(len(row.base) + len(row.detail) + len(row.original) for row in rows)
    footers = sum(part.footer_bytes for part in parts)
    indexes = sum(len(write_index(part.index)) for part in parts)
    empty = len(write_index(parts[0].index.slice(0, 0)))
    grown = sum(len(part.data) for part in parts) - footers - blobs
    grown += INDEX_COPIES * (indexes - empty * len(parts))
    return grown / len(rows), footers / len(parts) + INDEX_COPIES * empty + COMMIT_BYTES
