"""Hugging Face ``datasets``: an archive as an ``IterableDataset`` with shards.

    load_hf("s3://bucket/archive", where="'dog' in tags")["image"]   # PIL images, decoded as it goes

Each row group is a shard, so that ``split_dataset_by_node``, DataLoader workers, ``.shuffle()`` and
``state_dict`` of the library work as with its own files.
"""

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from dicmh_ray.adapters.handle import ArchiveHandle
from dicmh_ray.adapters.samples import check_sample, sample_of, with_view
from dicmh_ray.archive import ARROW_SCHEMA, SMALL_COLUMNS
from dicmh_ray.archive.schema import from_batch
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import MissingExtraError
from dicmh_ray.reader import Fragment, OnError
from dicmh_ray.views import decode_views, mark_of, save_picture
from dicmh_ray.views.decode import blobs_for, error_of, states_for

try:
    import datasets
except ModuleNotFoundError as exc:
    raise MissingExtraError("datasets", "data") from exc

_log = logging.getLogger(__name__)

DEFAULT_COLUMNS = ("key", "tags")


def load_hf(
    uri: str,
    *,
    view: str = "machine",
    states: int | None = None,
    where: str | None = None,
    columns: Sequence[str] = DEFAULT_COLUMNS,
    decode_batch: int = 16,
    on_error: OnError = "raise",
    version: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    codec: Callable[[], ImageCodec] | None = None,
    device: str = "cpu",
) -> datasets.IterableDataset:
    """An archive as it is now, decoded while it is read.

    Args:
        uri: address of the archive.
        view: ``machine``, ``human`` or ``thumbnail`` give an ``image`` of the feature ``Image``;
            ``original`` too, of the kept source bytes; ``latent`` gives a ``latent``: its values as
            a flat list of float16, and its ``shape``, since no feature of the library holds arrays
            of several shapes; ``np.reshape(x["values"], x["shape"])`` is ``[C, h, w]``.
        states: decode from the first ones only; None is all.
        where: filter, see :func:`dicmh_ray.reader.parse_where`.
        columns: small columns of the archive; ``metadata`` comes as its JSON text, since rows may
            have different fields.
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
    check_sample(view, columns)
    handle = ArchiveHandle(
        uri=uri,
        version=version,
        storage_options=dict(storage_options or {}),
        codec=codec,
        device=device,
    ).pinned()
    # A part has few row groups: shards of both kinds of number are plain integers.
    shards = list(range(len(handle.archive().reader.fragments())))
    chosen = [name for name in SMALL_COLUMNS if name in columns]
    return datasets.IterableDataset.from_generator(
        _examples,
        features=_features(chosen, view),
        gen_kwargs={
            "shards": shards,
            "handle": handle,
            "view": view,
            "states": states,
            "where": with_view(where, view),
            "columns": tuple(chosen),
            "decode_batch": decode_batch,
            "on_error": on_error,
        },
    )


def _examples(
    shards: list[int],
    handle: ArchiveHandle,
    view: str,
    states: int | None,
    where: str,
    columns: tuple[str, ...],
    decode_batch: int,
    on_error: OnError,
) -> Iterator[dict[str, Any]]:
    """The rows of some row groups; the library calls it with the shards of one worker."""
    archive = handle.archive()
    fragments = archive.reader.fragments()
    known_faults = len(archive.faults)
    for shard in shards:
        yield from _of_fragment(
            handle, fragments[shard], view, states, where, columns, decode_batch, on_error
        )
    faults = archive.faults[known_faults:]
    if faults:
        _log.warning("%s: %d faults, rows were left out: %s", handle.uri, len(faults), faults[0])


def _of_fragment(
    handle: ArchiveHandle,
    fragment: Fragment,
    view: str,
    states: int | None,
    where: str,
    columns: tuple[str, ...],
    decode_batch: int,
    on_error: OnError,
) -> Iterator[dict[str, Any]]:
    archive = handle.archive()
    batch = archive.reader.scan_fragment(
        fragment,
        [*SMALL_COLUMNS, *blobs_for(view)],
        where,
        states_for(view, states),
        on_error=on_error,
    )
    if batch is None:
        return
    for start in range(0, len(batch), decode_batch):
        rows = list(from_batch(batch.slice(start, decode_batch)))
        results = decode_views(
            rows,
            view,
            states,
            lambda: archive.codec,
            on_error="raise" if on_error == "raise" else "return",
        )
        for row, result in zip(rows, results, strict=True):
            error = error_of(result)
            if error is not None:
                _log.warning("%s: %r was left out: %s", handle.uri, row.key, error)
                continue
            sample = sample_of(row, columns, view, result)
            if "metadata" in sample:
                sample["metadata"] = row.metadata
            if view == "latent":
                sample["latent"] = {"values": result.reshape(-1), "shape": list(result.shape)}
            elif view == "original":
                sample["image"] = {"bytes": sample.pop("original"), "path": None}
            else:
                sink = io.BytesIO()
                save_picture(sink, result, mark_of(row, view), format="png")
                sample["image"] = {"bytes": sink.getvalue(), "path": None}
            yield sample


def _features(columns: Sequence[str], view: str) -> datasets.Features:
    features = {name: _feature_of(ARROW_SCHEMA.field(name).type) for name in columns}
    if view == "latent":
        features["latent"] = {
            "values": datasets.List(datasets.Value("float16")),
            "shape": datasets.List(datasets.Value("int32")),
        }
    else:
        features["image"] = datasets.Image()
    return datasets.Features(features)


def _feature_of(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return datasets.List(_feature_of(kind.value_type))
    return datasets.Value(str(kind))
