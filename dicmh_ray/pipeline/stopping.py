"""Told to stop: SIGTERM as a notice, with a while to end what was begun.

Batch systems, Kubernetes and clouds that take a machine away say so first: SIGTERM, and SIGKILL some
30 s later. The first signal is a notice: no unit is begun any more, those that run have
``grace_s`` to be committed, and are then abandoned between two rows. Nothing is ever half published:
a unit appears with its commit, which is put after its last row. The second signal ends the process.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dicmh_ray.errors import JobStoppedError

GRACE_S = 20.0
"""Of the 30 s that Kubernetes and most clouds give by default, what a unit may still take."""


class StopNotice:
    """Whether this process was told to stop, and how long it may go on. Safe between threads."""

    def __init__(self, *, grace_s: float = GRACE_S) -> None:
        if not grace_s >= 0:
            raise ValueError(f"grace_s is {grace_s}, wanted 0 or more")
        self._grace_s = grace_s
        self._deadline: float | None = None

    def give(self) -> None:
        """Tell the process to stop. Only the first time counts."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s

    @property
    def is_given(self) -> bool:
        """Whether no further unit may be begun."""
        return self._deadline is not None

    @property
    def is_over(self) -> bool:
        """Whether units that run must be abandoned now."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def check(self, units_left: int) -> None:
        """Raise JobStoppedError when a unit that runs must be abandoned."""
        if self.is_over:
            raise JobStoppedError(units_left)

    def listen(self) -> None:
        """Take SIGTERM as the notice from now on; the signal after it ends the process.

        Only the main thread can; elsewhere it does nothing, and SIGTERM keeps its meaning.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.give()


@contextmanager
def listening_for_stop(*, grace_s: float = GRACE_S) -> Iterator[StopNotice]:
    """A notice that SIGTERM gives, for as long as the context lasts."""
    notice = StopNotice(grace_s=grace_s)
    if threading.current_thread() is not threading.main_thread():
        yield notice
        return
    before = signal.getsignal(signal.SIGTERM)
    notice.listen()
    try:
        yield notice
    finally:
        # None: a handler that was not set from Python, which Python cannot put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
