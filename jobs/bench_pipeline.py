"""What an engine costs: the same pictures encoded in a bare loop, by us, and by what others build.

    python jobs/bench_pipeline.py 'shards/*.tar'
    python jobs/bench_pipeline.py --make 800 --codec webp --json figures.json
    python jobs/bench_pipeline.py --huge 3

Every way does the same to each picture (read, decode, encode, choose states, measure). The bare loop
does it in one process with one thread, or in several that share the tars out between them, and writes
nothing: two busy cores are slower than one, each, and so every way is compared with as many bare
loops as it has workers. Our pipeline writes an archive: Parquet
parts, hashes, indexes, commits. The process pool is what img2dataset does: a shard for each task, a
Parquet file and a JSON file of statistics. Ray Data is `read_webdataset`, `map_batches` with actors,
`write_parquet`, as its documentation shows it.

Two figures each. Pictures a second of processor time, over all processes of the engine, against the
bare loop of a further process that encodes a few pictures now and then meanwhile: a core's speed changes from second to
second, with the machine's other guests and with what else uses its caches, and this way it changes for
both. Pictures a second of wall time and worker, from the moment at which the first codec was loaded,
against the bare loops of the same round. All ways run in rounds: medians, and the least and the greatest
ratio. Start-up (processes, imports, loading the codec) is apart.

``--huge`` compresses pictures of 50 megapixels instead and says how much memory a worker took.
"""

# What Ray sets for its workers; else numpy's threads spin in the loops that it is compared with.
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# And not behind the loops beside them, as Ray's workers otherwise are.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so

import argparse
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

# Before ray is imported, which reads what this sets in the environment.
from dicmh_ray.ray_plugin.cluster import start_local_ray  # isort: skip

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from dicmh_ray import EncodePolicy, SourceOptions, compress, load_codec
from dicmh_ray.archive import EncodedImage
from dicmh_ray.bench import describe_environment
from dicmh_ray.bench.process_watch import Watch
from dicmh_ray.bitstream import Header, State, crc32c, parse_bitstream, write_bitstream
from dicmh_ray.codec import ImageCodec, Quality
from dicmh_ray.pipeline import EncodeOptions, JobReport, encode_images
from dicmh_ray.ray_plugin import RayOptions
from dicmh_ray.source import SourceImage, Unit, plan_units, read_unit

OPTIONS = SourceOptions()
WEBP_QUALITIES = (20, 75)
PAUSE = 3
"""Of the loop beside what is measured: so many times as long as what it does in one go."""

SAMPLE_IMAGES = 20
"""What it does in one go."""

LEAST_RATIO = 0.95
"""Of the rate of bare loops that as many of our workers must reach, per second of processor time."""


class WebpCodec:
    """A light codec: WebP at two qualities, a state each. A few percent of the shipped codec's time."""

    def __init__(self) -> None:
        self.codec_id = "2b" * 32
        self.num_states = 2
        self.latent_channels = 3
        self.views: tuple[str, ...] = ("machine",)

    def encode(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        tags: Sequence[Sequence[str]],
        exif_orientations: Sequence[int],
    ) -> list[bytes]:
        """See ImageCodec."""
        streams = []
        for image, own, orientation in zip(images, tags, exif_orientations, strict=True):
            states = []
            for quality in WEBP_QUALITIES:
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "WEBP", quality=quality, method=4)
                states.append(State(buffer.getvalue(), crc32c(buffer.getvalue())))
            header = Header(
                codec_id=self.codec_id,
                width=image.shape[1],
                height=image.shape[0],
                exif_orientation=orientation,
                num_states=2,
            )
            streams.append(write_bitstream(header, own, states))
        return streams

    def decode(
        self, bitstreams: Sequence[bytes], *, states: int | None = None, view: str = "machine"
    ) -> list[npt.NDArray[np.uint8]]:
        """See ImageCodec."""
        last = [parse_bitstream(stream).states[:states][-1] for stream in bitstreams]
        return [np.asarray(Image.open(io.BytesIO(state.payload)).convert("RGB")) for state in last]

    def decode_latent(
        self, bitstreams: Sequence[bytes], *, states: int | None = None
    ) -> list[npt.NDArray[np.float16]]:
        """See ImageCodec."""
        return [
            np.moveaxis(image, 2, 0).astype(np.float16)
            for image in self.decode(bitstreams, states=states)
        ]

    def measure(
        self,
        originals: Sequence[npt.NDArray[np.uint8]],
        decoded: Sequence[npt.NDArray[np.uint8]],
    ) -> list[Quality]:
        """See ImageCodec."""
        qualities = []
        for a, b in zip(originals, decoded, strict=True):
            error = a.astype(np.int16) - b
            db = min(100.0, float(10 * np.log10(65025 / max(float(np.mean(error * error)), 1e-9))))
            qualities.append(Quality(db, db, None))
        return qualities


def make_codec(name: str) -> ImageCodec:
    """The light codec, or that of a checkpoint."""
    return WebpCodec() if name == "webp" else load_codec(name, device="cpu", threads=1)


@dataclass(frozen=True)
class NotedCodec:
    """Makes the codec, and notes for the benchmark what that cost. Pickles."""

    name: str
    notes: str
    driver: int = dataclasses.field(default_factory=os.getpid)

    def __call__(self) -> ImageCodec:
        """The codec, in this process."""
        before = time.process_time()
        codec = make_codec(self.name)
        # In a worker everything until now is start-up: its imports, too.
        spent = time.process_time() - (before if os.getpid() == self.driver else 0.0)
        note = {"pid": os.getpid(), "cpu": spent, "at": time.time()}
        Path(self.notes, f"{os.getpid()}-{time.time_ns()}.json").write_text(json.dumps(note))
        return codec


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """What one way of running came to."""

    name: str
    workers: int
    images: int
    cpu_seconds: float
    """Of all its processes, without what :class:`NotedCodec` calls start-up."""

    started_at: float
    """When the first codec was loaded, in seconds since the epoch."""

    wall_seconds: float
    """From then on."""

    startup_seconds: float
    """Until then."""

    worker_bytes: int
    """The most that one of the processes that encode had in memory."""

    loop_per_cpu_second: float = math.nan
    """Images for each second of a core in the loop beside it, if there was one."""

    @property
    def per_cpu_second(self) -> float:
        """Images for each second of one busy core."""
        return self.images / self.cpu_seconds

    @property
    def per_worker_second(self) -> float:
        """Images for each second and worker."""
        return self.images / self.wall_seconds / self.workers


@dataclass(frozen=True, slots=True)
class Sample:
    """What a bare loop did in one go."""

    started_at: float
    """Seconds since the epoch."""

    ended_at: float
    images: int
    cpu_seconds: float


def rate_between(samples: Iterable[Sample], start: float, end: float) -> float:
    """Pictures a second of processor time, of what was done between two times, not across them."""
    within = [one for one in samples if one.started_at >= start and one.ended_at <= end]
    if not within:
        raise RuntimeError("too short a run: meanwhile the loop beside it came to nothing")
    return sum(one.images for one in within) / sum(one.cpu_seconds for one in within)


class LoopBeside:
    """A bare loop in a process of its own: a few pictures, a pause three times as long, the next few.

    It tells how fast a core is while something else is measured, and takes little of it.

    Args:
        units: tars, taken over and over.
        policy: as in what is measured.
        codec: name of the codec.
    """

    def __init__(self, units: Sequence[Unit], policy: EncodePolicy, codec: str) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._line = ours
        self._process = context.Process(target=sample_speed, args=(theirs, units, policy, codec))
        self._process.start()
        theirs.close()  # so that waiting ends with the process
        self._line.recv()

    @property
    def pid(self) -> int:
        """Whose processor time is not the engine's."""
        return self._process.pid or 0

    def end(self) -> list[Sample]:
        """Stop, after the pictures that it is at."""
        self._line.send(None)
        samples: list[Sample] = self._line.recv()
        self._process.join()
        return samples


def sample_speed(line: Connection, units: Sequence[Unit], policy: EncodePolicy, codec: str) -> None:
    """The process of :class:`LoopBeside`."""
    _loaded.append(make_codec(codec))
    encode_share((units[:1], policy))  # what is imported and allocated by the first pictures
    line.send(None)  # ready
    samples: list[Sample] = []
    images = images_of(itertools.cycle(units))
    options = EncodeOptions(load_threads=0)
    while True:
        few = itertools.islice(images, SAMPLE_IMAGES)
        began, cpu = time.time(), time.process_time()
        done = sum(1 for _ in encode_images(few, _loaded[0], policy, options=options))
        samples.append(Sample(began, time.time(), done, time.process_time() - cpu))
        if line.poll(PAUSE * (samples[-1].ended_at - began)):
            line.send(samples)
            return


Run = Callable[[NotedCodec, Path], int]
"""Encodes a whole collection into a folder; how many pictures it encoded."""


def measured(
    name: str, workers: int, codec: str, run: Run, *, ignored: Collection[int] = ()
) -> Way:
    """Run one way in a folder that is thrown away, without counting the processes ``ignored``."""
    with tempfile.TemporaryDirectory(prefix="dicmh-bench-") as folder:
        notes, output = Path(folder, "notes"), Path(folder, "output")
        notes.mkdir()
        output.mkdir()
        watch, started = Watch(ignored), time.time()
        images = run(NotedCodec(codec, str(notes)), output)
        ended = time.time()
        watch.end()
        loads = [json.loads(path.read_text()) for path in notes.iterdir()]
    in_workers = [note for note in loads if note["pid"] != os.getpid()] or loads
    first = min(note["at"] for note in in_workers)
    return Way(
        name=name,
        workers=workers,
        images=images,
        cpu_seconds=watch.cpu_seconds({note["pid"]: note["cpu"] for note in loads}),
        started_at=first,
        wall_seconds=ended - first,
        startup_seconds=first - started,
        worker_bytes=max(watch.peaks.get(note["pid"], 0) for note in in_workers),
    )


def images_of(units: Iterable[Unit]) -> Iterator[SourceImage]:
    """All images of units."""
    return itertools.chain.from_iterable(read_unit(unit, options=OPTIONS) for unit in units)


def columns_of(row: EncodedImage) -> dict[str, Any]:
    """What the plain writers keep of a row."""
    return {
        "key": row.key, "status": row.status, "width": row.width, "height": row.height,
        "psnr": row.psnr, "sha256": row.original_sha256, "stream": row.base + row.detail,
        "original": row.original,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Ways:
    """The ways, on one collection."""

    sources: Sequence[str]
    policy: EncodePolicy

    def bare_loop(self, codec: NotedCodec, _: Path) -> int:
        """One process, one thread, nothing written."""
        made = codec()
        options = EncodeOptions(load_threads=0)
        units = plan_units(self.sources, options=OPTIONS)
        rows = encode_images(images_of(units), made, self.policy, options=options)
        return sum(row.status == "ok" for row in rows)

    def bare_loops(self, workers: int) -> Run:
        """As many bare loops at once, each over its share of the tars."""

        def run(codec: NotedCodec, _: Path) -> int:
            units = plan_units(self.sources, options=OPTIONS)
            shares = [(units[n::workers], self.policy) for n in range(workers)]
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, context, load_in_pool, (codec,)) as pool:
                return sum(pool.map(encode_share, shares))

        return run

    def ours(self, workers: int) -> Run:
        """Our pipeline on Ray."""

        def run(codec: NotedCodec, output: Path) -> int:
            report = self.report(codec, output, workers)
            return report.tally.ok

        return run

    def report(self, codec: NotedCodec, output: Path, workers: int) -> JobReport:
        """The report of our pipeline."""
        return compress(
            self.sources,
            str(output / "archive"),
            codec=codec,
            policy=self.policy,
            encode_options=EncodeOptions(device="cpu", threads=1),
            ray_options=RayOptions(workers=workers, min_workers=workers),
            failure_budget=1.0,
        )

    def process_pool(self, workers: int) -> Run:
        """As img2dataset: a shard for each task of a pool of processes."""

        def run(codec: NotedCodec, output: Path) -> int:
            units = plan_units(self.sources, options=OPTIONS)
            tasks = [(unit, self.policy, str(output)) for unit in units]
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, context, load_in_pool, (codec,)) as pool:
                return sum(pool.map(write_shard, tasks))

        return run

    def ray_data(self, workers: int) -> Run:
        """As Ray Data's documentation shows it."""

        def run(codec: NotedCodec, output: Path) -> int:
            ray.data.DataContext.get_current().enable_progress_bars = False
            images = ray.data.read_webdataset(list(self.sources), decoder=None)
            # Half a core claimed: with a whole one each, reading would find no core, and wait.
            rows = images.map_batches(
                BatchEncoder,
                fn_constructor_args=(codec, self.policy),
                batch_size=32,
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=0.5,
            )
            rows.write_parquet(str(output / "rows"))
            files = (output / "rows").glob("*.parquet")
            return sum(pq.read_table(path)["status"].to_pylist().count("ok") for path in files)

        return run


class BatchEncoder:
    """What Ray Data's actors run."""

    def __init__(self, codec: NotedCodec, policy: EncodePolicy) -> None:
        self._codec, self._policy = codec(), policy

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """A batch of undecoded images -> a batch of rows."""
        images = (
            SourceImage(key=str(key), data=bytes(data), source_uri="")
            for key, data in zip(batch["__key__"], batch["jpg"], strict=True)
        )
        options = EncodeOptions(load_threads=0)
        rows = [
            columns_of(row)
            for row in encode_images(images, self._codec, self._policy, options=options)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}


_loaded: list[ImageCodec] = []
"""The codec of a process of the pool."""


def load_in_pool(codec: NotedCodec) -> None:
    """Start a process of the pool."""
    _loaded.append(codec())


def encode_share(share: tuple[Sequence[Unit], EncodePolicy]) -> int:
    """A bare loop over some shards, in a process of the pool."""
    units, policy = share
    options = EncodeOptions(load_threads=0)
    rows = encode_images(images_of(units), _loaded[0], policy, options=options)
    return sum(row.status == "ok" for row in rows)


def write_shard(task: tuple[Unit, EncodePolicy, str]) -> int:
    """One shard, in a process of the pool."""
    unit, policy, output = task
    options = EncodeOptions(load_threads=0)
    started = time.perf_counter()
    rows = [
        columns_of(row)
        for row in encode_images(images_of([unit]), _loaded[0], policy, options=options)
    ]
    pq.write_table(pa.Table.from_pylist(rows), f"{output}/{unit.name}.parquet")
    facts = {"count": len(rows), "seconds": time.perf_counter() - started}
    Path(output, f"{unit.name}_stats.json").write_text(json.dumps(facts))
    return sum(row["status"] == "ok" for row in rows)


def make_collection(folder: Path, *, images: int, per_tar: int, side: int) -> list[str]:
    """Tars of JPEGs of ``side`` by three quarters of it: coarse noise, enlarged, and fine noise."""
    rng = np.random.default_rng(5)
    width, height = side, 3 * side // 4
    tars = []
    for first in range(0, images, per_tar):
        path = folder / f"shard-{first // per_tar:04d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + per_tar, images)):
                coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
                picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
                grain = rng.integers(0, 12, (min(height, 512), min(width, 512), 1), np.uint8)
                tile = np.tile(grain, (-(-height // len(grain)), -(-width // len(grain[0])), 1))
                samples = np.asarray(picture) // 2 + 40 + tile[:height, :width]
                buffer = io.BytesIO()
                Image.fromarray(samples.astype(np.uint8)).save(buffer, "JPEG", quality=90)
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
        tars.append(str(path))
    return tars


@contextmanager
def local_ray(workers: int) -> Iterator[None]:
    """A Ray of this machine, started outside of what is measured."""
    start_local_ray(max(2, workers))
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One way of running in every round, and the bare loops of the same rounds and workers."""

    ways: Sequence[Way]
    loops: Sequence[Way]

    @property
    def cpu_ratios(self) -> list[float]:
        """Images a second of processor time over the loop's beside it, of each round, in order of size."""
        return sorted(way.per_cpu_second / way.loop_per_cpu_second for way in self.ways)

    @property
    def wall_ratios(self) -> list[float]:
        """Images a second and worker over the bare loops', of each round, in order of size."""
        pairs = zip(self.ways, self.loops, strict=True)
        return sorted(way.per_worker_second / loop.per_worker_second for way, loop in pairs)

    def figures(self) -> dict[str, Any]:
        """Medians, and the ratios of all rounds."""
        fields = ("images", "workers", "cpu_seconds", "wall_seconds", "startup_seconds")
        rates = ("per_cpu_second", "loop_per_cpu_second", "per_worker_second")
        return (
            {"name": self.ways[0].name}
            | {one: median(getattr(way, one) for way in self.ways) for one in fields + rates}
            | {"cpu_ratios": self.cpu_ratios, "wall_ratios": self.wall_ratios}
            | {"worker_bytes": max(way.worker_bytes for way in self.ways)}
        )

    def line(self) -> str:
        """Of the table."""
        found = self.figures()
        return (
            f"{found['name']:26} {found['per_cpu_second']:9.1f} {_span(self.cpu_ratios):>18} "
            f"{found['per_worker_second']:9.1f} {_span(self.wall_ratios):>18} "
            f"{found['startup_seconds']:8.1f} {found['worker_bytes'] / 2**20:6.0f}"
        )


def _span(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def compared(rounds: Sequence[Sequence[Way]]) -> list[Compared]:
    """Rounds of all ways, in the same order -> ways."""
    found = []
    for ways in zip(*rounds, strict=True):
        loops = [
            next(one for one in run if one.name.startswith("bare") and one.workers == way.workers)
            for way, run in zip(ways, rounds, strict=True)
        ]
        found.append(Compared(ways=ways, loops=loops))
    return found


def run_all(ways: Ways, codec: str, workers: int) -> list[Way]:
    """One round: run every way."""

    def one(name: str, count: int, run: Run) -> Way:
        beside = LoopBeside(plan_units(ways.sources, options=OPTIONS), ways.policy, codec)
        try:
            way = measured(name, count, codec, run, ignored=[beside.pid])
        finally:
            samples = beside.end()
        rate = rate_between(samples, way.started_at, way.started_at + way.wall_seconds)
        return dataclasses.replace(way, loop_per_cpu_second=rate)

    many = f"{workers} processes"
    found = [one("bare loop", 1, ways.bare_loop)]
    found.append(one(f"bare loops, {many}", workers, ways.bare_loops(workers)))
    found.append(one(f"process pool, {many}", workers, ways.process_pool(workers)))
    with local_ray(workers):
        found += [
            one(f"dicmh, {count} actor{'s' * (count > 1)}", count, ways.ours(count))
            for count in sorted({1, workers})
        ]
        found.append(one(f"Ray Data, {workers} actors", workers, ways.ray_data(workers)))
    counts = {way.name: way.images for way in found}
    if len(set(counts.values())) > 1:
        raise RuntimeError(f"these are not the same work: pictures encoded by {counts}")
    return found


def measure_memory(images: int, codec: str, policy: EncodePolicy) -> dict[str, Any]:
    """Pictures of 50 megapixels through one of our actors: what its process took."""
    with tempfile.TemporaryDirectory(prefix="dicmh-huge-") as folder, local_ray(1):
        sources = make_collection(Path(folder), images=images, per_tar=images, side=8165)
        way = measured("dicmh, 50 MP", 1, codec, Ways(sources=sources, policy=policy).ours(1))
        empty = make_collection(Path(folder), images=1, per_tar=1, side=64)
        idle = measured("dicmh, 64x48", 1, codec, Ways(sources=empty, policy=policy).ours(1))
    return {
        "images": way.images,
        "megapixels": 8165 * 6123 / 1e6,
        "seconds_per_image": way.wall_seconds / way.images,
        "worker_peak_bytes": way.worker_bytes,
        "worker_peak_bytes_with_small_pictures": idle.worker_bytes,
    }


def main() -> int:
    """Run, print a table, return 0 when our workers keep 0.95 of the bare loops' rate a core."""
    parser = argparse.ArgumentParser(description="Pictures a core: engines against a bare loop.")
    parser.add_argument("sources", nargs="*", metavar="SRC", help="tars of JPEGs")
    parser.add_argument("--make", type=int, default=400, help="pictures, when no SRC is given")
    parser.add_argument("--per-tar", type=int, default=100, help="of these")
    parser.add_argument("--side", type=int, default=320, help="width of these")
    parser.add_argument("--codec", default="default", help="a checkpoint, or webp: a light one")
    parser.add_argument("--states", type=int, default=2, help="written of each picture")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of all ways; medians are told")
    parser.add_argument("--huge", type=int, help="so many pictures of 50 megapixels instead")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    policy = EncodePolicy(states=options.states, min_psnr=0, min_worst_tile_psnr=0)
    environment = describe_environment(" ".join(sys.argv))
    print("\n".join(environment.lines()))
    if options.huge:
        memory = measure_memory(options.huge, options.codec, policy)
        print(json.dumps(memory, indent=1))
        if options.json:
            options.json.write_text(
                json.dumps({"memory": memory, "environment": environment.lines()})
            )
        return 0
    with tempfile.TemporaryDirectory(prefix="dicmh-bench-") as folder:
        sources = options.sources or make_collection(
            Path(folder), images=options.make, per_tar=options.per_tar, side=options.side
        )
        ways = Ways(sources=sources, policy=policy)
        rounds = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            rounds.append(run_all(ways, options.codec, options.workers))
    found = compared(rounds)
    print(
        f"\n{'images a second of':26} {'one core':>9} {'of bare loops':>18} {'one worker':>9} "
        f"{'of bare loops':>18} {'start s':>8} {'MiB':>6}"
    )
    for one in found:
        print(one.line())
    if options.json:
        figures = [one.figures() for one in found]
        options.json.write_text(
            json.dumps({"ways": figures, "environment": environment.lines()}, indent=1)
        )
    (ours,) = (one for one in found if one.ways[0].name.startswith(f"dicmh, {options.workers} "))
    return 0 if median(ours.cpu_ratios) >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
