"""A call at every operation of every store of this process, by name: where a test may kill it.

A point is ``<before|after> <operation> <kind of object>``, for example ``after put data`` or
``before put_if_absent commit``; ``middle`` is between the two steps of a put on a local disk. All
state of a job is in its store, so that the points are all the places where a death can differ.

The hooks are set on the classes from outside and taken off again. Code that is not under test has
none, and pays nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from dicmh_ray.archive import store
from dicmh_ray.archive.commit import COMMIT_PREFIX, JOB_PREFIX
from dicmh_ray.archive.manifest import MANIFEST_PREFIX
from dicmh_ray.archive.plan import LATER_PLAN_PREFIX, PLAN_NAME
from dicmh_ray.archive.store import SCRATCH

OPERATIONS = ("put", "put_if_absent", "get", "list", "list_objects", "delete")
_KINDS = {
    COMMIT_PREFIX: "commit",
    JOB_PREFIX: "job",
    MANIFEST_PREFIX: "manifest",
    LATER_PLAN_PREFIX: "later-plan",
    PLAN_NAME: "plan",
    SCRATCH: "scratch",
    "codec/": "codec",
    "data/": "data",
    "index/": "index",
}

Hook = Callable[[str], None]


def kind_of(name: str) -> str:
    """The kind of object that a name, or the prefix of a listing, is of."""
    for prefix, kind in _KINDS.items():
        if name.startswith(prefix):
            return kind
    return "everything" if not name else "other"


@contextlib.contextmanager
def hooked(hook: Hook) -> Iterator[None]:
    """Call ``hook`` with the name of each point that a store of this process reaches."""
    with contextlib.ExitStack() as undo:
        for cls in (store.Store, store.LocalStore, store.MemoryStore, store.S3Store):
            for operation in OPERATIONS:
                if operation in vars(cls):
                    _replace(undo, cls, operation, _around(hook, operation, vars(cls)[operation]))
        written = store.LocalStore._write_temporary

        def write(path: Any, data: bytes) -> Any:
            temporary = written(path, data)
            hook(f"middle put {kind_of('/'.join(path.parts[-2:]))}")
            return temporary

        _replace(undo, store.LocalStore, "_write_temporary", staticmethod(write))
        yield


def _replace(undo: contextlib.ExitStack, cls: type, name: str, new: Any) -> None:
    undo.callback(setattr, cls, name, vars(cls)[name])
    setattr(cls, name, new)


def _around(hook: Hook, operation: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def around(self: Any, name: str, *args: Any) -> Any:
        point = f"{operation} {kind_of(name)}"
        hook(f"before {point}")
        result = method(self, name, *args)
        hook(f"after {point}")
        return result

    return around
