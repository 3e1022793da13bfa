"""A lazy sequence of images, and loops over it that decode in batches."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, SupportsIndex

import numpy as np

from dicmh_ray.archive import EncodedImage, Snapshot, open_snapshot
from dicmh_ray.archive.range_cache import DEFAULT_CACHE_BYTES, RangeCache
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import CodecMismatchError, DicmhError
from dicmh_ray.reader import ArchiveReader, OnError, ReadFault, ReadOrder
from dicmh_ray.reader.index import Numbers
from dicmh_ray.views.codecs import codec_of
from dicmh_ray.views.decode import blobs_for, check_view, decode_views, error_of, states_for
from dicmh_ray.views.image import ImageView


def open_archive(
    uri: str,
    *,
    version: int | None = None,
    codec: ImageCodec | None = None,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
    cache: str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> "Archive":
    """Open an archive for reading, finished or not. Reads what lists its parts, nothing else.

    Args:
        uri: its address on any fsspec store.
        version: of the manifest; None is the newest, or the commits of an unfinished archive.
        codec: decodes the streams; None loads the right one when the first picture is wanted.
        device: where that one runs.
        storage_options: passed to fsspec.
        cache: folder on a local disk that keeps what was read from the store, for this process and
            all others; None keeps nothing.
        cache_bytes: bound of that folder; what was used longest ago goes first.

    Raises:
        ArchiveNotFoundError: there is no archive there.
        CodecMismatchError: ``codec`` is not the one the archive was written with.
    """
    snapshot = open_snapshot(uri, version=version, storage_options=storage_options)
    if codec is not None and codec.codec_id != snapshot.codec_id:
        raise CodecMismatchError(snapshot.codec_id, codec.codec_id)
    ranges = None if cache is None else RangeCache(cache, cache_bytes)
    return Archive(snapshot, codec=codec, device=device, cache=ranges)


class Archive:
    """A lazy sequence of images.

    ``archive["key"]`` finds one by its key, ``archive[3]`` the fourth in storage order; a loop
    streams all of them in storage order. Pickles small; a codec that was not given is not sent.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        codec: ImageCodec | None = None,
        device: str = "auto",
        cache: RangeCache | None = None,
    ) -> None:
        self.reader = ArchiveReader(snapshot, cache=cache)
        """What the images are read with."""
        self._snapshot = snapshot
        self._cache = cache
        self._given_codec = codec
        self._codec = codec
        self._device = device

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._snapshot, self._given_codec, self._device, self._cache)

    @property
    def codec_id(self) -> str:
        """SHA-256 of the checkpoint that every stream was written with."""
        return self._snapshot.codec_id

    @property
    def codec(self) -> ImageCodec:
        """The codec, loaded at the first use.

        Raises:
            WeightsError: the archive's checkpoint is missing or damaged.
            CodecMismatchError: it is not the one its name says.
        """
        if self._codec is None:
            self._codec = codec_of(self._snapshot, device=self._device)
        return self._codec

    @property
    def faults(self) -> list[ReadFault]:
        """What loops with ``on_error="skip"`` left out."""
        return self.reader.faults

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[ImageView]:
        return self.views()

    def __getitem__(self, key: str | SupportsIndex) -> ImageView:
        """The image with a key, or at a position, numpy's integers too; no request beyond the index.

        Of two images with one key it is the first in storage order.

        Raises:
            RowNotFoundError: no row has this key; it is a KeyError.
            IndexError: the position is beyond the end.
        """
        if isinstance(key, str):
            return self.get_many([key])[0]
        return self.view_rows(np.array([range(len(self))[key]], np.int64))[0]

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        try:
            self.reader.get(key, blobs=(), columns="index")
        except KeyError:
            return False
        return True

    def keys(self) -> Iterator[str]:
        """All keys, in storage order."""
        return self.reader.keys()

    def views(self, where: str | None = None) -> Iterator[ImageView]:
        """The images that a filter selects, as :func:`dicmh_ray.reader.parse_where` reads it.

        Raises:
            WhereError: the filter cannot be understood.
        """
        for number, row in self.reader.numbered(where):
            yield ImageView(self, row, number)

    def take(self, n: int, where: str | None = None) -> list[ImageView]:
        """The first ``n`` images that a filter selects."""
        return list(islice(self.views(where), n))

    def get_many(self, keys: Iterable[str]) -> list[ImageView]:
        """Images by their keys, in that order; no request beyond the index.

        Raises:
            RowNotFoundError: no row has a key.
        """
        return self.view_rows(self.reader.find(keys))

    def view_rows(self, rows: Numbers, *, on_error: OnError = "raise") -> list[ImageView]:
        """Images by the numbers of their rows, in that order; no request beyond the index.

        With ``on_error="skip"`` numbers are those of the rows that are not lost.
        """
        found = self.reader.read_rows(rows, (), columns="index", on_error=on_error)
        return [
            ImageView(self, row, number, is_whole=False)
            for number, (_, row) in zip(rows.tolist(), found, strict=True)
        ]

    def iter(
        self,
        where: str | None = None,
        *,
        view: str | None = None,
        states: int | None = None,
        shuffle: int | None = None,
        rank: int = 0,
        world: int = 1,
        batch_size: int = 16,
        on_error: OnError = "raise",
    ) -> "ViewIterator":
        """A loop over images that can be shuffled, shared among ranks, and continued.

        Args:
            where: filter; rows that do not match are neither read nor decoded.
            view: what is decoded beforehand, in batches: the method of that name then costs
                nothing. None leaves every image lazy.
            states: decode from the first ones only; None is all.
            shuffle: seed; None is storage order. Take another for each epoch.
            rank: which share, from 0; see :class:`dicmh_ray.reader.ReadOrder`.
            world: how many shares.
            batch_size: images decoded at once.
            on_error: ``"skip"`` leaves out damaged rows, and with a view rows that have none, and
                notes them in :attr:`faults`.
        """
        order = self.reader.order(
            where=where, shuffle=shuffle, rank=rank, world=world, on_error=on_error
        )
        return ViewIterator(
            self, order, view=view, states=states, batch_size=batch_size, on_error=on_error
        )


class ViewIterator(Iterator[ImageView]):
    """Images in a fixed order, with a bookmark. Made by :meth:`Archive.iter`."""

    def __init__(
        self,
        archive: Archive,
        order: ReadOrder,
        *,
        view: str | None,
        states: int | None,
        batch_size: int,
        on_error: OnError,
    ) -> None:
        if view is not None:
            check_view(view)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, wanted 1 or more")
        self.order = order
        """What is walked, and how far."""
        self._archive = archive
        self._view = view
        self._states = states
        self._batch_size = batch_size
        self._on_error: OnError = on_error
        self._running: Iterator[tuple[int, ImageView]] | None = None

    def __len__(self) -> int:
        """Images of the whole loop, those before the bookmark included."""
        return len(self.order)

    def __iter__(self) -> "ViewIterator":
        return self

    def __next__(self) -> ImageView:
        if self._running is None:
            self._running = self._images()
        try:
            done, image = next(self._running)
        except StopIteration:
            self.order.done = len(self.order)
            raise
        except BaseException:
            self._running = None  # a generator that raised is at its end, the loop is not
            raise
        self.order.done = done
        return image

    def state_dict(self) -> dict[str, Any]:
        """The bookmark, as JSON: behind the last image that was handed out."""
        return self.order.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a bookmark of an equal loop, in this process or another.

        Raises:
            ReadStateError: it is of another snapshot, filter, seed or share.
        """
        self.order.resume(state)
        self._running = None

    def _images(self) -> Iterator[tuple[int, ImageView]]:
        if self._view is None:
            for done, row in self.order.numbered((), on_error=self._on_error):
                yield done, self._view_of(row, done)
            return
        rows = self.order.numbered(
            blobs_for(self._view),
            states_for(self._view, self._states),
            on_error=self._on_error,
            spare_originals=self._view != "original",
        )
        while batch := list(islice(rows, self._batch_size)):
            yield from self._decoded(batch, self._view)

    def _decoded(self, batch: list[tuple[int, Any]], view: str) -> Iterator[tuple[int, ImageView]]:
        results = decode_views(
            [row for _, row in batch],
            view,
            self._states,
            lambda: self._archive.codec,
            on_error="raise" if self._on_error == "raise" else "return",
        )
        for (done, row), result in zip(batch, results, strict=True):
            error = error_of(result)
            if error is not None:
                self._note(row.key, error)
                continue
            image = self._view_of(row, done)
            image.hold(view, self._states, result)
            yield done, image

    def _view_of(self, row: EncodedImage, done: int) -> ImageView:
        return ImageView(self._archive, row, int(self.order.rows[done - 1]))

    def _note(self, key: str, error: DicmhError) -> None:
        self._archive.reader.faults.append(ReadFault.of_picture(key, error))


def _reopen(
    snapshot: Snapshot, codec: ImageCodec | None, device: str, cache: RangeCache | None
) -> Archive:
    return Archive(snapshot, codec=codec, device=device, cache=cache)
