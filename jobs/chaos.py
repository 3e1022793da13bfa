"""Kill a job, and break its store, in every way there is; compare what it wrote.

    python jobs/chaos.py --failpoints --kills 100 --schedules 500 --seed 7 --record chaos.jsonl

Three trials, each of them only when asked for:

* ``--failpoints``: compress, append, compact and collect garbage in a process that gets ``kill -9``
  before, in the middle of and after each kind of operation on its store, once, and twice in a row;
  on a local folder and on an S3 server. A number takes so many of them.
* ``--kills N``: jobs on Ray of which the driver, an actor, any worker or the raylet gets SIGKILL at
  random moments; what ended in an error is started again with the same command.
* ``--schedules N``: one driver or two at once write to an S3 server through a proxy that breaks
  requests by a seeded schedule: 500, 503, 429, timeouts and resets before and after the effect, 409
  and 412, writes that arrive late, answers cut short. The archive is read back through it, too.

Every archive must verify, hold every key exactly once, and equal an undisturbed run: each row, and
where nothing was compacted each file of rows, byte by byte. Exit code 0 when all do. ``--record`` keeps each case as a line of JSON: the same
command goes on from there, and several pieces add up. The codec needs no torch; ``--shipped`` kills
jobs of the shipped one. Kills only processes that it started itself. Linux only.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from random import Random
from typing import Any

from dicmh_ray import compress
from dicmh_ray.archive import (
    GcOptions,
    collect_garbage,
    compact_archive,
    open_store,
    retrying,
)
from dicmh_ray.archive.retrying import RetryPolicy
from dicmh_ray.errors import DicmhError
from dicmh_ray.testing import ceph
from dicmh_ray.testing.collection import Contents, judge, make_collection
from dicmh_ray.testing.failpoints import hooked
from dicmh_ray.testing.fake_codec import FakeCodec
from dicmh_ray.testing.fault_proxy import FAULTS, FaultProxy, Schedule
from dicmh_ray.testing.processes import VICTIMS, Driver, Victim

Place = tuple[str, Mapping[str, Any]]
"""An address and the options of its store."""

BUCKET = "chaos"
MAX_STARTS = 40
EVERYTHING = GcOptions(keep_versions=1, keep_s=0, grace_s=0)

AT_ONCE = 4
"""Cases that run at once: much of their time is waiting."""

# A job that was told to wait seconds would make 500 schedules a matter of hours.
QUICK = RetryPolicy(tries=6, base_s=0.02, cap_s=0.2)
PATIENCE_S, HOLD_S = 0.6, 0.9

# Jobs on Ray: between two kills, and with a driver whose raylet died.
PER_TAR, WORKERS, PACE_MS = 20, 2, 15.0
PAUSE_S = 1.0, 8.0
RAYLET_PATIENCE_S = 30.0
MAX_LIFE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One archive and what was done to it."""

    trial: str
    name: str
    """Unique in its trial; with the seed it says all."""

    starts: int
    """Times that a job was started."""

    rows: int
    """Rows compared with the undisturbed run's."""

    kills: Mapping[str, int] = field(default_factory=dict)
    """By what was killed, or at which failpoint."""

    faults: Mapping[str, int] = field(default_factory=dict)
    """Requests that broke, by kind."""

    requests: int = 0
    """Requests through the proxy."""

    unanswered: int = 0
    """Times that reading through the proxy ended in an error, as it may."""

    wrong: Sequence[str] = ()
    """What is lost, duplicated, unreadable or different."""


class Record:
    """The cases so far, also those of earlier runs with this file.

    Args:
        path: JSON lines, one a case; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.cases: dict[tuple[str, str], Case] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                case = Case(**json.loads(line))
                self.cases[case.trial, case.name] = case

    def add(self, case: Case) -> None:
        """Keep one, and say so if something is wrong with it."""
        self.cases[case.trial, case.name] = case
        for fault in case.wrong[:5]:
            print(f"  WRONG: {case.trial}: {case.name}: {fault}", flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(case)) + "\n")

    def lacks(self, trial: str, names: Iterable[str]) -> list[str]:
        """Those that are still to be done."""
        return [name for name in names if (trial, name) not in self.cases]

    def of(self, trial: str) -> list[Case]:
        """The cases of one trial."""
        return [case for case in self.cases.values() if case.trial == trial]

    def figures(self) -> dict[str, dict[str, Any]]:
        """Sums of each trial."""
        found = {}
        for trial in dict.fromkeys(trial for trial, _ in self.cases):
            cases = self.of(trial)
            kills: Counter[str] = Counter()
            faults: Counter[str] = Counter()
            for case in cases:
                kills.update(case.kills)
                faults.update(case.faults)
            found[trial] = {
                "archives": len(cases),
                "starts": sum(case.starts for case in cases),
                "kills": kills.total(),
                "broken requests": faults.total(),
                "requests": sum(case.requests for case in cases),
                "unanswered reads": sum(case.unanswered for case in cases),
                "rows": sum(case.rows for case in cases),
                "wrong": sum(len(case.wrong) for case in cases),
                "kills by kind": dict(sorted(kills.items())),
                "broken requests by kind": dict(sorted(faults.items())),
            }
        return found


# --- failpoints ---------------------------------------------------------------------------------


def live(
    place: Place,
    first: Sequence[str],
    later: Sequence[str],
    kill_at: tuple[str, int] | None,
    reached: Any,
) -> None:
    """An archive's whole life, in a process that dies at the n-th time a failpoint is reached.

    Each step may have been made already, or begun.

    Args:
        place: the archive.
        first: tars of the first job.
        later: tars of the append.
        kill_at: failpoint and n; None lives.
        reached: end of a pipe that is sent how often each failpoint was reached.
    """
    retrying.DEFAULT_RETRY = QUICK
    seen: Counter[str] = Counter()
    uri, options = place

    lock = threading.Lock()

    def hook(point: str) -> None:
        with lock:
            seen[point] += 1
            if kill_at == (point, seen[point]):
                os.kill(os.getpid(), signal.SIGKILL)

    start = partial(compress, codec=FakeCodec, runtime="local", storage_options=options)
    with hooked(hook):
        start(first, uri)
        start([*first, *later], uri, append=True)
        compact_archive(uri, storage_options=options)
        collect_garbage(uri, options=EVERYTHING, storage_options=options)
    reached.send(dict(seen))


def ready_processes() -> ForkServerContext:
    """Starts processes quickly: a server that has all modules forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dicmh_ray.ray_plugin", "dicmh_ray.testing.collection", "s3fs"])
    return context


class Lives:
    """Lives in new processes.

    Args:
        first: tars of the first job.
        later: tars of the append.
    """

    def __init__(self, first: Sequence[str], later: Sequence[str]) -> None:
        self._context = ready_processes()
        self._first, self._later = first, later
        # Starting a process also asks how others ended, and their threads would not hear it.
        self._lock = threading.Lock()

    def run(self, place: Place, kill_at: tuple[str, int] | None = None) -> dict[str, int] | None:
        """How often each failpoint was reached; None where the process was killed.

        Raises:
            RuntimeError: it ended in another way.
        """
        here, there = self._context.Pipe(duplex=False)
        arguments = place, self._first, self._later, kill_at, there
        process = self._context.Process(target=live, args=arguments)
        with self._lock:
            process.start()
        there.close()
        connection.wait([process.sentinel])
        with self._lock:
            process.join()
        if process.exitcode == -signal.SIGKILL:
            return None
        if process.exitcode != 0:
            raise RuntimeError(f"the life of {place[0]} ended with {process.exitcode}")
        found: dict[str, int] = here.recv()
        return found


def try_failpoints(
    trial: str,
    root: Place,
    tars: tuple[Sequence[str], Sequence[str]],
    record: Record,
    options: argparse.Namespace,
) -> None:
    """Kill at every failpoint: once at a random reach of it, and twice in a row at the first."""
    lives = Lives(*tars)
    uri, storage_options = root
    undisturbed = f"{uri}/undisturbed", storage_options
    points = lives.run(undisturbed)
    assert points is not None
    expected = replace(Contents.read(*undisturbed), part_sha256=None)
    chosen = sorted(points)
    random = Random(options.seed)
    if options.failpoints < len(chosen):
        chosen = sorted(random.sample(chosen, options.failpoints))
    print(f"{trial}: {len(chosen)} of {len(points)} points", flush=True)
    deaths = {}
    for point in chosen:
        reach = random.randint(1, points[point])
        deaths[f"{point}, time {reach}, seed {options.seed}"] = point, [reach]
        deaths[f"{point}, twice, seed {options.seed}"] = point, [1, 1]

    def run(numbered: tuple[int, str]) -> None:
        number, name = numbered
        point, reaches = deaths[name]
        place = f"{uri}/{number:03d}", storage_options
        kills = [lives.run(place, (point, reach)) is None for reach in reaches]
        lives.run(place)
        wrong = judge(place[0], expected, storage_options)
        if not kills[0]:
            wrong.append("the failpoint was not reached: nothing was tried")
        record.add(
            Case(
                trial=trial,
                name=name,
                starts=len(kills) + 1,
                kills={point: sum(kills)},
                rows=len(expected.rows),
                wrong=wrong,
            )
        )

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(run, enumerate(record.lacks(trial, deaths))))


# --- kills --------------------------------------------------------------------------------------


def torment(
    command: Sequence[str], log: Path, limit: int, waiting: deque[Victim], random: Random
) -> tuple[int, Counter[str]]:
    """Run one job to its end under fire; how often it was started, and what was killed.

    Args:
        command: that runs the job.
        log: where what it prints goes.
        limit: of kills.
        waiting: kinds of victims, the next one first. One stays in front until it was found, so that
            rare kinds get their share; when none is left, one of each follows in any order.
        random: draws the times, orders and processes.

    Raises:
        RuntimeError: the job hangs, or does not end however often it is started.
    """
    kills: Counter[str] = Counter()
    for starts in range(1, 5 * (limit + 1)):
        driver = Driver(command, log)
        give_up_at = time.monotonic() + MAX_LIFE_S
        try:
            strike_at = time.monotonic() + random.uniform(*PAUSE_S)
            while (ended := driver.poll()) is None and not driver.is_stuck(RAYLET_PATIENCE_S):
                time.sleep(0.1)
                if time.monotonic() > give_up_at:
                    raise RuntimeError(f"the job hangs since {MAX_LIFE_S:.0f} s; see {log}")
                if kills.total() == limit or time.monotonic() < strike_at:
                    continue
                if not waiting:
                    waiting.extend(random.sample(VICTIMS, len(VICTIMS)))
                struck = driver.strike(waiting[0], random)
                if struck is None:
                    continue  # there is none yet
                kills[waiting.popleft()] += 1
                print(f"  killed {struck}", flush=True)
                strike_at = time.monotonic() + random.uniform(*PAUSE_S)
            if ended == 0:
                return starts, kills
        finally:
            driver.end()
    raise RuntimeError(f"the job does not end; see {log}")


def try_kills(trial: str, folder: Path, record: Record, options: argparse.Namespace) -> None:
    """Kill random processes of jobs on Ray until there were enough."""
    sources = make_collection(folder, images=options.images, per_tar=PER_TAR, seed=options.seed)

    def command(archive: Path, *more: str) -> list[str]:
        if options.shipped:
            program = [sys.executable, "-m", "dicmh_ray.cli", "compress", *sources, str(archive)]
            return [*program, "--threads", "1", "--device", "cpu", *more]
        program = [sys.executable, "-m", "dicmh_ray.testing.fake_job", *sources, str(archive)]
        return [*program, *more]

    undisturbed = folder / "undisturbed"
    with (folder / "undisturbed.log").open("wb") as log:
        alone = command(undisturbed, "--runtime", "local")
        subprocess.run(alone, check=True, stdout=log, stderr=log)
    expected = Contents.read(str(undisturbed))
    on_ray = ["--workers", str(WORKERS)]
    if not options.shipped:
        on_ray += ["--pace-ms", str(PACE_MS)]
    number, waiting = 0, deque[Victim]()
    while (left := options.kills - sum(sum(c.kills.values()) for c in record.of(trial))) > 0:
        name = f"archive {number}, seed {options.seed}"
        if record.lacks(trial, [name]):
            archive = folder / f"archive-{number}"
            random = Random(f"{options.seed} {number}")
            log_path = archive.with_suffix(".log")
            starts, kills = torment(command(archive, *on_ray), log_path, left, waiting, random)
            record.add(
                Case(
                    trial=trial,
                    name=name,
                    starts=starts,
                    kills=dict(kills),
                    rows=len(expected.rows),
                    wrong=judge(str(archive), expected),
                )
            )
            print(f"  {trial}: {options.kills - left + kills.total()} kills", flush=True)
        number += 1


# --- schedules ----------------------------------------------------------------------------------


def drive(sources: Sequence[str], place: Place) -> int:
    """Start a job until it ends well; how often it was started.

    Raises:
        RuntimeError: it does not.
    """
    uri, options = place
    reason = ""
    for start in range(1, MAX_STARTS + 1):
        try:
            compress(sources, uri, codec=FakeCodec, runtime="local", storage_options=options)
        except (DicmhError, OSError) as exc:
            reason = f"{type(exc).__name__}: {exc}"
            continue
        return start
    raise RuntimeError(f"the job at {uri} does not end in {MAX_STARTS} starts: {reason}")


def schedule_of(seed: int) -> Schedule:
    """A schedule of its own: how many requests break, and in which ways."""
    random = Random(seed)
    kinds = FAULTS if random.random() < 0.5 else tuple(sorted(random.sample(FAULTS, 3)))
    return Schedule(seed=seed, rate=random.uniform(0.02, 0.3), kinds=kinds, hold_s=HOLD_S)


def run_schedule(
    trial: str, root: Place, sources: Sequence[str], expected: Contents, seed: int
) -> Case:
    """One archive, written and read back through a proxy with this schedule."""
    retrying.DEFAULT_RETRY = QUICK
    uri, direct = f"{root[0]}/{seed}", root[1]
    unanswered = 0
    with (
        FaultProxy(direct["endpoint_url"], rate=0.0) as proxy,
        ThreadPoolExecutor(2) as drivers,
    ):
        proxy.begin(schedule_of(seed))
        broken = impatient({**direct, "endpoint_url": proxy.url})
        futures = [drivers.submit(drive, sources, (uri, broken)) for _ in range(1 + seed % 2)]
        starts = sum(future.result() for future in futures)
        wrong = []
        try:
            read_back = Contents.read(uri, broken)
        except (DicmhError, OSError):
            # It may be told that the store does not answer; it must never be told other rows.
            unanswered = 1
        else:
            if read_back != expected:
                wrong.append("other rows were read through the proxy")
        proxy.settle()
        faults, requests = proxy.faults(), len(proxy.requests())
    return Case(
        trial=trial,
        name=f"seed {seed}",
        starts=starts,
        faults=dict(faults),
        requests=requests,
        unanswered=unanswered,
        rows=len(expected.rows),
        wrong=[*wrong, *judge(uri, expected, direct)],
    )


def try_schedules(
    trial: str, root: Place, sources: Sequence[str], record: Record, options: argparse.Namespace
) -> None:
    """Break the requests of jobs by many schedules."""
    undisturbed = f"{root[0]}/undisturbed", root[1]
    drive(sources, undisturbed)
    expected = Contents.read(*undisturbed)
    seeds = {f"seed {seed}": seed for seed in range(options.seed, options.seed + options.schedules)}
    todo = [seeds[name] for name in record.lacks(trial, seeds)]
    run: Callable[[int], Case] = partial(run_schedule, trial, root, sources, expected)
    # Processes, since a proxy and its drivers in one would wait for each other's turns.
    with ProcessPoolExecutor(AT_ONCE, mp_context=ready_processes()) as pool:
        for done, case in enumerate(pool.map(run, todo), 1):
            record.add(case)
            if done % 25 == 0:
                print(f"  {trial}: {done} of {len(todo)}", flush=True)


# --- all ----------------------------------------------------------------------------------------


def impatient(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options for a client that soon takes a silent server for dead."""
    timeouts = {"read_timeout": PATIENCE_S, "connect_timeout": 5, "max_pool_connections": 50}
    return {**options, "config_kwargs": {**options["config_kwargs"], **timeouts}}


@contextmanager
def s3_server(prefix: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of a server with one bucket: Ceph from that folder, otherwise moto."""
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    with moto_server() if prefix is None else ceph.ceph_gateway(prefix) as endpoint:
        options = ceph.storage_options(endpoint)
        open_store(f"s3://{BUCKET}", options)._fs.call_s3("create_bucket", Bucket=BUCKET)
        yield "moto" if prefix is None else "Ceph", options


@contextmanager
def moto_server() -> Iterator[str]:
    """Address of a moto server in a process of its own."""
    program = (
        "from moto.server import ThreadedMotoServer as S; import logging, sys\n"
        "logging.getLogger('werkzeug').setLevel(logging.ERROR)\n"
        "s = S(port=0, verbose=False); s.start(); print(*s.get_host_and_port(), flush=True)\n"
        "sys.stdin.read()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        _, port = server.stdout.readline().split()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.communicate()


def show(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the sums as a table, then what was killed and broken."""
    columns = ("archives", "starts", "kills", "broken requests", "rows", "wrong")
    print(f"{'trial':32}" + "".join(f"{column:>17}" for column in columns))
    for trial, sums in figures.items():
        print(f"{trial:32}" + "".join(f"{sums[column]:>17,}" for column in columns))
    for trial, sums in figures.items():
        for kinds in ("kills by kind", "broken requests by kind"):
            counts = ", ".join(f"{count} {kind}" for kind, count in sums[kinds].items())
            if counts and not trial.startswith("failpoints"):
                print(f"{trial}: {kinds}: {counts}")
        if sums["requests"]:
            print(f"{trial}: {sums['requests']:,} requests, {sums['unanswered reads']} unanswered")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials that are asked for."""
    parser = argparse.ArgumentParser(description="Kill jobs, break stores, compare archives.")
    parser.add_argument(
        "--failpoints", type=int, nargs="?", const=sys.maxsize, default=0, help="default: all"
    )
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs of processes of Ray jobs")
    parser.add_argument("--schedules", type=int, default=0, help="schedules of broken requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ceph", type=Path, help="S3 server: where its programs are; else moto")
    parser.add_argument("--images", type=int, default=400, help="in a job that is killed")
    parser.add_argument("--shipped", action="store_true", help="kill jobs of the shipped codec")
    parser.add_argument("--record", type=Path, help="cases so far; the same file goes on")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    if not (options.failpoints or options.kills or options.schedules):
        parser.error("nothing to do: ask for --failpoints, --kills or --schedules")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    prefix = None if options.ceph is None else ceph.find_ceph(options.ceph)
    if prefix is None and options.ceph is not None:
        parser.error(f"no Ceph programs in {options.ceph}: run .ci/fetch_ceph build/ceph")
    print(f"seed {options.seed}", flush=True)
    record = Record(options.record)
    with tempfile.TemporaryDirectory(prefix="dicmh-chaos-") as name:
        folder = Path(name)
        pictures = {"per_tar": 4, "seed": options.seed, "side": 16}
        first = make_collection(folder, images=12, **pictures)
        later = make_collection(folder, images=8, first_key=100, **pictures)
        if options.failpoints:
            local: Place = str(folder / "failpoints"), {}
            try_failpoints("failpoints, local folder", local, (first, later), record, options)
        if options.failpoints or options.schedules:
            with s3_server(prefix) as (kind, storage_options):
                if options.failpoints:
                    root = f"s3://{BUCKET}/failpoints", storage_options
                    trial = f"failpoints, S3 ({kind})"
                    try_failpoints(trial, root, (first, later), record, options)
                if options.schedules:
                    root = f"s3://{BUCKET}/schedules", storage_options
                    try_schedules(f"schedules, S3 ({kind})", root, first, record, options)
        if options.kills:
            jobs = folder / "jobs"
            jobs.mkdir()
            try_kills(
                f"kills, {'shipped' if options.shipped else 'light'} codec", jobs, record, options
            )
    figures = record.figures()
    show(figures)
    wrong = sum(sums["wrong"] for sums in figures.values())
    print("FAIL" if wrong else "PASS")
    if options.json is not None:
        report = {"seed": options.seed, "trials": figures}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
