"""The workers: those that encode and commit units, and those that only read for them.

Plain classes; ``pool`` makes Ray actors of them. Without readers nothing but small results leaves a
worker: images go from the source to the archive's store inside one process. A reader's pictures go
through Ray's object store, a few chunks at a time, pulled by the worker that wants them.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import pyarrow as pa

from dicmh_ray.codec import ImageCodec, ImageTagger
from dicmh_ray.errors import JobStoppedError
from dicmh_ray.pipeline import Job, UnitResult, encode_images
from dicmh_ray.pipeline.encode import encode_loaded, load_unit
from dicmh_ray.pipeline.loading import LoadedImage
from dicmh_ray.pipeline.stopping import StopNotice
from dicmh_ray.source import Unit

CHUNK_BYTES = 2**25
"""Of a reader's answer; one picture that is larger is an answer of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerFacts:
    """What a worker says of itself when it is ready."""

    host: str
    pid: int
    node_id: str
    """As Ray names it."""

    load_seconds: float
    """For codec and tagger."""


class Feed(Protocol):
    """Where a worker gets decoded images from when it does not read itself."""

    def images(self, unit: Unit) -> Iterator[LoadedImage]:
        """Images of a unit in order, as :func:`load_unit` gives them."""


class UnitWorker:
    """Runs units of one job, one at a time.

    Codec and tagger are loaded by the first call and not by the constructor: an error there then
    arrives at the driver with its type, instead of as the death of an actor.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._loaded: tuple[ImageCodec, ImageTagger | None] | None = None
        self._notice = StopNotice()

    def whereabouts(self) -> tuple[str, int]:
        """Host name and process id."""
        return socket.gethostname(), os.getpid()

    def begin(self, node_id: Callable[[], str], grace_s: float) -> WorkerFacts:
        """Load codec and tagger, and take SIGTERM as a notice from now on.

        Args:
            node_id: names this machine.
            grace_s: what a unit may still take after the notice.
        """
        self._notice = StopNotice(grace_s=grace_s)
        self._notice.listen()
        started = time.perf_counter()
        # pyarrow imports pandas, where there is one, to make its first array: not in the first unit.
        pa.array([])
        self._models()
        return WorkerFacts(
            host=socket.gethostname(),
            pid=os.getpid(),
            node_id=node_id(),
            load_seconds=time.perf_counter() - started,
        )

    def run_unit(
        self, unit: Unit, quarantine: frozenset[int] = frozenset(), feed: Feed | None = None
    ) -> UnitResult:
        """Read, encode and commit one unit; see :meth:`Job.run_unit`.

        Raises:
            JobStoppedError: this process was told to stop: the unit was not begun, or abandoned.
        """
        if self._notice.is_given:
            raise JobStoppedError(1)
        codec, tagger = self._models()
        rows = None
        if feed is not None:
            rows = encode_loaded(
                feed.images(unit),
                codec,
                self._job.policy,
                options=self._job.encode_options,
                tagger=tagger,
            )
        return self._job.run_unit(
            unit,
            codec,
            tagger=tagger,
            quarantine=quarantine,
            rows=rows,
            on_row=lambda _: self._notice.check(1),
        )

    def load(self) -> None:
        """Load codec and tagger now."""
        self._models()

    def count_images(self, unit: Unit) -> int:
        """How many images the unit has, without decoding any."""
        return sum(1 for _ in self._job.read(unit))

    def rehearse(self, unit: Unit, start: int, stop: int) -> None:
        """Encode the images at positions ``[start, stop)`` and throw the rows away.

        What it is for is to survive it, or not.
        """
        codec, tagger = self._models()
        images = islice(self._job.read(unit), start, stop)
        options = self._job.encode_options
        for _ in encode_images(images, codec, self._job.policy, options=options, tagger=tagger):
            pass

    def _models(self) -> tuple[ImageCodec, ImageTagger | None]:
        if self._loaded is None:
            job = self._job
            self._loaded = job.checkpoint.load(job.encode_options), job.load_tagger()
        return self._loaded


class UnitReader:
    """Reads and decodes units for one worker, ahead of what it asked for, within bounds.

    Bounded by the ``ahead_bytes`` of the job's options here, and by what the worker asks for: an
    answer is at most :data:`CHUNK_BYTES`, or one picture.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._chunks: Iterator[list[LoadedImage]] = iter(())

    def begin(self) -> None:
        """Nothing: that it returns says that the process is there."""

    def open(self, unit: Unit) -> None:
        """Read this unit from now on, whatever became of the one before."""
        self._chunks = _chunks(load_unit(self._job.read(unit), self._job.encode_options))

    def read(self) -> list[LoadedImage]:
        """The next images of the unit; an empty list after its last."""
        return next(self._chunks, [])


def _chunks(images: Iterator[LoadedImage]) -> Iterator[list[LoadedImage]]:
    chunk: list[LoadedImage] = []
    held = 0
    for image in images:
        if chunk and held + image.num_bytes > CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(image)
        held += image.num_bytes
    if chunk:
        yield chunk
