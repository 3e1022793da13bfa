"""An archive as a stream of WebDataset samples, to put where a pipeline has its tars.

    wds.DataPipeline(
        webdataset_stream("s3://bucket/archive", where="'dog' in tags"),
        wds.decode("rgb"),
        wds.to_tuple("png", "json"),
    )

The stream shares its rows among nodes and workers by itself: leave out ``split_by_node`` and
``split_by_worker``, which would decode everything everywhere and then throw most of it away.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dicmh_ray.adapters.handle import ArchiveHandle
from dicmh_ray.adapters.samples import check_sample, held_view, webdataset_sample, with_view
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import MissingExtraError
from dicmh_ray.reader import OnError
from dicmh_ray.views.saving import FORMATS

try:
    from webdataset.utils import pytorch_worker_info
except ModuleNotFoundError as exc:
    raise MissingExtraError("webdataset", "data") from exc

_log = logging.getLogger(__name__)


def webdataset_stream(
    uri: str,
    *,
    view: str = "machine",
    states: int | None = None,
    where: str | None = None,
    format: str | None = "png",
    shuffle: int | None = None,
    decode_batch: int = 16,
    on_error: OnError = "raise",
    version: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    codec: Callable[[], ImageCodec] | None = None,
    device: str = "cpu",
) -> "WebDatasetStream":
    """A stream of samples of an archive as it is now.

    Args:
        uri: address of the archive.
        view: ``machine``, ``human``, ``thumbnail``, ``latent`` or ``original``.
        states: decode from the first ones only; None is all.
        where: filter, see :func:`dicmh_ray.reader.parse_where`.
        format: of pictures: ``png``, ``jpg`` or ``webp``; None hands out arrays under ``image``
            and ``json`` as an object, for pipelines without ``.decode()``: nothing is encoded only
            to be decoded again.
        shuffle: seed; None is storage order. Each loop over the stream has an order of its own.
        decode_batch: images decoded at once.
        on_error: ``"skip"`` leaves out damaged rows, and says so in the log.
        version: of the archive; None is the newest.
        storage_options: passed to fsspec.
        codec: makes the codec in each process; None loads the archive's own.
        device: where that one runs.

    Raises:
        ArchiveNotFoundError: there is no archive.
        ValueError: there is no such view or format.
    """
    check_sample(view, ())
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}, wanted one of {', '.join(FORMATS)}")
    handle = ArchiveHandle(
        uri=uri,
        version=version,
        storage_options=dict(storage_options or {}),
        codec=codec,
        device=device,
    ).pinned()
    return WebDatasetStream(handle, view, states, where, format, shuffle, decode_batch, on_error)


class WebDatasetStream:
    """Iterable of samples, see :func:`webdataset_sample`. Made by :func:`webdataset_stream`."""

    def __init__(
        self,
        handle: ArchiveHandle,
        view: str,
        states: int | None,
        where: str | None,
        format: str | None,
        shuffle: int | None,
        decode_batch: int,
        on_error: OnError,
    ) -> None:
        self._handle = handle
        self._view = view
        self._states = states
        self._where = where
        self._format = format
        self._shuffle = shuffle
        self._decode_batch = decode_batch
        self._on_error: OnError = on_error
        self._loops = 0

    def __call__(self) -> Iterator[dict[str, Any]]:
        """One loop: what a pipeline asks of its first stage."""
        return iter(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples of this node's and this worker's share, one epoch."""
        rank, world, worker, workers = pytorch_worker_info()
        seed = None if self._shuffle is None else (self._shuffle << 32) + self._loops
        self._loops += 1
        archive = self._handle.archive()
        known_faults = len(archive.faults)
        images = archive.iter(
            with_view(self._where, self._view),
            view=self._view,
            states=self._states,
            shuffle=seed,
            rank=rank * workers + worker,
            world=world * workers,
            batch_size=self._decode_batch,
            on_error=self._on_error,
        )
        for image in images:
            sample = webdataset_sample(
                image.row,
                held_view(image, self._view, self._states),
                view=self._view,
                states=self._states,
                format=self._format,
            )
            yield {**sample, "__url__": self._handle.uri}
        faults = archive.faults[known_faults:]
        if faults:
            _log.warning("%s: %d faults, rows left out: %s", self._handle.uri, len(faults), faults)
