"""What broken images cost: a collection with and without them, every key accounted for.

    python jobs/poison_run.py --images 10000 --poison 0.01
    python jobs/poison_run.py --images 2000 --runtime ray --workers 2

Makes two collections of small pictures, equal but for the poisoned ones: junk, cut-off files, files
with nothing in them, text, and pictures that the codec refuses in the middle of a batch. Compresses
both, in turns, with a codec that costs little, so that a loss shows. The archive of the poisoned one
must hold every key exactly once, each poisoned one with its cause and its bytes, each sound one with
the stream that the clean run gave it. The loss is that of sound images a second of the workers'
processor time, which other work on the machine changes little; wall times are printed beside it.

Exit code 0 when everything is accounted for and the loss is below ``--tolerance``.
"""

import argparse
import io
import json
import logging
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dicmh_ray.archive import open_snapshot, verify_archive
from dicmh_ray.bench import describe_environment
from dicmh_ray.pipeline import EncodeOptions, JobReport
from dicmh_ray.ray_plugin import RayOptions, Runtime, compress
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.testing.fake_codec import POISON, FakeCodec

CAUSES = {
    "junk": "unreadable",
    "cut": "unreadable",
    "empty": "unreadable",
    "text": "unreadable",
    "refused": "encode-failed",
}
"""Kind of poison -> the cause that its row must name."""

PER_TAR = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The run."""

    images: int
    poison: float
    side: int
    batch_images: int
    repeat: int
    seed: int
    runtime: Runtime
    workers: int | None
    tolerance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One job, or the median of several."""

    images: int
    failures: int
    cpu_seconds: float
    seconds: float

    @property
    def per_cpu_second(self) -> float:
        """Sound images for each second of the workers' processor time.

        What broken ones take counts against them: they are no work that anybody wanted done.
        """
        return (self.images - self.failures) / self.cpu_seconds

    @classmethod
    def of(cls, reports: Sequence[JobReport]) -> "Figures":
        """The median of runs of one job."""
        return cls(
            images=reports[0].tally.images,
            failures=reports[0].tally.failures,
            cpu_seconds=statistics.median(report.cpu_seconds for report in reports),
            seconds=statistics.median(report.seconds for report in reports),
        )


def picture(rng: np.random.Generator, side: int) -> bytes:
    """A smooth random picture as PNG: larger than its stream."""
    coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    # Multiples of 16: two of the codec's three states are enough.
    return png(np.asarray(image, np.uint8) // np.uint8(16) * np.uint8(16))


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Uncompressed, so that no stream is larger than its source."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def poisoned(kind: str, sound: bytes, side: int) -> bytes:
    """What stands in the place of a sound file."""
    return {
        "junk": bytes(range(256)) * 64,
        "cut": sound[: len(sound) // 2],
        "empty": b"",
        "text": b"404 not found\n" * 40,
        "refused": png(np.full((side, side, 3), POISON, np.uint8)),
    }[kind]


def write_collections(folder: Path, options: Options) -> dict[str, str]:
    """The tars ``clean-*`` and ``poisoned-*``; returns key -> kind of the poisoned ones."""
    rng = np.random.default_rng(options.seed)
    count = round(options.images * options.poison)
    chosen = sorted(rng.choice(options.images, count, replace=False).tolist())
    kinds = dict(zip(chosen, [list(CAUSES)[i % len(CAUSES)] for i in range(count)], strict=True))
    found = {}
    for first in range(0, options.images, PER_TAR):
        name = f"{first // PER_TAR:05d}.tar"
        with (
            tarfile.open(folder / f"clean-{name}", "w") as clean,
            tarfile.open(folder / f"poisoned-{name}", "w") as spoilt,
        ):
            for number in range(first, min(first + PER_TAR, options.images)):
                sound = picture(rng, options.side)
                add(clean, f"{number:07d}.png", sound)
                if number in kinds:
                    found[f"{number:07d}"] = kinds[number]
                    sound = poisoned(kinds[number], sound, options.side)
                add(spoilt, f"{number:07d}.png", sound)
    return found


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """One member."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def run(folder: Path, name: str, number: int, options: Options) -> JobReport:
    """Compress one of the collections; failures are what is measured, so all are tolerated."""
    return compress(
        str(folder / f"{name}-*.tar"),
        str(folder / f"archive-{name}-{number}"),
        codec=FakeCodec,
        runtime=options.runtime,
        failure_budget=1.0,
        encode_options=EncodeOptions(
            threads=1, batch_pixels=options.batch_images * options.side * options.side
        ),
        ray_options=RayOptions(workers=options.workers),
    )


def complaints(folder: Path, kinds: dict[str, str], options: Options) -> Iterator[str]:
    """Everything that is not as it must be in the last archives."""
    last = options.repeat - 1
    archives = {name: str(folder / f"archive-{name}-{last}") for name in ("clean", "poisoned")}
    rows = {
        name: [
            (row.key.rpartition("/")[2], row)
            for row in ArchiveReader(open_snapshot(archive)).rows(
                blobs=("base", "detail", "original")
            )
        ]
        for name, archive in archives.items()
    }
    clean = dict(rows["clean"])
    keys = [key for key, _ in rows["poisoned"]]
    if sorted(keys) != [f"{number:07d}" for number in range(options.images)]:
        yield f"{len(keys)} rows, {len(set(keys))} keys, {options.images} images"
    for key, row in rows["poisoned"]:
        kind = kinds.get(key)
        if kind is None:
            if (row.status, row.base, row.detail) != ("ok", clean[key].base, clean[key].detail):
                yield f"{key}: sound, but {row.status}: {row.error}"
            continue
        cause = (row.error or "").partition(":")[0]
        wanted = "failed" if kind == "empty" else "kept_original"
        if (cause, row.status) != (CAUSES[kind], wanted):
            yield f"{key}: {kind}, but {row.status}: {row.error}"
    report = verify_archive(archives["poisoned"])
    if report.exit_code != 0:
        yield f"verify: {report.to_dict()}"


def parse(arguments: Sequence[str]) -> Options:
    """The command line as options."""
    parser = argparse.ArgumentParser(description="Throughput with and without broken images.")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--poison", type=float, default=0.01, help="share of the images")
    parser.add_argument("--side", type=int, default=128, help="of a picture, pixels")
    parser.add_argument("--batch-images", type=int, default=16, help="in a call of the codec")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; medians are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtime", choices=["local", "ray"], default="local")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--tolerance", type=float, default=0.05)
    return Options(**vars(parser.parse_args(arguments)))


def main() -> int:
    """Run both, compare, print; the last line is JSON."""
    options = parse(sys.argv[1:])
    # Warnings name each image that fails: here that is what is asked for.
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="dicmh-poison-") as temporary:
        folder = Path(temporary)
        kinds = write_collections(folder, options)
        # Poisoned first: what the process's first run costs, imports, counts against it.
        reports: dict[str, list[JobReport]] = {"poisoned": [], "clean": []}
        for number in range(options.repeat):
            for name, done in reports.items():
                done.append(run(folder, name, number, options))
        found = list(complaints(folder, kinds, options))
    clean, spoilt = (Figures.of(reports[name]) for name in ("clean", "poisoned"))
    loss = 1 - spoilt.per_cpu_second / clean.per_cpu_second
    print("\n".join(describe_environment(" ".join(sys.argv)).lines()))
    print(f"\n{'':10} {'images':>8} {'failures':>9} {'CPU s':>8} {'wall s':>8} {'sound/CPU s':>13}")
    for name, one in (("clean", clean), ("poisoned", spoilt)):
        print(
            f"{name:10} {one.images:8} {one.failures:9} {one.cpu_seconds:8.1f} {one.seconds:8.1f} "
            f"{one.per_cpu_second:13.1f}"
        )
    causes = dict(sorted(reports["poisoned"][-1].tally.causes.items()))
    print(f"causes: {causes}; loss of throughput: {loss:.1%}")
    for line in found[:20]:
        print(line)
    is_good = not found and loss < options.tolerance
    print("PASS" if is_good else f"FAIL: {len(found)} complaints, loss {loss:.1%}")
    facts = {"options": asdict(options), "loss": loss, "complaints": len(found), "causes": causes}
    print(json.dumps(facts | {"clean": asdict(clean), "poisoned": asdict(spoilt)}))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
