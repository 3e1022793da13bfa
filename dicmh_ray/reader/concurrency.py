"""Tasks that wait for a store, a few at once, with their results in order."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

AT_ONCE = 4
"""Tasks that run at once, and results that are made before they are asked for."""

_A = TypeVar("_A")
_T = TypeVar("_T")


def at_once(read: Callable[[int], _T], tasks: range) -> list[_T]:
    """Results of tasks that wait for a store; one alone needs no thread."""
    if len(tasks) < 2:
        return [read(task) for task in tasks]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(read, tasks))


def read_ahead(read: Callable[[_A], _T], tasks: Iterator[_A]) -> Iterator[_T]:
    """Results in order. Whoever takes one gets one; whoever goes on has the next ones read."""
    first = next(tasks, None)
    if first is None:
        return
    yield read(first)
    waiting: list[Future[_T]] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            ahead = 1
            while True:
                waiting += [pool.submit(read, task) for task in islice(tasks, ahead - len(waiting))]
                if not waiting:
                    return
                yield waiting.pop(0).result()
                ahead = min(2 * ahead, AT_ONCE)
        finally:
            for future in waiting:
                future.cancel()
