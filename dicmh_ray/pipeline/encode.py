"""Source images -> encoded rows: the encode stage as a plain generator, and its policy.

    SourceImage ─ load_pixels ─ batch by pixels ─ codec.encode ─ choose states ─ cut ─ EncodedImage
         │            │                               │              │
         └ unreadable ┴ unsupported                   └ failed       └ below floor · larger than source
                    (a row all the same: the original bytes, and the reason in ``error``)

A ``for`` loop runs it; Ray is another way to run it. Whatever happens to an image, its key comes
out exactly once and in the order in which it came in. The quality in a row is measured on a decode
of exactly the bytes of that row.

Memory: pictures that are decoded ahead (``ahead_bytes``), a window of neighbours out of which batches
of similar shapes are made (four batches of ``batch_pixels``), each of them or one picture, whichever
is more; and what the codec takes for a batch. Rows hold streams, not pixels.
"""

import hashlib
import json
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from dicmh_ray.archive.schema import EncodedImage
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec, ImageTagger, Quality, TagSuggester
from dicmh_ray.codec.image_taggers import without_known
from dicmh_ray.errors import (
    CodecMismatchError,
    MissingExtraError,
    TaggerError,
    WeightsError,
)
from dicmh_ray.pipeline.batching import WINDOW_BATCHES, similar_batches, windows
from dicmh_ray.pipeline.loading import (
    CRASH,
    PIXEL_BYTES,
    UNREADABLE,
    LoadedImage,
    load_images,
)
from dicmh_ray.source import SourceImage

_log = logging.getLogger(__name__)

DEFAULT_BATCH_PIXELS = 2**20

KeepOriginal = Literal["never", "below-floor", "always"]

ENCODE_FAILED = "encode-failed"
TAG_FAILED = "tag-failed"
DAMAGED_SOURCE = "damaged-source"
WRONG_SIZE = "wrong-size"
UNDECODABLE = "undecodable"
BELOW_FLOOR = "below-floor"
LARGER_THAN_SOURCE = "larger-than-source"

MAX_REASON_CHARS = 500
"""Of ``error``: some libraries put whole tensors into their messages."""

FEW_IMAGES = 16
"""In so small a group the one that fails is found by encoding each of them alone."""

FAILURE_CAUSES = frozenset(
    {UNREADABLE, ENCODE_FAILED, TAG_FAILED, CRASH, DAMAGED_SOURCE, WRONG_SIZE, UNDECODABLE}
)
"""Causes that count against a job's failure budget, whether the original bytes were kept or not.
The other causes are decisions of the policy, not failures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodePolicy:
    """How many states of each image are written, and what happens to its original bytes.

    Every picture is encoded once, to all its states; the policy cuts that stream. What is said
    first wins:

    1. ``max_bytes`` limits the states, whatever else is asked for.
    2. ``states`` or ``target_bpp`` set the rate within that limit. With neither of them the rate
       follows the picture: the fewest states whose machine view meets the floor, or as many as the
       limit leaves.
    3. The floor is checked at the rate that came out. A picture that misses it keeps its original
       bytes instead of a stream, unless ``keep_original`` is ``"never"``.

    A stream has at least one state. Where that alone is more than ``max_bytes`` or ``target_bpp``
    ask for, it is written all the same; the job's report counts the pictures over ``max_bytes``.
    """

    states: int | None = None
    """Write exactly this many states (all there are, when the codec has fewer)."""

    target_bpp: float | None = None
    """Write the most states that stay within this many bits per pixel, and at least one."""

    max_bytes: int | None = None
    """No stream gets a state that makes it longer than this; but each has one state."""

    min_psnr: float = 30.0
    """Floor: dB over the whole picture, of the machine view."""

    min_worst_tile_psnr: float = 24.0
    """Floor: dB of the worst 64x64 tile, of the machine view."""

    keep_original: KeepOriginal = "below-floor"
    """``below-floor``: keep the source's bytes of every image that gets no stream, so that nothing
    is lost. ``always``: also beside every stream. ``never``: keep none; what cannot be encoded is
    a ``failed`` row, and a stream below the floor or larger than its source is written all the
    same, with tier ``none`` where it misses the floor."""

    base_states: int = 2
    """States in the ``base`` column (a preview, a low-rate scan); the later ones go to ``detail``."""

    suggest_tags: bool = False
    """Add the tags that the codec's tagger suggests, with their scores. Its checkpoint must have one."""

    def __post_init__(self) -> None:
        if self.states is not None and self.target_bpp is not None:
            raise ValueError("states and target_bpp exclude each other")
        if self.states is not None and self.states < 1:
            raise ValueError(f"states is {self.states}, wanted at least 1")
        if self.target_bpp is not None and not 0 < self.target_bpp < math.inf:
            raise ValueError(f"target_bpp is {self.target_bpp}, wanted more than 0")
        for name in ("min_psnr", "min_worst_tile_psnr"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, wanted finite dB")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes is {self.max_bytes}, wanted at least 1")
        if self.base_states < 1:
            raise ValueError(f"base_states is {self.base_states}, wanted at least 1")
        if self.keep_original not in ("never", "below-floor", "always"):
            raise ValueError(f"keep_original is {self.keep_original!r}")

    def meets_floor(self, quality: Quality) -> bool:
        """Whether a decoded picture is good enough to stand for its source."""
        return quality.psnr >= self.min_psnr and quality.worst_tile_psnr >= self.min_worst_tile_psnr

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON: it is part of an archive's plan."""
        values = asdict(self)
        if not self.suggest_tags:
            del values["suggest_tags"]  # plans of before it existed stay the same plans
        if self.max_bytes is None:
            del values["max_bytes"]  # the same
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The policy that ``to_dict`` described. Raises ValueError on an unknown name."""
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown policy fields: {', '.join(sorted(unknown))}")
        return cls(**data)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions:
    """What changes the speed of encoding and its memory, but not what is promised about rows."""

    device: str = "auto"
    """Where the codec runs: a torch device, or ``auto``."""

    threads: int | None = None
    """CPU threads of torch in each process; None leaves the choice to torch (on Ray: 1 on a CPU)."""

    batch_pixels: int | None = None
    """Pixels in one codec call; None means 2**20, for Ray workers on a GPU 2**24. One picture
    above it makes a batch of its own. Batches are made of pictures of similar shape, out of four
    batches' pixels of neighbours."""

    load_threads: int | None = None
    """Threads that read and decode source files ahead of the codec; None means 1, for Ray workers on
    a GPU 4. With 0 each picture is read when its batch is made."""

    ahead_bytes: int | None = None
    """Of files and decoded pictures that wait for the codec or are being decoded; None means the
    pixels of four batches. A picture that takes more is let in alone."""

    max_image_pixels: int = 268_435_456
    """Larger pictures are refused before they are decoded: they keep their original bytes."""


class _Chosen(NamedTuple):
    """The part of a full stream that the policy chose, and how good its decode is."""

    stream: bytes
    offsets: tuple[int, ...]
    quality: Quality


def encode_images(
    images: Iterable[SourceImage],
    codec: ImageCodec,
    policy: EncodePolicy,
    *,
    options: EncodeOptions | None = None,
    quarantine: Collection[int] = (),
    tagger: ImageTagger | None = None,
) -> Iterator[EncodedImage]:
    """Encode images to rows, one row for each, in order.

    Keys are unique among the rows of one call: the second bearer of a key gets the suffix ``~2``,
    the third ``~3``, the same every time.

    Args:
        images: what a source yields. An image that carries an ``error`` becomes a row at once.
        codec: encodes, and decodes again to measure.
        policy: how many states, and what becomes of originals.
        options: batch size and threads.
        quarantine: positions (0-based) in ``images`` that killed a worker process before: their
            bytes are not looked at, they become rows with the error ``crash``.
        tagger: its words follow an image's own tags, with their scores. An image it fails on
            becomes a row with the error ``tag-failed``.

    Raises:
        CodecMismatchError, WeightsError, TaggerError, MissingExtraError: codec or tagger itself is
            unusable, which no other image will change. Every other failure is a row.
    """
    options = options or EncodeOptions()
    loaded = load_unit(images, options, quarantine=quarantine)
    yield from encode_loaded(loaded, codec, policy, options=options, tagger=tagger)


def load_unit(
    images: Iterable[SourceImage], options: EncodeOptions, *, quarantine: Collection[int] = ()
) -> Iterator[LoadedImage]:
    """The first half of :func:`encode_images`: give keys, decode ahead."""
    batch_pixels = options.batch_pixels or DEFAULT_BATCH_PIXELS
    return load_images(
        images,
        threads=1 if options.load_threads is None else options.load_threads,
        ahead_bytes=options.ahead_bytes or PIXEL_BYTES * WINDOW_BATCHES * batch_pixels,
        max_pixels=options.max_image_pixels,
        quarantine=quarantine,
    )


def encode_loaded(
    images: Iterable[LoadedImage],
    codec: ImageCodec,
    policy: EncodePolicy,
    *,
    options: EncodeOptions | None = None,
    tagger: ImageTagger | None = None,
) -> Iterator[EncodedImage]:
    """The second half of :func:`encode_images`, wherever the images were decoded."""
    batch_pixels = (options or EncodeOptions()).batch_pixels or DEFAULT_BATCH_PIXELS
    # The state the last picture needed is where the search for the next one starts.
    start = (codec.num_states + 1) // 2
    for window in windows(images, max_pixels=WINDOW_BATCHES * batch_pixels):
        rows: list[EncodedImage | None] = [None] * len(window)
        for positions in list(similar_batches(window, batch_pixels)):
            batch = [image for image in (window[i] for i in positions) if image is not None]
            encoded = _encode_batch(batch, codec, policy, start, tagger)
            start = next((row.num_states for row in reversed(encoded) if row.num_states), start)
            for position, row in zip(positions, encoded, strict=True):
                rows[position] = row
                window[position] = None  # its pixels are done with
        yield from (row for row in rows if row is not None)


def _encode_batch(
    batch: Sequence[LoadedImage],
    codec: ImageCodec,
    policy: EncodePolicy,
    start: int,
    tagger: ImageTagger | None,
) -> list[EncodedImage]:
    """Rows for a batch, in its order; those without pixels never reach the codec."""
    if tagger is not None:
        batch = _tag_group(batch, tagger)
    with_pixels = [item for item in batch if item.failure is None]
    encoded = iter(_encode_group(with_pixels, codec, policy, start))
    return [
        next(encoded)
        if item.failure is None
        else _row_without_stream(item, policy, item.failure or UNREADABLE)
        for item in batch
    ]


def _tag_group(group: Sequence[LoadedImage], tagger: ImageTagger) -> list[LoadedImage]:
    """Add what the tagger says; on a failure by halves, as in :func:`_encode_group`."""
    with_pixels = [item for item in group if item.pixels is not None]
    if not with_pixels:
        return list(group)
    try:
        found = iter(tagger.tag([item.pixels.image for item in with_pixels if item.pixels]))
        return [
            item._replace(suggested=without_known(item.source.tags, next(found)))
            if item.pixels is not None
            else item
            for item in group
        ]
    except (TaggerError, MissingExtraError):
        raise
    except Exception as exc:  # noqa: BLE001  the user's code, perhaps: find the image, record it
        if len(group) == 1:
            _log.warning("tagging %r failed: %r", group[0].key, exc)
            reason = f"{TAG_FAILED}: {type(exc).__name__}: {exc}"[:MAX_REASON_CHARS]
            return [group[0]._replace(failure=reason)]
    middle = len(group) // 2
    return [*_tag_group(group[:middle], tagger), *_tag_group(group[middle:], tagger)]


def _encode_group(
    group: Sequence[LoadedImage], codec: ImageCodec, policy: EncodePolicy, start: int
) -> list[EncodedImage]:
    """Encode together; on a failure each half alone, and of a few images each one.

    Halving also is what helps when a GPU's memory is too small for the batch. To halve further
    would encode most of the few twice more, for one that fails.
    """
    if not group:
        return []
    try:
        images = [item.pixels.image for item in group if item.pixels is not None]
        tags = [(*item.source.tags, *(tag.tag for tag in item.suggested)) for item in group]
        orientations = [item.pixels.exif_orientation for item in group if item.pixels]
        if policy.suggest_tags:
            tagged = _suggester(codec).encode_with_suggestions(
                images, tags=tags, exif_orientations=orientations
            )
            streams = [one.stream for one in tagged]
            group = [
                item._replace(suggested=(*item.suggested, *one.suggested))
                for item, one in zip(group, tagged, strict=True)
            ]
        else:
            streams = codec.encode(images, tags=tags, exif_orientations=orientations)
        chosen = _choose_states(streams, images, codec, policy, start)
        return [_row(item, choice, policy) for item, choice in zip(group, chosen, strict=True)]
    except (CodecMismatchError, WeightsError, MissingExtraError):
        raise
    except Exception as exc:  # noqa: BLE001  whatever it is, one image has it: find it, record it
        if len(group) == 1:
            _log.warning("encoding %r failed: %r", group[0].key, exc)
            reason = f"{ENCODE_FAILED}: {type(exc).__name__}: {exc}"[:MAX_REASON_CHARS]
            return [_row_without_stream(group[0], policy, reason)]
    size = 1 if len(group) <= FEW_IMAGES else (len(group) + 1) // 2
    return [
        row
        for first in range(0, len(group), size)
        for row in _encode_group(group[first : first + size], codec, policy, start)
    ]


def _suggester(codec: ImageCodec) -> TagSuggester:
    if not isinstance(codec, TagSuggester):
        raise WeightsError(codec.codec_id[:16], "this codec suggests no tags")
    return codec


def _choose_states(
    streams: Sequence[bytes],
    images: Sequence[npt.NDArray[np.uint8]],
    codec: ImageCodec,
    policy: EncodePolicy,
    start: int,
) -> list[_Chosen]:
    """Cut each stream as the policy says, and measure the decode of what is left.

    Under the floor policy each picture walks from ``start``: down while it meets the floor, up while
    it misses it. Neighbours in a collection mostly need the same states, so two decodes are
    typical. Quality grows with the states in practice; where it does not, the result still meets
    the floor whenever the walk met a count that does.
    """
    offsets = [prefix_bytes(stream) for stream in streams]
    limits = [_states_allowed(ends, policy) for ends in offsets]
    wanted = [
        _states_by_rate(ends, image.shape[0] * image.shape[1], policy)
        for ends, image in zip(offsets, images, strict=True)
    ]
    states = [
        min(start if count is None else count, limit)
        for count, limit in zip(wanted, limits, strict=True)
    ]
    measured: list[dict[int, Quality]] = [{} for _ in streams]
    active = list(range(len(streams)))
    while active:
        cuts = [streams[i][: offsets[i][states[i] - 1]] for i in active]
        qualities = codec.measure([images[i] for i in active], codec.decode(cuts))
        for i, quality in zip(active, qualities, strict=True):
            measured[i][states[i]] = quality
        still_active = []
        for i in active:
            if wanted[i] is not None:
                continue
            meets = policy.meets_floor(measured[i][states[i]])
            following = states[i] + (-1 if meets else 1)
            if 1 <= following <= limits[i] and following not in measured[i]:
                states[i] = following
                still_active.append(i)
            elif not meets and following in measured[i]:
                states[i] = following  # the walk came down one too far
        active = still_active
    return [
        _Chosen(streams[i][: ends[states[i] - 1]], ends[: states[i]], measured[i][states[i]])
        for i, ends in enumerate(offsets)
    ]


def _states_allowed(ends: Sequence[int], policy: EncodePolicy) -> int:
    """How many states one picture may have at most."""
    if policy.max_bytes is None:
        return len(ends)
    return max(1, sum(end <= policy.max_bytes for end in ends))


def _states_by_rate(ends: Sequence[int], num_pixels: int, policy: EncodePolicy) -> int | None:
    """How many states an explicit rate means for one picture; None under the floor policy."""
    if policy.states is not None:
        return min(policy.states, len(ends))
    if policy.target_bpp is not None:
        return max(1, sum(8 * end <= policy.target_bpp * num_pixels for end in ends))
    return None


def _row(item: LoadedImage, chosen: _Chosen, policy: EncodePolicy) -> EncodedImage:
    """The row of an image that was encoded, or the original in its place."""
    if item.pixels is None:
        raise TypeError("an image without pixels has no stream")
    quality = chosen.quality
    meets_floor = policy.meets_floor(quality)
    if policy.keep_original != "never":
        if not meets_floor:
            reason = (
                f"{BELOW_FLOOR}: psnr {quality.psnr:.2f} dB, worst tile "
                f"{quality.worst_tile_psnr:.2f} dB with {len(chosen.offsets)} states"
            )
            return _row_without_stream(item, policy, reason)
        if len(chosen.stream) >= len(item.source.data):
            reason = (
                f"{LARGER_THAN_SOURCE}: {len(chosen.stream)} bytes against {len(item.source.data)}"
            )
            return _row_without_stream(item, policy, reason)
    height, width = item.pixels.image.shape[:2]
    split = chosen.offsets[min(policy.base_states, len(chosen.offsets)) - 1]
    return EncodedImage(
        **_source_columns(item),
        status="ok",
        error=None,
        tier="faithful" if meets_floor else "none",
        bpp=8 * len(chosen.stream) / (height * width),
        psnr=quality.psnr,
        worst_tile_psnr=quality.worst_tile_psnr,
        ms_ssim=quality.ms_ssim,
        num_states=len(chosen.offsets),
        prefix_bytes=chosen.offsets,
        base=chosen.stream[:split],
        detail=chosen.stream[split:],
        original=item.source.data if policy.keep_original == "always" else b"",
    )


def _row_without_stream(item: LoadedImage, policy: EncodePolicy, reason: str) -> EncodedImage:
    """The row of an image that has no stream: its original bytes where there are any to keep."""
    original = b"" if policy.keep_original == "never" else item.source.data
    return EncodedImage(
        **_source_columns(item),
        status="kept_original" if original else "failed",
        error=reason,
        tier="original" if original else "none",
        bpp=None,
        psnr=None,
        worst_tile_psnr=None,
        ms_ssim=None,
        num_states=None,
        prefix_bytes=(),
        base=b"",
        detail=b"",
        original=original,
    )


def _source_columns(item: LoadedImage) -> dict[str, Any]:
    """The columns that describe the source, the same for every status."""
    source, pixels = item.source, item.pixels
    scores = (*(1.0 for _ in source.tags), *(tag.score for tag in item.suggested))
    is_unread = source.error is not None and not source.data
    return {
        "key": item.key,
        "tags": (*source.tags, *(tag.tag for tag in item.suggested)),
        "tag_scores": scores if item.suggested else (),
        "width": pixels.image.shape[1] if pixels else None,
        "height": pixels.image.shape[0] if pixels else None,
        "source_uri": source.source_uri,
        "source_offset": source.source_offset,
        "original_sha256": "" if is_unread else hashlib.sha256(source.data).hexdigest(),
        "original_bytes": len(source.data),
        "original_format": pixels.format if pixels else None,
        "exif": pixels.exif if pixels else None,
        "icc": pixels.icc if pixels else None,
        "metadata": json.dumps(dict(source.metadata), ensure_ascii=False, separators=(",", ":")),
    }
