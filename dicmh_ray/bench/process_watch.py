"""Processor time and memory of this process and all that it starts, read from /proc while they run."""

import os
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


class Watch:
    """Looks at this process and its descendants: processor time and memory.

    Processes are seen four times a second, and keep what they had when they were seen last: nobody
    else knows what an actor that was killed has spent. What looking costs is not counted.

    Args:
        ignored: processes that belong to something else.
    """

    def __init__(self, ignored: Collection[int] = ()) -> None:
        self._ignored = set(ignored)
        self._looking_seconds = 0.0
        self.peaks: dict[int, int] = {}
        """Process -> the most bytes that it had in memory."""

        self._before = cpu_of_family()
        self._last = dict(self._before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()
        self._last |= cpu_of_family()

    def cpu_seconds(self, startup: Mapping[int, float]) -> float:
        """Of all processes since the start, without what each had spent for its start-up.

        Args:
            startup: process -> processor seconds of its life that are not charged. Those that
                were there before count from then.
        """
        total = 0.0
        for pid, last in self._last.items():
            free = startup.get(pid, 0.0) if pid != os.getpid() else 0.0
            if pid not in self._ignored:
                total += max(0.0, last - max(self._before.get(pid, 0.0), free))
        return total - startup.get(os.getpid(), 0.0) - self._looking_seconds

    def _look(self) -> None:
        while not self._stop.wait(0.25):
            now = cpu_of_family()
            self._last |= now
            for pid in now:
                self.peaks[pid] = max(self.peaks.get(pid, 0), peak_bytes(pid))
        self._looking_seconds = time.thread_time()


def stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def family(root: int) -> list[int]:
    """A process and its descendants."""
    parents = {
        int(entry.name): int(fields[1])
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and (fields := stat_of(int(entry.name)))
    }
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def cpu_of_family() -> dict[int, float]:
    """Processor seconds of this process and each of its descendants."""
    fields = {pid: stat_of(pid) for pid in family(os.getpid())}
    return {pid: sum(map(int, found[11:13])) / TICKS for pid, found in fields.items() if found}


def peak_bytes(pid: int) -> int:
    """The most that a process had in memory, its own pages; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found else 0
