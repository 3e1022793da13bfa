"""Pictures of mixed sizes -> batches of similar shapes, bounded by pixels.

A codec that stacks pictures wants them alike, and a collection mixes them. A window of neighbours is
sorted by shape and cut; its rows come out in the order in which its pictures came in.
"""

from collections.abc import Iterable, Iterator, Sequence

from dicmh_ray.pipeline.loading import LoadedImage

WINDOW_BATCHES = 4
"""Batches' pixels in a window: enough to find alike ones among a few common shapes."""

SHAPE_STEP = 64
"""Pixels: sides that are equal when rounded up to it are alike. Codecs pad to less or to it."""


def windows(
    images: Iterable[LoadedImage], *, max_pixels: int
) -> Iterator[list[LoadedImage | None]]:
    """Cut a stream of images into runs of at most ``max_pixels``, or of one picture above it.

    An image without pixels counts its file's bytes as pixels: it waits with the others, to keep the
    order. The caller may empty places of the list as it is done with them.
    """
    window: list[LoadedImage | None] = []
    held = 0
    for image in images:
        size = image.num_pixels or len(image.source.data)
        if window and held + size > max_pixels:
            yield window
            window, held = [], 0
        window.append(image)
        held += size
    if window:
        yield window


def similar_batches(images: Sequence[LoadedImage | None], batch_pixels: int) -> Iterator[list[int]]:
    """Positions of images, each once, in batches of similar shape and at most ``batch_pixels``.

    A picture above it is a batch of its own. Images without pixels join the first batch.
    """

    def shape(position: int) -> tuple[int, int]:
        image = images[position]
        if image is None or image.pixels is None:
            return 0, 0
        height, width = image.pixels.image.shape[:2]
        return -(-height // SHAPE_STEP), -(-width // SHAPE_STEP)

    batch: list[int] = []
    held = 0
    for position in sorted(range(len(images)), key=shape):
        image = images[position]
        size = image.num_pixels if image is not None else 0
        if batch and held + size > batch_pixels:
            yield batch
            batch, held = [], 0
        batch.append(position)
        held += size
    if batch:
        yield batch
