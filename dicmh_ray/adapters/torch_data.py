"""PyTorch: an archive as an iterable dataset and as a map-style one.

    DataLoader(ArchiveIterable(uri, where="'dog' in tags", shuffle=0), num_workers=2, ...)
    DataLoader(ArchiveDataset(uri, where="'dog' in tags"), sampler=..., num_workers=2, ...)

Both pickle small and open the archive again in each worker, forked or spawned; a worker decodes
with the one thread that DataLoader gives it. Rows that do not match are neither read nor decoded.
Samples are dicts of numpy arrays and plain values, for ``transform`` or ``collate_fn`` to make
batches of: pictures of an archive have many sizes.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from dicmh_ray.adapters.handle import ArchiveHandle
from dicmh_ray.adapters.samples import check_sample, held_view, sample_of, with_view
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import ReadStateError
from dicmh_ray.reader import OnError
from dicmh_ray.views import Archive, ViewIterator, decode_views
from dicmh_ray.views.decode import blobs_for, states_for

_log = logging.getLogger(__name__)

Sample = dict[str, Any]
Transform = Callable[[Sample], Any]

DEFAULT_COLUMNS = ("key",)


class ArchiveIterable(IterableDataset[Any]):
    """A stream of samples, shared among ranks and workers, shuffled, and continued where it stopped.

    Every row of a share comes once an epoch; shares differ by at most one row. ``state_dict`` and
    ``load_state_dict`` are those that torchdata's ``StatefulDataLoader`` looks for, and work by
    hand with ``num_workers=0``.
    """

    def __init__(
        self,
        uri: str,
        *,
        view: str = "machine",
        states: int | None = None,
        where: str | None = None,
        columns: Sequence[str] = DEFAULT_COLUMNS,
        transform: Transform | None = None,
        shuffle: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        even: bool = False,
        decode_batch: int = 16,
        on_error: OnError = "raise",
        version: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        codec: Callable[[], ImageCodec] | None = None,
        device: str = "cpu",
    ) -> None:
        """Samples of an archive as it is now: what is appended later does not appear.

        Args:
            uri: address of the archive.
            view: ``machine``, ``human``, ``thumbnail``, ``latent`` or ``original``.
            states: decode from the first ones only, and read no bytes of the others; None is all.
            where: filter, see :func:`dicmh_ray.reader.parse_where`. Rows that hold no picture
                never match.
            columns: small columns in each sample; ``metadata`` is an object.
            transform: makes of a sample what is handed out.
            shuffle: seed; None is storage order. Each epoch has an order of its own.
            rank: share of this process, from 0; None asks ``torch.distributed``, now.
            world: how many processes share the archive; None asks as well.
            even: leave out the odd row, so that all shares of all ranks are of one length.
            decode_batch: images decoded at once.
            on_error: ``"skip"`` leaves out damaged rows, and says so in the log.
            version: of the archive; None is the newest.
            storage_options: passed to fsspec.
            codec: makes the codec in each process; None loads the archive's own.
            device: where that one runs.

        Raises:
            ArchiveNotFoundError: there is no archive.
            ValueError: there is no such view or column.
        """
        super().__init__()
        check_sample(view, columns)
        if (rank is None) != (world is None):
            raise ValueError("rank and world go together")
        self._handle = _handle(uri, version, storage_options, codec, device)
        self._view, self._states, self._where = view, states, with_view(where, view)
        self._columns = tuple(columns)
        self._transform = transform
        self._seed = shuffle
        self._rank, self._world = _share() if rank is None or world is None else (rank, world)
        self._even = even
        self._decode_batch = decode_batch
        self._on_error: OnError = on_error
        # In shared memory: workers that live on are told of a new epoch as well.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._running: SampleIterator | None = None
        self._bookmark: Mapping[str, Any] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Shuffle in another way from the next loop on."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> "SampleIterator":
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        bookmark, self._bookmark = self._bookmark, None
        if bookmark is not None:
            self.set_epoch(_epoch_of(bookmark))
        self._running = SampleIterator(
            self._loop, self._rank * workers + worker, self._world * workers, int(self._epoch)
        )
        if bookmark is not None:
            self._running.load_state_dict(bookmark)
        return self._running

    def state_dict(self) -> dict[str, Any]:
        """Where the loop in this process is, as JSON."""
        if self._bookmark is not None:
            return dict(self._bookmark)  # of the loop that was not begun yet
        if self._running is not None:
            return self._running.state_dict()
        return {"epoch": int(self._epoch), "position": None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next loop goes on from there. Filter, seed and share must be those of the state.

        Raises:
            ReadStateError: it is no such state.
        """
        _epoch_of(state)
        self._running = None
        self._bookmark = state

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": None}

    def _loop(self, share: int, shares: int, epoch: int) -> "_Loop":
        archive = self._handle.archive()
        images = archive.iter(
            self._where,
            view=self._view,
            states=self._states,
            shuffle=None if self._seed is None else (self._seed << 32) + epoch,
            rank=share,
            world=shares,
            batch_size=self._decode_batch,
            on_error=self._on_error,
        )
        limit = len(images)
        if self._even:
            limit = len(archive.reader.matching(self._where)) // shares
        return _Loop(archive, images, limit, self._make)

    def _make(self, image: Any) -> Any:
        result = held_view(image, self._view, self._states)
        sample = sample_of(image.row, self._columns, self._view, result)
        return sample if self._transform is None else self._transform(sample)


class _Loop:
    """One epoch of one share."""

    def __init__(
        self, archive: Archive, images: ViewIterator, limit: int, make: Callable[[Any], Any]
    ) -> None:
        self.images = images
        self._archive = archive
        self._limit = limit
        self._make = make
        self._known_faults = len(archive.faults)

    def next(self) -> Any:
        if self.images.order.done >= self._limit:
            self._report()
            raise StopIteration
        try:
            return self._make(next(self.images))
        except StopIteration:
            self._report()
            raise

    def _report(self) -> None:
        faults = self._archive.faults[self._known_faults :]
        self._known_faults += len(faults)
        if faults:
            uri = self._archive.reader.snapshot.uri
            _log.warning("%s: %d faults, rows were left out: %s", uri, len(faults), faults[0])


class SampleIterator(Iterator[Any]):
    """Samples of one share in one epoch. Made by :class:`ArchiveIterable`; nothing is read before
    the first is wanted."""

    def __init__(
        self, begin: Callable[[int, int, int], _Loop], share: int, shares: int, epoch: int
    ) -> None:
        self._begin = begin
        self._share = share
        self._shares = shares
        self._epoch = epoch
        self._loop: _Loop | None = None
        self._position: Mapping[str, Any] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self._started().next()

    def state_dict(self) -> dict[str, Any]:
        """Behind the last sample that was handed out, as JSON."""
        if self._loop is None:
            return {"epoch": self._epoch, "position": self._position}
        return {"epoch": self._epoch, "position": self._loop.images.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of an equal share.

        Raises:
            ReadStateError: it is of another snapshot, filter, seed or share, or no state.
        """
        self._epoch = _epoch_of(state)
        self._position = state["position"]
        self._loop = None
        if self._position is not None:
            self._started()

    def _started(self) -> _Loop:
        if self._loop is None:
            self._loop = self._begin(self._share, self._shares, self._epoch)
            if self._position is not None:
                self._loop.images.load_state_dict(self._position)
        return self._loop


class ArchiveDataset(Dataset[Any]):
    """The matching rows of an archive by number, in storage order, for samplers of any kind.

    ``DataLoader`` asks for a batch at once: its rows share requests and are decoded together. A
    random sampler over a remote archive still reads one range a row; where whole epochs are read,
    :class:`ArchiveIterable` is cheaper.
    """

    def __init__(
        self,
        uri: str,
        *,
        view: str = "machine",
        states: int | None = None,
        where: str | None = None,
        columns: Sequence[str] = DEFAULT_COLUMNS,
        transform: Transform | None = None,
        version: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        codec: Callable[[], ImageCodec] | None = None,
        device: str = "cpu",
    ) -> None:
        """Arguments and errors as :class:`ArchiveIterable`."""
        check_sample(view, columns)
        self._handle = _handle(uri, version, storage_options, codec, device)
        self._view, self._states, self._where = view, states, with_view(where, view)
        self._columns = tuple(columns)
        self._transform = transform
        self._rows: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self._numbers())

    def __getitem__(self, index: int) -> Any:
        """One sample.

        Raises:
            IndexError: there is no such row.
            CorruptRowError, BitstreamError, UnreadableImageError: it is damaged.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Samples, decoded together. Raises as for one."""
        archive = self._handle.archive()
        found = archive.reader.read_rows(
            self._numbers()[np.asarray(indices, np.int64)],
            blobs_for(self._view),
            states_for(self._view, self._states),
            spare_originals=self._view != "original",
        )
        rows = [row for _, row in found]
        views = decode_views(rows, self._view, self._states, lambda: archive.codec)
        samples = [
            sample_of(row, self._columns, self._view, view)
            for row, view in zip(rows, views, strict=True)
        ]
        return samples if self._transform is None else [self._transform(s) for s in samples]

    def __getstate__(self) -> dict[str, Any]:
        # The numbers are found again from the index: a pickle stays small however many there are.
        return {**self.__dict__, "_rows": None}

    def _numbers(self) -> npt.NDArray[np.int64]:
        if self._rows is None:
            self._rows = self._handle.archive().reader.matching(self._where)
        return self._rows


def _handle(
    uri: str,
    version: int | None,
    storage_options: Mapping[str, Any] | None,
    codec: Callable[[], ImageCodec] | None,
    device: str,
) -> ArchiveHandle:
    return ArchiveHandle(
        uri=uri,
        version=version,
        storage_options=dict(storage_options or {}),
        codec=codec,
        device=device,
    ).pinned()


def _share() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _epoch_of(state: Mapping[str, Any]) -> int:
    epoch = state.get("epoch")
    if not isinstance(epoch, int) or "position" not in state:
        raise ReadStateError("it is no state of an ArchiveIterable")
    return epoch
