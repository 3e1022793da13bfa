"""The worker: loads the codec (and the tagger) once, then runs units one at a time.

A plain class; ``run`` makes Ray actors of it. Nothing but small results leaves it: images go from
the source to the archive's store inside one process.
"""

import os
import socket
from itertools import islice

from dicmh_ray.codec import ImageCodec, ImageTagger
from dicmh_ray.pipeline import Job, UnitResult, encode_images
from dicmh_ray.source import Unit


class UnitWorker:
    """Runs units of one job.

    Both are loaded by the first call and not by the constructor: an error there then arrives at
    the driver with its type, instead of as the death of an actor.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._loaded: tuple[ImageCodec, ImageTagger | None] | None = None

    def whereabouts(self) -> tuple[str, int]:
        """Host name and process id."""
        return socket.gethostname(), os.getpid()

    def run_unit(self, unit: Unit, quarantine: frozenset[int] = frozenset()) -> UnitResult:
        """Read, encode and commit one unit; see :meth:`Job.run_unit`."""
        codec, tagger = self._models()
        return self._job.run_unit(unit, codec, tagger=tagger, quarantine=quarantine)

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
