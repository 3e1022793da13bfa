"""A Ray dataset as an archive: every write task stages rows, the driver publishes them at once.

    dicmh_ray.write_archive(ds, "s3://bucket/archive")

What is exactly once: an archive appears whole or not at all, by one conditional put of its plan, and
holds the result of each write task once, however often Ray ran it. What is not: a task that was run
again leaves the objects of its other runs behind when its input was not the same to the byte, and so
does a write that failed; nothing refers to them. And Ray may lose or repeat nothing *before* the
write only as far as the dataset itself is deterministic.
"""

import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from dicmh_ray.archive import (
    EncodedImage,
    Manifest,
    PartOptions,
    Store,
    open_snapshot,
    open_store,
)
from dicmh_ray.archive.plan import PLAN_NAME
from dicmh_ray.archive.schema import ARROW_SCHEMA, from_batch
from dicmh_ray.archive.staged import StagedUnit, publish_staged, stage_unit
from dicmh_ray.bitstream import read_header
from dicmh_ray.codec import DEFAULT_CHECKPOINT, ImageCodec
from dicmh_ray.errors import CodecMismatchError, CommitFailedError, MissingExtraError
from dicmh_ray.pipeline import EncodeOptions, EncodePolicy
from dicmh_ray.pipeline.checkpoint import Checkpoint
from dicmh_ray.ray_plugin.decode import Encode, is_encoded

try:
    from ray.data import Dataset, Datasink
    from ray.data.block import Block, BlockAccessor
except ModuleNotFoundError as exc:
    raise MissingExtraError(exc.name or "ray", "ray") from exc

_log = logging.getLogger(__name__)

MIN_ROWS_PER_WRITE = 2_000


def write_archive(
    ds: Dataset,
    uri: str,
    *,
    codec: str | Path | Callable[[], ImageCodec] = DEFAULT_CHECKPOINT,
    codec_of: str | None = None,
    policy: EncodePolicy | None = None,
    encode_options: EncodeOptions | None = None,
    batch_size: int = 64,
    part_options: PartOptions | None = None,
    storage_options: Mapping[str, Any] | None = None,
    concurrency: int | None = None,
) -> Manifest:
    """Write a dataset as a new archive, and return its manifest.

    A dataset with every column of an archive (as ``read_archive`` gives it with all columns and
    blobs) is written as it is: filtered, merged, with other tags. Any other is encoded first, on
    CPUs, see :class:`~dicmh_ray.ray_plugin.decode.Encode`; to encode on GPUs, map that class by hand.
    For collections of files :func:`dicmh_ray.compress` is the better tool: it resumes.

    Args:
        ds: rows of an archive, or ``key`` and ``image`` or ``bytes``.
        uri: where the archive will be; there must be none.
        codec: that the rows were, or will be, written with.
        codec_of: address of an archive whose codec that is, in place of ``codec``.
        policy: for encoding.
        encode_options: for encoding.
        batch_size: for encoding.
        part_options: sizes of parts and row groups.
        storage_options: passed to fsspec.
        concurrency: how many write tasks run at once.

    Raises:
        CommitFailedError: there is something at ``uri`` already.
        CodecMismatchError: a row was written with another codec. Nothing was published.
        ValueError: a row is not one an archive can hold, or a key comes twice in one task.
    """
    if is_encoded(ds.columns() or []):
        if codec_of is None:
            checkpoint = Checkpoint.open(codec)
        else:
            snapshot = open_snapshot(codec_of, storage_options=storage_options)
            checkpoint = Checkpoint(codec_id=snapshot.codec_id, files=snapshot.codec_files())
    else:
        encode = Encode(codec, policy=policy, options=encode_options)
        checkpoint = encode.checkpoint
        # In numpy a column with nulls has numbers that are none, and its integers are no longer.
        ds = ds.map_batches(encode, batch_size=batch_size, batch_format="pyarrow")
    sink = ArchiveDatasink(
        uri, checkpoint=checkpoint, part_options=part_options, storage_options=storage_options
    )
    ds.write_datasink(sink, concurrency=concurrency)
    return sink.manifest


class ArchiveDatasink(Datasink[StagedUnit | None]):
    """Writes rows of an archive. See :func:`write_archive`."""

    def __init__(
        self,
        uri: str,
        *,
        checkpoint: Checkpoint,
        part_options: PartOptions | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            uri: where the archive will be.
            checkpoint: that the rows were written with.
            part_options: sizes of parts and row groups.
            storage_options: passed to fsspec.

        Raises:
            CommitFailedError: there is an archive already.
        """
        self._uri = uri
        self._checkpoint = checkpoint
        self._part_options = part_options
        self._storage_options = dict(storage_options or {})
        self._write = uuid.uuid4().hex[:12]
        self._manifest: Manifest | None = None
        _check_free(self._store())

    def __getstate__(self) -> dict[str, Any]:
        # The files of the checkpoint are for the driver; they may be gigabytes.
        slim = Checkpoint(codec_id=self._checkpoint.codec_id, files={})
        return {**self.__dict__, "_checkpoint": slim}

    @property
    def manifest(self) -> Manifest:
        """Of the archive, once it is written."""
        if self._manifest is None:
            raise CommitFailedError(PLAN_NAME, "the write is not complete")
        return self._manifest

    @property
    def min_rows_per_write(self) -> int:
        """Small blocks are joined: each write task makes a unit of its own."""
        return MIN_ROWS_PER_WRITE

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        """On the driver, once: nobody else may have begun meanwhile."""
        del schema
        _check_free(self._store())

    def write(self, blocks: Iterable[Block], ctx: Any) -> StagedUnit | None:
        """On a worker, once for each task, and again when Ray says so."""
        rows = [row for block in blocks for row in self._rows(block)]
        if not rows:
            return None
        return stage_unit(
            self._store(),
            f"{self._write}-{ctx.task_idx:06d}",
            rows,
            codec_id=self._checkpoint.codec_id,
            options=self._part_options,
        )

    def on_write_complete(self, write_result: Any) -> None:
        """On the driver, once: the archive appears."""
        units = [unit for unit in write_result.write_returns if unit is not None]
        self._manifest = publish_staged(
            self._uri,
            sorted(units, key=lambda unit: unit.name),
            codec_id=self._checkpoint.codec_id,
            codec_files=self._checkpoint.files,
            parameters={"writer": "ray.data"},
            storage_options=self._storage_options,
        )

    def on_write_failed(self, error: Exception) -> None:
        """On the driver, perhaps: what was staged goes, as far as it is there by now."""
        store = self._store()
        if _is_begun(store):
            return  # the plan was put: whoever finishes from it needs the objects
        mine = (f"data/part-{self._write}-", f"index/{self._write}-")
        names = [*store.list("data/"), *store.list("index/")]
        strays = [name for name in names if name.startswith(mine)]
        for name in strays:
            store.delete(name)
        _log.warning("write failed, %d staged objects were deleted: %s", len(strays), error)

    def _store(self) -> Store:
        return open_store(self._uri, self._storage_options)

    def _rows(self, block: Block) -> Iterable[EncodedImage]:
        table = BlockAccessor.for_block(block).to_arrow()
        for row in from_batch(table.select(ARROW_SCHEMA.names).cast(ARROW_SCHEMA)):
            if row.base:
                found = read_header(row.base).codec_id
                if found != self._checkpoint.codec_id[: len(found)]:
                    raise CodecMismatchError(self._checkpoint.codec_id, found)
            yield row


def _is_begun(store: Store) -> bool:
    try:
        store.get(PLAN_NAME)
    except FileNotFoundError:
        return False
    return True


def _check_free(store: Store) -> None:
    if _is_begun(store):
        raise CommitFailedError(PLAN_NAME, f"there is an archive at {store.uri} already")
