"""A thousand workers commit to one archive at once: does a shard cost the same whatever their number?

    python jobs/commit_storm.py --ceph build/ceph/root --shards 100 300 1000 --json storm.json

For each number of shards, one archive is begun on a real S3 server, and as many workers as there are
shards, at most ``--workers``, commit a small unit each, all at once: threads of four processes, with
one client a process. Requests are counted by a proxy in front of the server, in a first pass;
times are taken in a second, without it. Then the job is resumed by another driver (what listing the
commits costs), finished, and opened. ``--plot`` draws milliseconds and requests per shard.

Workers here spend all their time committing. Real ones encode for minutes in between, so that a
thousand of these at once stand for many more.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dicmh_ray.archive import Plan, create_archive, open_snapshot, open_store
from dicmh_ray.archive.schema import EncodedImage
from dicmh_ray.archive.writer import ArchiveWriter
from dicmh_ray.testing.ceph import ceph_gateway, find_ceph, storage_options
from dicmh_ray.testing.fault_proxy import FaultProxy

CODEC_ID = "ab" * 32
PROCESSES = 4
SIGNATURES = {"PUT": "puts", "GET": "gets", "HEAD": "heads", "DELETE": "deletes"}


@dataclass(frozen=True, kw_only=True)
class Storm:
    """What one number of shards came to."""

    shards: int
    workers: int
    requests: Mapping[str, float]
    """Per shard, by kind, from the first put of a part to the commit's answer."""

    wall_s: float
    """From the first worker's start to the last commit."""

    ms_per_shard: float
    """``wall_s`` over shards: what one commit takes of the whole system."""

    commit_ms_median: float
    """How long one worker waits for its commit while all others commit."""

    commit_ms_p99: float
    resume_s: float
    """Which units are done, asked by another driver."""

    resume_requests: int
    finalize_s: float
    finalize_requests: int
    open_s: float
    manifest_bytes: int


def unit_rows(unit: str, rows: int) -> list[EncodedImage]:
    """A unit small enough that the protocol is what is measured."""
    return [
        EncodedImage(
            key=f"{unit}-{n:04d}", status="failed", error="storm", source_uri=f"{unit}.tar"
        )
        for n in range(rows)
    ]


def commit_some(
    writer: ArchiveWriter, units: Sequence[str], workers: int, rows: int
) -> list[float]:
    """Commit these units from threads that start together; seconds of each commit."""
    gate = threading.Barrier(min(workers, len(units)))
    waiting = threading.local()

    def commit(unit: str) -> float:
        if not getattr(waiting, "is_over", False):
            waiting.is_over = True
            gate.wait()
        started = time.monotonic()
        writer.commit_unit(unit, unit_rows(unit, rows))
        return time.monotonic() - started

    with ThreadPoolExecutor(min(workers, len(units))) as pool:
        return list(pool.map(commit, units))


def commit_all(
    pool: ProcessPoolExecutor, writer: ArchiveWriter, workers: int, rows: int
) -> tuple[float, list[float]]:
    """Commit every unit at once; seconds in all, and of each commit."""
    units = writer.plan.unit_names
    started = time.monotonic()
    shares = [
        pool.submit(commit_some, writer, units[n::PROCESSES], math.ceil(workers / PROCESSES), rows)
        for n in range(PROCESSES)
    ]
    seconds = [each for share in shares for each in share.result()]
    return time.monotonic() - started, seconds


def begin(bucket: str, shards: int, options: Mapping[str, Any]) -> ArchiveWriter:
    """An archive without commits."""
    plan = Plan(
        units=[{"name": f"{n:06d}", "uri": f"{n:06d}.tar"} for n in range(shards)],
        codec_id=CODEC_ID,
        parameters={},
    )
    uri = f"s3://{bucket}/{uuid.uuid4().hex}"
    return create_archive(uri, plan=plan, codec_files={}, storage_options=options)


def storm(
    pool: ProcessPoolExecutor, endpoint: str, bucket: str, shards: int, workers: int, rows: int
) -> Storm:
    """One number of shards, counted and timed."""
    clients = {"config_kwargs": {"max_pool_connections": 64, "read_timeout": 120}}
    with FaultProxy(endpoint, rate=0.0) as proxy:
        writer = begin(bucket, shards, storage_options(proxy.url, **clients))
        before = len(proxy.requests())
        commit_all(pool, writer, workers, rows)
        during = proxy.requests()[before:]
        before = len(proxy.requests())
        assert len(writer.committed_units()) == shards
        resume_requests = len(proxy.requests()) - before
        before = len(proxy.requests())
        writer.finalize()
        finalize_requests = len(proxy.requests()) - before
    counted = Counter(
        "conditional puts" if r.is_conditional else SIGNATURES[r.method] for r in during
    )
    options = storage_options(endpoint, **clients)
    writer = begin(bucket, shards, options)
    wall_s, seconds = commit_all(pool, writer, workers, rows)
    started = time.monotonic()
    assert len(writer.committed_units()) == shards
    resumed = time.monotonic()
    writer.finalize()
    finalized = time.monotonic()
    snapshot = open_snapshot(writer.uri, storage_options=options)
    opened = time.monotonic()
    assert snapshot.statistics.rows == shards * rows
    manifest = snapshot.manifest
    assert manifest is not None
    seconds.sort()
    return Storm(
        shards=shards,
        workers=min(workers, shards),
        requests={kind: count / shards for kind, count in sorted(counted.items())},
        wall_s=wall_s,
        ms_per_shard=1000 * wall_s / shards,
        commit_ms_median=1000 * statistics.median(seconds),
        commit_ms_p99=1000 * seconds[int(0.99 * (len(seconds) - 1))],
        resume_s=resumed - started,
        resume_requests=resume_requests,
        finalize_s=finalized - resumed,
        finalize_requests=finalize_requests,
        open_s=opened - finalized,
        manifest_bytes=len(manifest.to_bytes()),
    )


def plot(storms: Sequence[Storm], path: Path) -> None:
    """Cost of a shard over the number of shards: the same figures give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "dicmh", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        shards = [each.shards for each in storms]
        bottom = [0.0] * len(storms)
        places = [f"{each.shards:,}" for each in storms]
        for kind in sorted({kind for each in storms for kind in each.requests}):
            heights = [each.requests.get(kind, 0.0) for each in storms]
            left.bar(places, heights, 0.5, bottom=bottom, label=kind)
            bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
        left.set_ylabel("requests a shard")
        left.set_xlabel("shards, all committed at once")
        left.set_ylim(0, 1.45 * max(bottom))
        left.legend(ncols=2, fontsize="small")
        right.plot(shards, [each.ms_per_shard for each in storms], "o-")
        right.set_ylabel("ms a shard: whole time / shards")
        right.set_xlabel("shards, all committed at once")
        right.set_ylim(0, 1.45 * max(each.ms_per_shard for each in storms))
        right.grid(visible=True, alpha=0.3)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> int:
    """Run the storms; exit code 0 when every shard arrived."""
    parser = argparse.ArgumentParser(description="Many workers commit at once.")
    parser.add_argument("--ceph", type=Path, default=Path("build/ceph/root"), help="its programs")
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=4, help="rows a shard")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    prefix = find_ceph(options.ceph)
    if prefix is None:
        print(f"no Ceph programs in {options.ceph}: run .ci/fetch_ceph build/ceph", file=sys.stderr)
        return 1
    storms = []
    context = multiprocessing.get_context("spawn")
    with ceph_gateway(prefix) as endpoint, ProcessPoolExecutor(PROCESSES, context) as pool:
        bucket = f"storm-{uuid.uuid4().hex}"
        store = open_store(f"s3://{bucket}", storage_options(endpoint))
        store._fs.call_s3("create_bucket", Bucket=bucket)
        # Processes start, and the server's first requests are slow.
        storm(pool, endpoint, bucket, 20, 20, options.rows)
        for shards in options.shards:
            found = storm(pool, endpoint, bucket, shards, options.workers, options.rows)
            storms.append(found)
            requests = ", ".join(f"{count:.2f} {kind}" for kind, count in found.requests.items())
            print(
                f"{shards} shards, {found.workers} workers: {found.ms_per_shard:.1f} ms per shard, "
                f"a commit {found.commit_ms_median:.0f} ms; per shard {requests}; "
                f"resume {found.resume_requests} requests {found.resume_s:.2f} s; "
                f"finalize {found.finalize_requests} requests {found.finalize_s:.2f} s; "
                f"manifest {found.manifest_bytes} bytes, opened in {found.open_s:.2f} s",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in storms], indent=1) + "\n")
    if options.plot is not None:
        plot(storms, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
