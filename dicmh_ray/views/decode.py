"""Rows -> what was asked for of them, in batches of bounded size. Usable from any worker.

    decode_views(rows, "machine", codec=codec)

A row carries the bytes it was read with; nothing is fetched here. Of a row that kept its original
instead of a stream, every picture is the original's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from dicmh_ray.archive import BLOBS, EncodedImage
from dicmh_ray.codec import ImageCodec, ReducingCodec
from dicmh_ray.errors import (
    BitstreamError,
    DicmhError,
    SourceImageError,
    UnreadableImageError,
    UnsupportedImageError,
)
from dicmh_ray.views.pictures import picture_of, reduced, reduced_further, reduction_for

View = Literal["tags", "latent", "machine", "human", "thumbnail", "original"]
VIEWS: tuple[str, ...] = get_args(View)

THUMBNAIL_SIDE = 256
THUMBNAIL_STATES = 1
"""A picture that is shown small needs no more."""

BATCH_PIXELS = 16_000_000
"""Pixels that a codec is given at once; one larger picture is a batch of its own."""


def check_view(view: str) -> None:
    """Refuse what is no view."""
    if view not in VIEWS:
        raise ValueError(f"view is {view!r}, wanted one of {', '.join(VIEWS)}")


def blobs_for(view: str) -> tuple[str, ...]:
    """Blob columns that rows must have been read with; ``original`` where there is no stream."""
    check_view(view)
    if view == "tags":
        return ()
    if view == "original":
        return ("original",)
    return ("base", "detail") if view == "latent" else BLOBS


def states_for(view: str, states: int | None) -> int | None:
    """How many states to read; None is all."""
    return THUMBNAIL_STATES if view == "thumbnail" and states is None else states


def is_generated(row: EncodedImage, view: str) -> bool:
    """Whether a picture of the row shows detail that its stream does not hold."""
    return view == "human" and bool(row.prefix_bytes)


def decode_views(
    rows: Sequence[EncodedImage],
    view: str,
    states: int | None = None,
    codec: ImageCodec | Callable[[], ImageCodec] | None = None,
    *,
    max_side: int = THUMBNAIL_SIDE,
    on_error: Literal["raise", "return"] = "raise",
) -> list[Any]:
    """One view of each row.

    Args:
        rows: with the blobs of :func:`blobs_for`, possibly cut after some states.
        view: ``"tags"``: tuple of str. ``"latent"``: float16 ``[C, h, w]``. ``"machine"`` and
            ``"human"``: uint8 ``[H, W, 3]``. ``"thumbnail"``: uint8 ``[h, w, 3]``, no side above
            ``max_side``, from the fewest states. ``"original"``: bytes.
        states: decode from the first ones only, where there are more; None is all (of a thumbnail:
            the first).
        codec: the archive's, or what loads it when the first stream is met; not needed for tags,
            originals, and rows without a stream.
        max_side: of thumbnails, in pixels.
        on_error: ``"return"`` puts the error in the place of what could not be made of one row.

    Raises:
        UnreadableImageError: a row holds no picture.
        UnsupportedImageError: a row has no stream, or its original was not kept.
        BitstreamError: a stream is damaged.
        ViewError: the archive's checkpoint does not draw this view.
    """
    check_view(view)
    results: list[Any] = [None] * len(rows)
    streams = []
    for i, row in enumerate(rows):
        if row.prefix_bytes and view not in ("tags", "original"):
            streams.append(i)
            continue
        try:
            results[i] = _without_codec(row, view, max_side)
        except SourceImageError as exc:
            if on_error == "raise":
                raise
            results[i] = exc
    if not streams:
        return results
    loaded = codec() if callable(codec) else codec
    if loaded is None:
        raise ValueError(f"a codec is needed for the view {view!r}")
    for batch in _batches(rows, streams):
        decoded = _decoded([rows[i] for i in batch], view, states, loaded, max_side, on_error)
        for i, result in zip(batch, decoded, strict=True):
            results[i] = result
    return results


def _without_codec(row: EncodedImage, view: str, max_side: int) -> Any:
    if view == "tags":
        return row.tags
    if view == "original":
        if not row.original:
            raise UnsupportedImageError(f"{row.key!r}: its original bytes were not kept")
        return row.original
    if view == "latent":
        raise UnsupportedImageError(
            f"{row.key!r} has no bitstream, its status is {row.status}: {row.error}"
        )
    if not row.original:
        raise UnreadableImageError(f"{row.key!r} holds no picture: {row.error}")
    try:
        picture = picture_of(row.original)
    except UnreadableImageError as exc:
        raise UnreadableImageError(f"{row.key!r}: {exc}") from exc
    return reduced(picture, max_side) if view == "thumbnail" else picture


def _batches(rows: Sequence[EncodedImage], places: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    total = 0
    for i in places:
        pixels = (rows[i].width or 1) * (rows[i].height or 1)
        if batch and total + pixels > BATCH_PIXELS:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += pixels
    if batch:
        yield batch


def _decoded(
    rows: Sequence[EncodedImage],
    view: str,
    states: int | None,
    codec: ImageCodec,
    max_side: int,
    on_error: str,
) -> list[Any]:
    try:
        return _decode(rows, view, states, codec, max_side)
    except BitstreamError as exc:
        if on_error == "raise":
            raise
        if len(rows) == 1:
            return [exc]
    # Which of them it was, one by one: damage is rare.
    return [r for row in rows for r in _decoded([row], view, states, codec, max_side, on_error)]


def _decode(
    rows: Sequence[EncodedImage],
    view: str,
    states: int | None,
    codec: ImageCodec,
    max_side: int,
) -> list[Any]:
    data = [row.base + row.detail for row in rows]
    if view == "latent":
        return list(codec.decode_latent(data, states=states))
    if view != "thumbnail":
        return list(codec.decode(data, states=states, view=view))
    states = states_for(view, states)
    if not isinstance(codec, ReducingCodec):
        return [reduced(picture, max_side) for picture in codec.decode(data, states=states)]
    sizes = [(row.height or 1, row.width or 1) for row in rows]
    reductions = [reduction_for(height, width, max_side) for height, width in sizes]
    pictures = codec.decode_reduced(data, reductions, states=states)
    return [
        reduced_further(picture, reduction, height, width, max_side)
        for picture, reduction, (height, width) in zip(pictures, reductions, sizes, strict=True)
    ]


def error_of(result: Any) -> DicmhError | None:
    """The error in the place of a view, if that is what ``on_error="return"`` put there."""
    return result if isinstance(result, DicmhError) else None
