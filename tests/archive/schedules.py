"""Stores that die at a chosen operation, or hand over to somebody else there."""

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

from dicmh_ray.archive import open_store, store


class Killed(BaseException):
    """The process is gone: nothing catches this, nothing is tidied up."""


class Script:
    """What happens before which operation of a store, counted from 1; 0 is never."""

    def __init__(self):
        self.plan(0, None)

    def plan(self, at, act):
        self.count, self.at, self.act = 0, at, act

    @contextlib.contextmanager
    def operation(self):
        self.count += 1
        if self.count == self.at:
            self.act()
        yield


class Lockstep:
    """Threads by name take turns, operation by operation; a seed says whose turn it is."""

    def __init__(self, seed, names):
        self.random, self.alive = random.Random(seed), set(names)
        self.changed = threading.Condition()
        self.turn = self.random.choice(sorted(names))

    @contextlib.contextmanager
    def operation(self, actor):
        if actor not in self.alive:
            yield
            return
        with self.changed:
            assert self.changed.wait_for(lambda: self.turn == actor, timeout=60)
            try:
                yield
            finally:
                self.choose()

    def leave(self, actor):
        with self.changed:
            self.alive.discard(actor)
            self.choose()

    def choose(self):
        self.turn = self.random.choice(sorted(self.alive)) if self.alive else None
        self.changed.notify_all()

    def run(self, actions):
        """Run one function a name, each in a thread of that name; their results."""

        def work(name, action):
            threading.current_thread().name = name
            try:
                return action()
            finally:
                self.leave(name)

        with ThreadPoolExecutor(len(actions)) as pool:
            futures = {name: pool.submit(work, name, act) for name, act in actions.items()}
            return {name: future.result(timeout=120) for name, future in futures.items()}


def install(monkeypatch, step):
    """Have every memory store call ``step(actor)``, a context manager, around each operation."""

    class Stepping(store.MemoryStore):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.actor = threading.current_thread().name

        def _create(self, path, data):
            with step(self.actor):
                return super()._create(path, data)

    def stepped(name):
        def operation(self, *args):
            with step(self.actor):
                return getattr(super(Stepping, self), name)(*args)

        return operation

    for name in ("get", "get_range", "put", "list", "list_objects", "modified", "size", "delete"):
        setattr(Stepping, name, stepped(name))
    monkeypatch.setattr(store, "MemoryStore", Stepping)


def scripted(monkeypatch):
    """One script for all memory stores."""
    script = Script()
    install(monkeypatch, lambda actor: script.operation())
    return script


def copy_archive(source, target):
    """The same objects at another address."""
    old, new = open_store(source), open_store(target)
    for name in old.list(""):
        new.put(name, old.get(name))
    return target


def operations_of(script, action, uri):
    """How many operations an undisturbed run takes."""
    script.plan(0, None)
    action(uri)
    return script.count


def kill_everywhere(script, action, prepare):
    """Run ``action(uri)`` and kill it before each of its operations: after the one before it.

    Yields:
        The address after each such death, for the caller to look at and to try again.
    """

    def die():
        raise Killed

    for number in range(1, operations_of(script, action, prepare("undisturbed")) + 1):
        script.plan(0, None)
        uri = prepare(str(number))
        script.plan(number, die)
        with contextlib.suppress(Killed):
            action(uri)
        script.plan(0, None)
        yield uri
