"""What reading costs: bytes, requests and time, on an S3 server in this machine, beside other formats.

    .ci/fetch_ceph build/ceph
    python jobs/bench_reads.py --photographs photos/ --json reads.json

Photographs are cut to squares and encoded with the default checkpoint, and as JPEG of the quality
whose mean squared error is nearest to the decoded stream's. They are the first rows of 10,000; the
others have their sizes, up to a fifth more or less, and random bytes, which no format can make
smaller, as it could if rows were repeated. Every format holds the same rows on the same server: Ceph's gateway where its programs are
found, else moto. A proxy before it counts requests and the bytes of their answers; its time, some
two milliseconds a request, is in every figure. WebDataset with wids, Lance and MosaicML streaming
take part where they are installed (`pylance`, `webdataset<1`, `mosaicml-streaming`; the first and
the last in folders of their own on PYTHONPATH where they would change other versions).
``--only`` runs some parts; the million rows of ``million`` take minutes to write.

Exit code 1: something that reading may cost at most is exceeded.
"""

import argparse
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import s3fs
from PIL import Image

from dicmh_ray import load_codec, open_archive
from dicmh_ray.archive import EncodedImage, PartOptions, Plan, create_archive
from dicmh_ray.bench import describe_environment
from dicmh_ray.bitstream import Header, State, prefix_bytes, write_bitstream
from dicmh_ray.codec import ImageCodec, read_checkpoint
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.testing.ceph import ACCESS_KEY, SECRET_KEY, ceph_gateway, find_ceph
from dicmh_ray.testing.fault_proxy import FaultProxy
from dicmh_ray.views import Archive, decode_views

Picture = npt.NDArray[np.uint8]

PARTS = ("reads", "latency", "throughput", "million")
BUCKET = "bench"
BASE_STATES = 2
TAGS = [f"tag{number:02d}" for number in range(20)]
WHERE = "'tag07' in tags"
MOTO_KEYS = ("bench", "bench-secret")
CEPH_KEYS = (ACCESS_KEY, SECRET_KEY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Photograph:
    """One picture in both codings."""

    stream: bytes
    jpeg: bytes
    quality: int
    """Of the JPEG."""
    size: tuple[int, int]
    """Width and height."""


def serve(commands: Any, ceph: Path | None) -> None:
    """An S3 server behind a proxy that counts, in a process of its own."""
    with ExitStack() as stack:
        if ceph is not None:
            upstream = stack.enter_context(ceph_gateway(ceph))
        else:
            from moto.server import ThreadedMotoServer

            moto = ThreadedMotoServer(port=0, verbose=False)
            moto.start()
            stack.callback(moto.stop)
            host, port = moto.get_host_and_port()
            upstream = f"http://{host}:{port}"
        proxy = stack.enter_context(FaultProxy(upstream, rate=0))
        commands.send(proxy.url)
        while commands.recv():
            asked = proxy.requests()
            commands.send({"requests": len(asked), "bytes": sum(one.num_bytes for one in asked)})
            proxy.begin(proxy.schedule)


class CountingServer:
    """An S3 server, and what was asked of it; a context manager."""

    def __init__(self, ceph: Path | None) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._commands, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, ceph))
        self.url = ""

    def __enter__(self) -> Self:
        self._process.start()
        self.url = self._commands.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.send(False)
        self._process.join()

    def counts(self) -> dict[str, float]:
        """Requests and bytes answered since the last call."""
        self._commands.send(True)
        found: dict[str, float] = self._commands.recv()
        return found


class Meter:
    """What one way of reading costs the server and the clock."""

    def __init__(self, server: CountingServer) -> None:
        self._server = server
        self.results: dict[str, dict[str, dict[str, float]]] = {}

    def measure(self, format: str, what: str, read: Callable[[], Any]) -> Any:
        """Run one read and note requests, bytes and seconds."""
        self._server.counts()
        started = time.perf_counter()
        result = read()
        seconds = time.perf_counter() - started
        figures = {**self._server.counts(), "seconds": round(seconds, 4)}
        self.results.setdefault(what, {})[format] = figures
        print(f"{what:28} {format:12} {json.dumps(figures)}", file=sys.stderr, flush=True)
        return result


def squares(folder: Path, count: int, side: int) -> list[Picture]:
    """The middles of the first pictures of a folder, uint8 ``[side, side, 3]``."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pictures = []
    for path in paths:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if min(image.size) >= side:
            left, top = (image.width - side) // 2, (image.height - side) // 2
            pictures.append(np.asarray(image.crop((left, top, left + side, top + side))))
        if len(pictures) == count:
            return pictures
    raise SystemExit(f"{folder} has {len(pictures)} pictures of {side} pixels, {count} are wanted")


def equal_jpeg(picture: Picture, decoded: Picture) -> tuple[bytes, int]:
    """The JPEG whose error is nearest to that of ``decoded``, and its quality."""

    def error(other: Picture) -> float:
        return float(np.mean((picture.astype(np.float64) - other) ** 2))

    target = error(decoded)
    best: tuple[float, bytes, int] | None = None
    for quality in range(5, 96, 3):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality, optimize=True)
        distance = abs(error(np.asarray(Image.open(buffer))) - target)
        if best is None or distance < best[0]:
            best = (distance, buffer.getvalue(), quality)
    assert best is not None
    return best[1], best[2]


def encode_both(pictures: Sequence[Picture], codec: ImageCodec, states: int) -> list[Photograph]:
    """Every picture as a stream of some states and as JPEG of equal error."""
    found = []
    for picture in pictures:
        (whole,) = codec.encode([picture], tags=[[]], exif_orientations=[1])
        stream = whole[: prefix_bytes(whole)[states - 1]]
        jpeg, quality = equal_jpeg(picture, codec.decode([stream])[0])
        size = (picture.shape[1], picture.shape[0])
        found.append(Photograph(stream=stream, jpeg=jpeg, quality=quality, size=size))
    return found


def fill(photos: Sequence[Photograph], rows: int) -> list[Photograph]:
    """The photographs, then as many rows of random bytes in sound streams as are wanted."""
    rng = np.random.default_rng(1)
    filled = list(photos[:rows])
    for number in range(len(photos), rows):
        photo = photos[number % len(photos)]
        scale = rng.uniform(0.8, 1.2)
        ends = prefix_bytes(photo.stream)
        sizes = [ends[0], *np.diff(ends).tolist()]
        states = [State(rng.bytes(int(scale * size)), k) for k, size in enumerate(sizes)]
        width, height = photo.size
        header = Header(codec_id="ab" * 32, width=width, height=height, num_states=len(states))
        jpeg = rng.bytes(int(scale * len(photo.jpeg)))
        stream = write_bitstream(header, [], states)
        filled.append(dataclasses.replace(photo, stream=stream, jpeg=jpeg))
    return filled


def key_of(number: int) -> str:
    """Key of a row."""
    return f"{number:08d}"


def tags_of(number: int) -> list[str]:
    """Tags of a row: one in ten has each."""
    return [TAGS[number % 20], TAGS[(number * 7 + 3) % 20]]


def row_of(number: int, photo: Photograph) -> EncodedImage:
    """A row of the archive."""
    ends = prefix_bytes(photo.stream)
    cut = ends[min(BASE_STATES, len(ends)) - 1]
    width, height = photo.size
    return EncodedImage(
        key=key_of(number),
        status="ok",
        tags=tuple(tags_of(number)),
        width=width,
        height=height,
        bpp=8 * len(photo.stream) / (width * height),
        tier="faithful",
        psnr=31.0,
        num_states=len(ends),
        source_uri=f"photos/{number // 1000:06d}.tar",
        source_offset=512 * number,
        original_sha256=f"{number:064x}",
        original_bytes=len(photo.jpeg),
        original_format="JPEG",
        metadata=json.dumps({"number": number, "label": number % 1000}),
        prefix_bytes=ends,
        base=photo.stream[:cut],
        detail=photo.stream[cut:],
    )


def write_archive(
    uri: str,
    photos: Sequence[Photograph],
    rows: int,
    unit_rows: int,
    codec_id: str,
    storage_options: dict[str, Any] | None = None,
) -> None:
    """An archive of ``rows`` rows in units of ``unit_rows``, through the writer."""
    names = [f"{number:06d}" for number in range(-(-rows // unit_rows))]
    plan = Plan(units=[{"name": name} for name in names], codec_id=codec_id, parameters={})
    job = create_archive(
        uri,
        plan=plan,
        codec_files={"config.json": b"{}"},
        storage_options=storage_options,
        options=PartOptions(),
    )
    for number, name in enumerate(names):
        numbers = range(number * unit_rows, min(rows, (number + 1) * unit_rows))
        job.commit_unit(name, [row_of(n, photos[n % len(photos)]) for n in numbers])
    job.finalize()


def json_of(number: int) -> bytes:
    """Sidecar of a row."""
    return json.dumps({"tags": tags_of(number), "number": number, "label": number % 1000}).encode()


def ours(meter: Meter, uri: str, options: dict[str, Any], picks: Sequence[int]) -> None:
    """Every read of our archive."""
    name = "dicmh"
    reader = meter.measure(name, "open", lambda: ArchiveReader.open(uri, storage_options=options))
    meter.measure(name, "first key (reads the index)", lambda: reader.key_at(0))
    again = ArchiveReader.open(uri, storage_options=options)
    meter.measure(name, "tag scan, keys", lambda: len(list(again.scan(["key"], WHERE))))
    meter.measure(name, "one image", lambda: reader.bitstream(key_of(picks[0])))
    row = reader.get(key_of(picks[0]), blobs=("base", "detail"), columns="index")
    meter.results["one image"][name]["row_bytes"] = len(row.base) + len(row.detail)
    meter.measure(name, "one row with all columns", lambda: reader.get(key_of(picks[1])))
    keys, stream = [key_of(n) for n in picks], ("base", "detail")
    meter.measure(name, "100 images", lambda: reader.get_many(keys, blobs=stream, columns="index"))
    columns = ["key", "base", "detail"]
    meter.measure(
        name, "images with a tag", lambda: sum(len(b) for b in reader.scan(columns, WHERE))
    )
    meter.measure(
        name, "all, first states", lambda: sum(len(b) for b in reader.scan(columns, states=1))
    )
    meter.measure(name, "all images", lambda: sum(len(b) for b in reader.scan(columns)))


def lance_dataset(
    meter: Meter,
    endpoint: str,
    keys: tuple[str, str],
    photos: Sequence[Photograph],
    rows: int,
    picks: Sequence[int],
) -> None:
    """The same rows in a Lance dataset; its data storage version is the library's default."""
    import lance
    import pyarrow as pa

    storage = {
        "aws_endpoint": endpoint,
        "aws_region": "us-east-1",
        "aws_access_key_id": keys[0],
        "aws_secret_access_key": keys[1],
        "allow_http": "true",
    }
    numbers = range(rows)
    table = pa.table(
        {
            "key": [key_of(n) for n in numbers],
            "tags": pa.array([tags_of(n) for n in numbers], pa.list_(pa.string())),
            "metadata": [json_of(n).decode() for n in numbers],
            "image": pa.array([photos[n % len(photos)].jpeg for n in numbers], pa.binary()),
        }
    )
    uri = f"s3://{BUCKET}/lance"
    lance.write_dataset(table, uri, storage_options=storage, max_rows_per_file=2500)
    opened = meter.measure("lance", "open", lambda: lance.dataset(uri, storage_options=storage))
    where = "array_has(tags, 'tag07')"
    meter.measure(
        "lance", "tag scan, keys", lambda: opened.to_table(columns=["key"], filter=where).num_rows
    )
    meter.measure("lance", "one image", lambda: opened.take([picks[0]], columns=["image"]))
    meter.measure("lance", "one row with all columns", lambda: opened.take([picks[1]]))
    meter.measure("lance", "100 images", lambda: opened.take(list(picks), columns=["image"]))
    meter.measure(
        "lance",
        "images with a tag",
        lambda: opened.to_table(columns=["image"], filter=where).num_rows,
    )
    meter.measure("lance", "all images", lambda: opened.to_table(columns=["image"]).num_rows)


def wids_dataset(
    meter: Meter,
    endpoint: str,
    fs: Any,
    photos: Sequence[Photograph],
    rows: int,
    picks: Sequence[int],
    folder: Path,
) -> None:
    """The same rows in WebDataset tars of 1,000, read through wids, which fetches whole tars."""
    import wids

    shards = []
    for first in range(0, rows, 1000):
        buffer = io.BytesIO()
        numbers = range(first, min(rows, first + 1000))
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for n in numbers:
                for suffix, data in (("jpg", photos[n % len(photos)].jpeg), ("json", json_of(n))):
                    member = tarfile.TarInfo(f"{key_of(n)}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        name = f"{BUCKET}/wids/{first // 1000:06d}.tar"
        fs.pipe_file(name, buffer.getvalue(), ACL="public-read")  # wids asks over plain HTTP
        shards.append({"url": f"{endpoint}/{name}", "nsamples": len(numbers)})

    def opened(cache: str) -> Any:
        index = {"wids_version": 1, "shardlist": shards, "name": "bench"}
        path = folder / f"{cache}.json"
        path.write_text(json.dumps(index))
        return wids.ShardListDataset(
            str(path), cache_dir=str(folder / cache), lru_size=100, transformations=[]
        )

    def one(data: Any, number: int) -> int:
        return len(data[number][".jpg"].read())

    data = meter.measure("wids", "open", lambda: opened("wids-a"))
    meter.measure("wids", "one image", lambda: one(data, picks[0]))
    data = opened("wids-b")
    meter.measure("wids", "100 images", lambda: [one(data, n) for n in picks])
    data = opened("wids-c")
    meter.measure("wids", "all images", lambda: sum(one(data, n) for n in range(rows)))
    data = opened("wids-d")
    meter.measure(
        "wids",
        "tag scan, keys",
        lambda: sum("tag07" in json.load(data[n][".json"])["tags"] for n in range(rows)),
    )


def mds_dataset(
    meter: Meter,
    fs: Any,
    photos: Sequence[Photograph],
    rows: int,
    picks: Sequence[int],
    folder: Path,
) -> None:
    """The same rows in MosaicML shards of the default size, which are fetched whole."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    made = folder / "mds-made"
    with MDSWriter(out=str(made), columns={"key": "str", "json": "bytes", "image": "bytes"}) as out:
        for n in range(rows):
            out.write({"key": key_of(n), "json": json_of(n), "image": photos[n % len(photos)].jpeg})
    for path in made.iterdir():
        fs.pipe_file(f"{BUCKET}/mds/{path.name}", path.read_bytes())

    def opened(cache: str) -> Any:
        clean_stale_shared_memory()
        return StreamingDataset(
            remote=f"s3://{BUCKET}/mds", local=str(folder / cache), shuffle=False, batch_size=16
        )

    data = meter.measure("mosaicml", "open", lambda: opened("mds-a"))
    meter.measure("mosaicml", "one image", lambda: len(data[picks[0]]["image"]))
    data = opened("mds-b")
    meter.measure("mosaicml", "100 images", lambda: [len(data[n]["image"]) for n in picks])
    data = opened("mds-c")
    meter.measure("mosaicml", "all images", lambda: sum(len(data[n]["image"]) for n in range(rows)))
    data = opened("mds-d")
    meter.measure(
        "mosaicml",
        "tag scan, keys",
        lambda: sum("tag07" in json.loads(data[n]["json"])["tags"] for n in range(rows)),
    )
    data = None
    clean_stale_shared_memory()


def latency(uri: str, options: dict[str, Any], codec: ImageCodec, count: int) -> dict[str, float]:
    """Seconds until the pixels of one image are there: the best of several."""
    numbers = itertools.cycle(np.random.default_rng(3).permutation(count).tolist())

    def best(read: Callable[[str], Any], times: int) -> float:
        seconds = []
        for _ in range(times):
            key = key_of(next(numbers))
            started = time.perf_counter()
            read(key)
            seconds.append(time.perf_counter() - started)
        return round(min(seconds), 4)

    def opened(cache: str | None = None) -> Archive:
        return open_archive(uri, storage_options=options, codec=codec, cache=cache)

    archive = opened()
    seen = key_of(0)
    with tempfile.TemporaryDirectory() as cache:
        opened(cache)[seen].pixels()
        return {
            "cold: open, index, bytes, decode": best(lambda key: opened()[key].pixels(), 5),
            "the same, all but the decode cached": best(lambda _: opened(cache)[seen].pixels(), 5),
            "warm: bytes, decode": best(lambda key: archive[key].pixels(), 15),
            "warm, thumbnail": best(lambda key: archive[key].thumbnail(), 15),
            "warm, bytes alone": best(lambda key: archive[key].bitstream(), 15),
        }


KINDS = ("machine", "thumbnail", "latent", "Pillow, JPEG")

_race: tuple[Sequence[Photograph], Any] | None = None


def begin_racer(photos: Sequence[Photograph], start: Any) -> None:
    """A process that decodes, on one thread."""
    global _race
    _race = (photos, start)


def rate_of(kind: str, repeats: int) -> tuple[float, float]:
    """Pictures a second of one process, while the others do the same; and a second on the CPU."""
    if _race is None:
        raise RuntimeError("the process was not begun")
    photos, start = _race
    rows = [row_of(n, photo) for n, photo in enumerate(photos)]
    codec = load_codec(device="cpu", threads=1) if kind != KINDS[-1] else None

    def decode() -> None:
        if codec is not None:
            decode_views(rows, kind, codec=codec)
            return
        for photo in photos:
            np.asarray(Image.open(io.BytesIO(photo.jpeg)))

    decode()
    start.wait()
    started, used = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        decode()
    count = repeats * len(photos)
    return count / (time.perf_counter() - started), count / (time.process_time() - used)


def throughput(
    photos: Sequence[Photograph], processes: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Rates of each decoder, in so many processes at once.

    ``images_per_cpu_s`` is of one core, whatever else the machine does.
    """
    spawn = multiprocessing.get_context("spawn")
    megapixels = float(np.mean([p.size[0] * p.size[1] / 1e6 for p in photos]))
    found = {}
    start = spawn.Barrier(processes)
    with ProcessPoolExecutor(
        processes, mp_context=spawn, initializer=begin_racer, initargs=(photos, start)
    ) as pool:
        for kind in KINDS:
            times = repeats * (20 if kind == KINDS[-1] else 1)
            rates = list(pool.map(rate_of, [kind] * processes, [times] * processes))
            found[kind] = {
                "images_per_s": round(sum(rate for rate, _ in rates), 2),
                "images_per_cpu_s": round(float(np.mean([rate for _, rate in rates])), 2),
                "megapixels_per_cpu_s": round(
                    megapixels * float(np.mean([rate for _, rate in rates])), 2
                ),
            }
    return found


def million(folder: Path, rows: int) -> dict[str, float]:
    """A filter on tags over many rows on the local disk, with and without the index in memory."""
    header = Header(codec_id="ab" * 32, width=640, height=480, num_states=2)
    stream = write_bitstream(header, [], [State(bytes(20), 0), State(bytes(20), 1)])
    photo = Photograph(stream=stream, jpeg=b"", quality=0, size=(640, 480))
    uri = str(folder / "million")
    started = time.perf_counter()
    write_archive(uri, [photo], rows, 10_000, "ab" * 32)
    figures = {"rows": float(rows), "write_s": round(time.perf_counter() - started, 1)}
    reader = ArchiveReader.open(uri)
    for name in ("cold", "warm"):
        started = time.perf_counter()
        figures[f"{name}_matches"] = len(reader.matching(WHERE))
        figures[f"{name}_s"] = round(time.perf_counter() - started, 3)
    started = time.perf_counter()
    fresh = ArchiveReader.open(uri)
    keys = sum(len(batch) for batch in fresh.scan(["key"], f"{WHERE} and width >= 512"))
    figures["open_and_scan_keys_s"] = round(time.perf_counter() - started, 3)
    figures["keys"] = keys
    figures["index_bytes"] = sum(commit.index.num_bytes for commit in reader.snapshot.commits)
    return figures


def verdicts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What reading may cost at most, and what it does."""
    limits = {}
    if "reads" in report:
        reads = {what: figures["dicmh"] for what, figures in report["reads"].items()}
        one, scan, low = reads["one image"], reads["tag scan, keys"], reads["all, first states"]
        limits = {
            "tag scan, share of the bytes of a full read": (
                scan["bytes"] / reads["all images"]["bytes"],
                0.01,
            ),
            "point read, requests": (one["requests"], 2),
            "point read, bytes": (one["bytes"], 1.2 * one["row_bytes"] + 65_536),
            # In Parquet each value has its length before it, four bytes.
            "scan of the first states, bytes": (
                low["bytes"],
                report["base_bytes"] + 4 * report["rows"],
            ),
        }
    if "million" in report:
        limits["filter on tags of a million rows, s"] = (report["million"]["cold_s"], 2)
    return {
        what: {"found": found, "limit": limit, "holds": bool(found <= limit)}
        for what, (found, limit) in limits.items()
    }


def versions() -> dict[str, str]:
    """Of what is compared."""
    found = {}
    for name in ("pylance", "mosaicml-streaming", "webdataset", "pyarrow", "s3fs", "moto"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--count", type=int, default=32, help="different pictures")
    parser.add_argument("--side", type=int, default=256, help="of the squares, in pixels")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--states", type=int, default=4, help="of the streams")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--ceph", type=Path, default=Path("build/ceph/root"), help="its programs")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--million-rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="where the figures go; default: standard output")
    return parser.parse_args(arguments)


def on_a_server(
    report: dict[str, Any], photos: Sequence[Photograph], options: argparse.Namespace, folder: Path
) -> None:
    """Write every format on one server; latency, and what reading costs."""
    picks = np.random.default_rng(7).choice(options.rows, 100, replace=False).tolist()
    ceph = find_ceph(options.ceph)
    keys = MOTO_KEYS if ceph is None else CEPH_KEYS
    report["server"] = "moto" if ceph is None else "Ceph gateway"
    os.environ.update(
        AWS_ACCESS_KEY_ID=keys[0], AWS_SECRET_ACCESS_KEY=keys[1], AWS_DEFAULT_REGION="us-east-1"
    )
    with CountingServer(ceph) as server:
        os.environ["S3_ENDPOINT_URL"] = server.url  # MosaicML's
        storage = {
            "key": keys[0],
            "secret": keys[1],
            "endpoint_url": server.url,
            "client_kwargs": {"region_name": "us-east-1"},
            "config_kwargs": {"s3": {"addressing_style": "path"}},
        }
        fs = s3fs.S3FileSystem(**storage)
        fs.call_s3("create_bucket", Bucket=BUCKET)
        uri = f"s3://{BUCKET}/archive"
        photos = fill(photos, options.rows)
        write_archive(uri, photos, options.rows, 2500, read_checkpoint().codec_id, storage)
        if "latency" in options.only:
            codec = load_codec(device="cpu", threads=options.processes)
            report["latency_s"] = latency(uri, storage, codec, options.count)
        if "reads" not in options.only:
            return
        meter = Meter(server)
        ours(meter, uri, storage, picks)
        report["base_bytes"] = sum(len(row_of(n, photo).base) for n, photo in enumerate(photos))
        peers: dict[str, Callable[[], None]] = {
            "lance": lambda: lance_dataset(meter, server.url, keys, photos, options.rows, picks),
            "wids": lambda: wids_dataset(
                meter, server.url, fs, photos, options.rows, picks, folder
            ),
            "mosaicml": lambda: mds_dataset(meter, fs, photos, options.rows, picks, folder),
        }
        for name, measure in peers.items():
            try:
                measure()
            except ImportError as exc:
                report["not_installed"].append(f"{name}: {exc}")
                print(f"{name} takes no part: {exc}", file=sys.stderr)
        report["reads"] = meter.results


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every measurement."""
    started = time.perf_counter()
    codec = load_codec(device="cpu")
    report: dict[str, Any] = {
        "environment": dataclasses.asdict(describe_environment(" ".join(sys.argv))),
        "compared": versions(),
        "not_installed": [],
        "rows": options.rows,
        "load_codec_s": round(time.perf_counter() - started, 3),
    }
    photos = encode_both(
        squares(options.photographs, options.count, options.side), codec, options.states
    )
    report["stream_bytes_mean"] = float(np.mean([len(p.stream) for p in photos]))
    report["jpeg_bytes_mean"] = float(np.mean([len(p.jpeg) for p in photos]))
    report["jpeg_quality_mean"] = float(np.mean([p.quality for p in photos]))
    with tempfile.TemporaryDirectory(prefix="bench-reads-") as folder:
        if {"reads", "latency"} & set(options.only):
            on_a_server(report, photos, options, Path(folder))
        if "throughput" in options.only:
            report["throughput"] = throughput(photos, options.processes, options.repeats)
        if "million" in options.only:
            report["million"] = million(Path(folder), options.million_rows)
    report["verdicts"] = verdicts(report)
    return report


def main() -> int:
    """Measure and print; 1 when a limit is exceeded."""
    options = parse(sys.argv[1:])
    report = run(options)
    text = json.dumps(report, indent=2)
    if options.json is None:
        print(text)
    else:
        options.json.write_text(text)
    missed = [what for what, verdict in report["verdicts"].items() if not verdict["holds"]]
    for what in missed:
        print(f"exceeded: {what}: {report['verdicts'][what]}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
