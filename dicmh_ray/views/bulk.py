"""Decode a whole archive into files that other programs read: each row once, whatever dies.

    plan  ── matching rows, cut into shards ──> _decode/plan.json      put if absent
    shard ── read, decode, encode ── shard-000000.tar | .parquet       put if absent
                                  └─ 000000/<name>.png                 folder: equal bytes every time
          ── then ────────────────── _decode/000000.json               what the shard holds
    all shards there ──────────────> _decode/complete.json             the sums

A shard counts once its record is there. It may be run any number of times, anywhere: the object of a
tar or Parquet shard appears whole and once, and is never replaced. Who resumes runs the shards
that have no record.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dicmh_ray.archive import EncodedImage, Store, open_snapshot, open_store, probe
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import JobError, PlanConflictError, UnsupportedImageError
from dicmh_ray.reader import ArchiveReader, OnError, ReadFault
from dicmh_ray.reader.index import Numbers
from dicmh_ray.views.codecs import codec_of
from dicmh_ray.views.decode import (
    THUMBNAIL_SIDE,
    blobs_for,
    check_view,
    decode_views,
    error_of,
    states_for,
)
from dicmh_ray.views.names import FileNames
from dicmh_ray.views.saving import FORMATS, mark_of, save_picture

Container = Literal["webdataset", "parquet", "folder"]
CONTAINERS: tuple[str, ...] = get_args(Container)

PLAN_FORMAT = "dicmh.decode.plan"
PREFIX = "_decode/"
PLAN_NAME = f"{PREFIX}plan.json"
COMPLETE_NAME = f"{PREFIX}complete.json"

BATCH_ROWS = 32
_PARALLEL_READS = 16

_PARQUET_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("tags", pa.list_(pa.string()), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("tier", pa.string(), nullable=False),
        pa.field("is_generated", pa.bool_(), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("original_sha256", pa.string(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("data", pa.binary(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkOptions:
    """What is decoded, and into what."""

    view: str = "machine"
    """``machine``, ``human``, ``thumbnail``, ``latent`` (npy) or ``original``."""

    states: int | None = None
    """Decode from the first ones only; None is all."""

    where: str | None = None
    """Filter; None is all rows."""

    sample: int | None = None
    """Only so many of them, chosen at random; None is all."""

    seed: int = 0
    """Of the sample."""

    container: Container = "webdataset"
    """Tars of pictures and JSON; Parquet with a column of files; or plain files."""

    format: str = "png"
    """Of pictures: ``png``, ``jpg`` or ``webp``."""

    max_side: int = THUMBNAIL_SIDE
    """Of thumbnails, in pixels."""

    shard_rows: int = 1000
    """Rows of a shard: what is lost when a worker dies, and held in memory as files."""

    on_error: OnError = "raise"
    """``"skip"``: rows that are damaged or hold no picture are left out, and are in the record."""

    def __post_init__(self) -> None:
        check_view(self.view)
        if self.view == "tags":
            raise ValueError("tags are no picture: scan the column")
        if self.container not in CONTAINERS:
            raise ValueError(f"container is {self.container!r}, wanted {', '.join(CONTAINERS)}")
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}, wanted {', '.join(FORMATS)}")
        if self.sample is not None and self.sample < 1:
            raise ValueError(f"sample is {self.sample}, wanted 1 or more")
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows is {self.shard_rows}, wanted 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """What one shard holds."""

    shard: int
    """From 0."""

    rows: int
    """Rows written."""

    num_bytes: int
    """Bytes of its objects."""

    sha256: str
    """Of its object; of a folder: over the lines ``<SHA-256 of a file> <name>``."""

    faults: tuple[Mapping[str, Any], ...]
    """Rows left out, and why: fields of :class:`~dicmh_ray.reader.ReadFault`."""


class _File(NamedTuple):
    """A row of a shard, decoded and encoded."""

    row: EncodedImage
    stem: str
    """Name of its file, before the suffix; unique in the shard."""
    suffix: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class BulkDecode:
    """A job, planned. Pickles: a worker needs nothing else to run a shard."""

    archive: str
    """Address of the archive."""

    version: int | None
    """Of the archive; None while it is unfinished, and then it must not grow before the job is done."""

    output: str
    """Address of the result."""

    options: BulkOptions
    """What is made."""

    num_shards: int
    """How many there are."""

    rows_sha256: str
    """Of the numbers of the rows, int64 little-endian: every worker must come to the same."""

    lost: int = 0
    """Rows, row groups and objects that no shard knows of, because the filter could not see them."""

    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """For the archive's file system."""

    output_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """For the result's file system."""

    conditional: bool = True
    """Whether the result's store honours conditional puts."""

    @cached_property
    def _store(self) -> Store:
        return open_store(self.output, self.output_options, conditional=self.conditional)

    @cached_property
    def _reader(self) -> ArchiveReader:
        return ArchiveReader.open(
            self.archive, version=self.version, storage_options=self.storage_options
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_store", "_reader", "_rows")}

    @cached_property
    def _rows(self) -> Numbers:
        rows = _chosen(self._reader, self.options)
        if _digest(rows) != self.rows_sha256:
            raise JobError(
                f"{self.archive}: the filter no longer selects the rows that were planned; "
                "objects were lost or came back"
            )
        return rows

    def shards_left(self) -> list[int]:
        """Shards without a record; one listing."""
        done = set(self._store.list(PREFIX))
        return [n for n in range(self.num_shards) if _record_name(n) not in done]

    def run_shard(self, shard: int, codec: ImageCodec | None = None) -> ShardRecord:
        """Make one shard, unless it is there. Doing it again changes nothing.

        Args:
            shard: from 0.
            codec: the archive's; None loads it, once for this process, when a stream is met.
        """
        name = _record_name(shard)
        try:
            return _read_record(self._store.get(name))
        except FileNotFoundError:
            pass
        rows = self._rows[shard * self.options.shard_rows :][: self.options.shard_rows]
        before = len(self._reader.faults)
        faults: list[ReadFault] = []
        files = list(self._files(rows, codec, faults))
        faults = [*self._reader.faults[before:], *faults]
        num_bytes, sha256 = self._put(shard, files)
        record = ShardRecord(
            shard=shard,
            rows=len(files),
            num_bytes=num_bytes,
            sha256=sha256,
            faults=tuple(asdict(fault) for fault in faults),
        )
        self._store.put(name, _json(asdict(record)))
        return record

    def finish(self) -> dict[str, Any]:
        """Write the sums, once every shard has its record.

        Raises:
            JobError: some have none.
        """
        left = self.shards_left()
        if left:
            raise JobError(f"{len(left)} of {self.num_shards} shards are not done")
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            read = pool.map(lambda n: self._store.get(_record_name(n)), range(self.num_shards))
            records = [_read_record(data) for data in read]
        sums = {
            "shards": len(records),
            "rows": sum(record.rows for record in records),
            "num_bytes": sum(record.num_bytes for record in records),
            "faults": self.lost + sum(len(record.faults) for record in records),
        }
        self._store.put(COMPLETE_NAME, _json(sums))
        return sums

    def _files(
        self, rows: Numbers, codec: ImageCodec | None, faults: list[ReadFault]
    ) -> Iterator[_File]:
        """The rows of a shard as files."""
        options = self.options
        # Also of rows that will be left out: damage must not change the names of the others.
        keys = self._reader.keys_of(rows, on_error=options.on_error)
        names = FileNames(dots=options.container != "webdataset")
        stems = [names.claim(key, "") for key in keys]
        for start in range(0, len(rows), BATCH_ROWS):
            batch = self._reader.read_rows(
                rows[start : start + BATCH_ROWS],
                blobs_for(options.view),
                states_for(options.view, options.states),
                on_error=options.on_error,
                spare_originals=options.view != "original",
            )
            results = decode_views(
                [row for _, row in batch],
                options.view,
                options.states,
                codec or (lambda: codec_of(self._reader.snapshot)),
                max_side=options.max_side,
                on_error="raise" if options.on_error == "raise" else "return",
            )
            for (place, row), result in zip(batch, results, strict=True):
                error = error_of(result)
                if error is not None:
                    faults.append(ReadFault.of_picture(row.key, error))
                    continue
                try:
                    suffix, data = self._file_of(row, result)
                except UnsupportedImageError as exc:
                    if options.on_error == "raise":
                        raise
                    faults.append(ReadFault.of_picture(row.key, exc))
                    continue
                yield _File(row, stems[start + place], suffix, data)

    def _file_of(self, row: EncodedImage, result: Any) -> tuple[str, bytes]:
        if self.options.view == "original":
            return f".{(row.original_format or 'bin').lower()}", result
        buffer = io.BytesIO()
        if self.options.view == "latent":
            np.save(buffer, result, allow_pickle=False)
            return ".npy", buffer.getvalue()
        save_picture(buffer, result, mark_of(row, self.options.view), format=self.options.format)
        return f".{self.options.format}", buffer.getvalue()

    def _put(self, shard: int, files: Sequence[_File]) -> tuple[int, str]:
        """Store a shard; bytes and digest of what is stored."""
        if self.options.container == "folder":
            return self._put_files(shard, files)
        if self.options.container == "parquet":
            name, data = f"shard-{shard:06d}.parquet", self._parquet(files)
        else:
            name, data = f"shard-{shard:06d}.tar", self._tar(files)
        if not self._store.put_once(name, data):
            # Another attempt was first; a decode elsewhere may differ in a rounding.
            data = self._store.get(name)
        return len(data), hashlib.sha256(data).hexdigest()

    def _put_files(self, shard: int, files: Sequence[_File]) -> tuple[int, str]:
        hashed = hashlib.sha256()
        for _, stem, suffix, data in files:
            name = stem + suffix
            self._store.put(f"{shard:06d}/{name}", data)
            hashed.update(f"{hashlib.sha256(data).hexdigest()} {name}\n".encode())
        return sum(len(file.data) for file in files), hashed.hexdigest()

    def _tar(self, files: Sequence[_File]) -> bytes:
        buffer = io.BytesIO()
        # The format of POSIX 2001 is the plain one but for names of more than 100 bytes.
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for row, stem, suffix, data in files:
                for name, content in ((stem + suffix, data), (f"{stem}.json", self._facts(row))):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    def _facts(self, row: EncodedImage) -> bytes:
        mark = mark_of(row, self.options.view)
        return _json(
            {
                "key": row.key,
                "tags": list(row.tags),
                "status": row.status,
                "tier": row.tier,
                "view": self.options.view,
                "is_generated": mark.is_generated,
                "original_sha256": row.original_sha256,
                "metadata": json.loads(row.metadata),
            }
        )

    def _parquet(self, files: Sequence[_File]) -> bytes:
        records = [
            {
                "key": row.key,
                "tags": list(row.tags),
                "status": row.status,
                "tier": row.tier,
                "is_generated": mark_of(row, self.options.view).is_generated,
                "metadata": row.metadata,
                "original_sha256": row.original_sha256,
                "format": suffix.removeprefix("."),
                "data": data,
            }
            for row, _, suffix, data in files
        ]
        sink = pa.BufferOutputStream()
        compression = {name: "NONE" if name == "data" else "ZSTD" for name in _PARQUET_SCHEMA.names}
        compression["tags.list.element"] = compression.pop("tags")
        pq.write_table(
            pa.Table.from_pylist(records, schema=_PARQUET_SCHEMA),
            sink,
            compression=compression,
            use_dictionary=["status", "tier", "format", "tags.list.element"],
            write_page_checksum=True,
        )
        return bytes(sink.getvalue().to_pybytes())


def plan_bulk_decode(
    archive: str,
    output: str,
    options: BulkOptions,
    *,
    version: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    output_options: Mapping[str, Any] | None = None,
) -> BulkDecode:
    """Begin a bulk decode, or go on with one: cut the matching rows into shards.

    Args:
        archive: its address.
        output: folder or prefix on any fsspec store, not the archive's own.
        options: what is made.
        version: of the archive; None is the newest, and a resumed job keeps to the one it began with.
        storage_options: for the archive's file system; written nowhere.
        output_options: for the result's file system; written nowhere.

    Raises:
        PlanConflictError: the result belongs to a decode of other rows, or with other options.
        ArchiveNotFoundError: there is no archive.
        WhereError: the filter is wrong.
    """
    store = open_store(output, output_options)
    began = _plan_of(store)
    if version is None and began is not None:
        version = began.get("version")
    snapshot = open_snapshot(archive, version=version, storage_options=storage_options)
    if snapshot.manifest is not None:
        version = snapshot.manifest.version
    reader = ArchiveReader(snapshot)
    rows = _chosen(reader, options)
    lost = [asdict(fault) for fault in reader.faults]
    hashed = hashlib.sha256("".join(part.sha256 for part in snapshot.parts).encode())
    plan: dict[str, Any] = {
        "format": PLAN_FORMAT,
        "plan_version": 1,
        "rows": len(rows),
        "rows_sha256": _digest(rows),
        "lost": lost,
        "content": hashed.hexdigest(),
        "codec_id": snapshot.codec_id,
        "version": version,
        "options": asdict(options),
    }
    conditional = probe(store)
    if not conditional:
        store = open_store(output, output_options, conditional=False)
    if began is None and not store.put_once(PLAN_NAME, _json(plan)):
        began = _plan_of(store)
    if began is not None and began != plan:
        found = hashlib.sha256(_json(began)).hexdigest()
        raise PlanConflictError(store.uri, hashlib.sha256(_json(plan)).hexdigest(), found)
    return BulkDecode(
        archive=archive,
        version=version,
        output=output,
        options=options,
        num_shards=-(-len(rows) // options.shard_rows),
        rows_sha256=plan["rows_sha256"],
        lost=len(lost),
        storage_options=dict(storage_options or {}),
        output_options=dict(output_options or {}),
        conditional=conditional,
    )


def _plan_of(store: Store) -> dict[str, Any] | None:
    try:
        value = json.loads(store.get(PLAN_NAME))
    except FileNotFoundError:
        return None
    except ValueError as exc:
        raise JobError(f"{store.uri}: {PLAN_NAME} is no plan: {exc}") from exc
    if not isinstance(value, dict) or value.get("format") != PLAN_FORMAT:
        raise JobError(f"{store.uri}: {PLAN_NAME} is no plan of a bulk decode")
    return value


def _chosen(reader: ArchiveReader, options: BulkOptions) -> Numbers:
    if options.sample is None:
        return reader.matching(options.where, on_error=options.on_error)
    return reader.sample_rows(
        options.sample, seed=options.seed, where=options.where, on_error=options.on_error
    )


def _digest(rows: Numbers) -> str:
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def _record_name(shard: int) -> str:
    return f"{PREFIX}{shard:06d}.json"


def _read_record(data: bytes) -> ShardRecord:
    values = json.loads(data)
    return ShardRecord(**{**values, "faults": tuple(values["faults"])})


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
