"""What ``map_batches`` calls: rows of an archive to pictures, and pictures to rows.

    ds.map_batches(Decode("machine", states=2), batch_size=32)
    ds.map_batches(Decode, fn_constructor_args=("machine",), batch_size=64,
                   num_gpus=1, num_cpus=0, compute=ray.data.ActorPoolStrategy(size=1))

An object runs in tasks, a class in actors; either way a process loads the codec once. Actors on GPUs
should ask for ``num_cpus=0``: with Ray's default of one they wait for CPUs that the read tasks
hold, and on a small cluster for ever.
"""

import functools
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from dicmh_ray.adapters.samples import field_of
from dicmh_ray.archive import ARROW_SCHEMA, BLOBS, EncodedImage, open_snapshot
from dicmh_ray.archive.schema import to_table
from dicmh_ray.bitstream import prefix_bytes, read_header
from dicmh_ray.codec import DEFAULT_CHECKPOINT, ImageCodec, load_codec
from dicmh_ray.errors import BitstreamError, MissingExtraError
from dicmh_ray.pipeline import EncodeOptions, EncodePolicy, encode_images
from dicmh_ray.pipeline.checkpoint import Checkpoint
from dicmh_ray.reader import OnError
from dicmh_ray.source import SourceImage
from dicmh_ray.source.metadata import json_value
from dicmh_ray.views import codec_of, decode_views
from dicmh_ray.views.decode import check_view, error_of

try:
    from ray.data.extensions import ArrowVariableShapedTensorArray
except ModuleNotFoundError as exc:
    raise MissingExtraError(exc.name or "ray", "ray") from exc

_log = logging.getLogger(__name__)

Batch: TypeAlias = Any
"""An Arrow table, or numpy arrays by column: what Ray gives for the batch format asked for."""


class Decode:
    """Batches with the columns ``key``, ``base``, ``detail`` and ``original`` to batches of pictures.

    The view comes as a column ``image`` (uint8 ``[H, W, 3]``) or ``latent`` (float16 ``[C, h, w]``)
    in place of the blobs. Rows that hold neither a stream nor an original are left out.
    """

    def __init__(
        self,
        view: str = "machine",
        *,
        states: int | None = None,
        archive: str | None = None,
        version: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        codec: Callable[[], ImageCodec] | None = None,
        device: str = "auto",
        keep: Sequence[str] | None = None,
        on_error: OnError = "raise",
    ) -> None:
        """Nothing is loaded yet.

        Args:
            view: ``machine``, ``human``, ``thumbnail`` or ``latent``.
            states: decode from the first ones only; None is all that were read.
            archive: whose codec it is; None takes the one in the package, and streams of another
                raise CodecMismatchError.
            version: of that archive.
            storage_options: for it.
            codec: makes the codec in each process, in place of both.
            device: where it runs; ``auto`` is the GPU that Ray gave to the worker, if it did.
            keep: columns that stay; None is all but the blobs.
            on_error: ``"skip"`` leaves out rows that cannot be decoded, and logs each.
        """
        check_view(view)
        if view in ("tags", "original"):
            raise ValueError(f"nothing is decoded for the view {view!r}: read that column")
        self._view, self._states = view, states
        self._archive, self._version = archive, version
        self._storage_options = dict(storage_options or {})
        self._factory = codec
        self._device = device
        self._keep = None if keep is None else frozenset(keep)
        self._on_error = on_error
        self._codec: ImageCodec | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_codec": None}

    def __call__(self, batch: Batch) -> Batch:
        """One batch, as an Arrow table or a dict of numpy arrays; the result is of the same kind.

        Raises:
            ValueError: a column that is needed was not read.
            BitstreamError, UnreadableImageError: a row is damaged.
            CodecMismatchError: another codec wrote the streams.
        """
        table = batch if isinstance(batch, pa.Table) else None
        names = list(batch.column_names if table is not None else batch)
        places, rows = self._rows(batch, names)
        results = decode_views(
            rows,
            self._view,
            self._states,
            self._load,
            on_error="raise" if self._on_error == "raise" else "return",
        )
        kept = []
        for number, (row, result) in enumerate(zip(rows, results, strict=True)):
            error = error_of(result)
            if error is None:
                kept.append(number)
            else:
                _log.warning("%r was left out: %s", row.key, error)
        views = np.empty(len(kept), object)
        for number, place in enumerate(kept):
            views[number] = results[place]
        where = np.array([places[number] for number in kept], np.int64)
        stay = [name for name in names if self._stays(name)]
        field = field_of(self._view)
        if table is None:
            return {**{name: np.asarray(batch[name])[where] for name in stay}, field: views}
        column = ArrowVariableShapedTensorArray.from_numpy(views if kept else _no_views(field))
        column = column.slice(0, len(kept))
        return table.select(stay).take(pa.array(where)).append_column(field, column)

    def _stays(self, name: str) -> bool:
        return name not in BLOBS if self._keep is None else name in self._keep

    def _rows(self, batch: Batch, names: Sequence[str]) -> tuple[list[int], list[EncodedImage]]:
        """The rows that hold something to decode, and their places in the batch."""
        if "base" not in names or "key" not in names:
            raise ValueError(f"Decode needs the columns 'key' and 'base', the batch has {names}")
        read = {name: _values(batch, name) for name in ("key", "status", *BLOBS) if name in names}
        places, rows = [], []
        for place, key in enumerate(read["key"]):
            base = bytes(read["base"][place])
            detail = bytes(read["detail"][place]) if "detail" in read else b""
            original = bytes(read["original"][place]) if "original" in read else b""
            if not base and not original:
                failed = "status" in read and read["status"][place] == "failed"
                if failed or "original" in read:
                    continue
                raise ValueError(
                    f"{key!r} has no bitstream: read the column 'original' too, "
                    "or filter by where=\"status == 'ok'\""
                )
            places.append(place)
            rows.append(_row(str(key), base, detail, original))
        return places, rows

    def _load(self) -> ImageCodec:
        if self._codec is None:
            if self._factory is not None:
                self._codec = self._factory()
            elif self._archive is not None:
                snapshot = open_snapshot(
                    self._archive, version=self._version, storage_options=self._storage_options
                )
                self._codec = codec_of(snapshot, device=self._device)
            else:
                self._codec = _packaged_codec(self._device)
        return self._codec


class Encode:
    """Batches with the columns ``key`` and ``image`` or ``bytes`` to rows of an archive.

    ``bytes`` are image files; of an ``image`` (uint8 ``[H, W, 3]`` or ``[H, W]``) a PNG is made, and
    that is then the original whose digest the row has. A column ``tags`` (lists of words) becomes
    the tags; the others become the metadata, as far as they have a form in JSON: dates do, columns of
    bytes do not. A row without a picture is a failed one.
    """

    def __init__(
        self,
        codec: str | Path | Callable[[], ImageCodec] = DEFAULT_CHECKPOINT,
        *,
        policy: EncodePolicy | None = None,
        options: EncodeOptions | None = None,
    ) -> None:
        """Reads the checkpoint, which then travels to the workers.

        Args:
            codec: checkpoint name or directory, or a picklable function that makes a codec.
            policy: how many states, which quality floor, what happens to originals.
            options: device, threads, batches.

        Raises:
            WeightsError: the checkpoint is missing or incomplete.
        """
        self.checkpoint = Checkpoint.open(codec)
        """What the rows are written with."""
        self._policy = policy or EncodePolicy()
        self._options = options or EncodeOptions()
        self._codec: ImageCodec | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_codec": None}

    def __call__(self, batch: Batch) -> pa.Table:
        """One batch: as many rows, in order, those of pictures that cannot be coded included.

        Raises:
            ValueError: there is no ``key``, or neither ``image`` nor ``bytes``.
        """
        if self._codec is None:
            self._codec = self.checkpoint.load(self._options)
        images = _source_images(batch)
        return to_table(
            list(encode_images(images, self._codec, self._policy, options=self._options))
        )


def is_encoded(names: Sequence[str]) -> bool:
    """Whether a dataset of these columns holds rows of an archive."""
    return set(ARROW_SCHEMA.names) <= set(names)


def _source_images(batch: Batch) -> Iterator[SourceImage]:
    names = list(batch.column_names if isinstance(batch, pa.Table) else batch)
    blob = next((name for name in ("bytes", "image") if name in names), None)
    if blob is None or "key" not in names:
        raise ValueError(f"wanted the columns 'key' and 'image' or 'bytes', found {names}")
    others = [name for name in names if name not in ("key", "tags", blob)]
    values = {
        name: _values(batch, name) for name in ("key", "tags", blob, *others) if name in names
    }
    for place, key in enumerate(values["key"]):
        content = values[blob][place]
        tags = values["tags"][place] if "tags" in values else None
        yield SourceImage(
            key=str(key),
            data=_file(content),
            source_uri="",
            metadata={
                name: plain
                for name in others
                if (plain := _json_value(values[name][place])) is not None
            },
            tags=_words(tags),
        )


def _row(key: str, base: bytes, detail: bytes, original: bytes) -> EncodedImage:
    """What decoding needs of a row; a stream that cannot be parsed is left to the codec to refuse."""
    stream = base + detail
    width = height = None
    ends: tuple[int, ...] = ()
    if stream:
        try:
            header = read_header(stream)
            width, height, ends = header.width, header.height, prefix_bytes(stream)
        except BitstreamError:
            ends = (len(stream),)
    return EncodedImage(
        key=key,
        status="ok" if stream else "kept_original",
        prefix_bytes=ends,
        width=width,
        height=height,
        base=base,
        detail=detail,
        original=original,
    )


def _values(batch: Batch, name: str) -> Sequence[Any]:
    if isinstance(batch, pa.Table):
        column = batch[name]
        if isinstance(column.type, pa.ExtensionType):
            return [item for chunk in column.chunks for item in chunk.to_numpy(False)]
        values: list[Any] = column.to_pylist()
        return values
    return list(batch[name])


def _file(content: Any) -> bytes:
    if content is None:
        return b""  # a row without a picture, as in a table
    return content if isinstance(content, bytes) else _png(np.asarray(content))


def _words(tags: Any) -> tuple[str, ...]:
    if isinstance(tags, str):
        return (tags,)
    # Where all of a batch are null they are numbers that are none.
    return tuple(map(str, tags)) if isinstance(tags, list | tuple | np.ndarray) else ()


def _json_value(value: Any) -> Any:
    """What a table's value becomes in the metadata; None where it has no such form."""
    plain = _plain(value)
    if isinstance(plain, bytes):
        return None  # of any size
    try:
        return json_value(plain)
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    """Python's values for numpy's, inside lists and mappings as well."""
    if isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]")  # of nanoseconds numpy makes a number
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _no_views(field: str) -> Any:
    """One view to take none of: a column without rows has a type all the same."""
    return [np.zeros((0, 0, 3), np.uint8) if field == "image" else np.zeros((0, 0, 0), np.float16)]


@functools.cache
def _packaged_codec(device: str) -> ImageCodec:
    return load_codec(device=device)


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()
