"""An archive as something to send to workers: it pickles small, and each process opens its own."""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dicmh_ray.archive import Snapshot
from dicmh_ray.codec import ImageCodec
from dicmh_ray.views import Archive, open_archive

_HELD_ARCHIVES = 8
_lock = threading.Lock()
_opened: OrderedDict[Hashable, Archive] = OrderedDict()

os.register_at_fork(after_in_child=lambda: _forget())


@dataclass(frozen=True, kw_only=True)
class ArchiveHandle:
    """Which archive, which version of it, and how its pictures are decoded.

    Connections, locks and networks do not survive a fork, and do not pickle: a handle carries none
    of them. :meth:`archive` opens the archive at the first call in a process, and keeps it there.
    Send only what :meth:`pinned` gave: the others read whatever is the newest version.
    """

    uri: str
    """Address on any fsspec store."""

    version: int | None = None
    """Of the archive; None is the newest whenever it is opened."""

    storage_options: Mapping[str, Any] = field(default_factory=dict)
    """Passed to fsspec."""

    codec: Callable[[], ImageCodec] | None = None
    """Makes the codec in the process that decodes; None loads the archive's own."""

    device: str = "cpu"
    """Where the archive's own codec runs. Worker processes share a GPU badly, and a forked one
    cannot use a GPU that its parent has used."""

    snapshot: Snapshot | None = None
    """What is read of an unfinished archive, which has no version to name."""

    def pinned(self) -> "ArchiveHandle":
        """The same, with the version that is the newest now: every process then reads the same.

        Raises:
            ArchiveNotFoundError: there is no archive.
        """
        archive = self._open()
        manifest = archive.reader.snapshot.manifest
        if manifest is None:
            pinned = replace(self, snapshot=archive.reader.snapshot)
        else:
            pinned = replace(self, version=manifest.version)
        pinned._keep(archive)
        return pinned

    def archive(self) -> Archive:
        """The archive, opened in this process; the last few stay open, if they are pinned.

        Raises:
            ArchiveNotFoundError: there is no archive.
        """
        key = self._identity()
        with _lock:
            if key in _opened:
                _opened.move_to_end(key)
                return _opened[key]
        return self._keep(self._open())

    def _open(self) -> Archive:
        codec = None if self.codec is None else self.codec()
        if self.snapshot is not None:
            return Archive(self.snapshot, codec=codec, device=self.device)
        return open_archive(
            self.uri,
            version=self.version,
            codec=codec,
            device=self.device,
            storage_options=self.storage_options,
        )

    def _keep(self, archive: Archive) -> Archive:
        if self.version is None and self.snapshot is None:
            return archive  # the newest version may be another one next time
        with _lock:
            # Of two threads that opened it at once, both use the first one's.
            archive = _opened.setdefault(self._identity(), archive)
            while len(_opened) > _HELD_ARCHIVES:
                _opened.popitem(last=False)
        return archive

    def _identity(self) -> Hashable:
        options = json.dumps(dict(self.storage_options), sort_keys=True, default=repr)
        commits = None
        if self.snapshot is not None:
            commits = tuple(commit.attempt for commit in self.snapshot.commits)
        return self.uri, self.version, options, self.codec, self.device, commits


def _forget() -> None:
    """A forked process inherits connections it must not use, and perhaps a lock that is held."""
    global _lock
    _lock = threading.Lock()
    _opened.clear()
