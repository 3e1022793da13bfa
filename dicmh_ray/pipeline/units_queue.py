"""Units that wait to be run: in order, those that failed again after a while."""

import heapq
import random
import time
from collections import deque
from collections.abc import Iterable

from dicmh_ray.source import Unit

RETRY_BASE_S, RETRY_MAX_S = 0.5, 30.0


def retry_delay_s(attempt: int, rng: random.Random) -> float:
    """Seconds to wait after the ``attempt``-th failure of a unit: doubled each time, with jitter.

    Between half and all of the bound, so that workers that met the same hiccup of a store do not
    meet again.
    """
    bound = min(RETRY_MAX_S, RETRY_BASE_S * 2.0 ** (attempt - 1))
    return bound * rng.uniform(0.5, 1.0)


class UnitsQueue:
    """First in, first out, but for units that were put back: those wait for their time.

    Two drivers on one archive that keep the same order encode each unit at the same time, one of
    them in vain. A driver that finds a unit done by another calls :meth:`mix`.
    """

    def __init__(self, units: Iterable[Unit] = ()) -> None:
        self._ready: deque[Unit] = deque(units)
        self._later: list[tuple[float, int, Unit]] = []
        self._count = 0
        self._is_mixed = False

    def __len__(self) -> int:
        return len(self._ready) + len(self._later)

    def put(self, unit: Unit, *, delay_s: float = 0.0) -> None:
        """Add a unit at the end, to be taken after ``delay_s`` at the earliest."""
        if delay_s <= 0:
            self._ready.append(unit)
            return
        self._count += 1
        heapq.heappush(self._later, (time.monotonic() + delay_s, self._count, unit))

    def put_first(self, unit: Unit) -> None:
        """Add a unit at the front: it waited already."""
        self._ready.appendleft(unit)

    def take(self) -> Unit | None:
        """The next unit; None when there is none, or none whose time has come."""
        if self._later and self._later[0][0] <= time.monotonic():
            return heapq.heappop(self._later)[2]
        return self._ready.popleft() if self._ready else None

    def mix(self) -> None:
        """From now on, another order than that of any other driver. Again: no change."""
        if not self._is_mixed:
            self._is_mixed = True
            units = list(self._ready)
            random.shuffle(units)
            self._ready = deque(units)

    def wait_s(self) -> float:
        """Seconds until :meth:`take` gives a unit; 0 when it would now, or when none is left."""
        if self._ready or not self._later:
            return 0.0
        return max(0.0, self._later[0][0] - time.monotonic())
