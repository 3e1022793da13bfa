"""A local read-through cache of byte ranges: one SQLite file, bounded, shared between processes.

A range is stored under the SHA-256 that its whole object was committed with, so that bytes of an
object that was replaced are never taken for those of the new one, and two archives that share an
object share its ranges. Every entry carries its own checksum; one that the disk has changed is
dropped and read again from the store. The cache is a convenience: whatever goes wrong with it costs
a request, never a result.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from dicmh_ray.archive.ranges import ByteRange
from dicmh_ray.bitstream import crc32c

logger = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 4 * 2**30

_FILE = "ranges-v1.sqlite"
_ENTRY_BYTES = 200
"""Counted for each entry beside its bytes: keys, index, page slack."""

_LOW_WATER = 0.9
_TOUCH_S = 60
"""An entry is marked as used at most so often: a hit must not cost a write."""

_LOCK_TIMEOUT_S = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS ranges (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, used REAL NOT NULL, crc32c INTEGER NOT NULL,
    data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS ranges_by_use ON ranges (used);
CREATE TABLE IF NOT EXISTS total (one INTEGER PRIMARY KEY CHECK (one = 1), num_bytes INTEGER);
INSERT OR IGNORE INTO total VALUES (1, 0);
"""


class RangeCache:
    """Byte ranges on the local disk. Thread-safe, safe between processes; pickles as its folder."""

    def __init__(self, folder: str | Path, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        """
        Args:
            folder: on a local disk; created. Any number of archives and processes may share it.
            max_bytes: of all entries, bookkeeping included. The least recently used go first. The
                journal beside them takes 16 MiB at most.
        """
        if max_bytes < 1:
            raise ValueError(f"cache_bytes is {max_bytes}, wanted 1 or more")
        self.folder = Path(folder)
        """Where the file is."""
        self.max_bytes = max_bytes
        """Bound of its content."""
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._inherited: list[sqlite3.Connection] = []
        self._pid = 0
        self._is_broken = False

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.folder, self.max_bytes)

    def get(self, sha256: str, place: ByteRange) -> bytes | None:
        """One range, or None if it is not here."""
        return self.get_many(sha256, [place])[0]

    def get_many(self, sha256: str, ranges: Sequence[ByteRange]) -> list[bytes | None]:
        """Ranges of the object with this SHA-256; None for each that is not here."""
        found: list[bytes | None] = [None if place.length else b"" for place in ranges]
        with self._transaction() as database:
            if database is not None:
                for i, place in enumerate(ranges):
                    if place.length:
                        found[i] = self._look_up(database, _key(sha256, place), place.length)
        return found

    def put(self, sha256: str, entries: Sequence[tuple[ByteRange, bytes]]) -> None:
        """Keep ranges of the object with this SHA-256; older ones make room."""
        fitting = [(p, d) for p, d in entries if p.length and _size(d) <= self.max_bytes]
        if not fitting:
            return
        with self._transaction() as database:
            if database is None:
                return
            now, added = time.time(), 0
            for place, data in fitting:
                key = _key(sha256, place)
                done = database.execute(
                    "INSERT OR IGNORE INTO ranges (key, used, crc32c, data) VALUES (?, ?, ?, ?)",
                    (key, now, _checksum(key, data), data),
                )
                added += done.rowcount * _size(data)
            database.execute("UPDATE total SET num_bytes = num_bytes + ?", (added,))
            self._make_room(database)

    def num_bytes(self) -> int:
        """What the entries take."""
        num_bytes = 0
        with self._transaction() as database:
            if database is not None:
                num_bytes = _total(database)
        return num_bytes

    def _look_up(self, database: sqlite3.Connection, key: bytes, length: int) -> bytes | None:
        row = database.execute(
            "SELECT id, used, crc32c, data FROM ranges WHERE key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        entry, used, crc, data = row
        if len(data) != length or _checksum(key, data) != crc:
            logger.warning("%s: an entry is damaged and was dropped", self.folder)
            self._drop(database, entry, len(data))
            return None
        now = time.time()
        if now - used > _TOUCH_S:
            database.execute("UPDATE ranges SET used = ? WHERE id = ?", (now, entry))
        return bytes(data)

    def _make_room(self, database: sqlite3.Connection) -> None:
        total = _total(database)
        if total <= self.max_bytes:
            return
        oldest = database.execute("SELECT id, length(data) FROM ranges ORDER BY used, id")
        doomed = []
        for entry, length in oldest:
            if total <= self.max_bytes * _LOW_WATER:
                break
            total -= length + _ENTRY_BYTES
            doomed.append((entry,))
        oldest.close()
        database.executemany("DELETE FROM ranges WHERE id = ?", doomed)
        database.execute("UPDATE total SET num_bytes = ?", (total,))

    def _drop(self, database: sqlite3.Connection, entry: int, length: int) -> None:
        database.execute("DELETE FROM ranges WHERE id = ?", (entry,))
        database.execute("UPDATE total SET num_bytes = num_bytes - ?", (length + _ENTRY_BYTES,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection | None]:
        """The database in a transaction; None while it cannot be used. No error of it gets out."""
        with self._lock:
            database = self._open()
            if database is None:
                yield None
                return
            try:
                with database:
                    yield database
            except sqlite3.OperationalError as exc:
                logger.warning("%s: the cache is busy or full: %s", self.folder, exc)
            except sqlite3.DatabaseError as exc:
                self._start_again(exc)

    def _open(self) -> sqlite3.Connection | None:
        if self._is_broken:
            return None
        if self._connection is not None and self._pid == os.getpid():
            return self._connection
        if self._connection is not None:
            # A connection must not cross a fork: the parent's is neither used nor closed here.
            self._inherited.append(self._connection)
            self._connection = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._connection = self._connect()
            self._pid = os.getpid()
        except sqlite3.OperationalError as exc:
            logger.warning("%s: reading without the cache: %s", self.folder, exc)
            self._is_broken = True
        except sqlite3.DatabaseError as exc:
            self._start_again(exc)
        except OSError as exc:
            logger.warning("%s: reading without the cache: %s", self.folder, exc)
            self._is_broken = True
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(
            self.folder / _FILE, timeout=_LOCK_TIMEOUT_S, check_same_thread=False
        )
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA journal_size_limit = 16777216")
        database.executescript(_SCHEMA)
        return database

    def _start_again(self, exc: Exception) -> None:
        """The file is damaged. Others that have it open go on with theirs; it is theirs alone."""
        logger.warning("%s: the cache is damaged and is started again: %s", self.folder, exc)
        self._connection = None
        for suffix in ("", "-wal", "-shm"):
            (self.folder / f"{_FILE}{suffix}").unlink(missing_ok=True)


def _key(sha256: str, place: ByteRange) -> bytes:
    return bytes.fromhex(sha256) + place.start.to_bytes(8, "big") + place.length.to_bytes(8, "big")


def _checksum(key: bytes, data: bytes) -> int:
    return crc32c(data, crc32c(key))


def _size(data: bytes) -> int:
    return len(data) + _ENTRY_BYTES


def _total(database: sqlite3.Connection) -> int:
    with closing(database.execute("SELECT num_bytes FROM total")) as cursor:
        (num_bytes,) = cursor.fetchone()
    return int(num_bytes)
