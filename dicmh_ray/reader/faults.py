"""What could not be read, for callers that go on without it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

from dicmh_ray.errors import ArchiveError, CorruptObjectError, CorruptRowError, DicmhError

OnError = Literal["raise", "skip"]
"""``"raise"``: the first damage ends the read. ``"skip"``: what is damaged is left out, and noted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadFault:
    """One thing that was left out: a row, a row group, or all rows of an object."""

    key: str | None
    """Of the row; None when more than one row is gone."""

    part: str
    """Object that is missing or damaged."""

    row_group: int | None
    """In the part, from 0; None when the whole object is gone."""

    row: int | None
    """In the row group, from 0; None when more than one row is gone."""

    reason: str
    """What is wrong."""

    @classmethod
    def of_row(cls, exc: CorruptRowError) -> Self:
        """Of a row that fails its checksum."""
        return cls(
            key=exc.key, part=exc.part, row_group=exc.row_group, row=exc.row, reason=exc.reason
        )

    @classmethod
    def of_object(cls, exc: CorruptObjectError, row_group: int | None = None) -> Self:
        """Of all rows of an object, or of one of its row groups."""
        return cls(key=None, part=exc.name, row_group=row_group, row=None, reason=exc.reason)

    @classmethod
    def of_picture(cls, key: str, exc: DicmhError) -> Self:
        """Of a sound row that gives no picture."""
        return cls(key=key, part="", row_group=None, row=None, reason=str(exc))


FaultSink = Callable[[ArchiveError, ReadFault], None]
"""Told of each fault: raises the error, or notes it."""


def refuse(exc: ArchiveError, fault: ReadFault) -> None:
    """The sink of ``on_error="raise"``."""
    del fault
    raise exc


def check_on_error(on_error: str) -> None:
    """Refuse any other word."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}, wanted 'raise' or 'skip'")
