"""What a task is: one class that reads one view of rows and gives a table with a row for each.

    class Brightness(Task):
        name = "brightness"
        reads = "machine"
        schema = pa.schema([("mean", pa.float32())])

        def __call__(self, batch):
            return batch.table(mean=[picture.mean() for picture in batch.values])

A task is made in the driver, pickled to workers, set up there once, and called with batches. What its
results depend on is hashed into their name: name and version, what it reads, its parameters, the
filter, and the checkpoint of the archive. Change the version when the code changes what it gives.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from dicmh_ray.archive import EncodedImage
from dicmh_ray.archive.sealed import digest
from dicmh_ray.codec import ImageCodec

READABLE = ("tags", "latent", "machine", "thumbnail", "original")
"""Views that a task may read. A human view shows detail that was made up: it is no data."""

PICTURES = ("machine", "thumbnail")
"""Views that are pictures."""

KEY, ERROR = "key", "error"
"""Columns of every result: whose row it is, and why the others are empty."""

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some rows, and what the task reads of each."""

    rows: Sequence[EncodedImage]
    """Their small columns: all of them, or those of the index (:attr:`Task.facts`)."""

    values: Sequence[Any]
    """One a row. ``"tags"``: tuple of str; ``"latent"``: float16 ``[C, h, w]``; pictures: uint8
    ``[H, W, 3]``; ``"original"``: bytes."""

    schema: pa.Schema
    """Of the result: the key, then the task's columns."""

    @property
    def keys(self) -> list[str]:
        """Of the rows."""
        return [row.key for row in self.rows]

    def table(self, **columns: Iterable[Any]) -> pa.Table:
        """A result: the task's columns, each with a value for every row.

        Raises:
            ValueError: a column of the schema is missing, or has another length.
            pa.ArrowException: a value is not of its column's type.
        """
        if set(columns) != set(self.schema.names) - {KEY}:
            raise ValueError(f"columns are {sorted(columns)}, wanted {self.schema.names[1:]}")
        arrays = [pa.array(self.keys, pa.string())]
        for field in list(self.schema)[1:]:
            # Arrow refuses numpy's own numbers of another type than the column's.
            values = [v.item() if isinstance(v, np.generic) else v for v in columns[field.name]]
            if len(values) != len(self.rows):
                raise ValueError(f"{field.name} has {len(values)} values for {len(self.rows)} rows")
            arrays.append(pa.array(values, field.type))
        return pa.table(arrays, schema=self.schema)


class Described(ABC):
    """What has a name and a version, and results that depend on them."""

    name: ClassVar[str]
    """Of its results' folder: a small letter, then small letters, digits, ``-`` and ``_``."""

    version: ClassVar[str] = "1"
    """Another one for code that gives other results."""

    def parameters(self) -> Mapping[str, Any]:
        """Whatever else results depend on, as JSON: options, digests of nets. Never credentials."""
        return {}


class Task(Described):
    """One row of an archive in, one row of results out. Pickles."""

    reads: str = "machine"
    """One of :data:`READABLE`."""

    states: int | None = None
    """Read from the first states only; None is all."""

    facts: Literal["index", "all"] = "index"
    """Which small columns the rows of a batch have: those of the index cost no further request.
    Of a task that reads pictures or originals they have all."""

    codec_id: str | None = None
    """The only checkpoint whose latents it understands; None is any."""

    schema: pa.Schema
    """The columns it gives, without the key. Each may be null: of rows with an error it is."""

    def setup(self) -> None:
        """Load what is needed, once in each worker, before the first call."""

    def meet(self, load_codec: Callable[[], ImageCodec]) -> None:
        """Learn from the archive's codec what is needed of it, after ``setup``.

        Views are made without the task's help: only what wants to know what latents mean needs this.
        """

    @abstractmethod
    def __call__(self, batch: Batch) -> pa.Table:
        """The results of some rows, made with :meth:`Batch.table`: one for each, in their order.

        Whatever it raises is tried again with each row alone, and becomes the error of that row.
        """


def check_task(task: Task) -> None:
    """Refuse a task that cannot be run.

    Raises:
        ValueError: its name, view, states or schema are not as documented.
    """
    check_name(task)
    if task.reads not in READABLE:
        raise ValueError(f"{task.name} reads {task.reads!r}, wanted one of {', '.join(READABLE)}")
    if task.states is not None and task.states < 1:
        raise ValueError(f"{task.name} reads {task.states} states, wanted 1 or more")
    if task.facts not in ("index", "all"):
        raise ValueError(f"{task.name} has facts {task.facts!r}, wanted 'index' or 'all'")
    if taken := {KEY, ERROR} & set(task.schema.names):
        raise ValueError(f"{task.name} may not give columns {', '.join(sorted(taken))}")
    if len(set(task.schema.names)) != len(task.schema.names):
        raise ValueError(f"{task.name} gives a column twice: {task.schema.names}")


def check_name(described: Described) -> None:
    """Refuse a name that is no folder's. Raises ValueError."""
    if not _NAME.fullmatch(described.name):
        raise ValueError(f"{described.name!r} is no name of a task: wanted {_NAME.pattern}")


def keyed_schema(task: Task) -> pa.Schema:
    """What the task itself gives: the key, then its columns."""
    return pa.schema([pa.field(KEY, pa.string(), nullable=False), *task.schema])


def result_schema(task: Task) -> pa.Schema:
    """What is stored: the key, the task's columns, and the error."""
    fields = [pa.field(field.name, field.type, nullable=True) for field in task.schema]
    return pa.schema(
        [pa.field(KEY, pa.string(), nullable=False), *fields, pa.field(ERROR, pa.string())]
    )


def describe(task: Task, *, codec_id: str, where: str | None) -> dict[str, Any]:
    """What the results of a task depend on besides the rows, as JSON."""
    return {
        "task": task.name,
        "version": task.version,
        "reads": task.reads,
        "states": task.states,
        "parameters": dict(task.parameters()),
        "columns": [[field.name, str(field.type)] for field in result_schema(task)],
        "where": where,
        "codec_id": codec_id,
    }


def result_id(description: Mapping[str, Any]) -> str:
    """Folder of the results: the name, and 16 hex digits over everything they depend on."""
    return f"{description['task']}-{digest(description)[:16]}"
