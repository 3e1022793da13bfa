"""Source images -> pixels in order, decoded ahead of the codec within a budget of bytes.

    images ── feeder thread: name, price, wait for room ──> load threads ──> in order ──> batches
                                   ^                                             │
                                   └──────────── room is given back ─────────────┘

The budget counts bytes and not pictures: a picture takes its file's bytes and its pixels', and
while it is decoded also the decoder's own copy. One that is larger than the whole budget is let in
alone. What is held at any time is therefore the budget, or one picture if that is more; the reader
of the source is asked for no image before there is room for the one in hand.
"""

import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from dicmh_ray.codec import TagScore
from dicmh_ray.errors import SourceImageError, UnreadableImageError, UnsupportedImageError
from dicmh_ray.source import Pixels, SourceImage, load_pixels, stated_pixels
from dicmh_ray.source.image import UniqueKeys

UNREADABLE = "unreadable"
UNSUPPORTED = "unsupported"
CRASH = "crash"

PIXEL_BYTES = 3
DECODER_PIXEL_BYTES = 4
"""What Pillow holds of each pixel besides the result, until the picture is decoded."""

IMAGE_BYTES = 4096
"""Of everything else about an image: keeps the number of tiny ones bounded, too."""


class LoadedImage(NamedTuple):
    """A source image on its way: with pixels, or with the reason why there are none. Pickles."""

    key: str
    """Unique among the images that were loaded with it."""

    source: SourceImage

    pixels: Pixels | None

    failure: str | None
    """As a row's ``error``."""

    suggested: tuple[TagScore, ...] = ()
    """What a tagger said."""

    @property
    def num_pixels(self) -> int:
        """Height times width, 0 without pixels."""
        if self.pixels is None:
            return 0
        height, width = self.pixels.image.shape[:2]
        return int(height) * int(width)

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return IMAGE_BYTES + len(self.source.data) + PIXEL_BYTES * self.num_pixels


class NamedImage(NamedTuple):
    """A source image with its unique key, not decoded yet."""

    key: str

    source: SourceImage

    is_quarantined: bool


def load_images(
    images: Iterable[SourceImage],
    *,
    threads: int,
    ahead_bytes: int,
    max_pixels: int,
    quarantine: Collection[int] = (),
) -> Iterator[LoadedImage]:
    """Decode images, one for each, in order.

    Args:
        images: what a source yields; iterated in another thread unless ``threads`` is 0.
        threads: that decode; with 0 each picture is decoded when it is asked for.
        ahead_bytes: of pictures that wait or are being decoded.
        max_pixels: larger pictures are not decoded.
        quarantine: positions in ``images`` that are not looked at.
    """
    named = _named(images, frozenset(quarantine))
    if not threads:
        for image in named:
            yield _load(image, max_pixels)
        return
    ahead = _Ahead(named, lambda image: _load(image, max_pixels), threads, ahead_bytes, max_pixels)
    try:
        yield from ahead
    finally:
        ahead.close()


class _Budget:
    """Bytes that may be held at once."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._is_closed = False
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> bool:
        """Wait for room; False when the budget was closed instead."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or not self._held or self._held + num_bytes <= self._limit
            )
            self._held += num_bytes
            return not self._is_closed

    def give_back(self, num_bytes: int) -> None:
        """Make room."""
        with self._changed:
            self._held -= num_bytes
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody go who waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class _Ahead:
    """The feeder thread, the load threads, and the queue between them and the consumer."""

    def __init__(
        self,
        images: Iterator[NamedImage],
        load: Callable[[NamedImage], LoadedImage],
        threads: int,
        ahead_bytes: int,
        max_pixels: int,
    ) -> None:
        self._images, self._load, self._max_pixels = images, load, max_pixels
        self._budget = _Budget(ahead_bytes)
        self._queue: queue.SimpleQueue[Future[LoadedImage] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dicmh-load")
        # A daemon: a read that hangs must not keep a process from ending.
        self._feeder = threading.Thread(target=self._feed, name="dicmh-read", daemon=True)
        self._feeder.start()

    def __iter__(self) -> Iterator[LoadedImage]:
        while (future := self._queue.get()) is not None:
            loaded = future.result()
            yield loaded
            # Only now: the consumer asks for the next one when it has found a place for this one.
            self._budget.give_back(loaded.num_bytes)

    def close(self) -> None:
        """End the threads; the feeder after the image it is reading."""
        self._budget.close()
        self._feeder.join()
        self._pool.shutdown(cancel_futures=True)

    def _feed(self) -> None:
        try:
            for image in self._images:
                num_pixels = 0 if image.is_quarantined else stated_pixels(image.source.data)
                num_pixels = num_pixels if num_pixels <= self._max_pixels else 0
                price = IMAGE_BYTES + len(image.source.data)
                price += (PIXEL_BYTES + DECODER_PIXEL_BYTES) * num_pixels
                if not self._budget.take(price):
                    return
                self._queue.put(self._pool.submit(self._load_priced, image, price))
        except BaseException as exc:  # noqa: BLE001  the source's error: raised where it is consumed
            failed: Future[LoadedImage] = Future()
            failed.set_exception(exc)
            self._queue.put(failed)
        else:
            self._queue.put(None)

    def _load_priced(self, image: NamedImage, price: int) -> LoadedImage:
        loaded = self._load(image)
        self._budget.give_back(price - loaded.num_bytes)
        return loaded


def _named(images: Iterable[SourceImage], quarantine: frozenset[int]) -> Iterator[NamedImage]:
    keys = UniqueKeys()
    for position, image in enumerate(images):
        yield NamedImage(keys.claim(image.key), image, position in quarantine)


def _load(image: NamedImage, max_pixels: int) -> LoadedImage:
    key, source, is_quarantined = image
    if is_quarantined:
        return LoadedImage(key, source, None, f"{CRASH}: a worker process died on this image")
    if source.error is not None:
        return LoadedImage(key, source, None, _reason(source.error))
    try:
        return LoadedImage(key, source, load_pixels(source.data, max_pixels=max_pixels), None)
    except SourceImageError as exc:
        return LoadedImage(key, source, None, _reason(exc))


def _reason(error: SourceImageError) -> str:
    if isinstance(error, UnsupportedImageError):
        return f"{UNSUPPORTED}: {error.reason}"
    if isinstance(error, UnreadableImageError):
        return f"{UNREADABLE}: {error.reason}"
    return error.reason
