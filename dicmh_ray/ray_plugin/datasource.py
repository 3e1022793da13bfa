"""An archive as a Ray dataset: filters and projections go down to the reader, before any blob.

    ds = dicmh_ray.read_archive(uri, where="'dog' in tags")         columns, nothing decoded
    ds = dicmh_ray.read_archive(uri, view="machine", states=2)      pictures
    ds = read_archive(uri, columns=..., blobs...).map_batches(Decode("machine"), batch_size=32)

Only Ray's public interface is used. A read task covers whole row groups and reads the row index of
their units alone, then exactly the bytes of the rows that match.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dicmh_ray.adapters.handle import ArchiveHandle
from dicmh_ray.archive import ARROW_SCHEMA, BLOBS, SMALL_COLUMNS, Snapshot
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import MissingExtraError
from dicmh_ray.ray_plugin.decode import Decode
from dicmh_ray.reader import ArchiveReader, Fragment, OnError, parse_where
from dicmh_ray.reader.index import INDEX_FACTS
from dicmh_ray.views.decode import blobs_for, check_view, states_for

try:
    import ray
    from ray.data import Dataset, Datasource, ReadTask
    from ray.data.block import BlockMetadata
    from ray.data.expressions import Expr
except ModuleNotFoundError as exc:
    raise MissingExtraError(exc.name or "ray", "ray") from exc

from dicmh_ray.ray_plugin.pushdown import where_of

_SMALL_BYTES = 400
"""Of the small columns of a row in memory, when all are asked for; their share when some are."""


def read_archive(
    uri: str,
    *,
    columns: Sequence[str] | None = None,
    where: str | None = None,
    states: int | None = None,
    view: str | None = None,
    on_error: OnError = "raise",
    version: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    codec: Callable[[], ImageCodec] | None = None,
    batch_size: int = 32,
    override_num_blocks: int | None = None,
    concurrency: int | None = None,
) -> Dataset:
    """A Ray dataset of an archive as it is now. Lazy: only plan, manifest and index are read here.

    ``ds.filter(expr=...)`` and ``ds.select_columns(...)`` reach the reader where Ray's optimizer can
    move them there: comparisons, ``is_in``, null checks and their combinations of small columns.
    Tags and metadata fields are filtered by ``where``.

    Args:
        uri: address of the archive, from every node.
        columns: names; None is every column but the blobs. For :class:`Decode` add
            ``base``, ``detail`` and ``original``.
        where: filter, see :func:`dicmh_ray.reader.parse_where`.
        states: read ``base`` and ``detail`` after the first ones only up to there; None is all.
        view: adds the decoded view as a column ``image`` or ``latent``, in tasks on CPUs; for GPUs
            use :class:`Decode` by hand. Blob columns that were not asked for are gone then, and
            rows without a picture are left out.
        on_error: ``"skip"`` leaves out damaged rows, and says so in the workers' logs.
        version: of the archive; None is the newest.
        storage_options: passed to fsspec; they travel to the workers.
        codec: for ``view``: makes the codec in each worker; None loads the archive's own.
        batch_size: for ``view``: rows decoded at once.
        override_num_blocks: how many read tasks, if there are as many row groups.
        concurrency: how many of them run at once.

    Raises:
        ArchiveNotFoundError: there is no archive.
        WhereError: the filter is wrong.
        ValueError: there is no such column or view.
    """
    if view is not None:
        check_view(view)
    handle = ArchiveHandle(
        uri=uri, version=version, storage_options=dict(storage_options or {}), codec=codec
    ).pinned()
    wanted = None if columns is None else [name for name in ARROW_SCHEMA.names if name in columns]
    if columns is not None and len(set(columns)) != len(wanted or ()):
        raise ValueError(f"no such columns: {sorted(set(columns) - set(ARROW_SCHEMA.names))}")
    shown = list(SMALL_COLUMNS) if wanted is None else wanted
    decoded = view is not None and view != "tags"
    read = shown
    if view is not None and decoded:
        needed = {"key", "status", "prefix_bytes", *blobs_for(view)}
        read = [name for name in ARROW_SCHEMA.names if name in needed or name in shown]
        states = states_for(view, states)
    source = ArchiveDatasource(handle, columns=read, where=where, states=states, on_error=on_error)
    ds: Dataset = ray.data.read_datasource(
        source, override_num_blocks=override_num_blocks, concurrency=concurrency
    )
    if view is None or not decoded:
        return ds
    decode = Decode(
        view,
        states=states,
        archive=None if codec is not None else handle.uri,
        version=handle.version,
        storage_options=storage_options,
        codec=codec,
        keep=shown,
        on_error=on_error,
    )
    decoded_ds: Dataset = ds.map_batches(decode, batch_size=batch_size, batch_format="pyarrow")
    return decoded_ds


class ArchiveDatasource(Datasource):
    """Reads one version of an archive. See :func:`read_archive`, which makes them."""

    def __init__(
        self,
        handle: ArchiveHandle,
        *,
        columns: Sequence[str],
        where: str | None = None,
        states: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._handle = handle
        self._columns = tuple(columns)
        self._where = where
        self._states = states
        self._on_error: OnError = on_error
        self._projected: tuple[str, ...] | None = None
        if where is not None:
            parse_where(where)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of the matching rows, from the index: blobs as stored, small columns by the row.

        Of a filter that looks at more than the index has, and of ``states``, it is an upper bound.
        """
        return sum(self._estimated_bytes(f, rows) for f, rows in self._matches())

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Row groups with matches, in scan order, dealt to tasks of about equal size."""
        del data_context
        matches = self._matches()
        sizes = [self._estimated_bytes(fragment, rows) for fragment, rows in matches]
        tasks = []
        for start, stop in _dealt(sizes, parallelism):
            mine = [fragment for fragment, _ in matches[start:stop]]
            known = [rows for _, rows in matches[start:stop] if rows is not None]
            metadata = BlockMetadata(
                num_rows=sum(known) if len(known) == len(mine) else None,
                size_bytes=sum(sizes[start:stop]),
                input_files=tuple(
                    f"{self._handle.uri.rstrip('/')}/{part}"
                    for part in dict.fromkeys(fragment.part for fragment in mine)
                ),
                exec_stats=None,
            )
            tasks.append(
                ReadTask(
                    _Read(
                        self._narrowed(mine),
                        mine,
                        self._read_columns(),
                        self._where,
                        self._states,
                        self._on_error,
                    ),
                    metadata,
                    schema=pa.schema([ARROW_SCHEMA.field(name) for name in self._read_columns()]),
                    per_task_row_limit=per_task_row_limit,
                )
            )
        return tasks

    def supports_projection_pushdown(self) -> bool:
        """Columns that nobody wants are not read."""
        return True

    def get_projection_map(self) -> dict[str, str] | None:
        """What is read, each under its own name; None is all."""
        return None if self._projected is None else {name: name for name in self._projected}

    def apply_projection(self, projection_map: Mapping[str, str] | None) -> "ArchiveDatasource":
        """The same, of fewer columns."""
        clone = self._copy()
        if projection_map is not None:
            clone._projected = tuple(n for n in self._read_columns() if n in projection_map)
        return clone

    def supports_predicate_pushdown(self) -> bool:
        """Rows that do not match are not read."""
        return True

    def apply_predicate(self, predicate_expr: Expr) -> "ArchiveDatasource":
        """The same, of fewer rows; itself where the reader has no such filter, and Ray filters."""
        text = where_of(predicate_expr)
        if text is None:
            return self
        clone = self._copy()
        clone._predicate_expr = predicate_expr
        if self._predicate_expr is not None:
            clone._predicate_expr = self._predicate_expr & predicate_expr
        clone._where = text if self._where is None else f"({self._where}) and ({text})"
        return clone

    def _copy(self) -> "ArchiveDatasource":
        clone = ArchiveDatasource(
            self._handle,
            columns=self._columns,
            where=self._where,
            states=self._states,
            on_error=self._on_error,
        )
        clone._projected = self._projected
        clone._predicate_expr = self._predicate_expr
        return clone

    def _read_columns(self) -> tuple[str, ...]:
        return self._columns if self._projected is None else self._projected

    def _matches(self) -> list[tuple[Fragment, int | None]]:
        """Row groups that may have matches, each with how many; None where only reading tells."""
        reader = self._handle.archive().reader
        cheap, rest = (
            (None, None) if self._where is None else parse_where(self._where).split(INDEX_FACTS)
        )
        if cheap is None:
            return [(f, f.num_rows if rest is None else None) for f in reader.fragments()]
        found = reader.fragment_rows(reader.matching(cheap))
        return [(run.fragment, len(run.rows) if rest is None else None) for run in found]

    def _estimated_bytes(self, fragment: Fragment, rows: int | None) -> int:
        count = fragment.num_rows if rows is None else rows
        columns = self._read_columns()
        share = len([name for name in columns if name not in BLOBS]) / len(SMALL_COLUMNS)
        size = count * _SMALL_BYTES * share
        if any(name in BLOBS for name in columns):
            size += fragment.num_bytes * count / max(1, fragment.num_rows)
        return math.ceil(size)

    def _narrowed(self, fragments: Sequence[Fragment]) -> Snapshot:
        """The snapshot with the commits of some row groups: a task reads no other index."""
        snapshot = self._handle.archive().reader.snapshot
        parts = {fragment.part for fragment in fragments}
        commits = tuple(c for c in snapshot.commits if any(p.name in parts for p in c.parts))
        return replace(snapshot, commits=commits, manifest=None)


class _Read:
    """What one read task does, in some worker."""

    def __init__(
        self,
        snapshot: Snapshot,
        fragments: Sequence[Fragment],
        columns: Sequence[str],
        where: str | None,
        states: int | None,
        on_error: OnError,
    ) -> None:
        self._snapshot = snapshot
        self._fragments = list(fragments)
        self._columns = list(columns)
        self._where = where
        self._states = states
        self._on_error: OnError = on_error

    def __call__(self) -> Iterator[pa.Table]:
        reader = ArchiveReader(self._snapshot)
        # Rows that only count need a column too: a block without one has no length.
        columns = self._columns or ["key"]
        scan = reader.scan(
            columns, self._where, self._states, fragments=self._fragments, on_error=self._on_error
        )
        for batch in scan:
            yield pa.Table.from_batches([batch])


def _dealt(sizes: Sequence[int], tasks: int) -> list[tuple[int, int]]:
    """(start, stop) of up to ``tasks`` runs of about equal sums; none is empty."""
    total, edges, reached = sum(sizes) or 1, [0], 0
    for place, size in enumerate(sizes):
        reached += size
        left = len(sizes) - place - 1
        # As many tasks as asked for, if there are as many row groups.
        wanted = reached * tasks >= len(edges) * total or left <= tasks - len(edges)
        if left and wanted and len(edges) < tasks:
            edges.append(place + 1)
    return list(zip(edges, [*edges[1:], len(sizes)], strict=True)) if sizes else []
