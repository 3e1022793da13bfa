"""Codecs that kill, or delay, the process they run in. Factories: they pickle."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.fake_codec import FakeCodec

DEADLY = 77
"""A picture whose every sample has this value kills the process that encodes it."""


class HookedCodec(FakeCodec):
    """Calls ``before`` with each picture before it is encoded."""

    def __init__(self, before: Callable[[npt.NDArray[np.uint8]], None]) -> None:
        super().__init__()
        self._before = before

    def encode(self, images: Sequence[npt.NDArray[np.uint8]], **options: Any) -> list[bytes]:
        for image in images:
            self._before(image)
        return super().encode(images, **options)


def die() -> None:
    """As a segmentation fault or the kernel's memory killer would end it."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class DiesOnce:
    """The first process that encodes anything dies; ``marker`` remembers it."""

    marker: str

    def __call__(self) -> FakeCodec:
        return HookedCodec(self._die_once)

    def _die_once(self, _: npt.NDArray[np.uint8]) -> None:
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        die()


def dies_on_deadly_pictures() -> FakeCodec:
    """A factory: every process that encodes a deadly picture dies."""

    def before(image: npt.NDArray[np.uint8]) -> None:
        if (image == DEADLY).all():
            die()

    return HookedCodec(before)


@dataclass(frozen=True)
class DiesWhenLoaded:
    """Every process but the one that made the factory dies before it has a codec."""

    driver_pid: int

    def __call__(self) -> FakeCodec:
        if os.getpid() != self.driver_pid:
            die()
        return FakeCodec()


@dataclass(frozen=True)
class Slow:
    """Each picture takes ``seconds``, so that there is time to kill somebody."""

    seconds: float

    def __call__(self) -> FakeCodec:
        return HookedCodec(lambda _: time.sleep(self.seconds))


@dataclass(frozen=True)
class StopsOnce:
    """The first process that encodes anything gets SIGTERM; ``marker`` remembers it."""

    marker: str

    def __call__(self) -> FakeCodec:
        return HookedCodec(self._stop_once)

    def _stop_once(self, _: npt.NDArray[np.uint8]) -> None:
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Alone:
    """Each picture takes ``seconds``; two processes that encode at once leave ``folder/together``."""

    folder: str
    seconds: float

    def __call__(self) -> FakeCodec:
        return HookedCodec(self._be_alone)

    def _be_alone(self, _: npt.NDArray[np.uint8]) -> None:
        flag = os.path.join(self.folder, "busy")
        try:
            os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            os.close(os.open(os.path.join(self.folder, "together"), os.O_CREAT))
            return
        time.sleep(self.seconds)
        os.unlink(flag)
