"""What broken images cost: a collection with and without them, every key accounted for.

    python jobs/poison_run.py --images 10000 --poison 0.01
    python jobs/poison_run.py --images 2000 --runtime ray --workers 2

Makes two collections of small pictures, equal but for the poisoned ones: junk, cut-off files, files
with nothing in them, text, and pictures that the codec refuses in the middle of a batch. One job
compresses both, a tar of the one after a tar of the other, with a codec that costs little, so that a
loss shows and what else the machine does befalls both alike. The archive must hold every key of
the poisoned one exactly once, each poisoned one with its cause and its bytes, each sound one with the
stream that its twin has. The loss is that of sound images a second of processor time, over the units
of one kind against those of the other.

Exit code 0 when everything is accounted for and the loss is below ``--tolerance``.
"""

import argparse
import io
import json
import logging
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dicmh_ray.archive import EncodedImage, open_snapshot, verify_archive
from dicmh_ray.bench import describe_environment
from dicmh_ray.pipeline import EncodeOptions, JobObserver, JobReport, UnitResult
from dicmh_ray.ray_plugin import RayOptions, Runtime, compress
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.source import Unit
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
    seed: int
    runtime: Runtime
    workers: int | None
    tolerance: float


@dataclass(kw_only=True)
class Figures:
    """The units of one collection."""

    images: int = 0
    failures: int = 0
    cpu_seconds: float = 0.0
    causes: Counter[str] = field(default_factory=Counter)

    @property
    def per_cpu_second(self) -> float:
        """Sound images for each second of the workers' processor time.

        What broken ones take counts against them: they are no work that anybody wanted done.
        """
        return (self.images - self.failures) / self.cpu_seconds


class UnitFigures(JobObserver):
    """Sums over the units of each collection, as they are committed."""

    def __init__(self) -> None:
        self.of = {"clean": Figures(), "poisoned": Figures()}

    def unit_committed(self, report: JobReport, unit: Unit, result: UnitResult) -> None:
        figures = self.of[Path(str(unit.uri)).name.partition("-")[0]]
        figures.images += result.tally.images
        figures.failures += result.tally.failures
        figures.causes.update(result.tally.causes)
        figures.cpu_seconds += result.cpu_seconds


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


def run(folder: Path, archive: Path, options: Options) -> dict[str, Figures]:
    """Compress both collections in turns; failures are what is measured, so all are tolerated."""
    figures = UnitFigures()
    tars = sorted(folder.glob("*.tar"), key=lambda path: path.name.partition("-")[::-1])
    compress(
        [str(path) for path in tars],
        str(archive),
        codec=FakeCodec,
        runtime=options.runtime,
        failure_budget=1.0,
        observers=[figures],
        encode_options=EncodeOptions(
            threads=1, batch_pixels=options.batch_images * options.side * options.side
        ),
        ray_options=RayOptions(workers=options.workers),
    )
    return figures.of


def complaints(archive: Path, kinds: dict[str, str], options: Options) -> Iterator[str]:
    """Everything that is not as it must be in the archive."""
    rows: dict[str, list[tuple[str, EncodedImage]]] = {"clean": [], "poisoned": []}
    blobs = ("base", "detail", "original")
    for row in ArchiveReader(open_snapshot(str(archive))).rows(blobs=blobs):
        tar, _, key = row.key.rpartition("/")
        rows[tar.rpartition("/")[2].partition("-")[0]].append((key, row))
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
    report = verify_archive(str(archive))
    if report.exit_code != 0:
        yield f"verify: {report.to_dict()}"


def parse(arguments: Sequence[str]) -> Options:
    """The command line as options."""
    parser = argparse.ArgumentParser(description="Throughput with and without broken images.")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--poison", type=float, default=0.01, help="share of the images")
    parser.add_argument("--side", type=int, default=128, help="of a picture, pixels")
    parser.add_argument("--batch-images", type=int, default=16, help="in a call of the codec")
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
        folder, archive = Path(temporary), Path(temporary) / "archive"
        kinds = write_collections(folder, options)
        figures = run(folder, archive, options)
        found = list(complaints(archive, kinds, options))
    clean, spoilt = figures["clean"], figures["poisoned"]
    loss = 1 - spoilt.per_cpu_second / clean.per_cpu_second
    print("\n".join(describe_environment(" ".join(sys.argv)).lines()))
    print(f"\n{'':10} {'images':>8} {'failures':>9} {'CPU s':>8} {'sound/CPU s':>13}")
    for name, one in figures.items():
        print(
            f"{name:10} {one.images:8} {one.failures:9} {one.cpu_seconds:8.1f} "
            f"{one.per_cpu_second:13.1f}"
        )
    causes = dict(sorted(spoilt.causes.items()))
    print(f"causes: {causes}; loss of throughput: {loss:.1%}")
    for line in found[:20]:
        print(line)
    is_good = not found and loss < options.tolerance
    print("PASS" if is_good else f"FAIL: {len(found)} complaints, loss {loss:.1%}")
    facts = {"options": asdict(options), "loss": loss, "complaints": len(found)}
    print(json.dumps(facts | {name: vars(one) for name, one in figures.items()}))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
