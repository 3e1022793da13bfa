"""Pictures from a reader to the worker that encodes them.

UnitReader (CPUs) ── chunk ──> object store ── chunk ──> UnitWorker (GPU)
     ^ at most CHUNKS_AHEAD asked for, and as many not yet taken: that is the backpressure
"""

import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from dicmh_ray.errors import DicmhError
from dicmh_ray.pipeline.loading import LoadedImage
from dicmh_ray.source import Unit

CHUNKS_AHEAD = 2
"""Chunks that are on their way to a worker, or wait for it."""


class ReaderDiedError(DicmhError):
    """The process that read for a worker ended, perhaps of a picture."""

    def __init__(self, unit: str, was_preempted: bool) -> None:
        super().__init__(unit, was_preempted)
        self.unit, self.was_preempted = unit, was_preempted

    def __str__(self) -> str:
        return f"the reader of unit {self.unit} died"


@dataclasses.dataclass(frozen=True, slots=True)
class ReaderFeed:
    """A :class:`dicmh_ray.ray_plugin.actors.Feed` of one reader. Pickles."""

    reader: Any
    """Handle of a ``UnitReader`` that no other worker uses."""

    def images(self, unit: Unit) -> Iterator[LoadedImage]:
        """Images of a unit in order.

        Raises:
            ReaderDiedError: see there.
            DicmhError, OSError: what reading the source raised.
        """
        try:
            opened = self.reader.open.remote(unit)
            asked = deque(self.reader.read.remote() for _ in range(CHUNKS_AHEAD))
            ray.get(opened)
            while chunk := ray.get(asked.popleft()):
                asked.append(self.reader.read.remote())
                yield from map(_owned, chunk)
        except RayTaskError as exc:
            # As if it had been raised here: the driver decides by its type.
            raise (getattr(exc, "cause", None) or exc) from exc
        except (RayActorError, WorkerCrashedError) as exc:
            raise ReaderDiedError(unit.name, getattr(exc, "preempted", False)) from exc


def _owned(image: LoadedImage) -> LoadedImage:
    """The image with pixels of its own: those in the object store are read-only, and hold a chunk."""
    if image.pixels is None or image.pixels.image.flags.writeable:
        return image
    return image._replace(
        pixels=dataclasses.replace(image.pixels, image=np.array(image.pixels.image))
    )
