"""Kill a job at random moments until it is done, again and again, and compare what it wrote.

    python jobs/chaos.py --kills 20 --seed 7

Makes a collection of 1,000 small photographs-like pictures (or takes ``--source``), compresses it
undisturbed, then again while processes of the job get SIGKILL at random moments: the driver, an
actor that encodes, or any Ray worker process. A driver that died, or ended in an error, is started
again with the same command. When an archive is complete before all kills are spent, it is judged and
the next one begun. Each archive must verify, hold every key exactly once, and equal the
undisturbed one row by row. Exit code 0 when all do. Linux only: it reads /proc. Kills only processes
that it started itself, and cleans up those that a killed driver leaves behind.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dicmh_ray.archive import EncodedImage, verify_archive
from dicmh_ray.reader import ArchiveReader

VICTIMS = ("driver", "actor", "worker")


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One process of the job, named so that a reused number is not mistaken for it."""

    pid: int
    parent: int
    started: int
    title: str


def make_collection(folder: Path, *, images: int, per_tar: int, seed: int) -> list[str]:
    """Tars of JPEGs: smooth random pictures of 64 to 128 pixels a side."""
    rng = np.random.default_rng(seed)
    tars = []
    for first in range(0, images, per_tar):
        path = folder / f"shard-{first // per_tar:04d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + per_tar, images)):
                coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
                side = int(rng.integers(64, 129))
                picture = Image.fromarray(coarse).resize((side, 96), Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                picture.save(buffer, "JPEG", quality=95)
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
        tars.append(str(path))
    return tars


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
    """The command under test, in a process of its own."""

    def __init__(self, sources: Sequence[str], archive: Path, log: Path, workers: int) -> None:
        command = [sys.executable, "-m", "dicmh_ray.cli", "-v", "compress", *sources, str(archive)]
        command += ["--threads", "1", "--device", "cpu", "--workers", str(workers)]
        self._log = log.open("ab")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self._family: dict[tuple[int, int], Process] = {}

    def poll(self) -> int | None:
        """Exit code, once it ended. Also takes note of its descendants."""
        for process in family(self._process.pid):
            self._family[process.pid, process.started] = process
        return self._process.poll()

    def strike(self, victim: str) -> str | None:
        """Kill a process of the kind; what was killed, or None where there is none."""
        if victim == "driver":
            self._process.kill()
            return f"driver {self._process.pid}"
        wanted = "ray::UnitWorker.run_unit" if victim == "actor" else "ray::"
        agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
        found = [
            process
            for process in family(self._process.pid)
            if process.title.startswith(wanted) and not process.title.startswith(agents)
        ]
        if not found:
            return None
        chosen = random.choice(found)
        kill([chosen])
        return f"{victim} {chosen.pid} ({chosen.title})"

    def end(self) -> None:
        """End it and everything it started."""
        self.poll()
        self._process.kill()
        self._process.wait()
        kill(list(self._family.values()))
        self._log.close()


def rows_by_key(archive: Path) -> dict[str, EncodedImage]:
    """Every row, whole. Raises ValueError when a key is there twice."""
    rows: dict[str, EncodedImage] = {}
    for row in ArchiveReader.open(str(archive)).rows(blobs=("base", "detail", "original")):
        if row.key in rows:
            raise ValueError(f"{row.key!r} is there twice")
        rows[row.key] = row
    return rows


def judge(archive: Path, expected: dict[str, EncodedImage]) -> list[str]:
    """What is wrong with an archive."""
    report = verify_archive(str(archive))
    faults = [str(problem) for problem in report.problems]
    if not report.is_complete:
        faults.append("has no manifest")
    try:
        rows = rows_by_key(archive)
    except ValueError as exc:
        return [*faults, str(exc)]
    faults += [f"{key!r} is missing" for key in expected.keys() - rows.keys()]
    faults += [f"{key!r} is not of the source" for key in rows.keys() - expected.keys()]
    faults += [
        f"{key!r} differs from the undisturbed run"
        for key in expected.keys() & rows.keys()
        if rows[key] != expected[key]
    ]
    return faults


def torment(
    sources: Sequence[str], archive: Path, options: Any, kills_left: int
) -> tuple[int, int]:
    """Run one archive to its end under fire; (kills, starts of the driver)."""
    kills = starts = 0
    while True:
        starts += 1
        driver = Driver(sources, archive, archive.with_suffix(".log"), options.workers)
        try:
            strike_at = time.monotonic() + random.uniform(2, options.max_pause_s)
            while driver.poll() is None:
                time.sleep(0.1)
                if kills < kills_left and time.monotonic() >= strike_at:
                    struck = driver.strike(random.choice(VICTIMS))
                    if struck is not None:
                        kills += 1
                        print(f"  {kills:3}: killed {struck}", flush=True)
                        strike_at = time.monotonic() + random.uniform(2, options.max_pause_s)
            if driver.poll() == 0:
                return kills, starts
            if starts > 5 * (options.kills + 1):
                raise RuntimeError(f"the job does not end; see {archive.with_suffix('.log')}")
        finally:
            driver.end()


def main() -> int:
    """Undisturbed, disturbed, compared."""
    parser = argparse.ArgumentParser(description="Kill a job at random and compare its archive.")
    parser.add_argument("--source", action="append", help="instead of made pictures; repeatable")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--per-tar", type=int, default=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-pause-s", type=float, default=45.0, help="between two kills")
    options = parser.parse_args()
    random.seed(options.seed)
    print(f"seed {options.seed}, {options.kills} kills", flush=True)
    with tempfile.TemporaryDirectory(prefix="dicmh-chaos-") as name:
        folder = Path(name)
        sources = options.source or make_collection(
            folder, images=options.images, per_tar=options.per_tar, seed=options.seed
        )
        undisturbed = folder / "undisturbed"
        _, starts = torment(sources, undisturbed, options, 0)
        expected = rows_by_key(undisturbed)
        print(f"undisturbed: {len(expected)} rows, {starts} start", flush=True)
        kills = rounds = 0
        faults = judge(undisturbed, expected)
        while kills < options.kills:
            rounds += 1
            archive = folder / f"archive-{rounds}"
            struck, starts = torment(sources, archive, options, options.kills - kills)
            kills += struck
            found = judge(archive, expected)
            faults += found
            verdict = "equal to the undisturbed run" if not found else f"{len(found)} faults"
            print(f"archive {rounds}: {struck} kills, {starts} driver starts, {verdict}")
        for fault in faults[:20]:
            print(f"FAULT: {fault}")
    verdict = "PASS" if not faults else "FAIL"
    print(f"{verdict}: seed {options.seed}, {kills} kills, {rounds} archives")
    return 0 if not faults else 1


if __name__ == "__main__":
    sys.exit(main())
