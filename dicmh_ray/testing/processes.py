"""The processes of a job on this machine, and the end of some of them. Linux: it reads /proc."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, get_args

Victim = Literal["driver", "actor", "worker", "raylet"]
VICTIMS: tuple[Victim, ...] = get_args(Victim)

_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One process, named so that a reused number is not mistaken for it."""

    pid: int
    parent: int
    started: int
    """Ticks since the machine booted."""

    title: str
    """Command line; Ray's workers write there what they are."""

    is_zombie: bool
    """Whether it has ended and nobody asked how."""


def processes() -> Iterator[Process]:
    """All processes of this machine."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        after_name = stat.rpartition(")")[2].split()
        yield Process(
            pid=int(entry.name),
            parent=int(after_name[1]),
            started=int(after_name[19]),
            title=title.strip(),
            is_zombie=after_name[0] == "Z",
        )


def family(root: int) -> list[Process]:
    """A process's descendants."""
    everyone = list(processes())
    found, parents = [], {root}
    while parents:
        children = [process for process in everyone if process.parent in parents]
        found += children
        parents = {process.pid for process in children}
    return found


def kill(victims: Sequence[Process]) -> None:
    """SIGKILL those that still are who they were."""
    alive = {(process.pid, process.started) for process in processes()}
    for victim in victims:
        if (victim.pid, victim.started) in alive:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself in between
                os.kill(victim.pid, signal.SIGKILL)


class Driver:
    """A job in a process of its own; everything that it starts is ended with it."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log.open("ab")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self._family: dict[tuple[int, int], Process] = {}
        self._orphaned_at: float | None = None

    def poll(self) -> int | None:
        """Exit code, once it ended. Also takes note of its descendants."""
        for process in family(self._process.pid):
            self._family[process.pid, process.started] = process
        return self._process.poll()

    def strike(self, victim: Victim, random: Random) -> str | None:
        """Kill a process of the kind; what was killed, or None where there is none."""
        if victim == "driver":
            self._process.kill()
            return f"driver {self._process.pid}"
        found = [p for p in family(self._process.pid) if not p.is_zombie and _is(victim, p.title)]
        if not found:
            return None
        chosen = random.choice(found)
        kill([chosen])
        if victim == "raylet":
            self._orphaned_at = time.monotonic()
        return f"{victim} {chosen.pid} ({chosen.title[:60]})"

    def is_stuck(self, patience_s: float) -> bool:
        """Whether it goes on without its raylet for longer than that: it will not end by itself."""
        return self._orphaned_at is not None and time.monotonic() - self._orphaned_at > patience_s

    def end(self) -> None:
        """End it and everything it started."""
        self.poll()
        self._process.kill()
        self._process.wait()
        kill(list(self._family.values()))
        self._log.close()


def _is(victim: Victim, title: str) -> bool:
    if victim == "raylet":
        return title.split(" ", 1)[0].endswith("/raylet")
    if not title.startswith("ray::") or title.startswith(_AGENTS):
        return False
    # An actor that is at work has its method in its title.
    return "." in title if victim == "actor" else True
