"""The whole path on real photographs: ``python jobs/demo.py``, which is what ``make demo`` runs.

The photographs are those that scikit-image and scikit-learn carry, so nothing is downloaded. They
are written as two WebDataset tars and a Parquet file, with crops of other sizes and with the kinds
of file that every real collection has: transparency, 16 bits, CMYK, a picture to be turned, a
broken one. Ray compresses them into ``demo-output/archive``; the archive is verified and decoded,
and two tables and ``demo-output/sheet.png`` show what came of it.
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from dicmh_ray import Archive, JobReport, SourceOptions, compress, load_pixels, open_archive
from dicmh_ray.archive import verify_archive
from dicmh_ray.bench import comparison_sheet, describe_environment

OUTPUT = Path("demo-output")
SKIMAGE, SKLEARN = "skimage.data", "sklearn.datasets.images"
PHOTOGRAPHS: Final = {
    "astronaut": (SKIMAGE, "astronaut.png", ["person", "portrait"]),
    "chelsea": (SKIMAGE, "chelsea.png", ["cat", "animal"]),
    "coffee": (SKIMAGE, "coffee.png", ["cup", "table"]),
    "motorcycle": (SKIMAGE, "motorcycle_left.png", ["motorcycle", "indoor"]),
    "motorcycle-right": (SKIMAGE, "motorcycle_right.png", ["motorcycle", "indoor"]),
    "rocket": (SKIMAGE, "rocket.jpg", ["rocket", "night"]),
    "hubble": (SKIMAGE, "hubble_deep_field.jpg", ["sky", "science"]),
    "tissue": (SKIMAGE, "ihc.png", ["science"]),
    "camera": (SKIMAGE, "camera.png", ["person", "grey"]),
    "coins": (SKIMAGE, "coins.png", ["coin", "grey"]),
    "grass": (SKIMAGE, "grass.png", ["texture", "grey"]),
    "china": (SKLEARN, "china.jpg", ["building", "travel"]),
    "flower": (SKLEARN, "flower.jpg", ["flower", "plant"]),
}
CROP_SIZES = ((256, 256), (320, 200), (191, 257))
SHEET = ("chelsea", "china", "coffee", "flower", "astronaut")

Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One file of the collection."""

    name: str
    extension: str
    data: bytes
    tags: tuple[str, ...]
    caption: str


def main() -> None:
    """Write, compress, verify, decode, show."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    console = Console()
    for made in ("collection", "archive"):
        shutil.rmtree(OUTPUT / made, ignore_errors=True)
    items = [*photographs(), *crops(), *awkward_kinds()]
    sources = write_collection(items, OUTPUT / "collection")
    console.print(f"{len(items)} images in {', '.join(str(source) for source in sources)}")

    archive_path = str(OUTPUT / "archive")
    report = compress(
        [str(source) for source in sources],
        archive_path,
        source_options=SourceOptions(tag_fields=("tags",)),
    )
    archive = open_archive(archive_path)
    verified = verify_archive(archive_path, decode=archive.codec.decode_latent)
    for problem in verified.problems:
        console.print(f"[red]{problem}[/]")
    originals = {item.name: item.data for item in items}
    console.print(
        job_table(report, OUTPUT / "archive", verified.exit_code),
        kinds_table(archive),
        states_table(archive, originals),
    )
    pictures = [(name, load_pixels(originals[name]).image) for name in SHEET]
    comparison_sheet(pictures, archive.codec).save(OUTPUT / "sheet.png")
    machine = describe_environment()
    console.print(f"\n{machine.cpu}, {machine.num_cores} cores; codec {archive.codec_id[:16]}")
    console.print(f"every state beside its original: {OUTPUT / 'sheet.png'}")
    console.print(f"look further: dicmh ls {archive_path} --where \"'cat' in tags\"")
    sys.exit(verified.exit_code)


def photographs() -> Iterator[Item]:
    """Each photograph whole, as a camera or an editor would have left it."""
    for name, picture in pictures():
        extension = "png" if name == "coins" else "jpg"
        yield item_of(name, picture, extension, PHOTOGRAPHS[name][2], f"{name}, whole")


def crops() -> Iterator[Item]:
    """Two pieces of each photograph, of sizes that are no multiples of anything; one in six PNG."""
    chance = np.random.default_rng(7)
    for number, (name, picture) in enumerate(pictures()):
        for piece in range(2):
            width, height = CROP_SIZES[(number + piece) % len(CROP_SIZES)]
            left = int(chance.integers(picture.width - width + 1))
            top = int(chance.integers(picture.height - height + 1))
            crop = picture.crop((left, top, left + width, top + height))
            extension = "png" if (2 * number + piece) % 6 == 0 else "jpg"
            caption = f"{name}, {width}x{height} at {left}, {top}"
            yield item_of(f"{name}-crop{piece}", crop, extension, PHOTOGRAPHS[name][2], caption)


def awkward_kinds() -> Iterator[Item]:
    """What a codec of 8-bit RGB must not spoil in silence."""
    by_name = dict(pictures())
    camera, cat = by_name["camera"], by_name["chelsea"]
    deep = Image.fromarray(np.asarray(camera, np.uint16) * 257)
    clear = cat.convert("RGBA")
    clear.putalpha(Image.radial_gradient("L").resize(cat.size))
    yield item_of("cat-vignette", clear, "png", ["cat"], "with transparency")
    yield item_of("camera-16bit", deep, "png", ["person", "grey"], "16 bits")
    yield item_of("coffee-cmyk", by_name["coffee"].convert("CMYK"), "jpg", ["cup"], "CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = cat.transpose(Image.Transpose.ROTATE_90)
    yield item_of("cat-turned", turned, "jpg", ["cat"], "to be turned when shown", exif=exif)
    yield item_of("pixel", cat.crop((90, 90, 91, 91)), "png", ["tiny"], "one pixel")
    whole = item_of("cat-broken", cat, "jpg", ["cat"], "cut off half-way")
    yield Item(
        name=whole.name,
        extension="jpg",
        data=whole.data[: len(whole.data) // 2],
        tags=whole.tags,
        caption=whole.caption,
    )


def pictures() -> Iterator[tuple[str, Image.Image]]:
    """The photographs, decoded."""
    for name, (package, file, _) in PHOTOGRAPHS.items():
        yield name, Image.open(io.BytesIO(package_bytes(package, file)))


def package_bytes(package: str, file: str) -> bytes:
    """A file that lies beside a package's modules."""
    return files(package).joinpath(file).read_bytes()


def item_of(
    name: str, picture: Image.Image, extension: str, tags: list[str], caption: str, **save: Any
) -> Item:
    """A picture as a file: JPEG of quality 95 without chroma subsampling, or PNG."""
    buffer = io.BytesIO()
    if extension == "jpg":
        picture.save(buffer, "JPEG", quality=95, subsampling=0, **save)
    else:
        picture.save(buffer, "PNG")
    return Item(
        name=name, extension=extension, data=buffer.getvalue(), tags=tuple(tags), caption=caption
    )


def write_collection(items: list[Item], folder: Path) -> list[Path]:
    """Two tars with sidecars, by WebDataset's conventions, and a Parquet file for the last third."""
    folder.mkdir(parents=True)
    third = -(-len(items) // 3)
    paths = []
    for number in range(2):
        paths.append(folder / f"photos-{number:03d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for item in items[number * third : (number + 1) * third]:
                fields = json.dumps({"name": item.name, "tags": item.tags}).encode()
                add_member(tar, f"{item.name}.{item.extension}", item.data)
                add_member(tar, f"{item.name}.json", fields)
                add_member(tar, f"{item.name}.cls", str(len(item.tags)).encode())
                add_member(tar, f"{item.name}.txt", item.caption.encode())
    rest = items[2 * third :]
    table = pa.table(
        {
            "id": [item.name for item in rest],
            "image": [
                {"bytes": item.data, "path": f"{item.name}.{item.extension}"} for item in rest
            ],
            "name": [item.name for item in rest],
            "tags": [list(item.tags) for item in rest],
            "caption": [item.caption for item in rest],
        }
    )
    paths.append(folder / "photos.parquet")
    pq.write_table(table, paths[-1])
    return paths


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """One file of a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def job_table(report: JobReport, archive: Path, exit_code: int) -> Table:
    """What went in, what came out."""
    tally = report.tally
    table = Table(title="Compressed on Ray", title_justify="left", show_header=False)
    table.add_row("images", f"{tally.images}")
    table.add_row(
        "status",
        f"{tally.ok} ok, {tally.kept_original} kept original, {tally.failed} failed",
    )
    table.add_row("bytes in", f"{tally.bytes_in:,}")
    table.add_row(
        "bytes out",
        f"{tally.bytes_out:,} (1 : {tally.bytes_in / tally.bytes_out:.2f}, all columns)",
    )
    table.add_row("of it streams", f"{tally.stream_bytes:,}")
    checkpoint = sum(path.stat().st_size for path in archive.glob("codec/*/*"))
    table.add_row("checkpoint, once", f"{checkpoint:,}, carried by every archive")
    table.add_row("mean rate of streams", f"{report.mean_bpp or 0:.3f} bpp")
    table.add_row("mean PSNR of streams", f"{report.mean_psnr or 0:.2f} dB")
    table.add_row("seconds", f"{report.seconds:.1f} with the start of {report.workers} workers")
    table.add_row("verified", "sound" if exit_code == 0 else "DAMAGED")
    return table


def kinds_table(archive: Archive) -> Table:
    """The images that have no stream, and why: their bytes are in the archive untouched."""
    table = Table("key", "status", "why", "bytes", title="Not as a stream", title_justify="left")
    for view in archive.views(where="status != 'ok'"):
        table.add_row(view.key, view.status, view.error, f"{len(view.original):,}")
    return table


def states_table(archive: Archive, originals: dict[str, bytes]) -> Table:
    """Every stream decoded from its first states: the rate is chosen by the reader, too."""
    streams: list[tuple[Any, Array]] = [
        (view, load_pixels(originals[view.metadata["name"]]).image)
        for view in archive.views(where="status == 'ok'")
    ]
    table = Table(
        "states read", "streams that end here", "bytes", "bpp", "mean PSNR", "worst PSNR",
        title="Decoded from a prefix", title_justify="left",
    )  # fmt: skip
    area = sum(picture.shape[0] * picture.shape[1] for _, picture in streams)
    for count in range(1, max((view.num_states for view, _ in streams), default=0) + 1):
        num_bytes, scores = 0, []
        for view, picture in streams:
            states = min(count, view.num_states)
            num_bytes += len(view.bitstream(states))
            decoded = view.pixels(states=states)
            scores.append(archive.codec.measure([picture], [decoded])[0].psnr)
        table.add_row(
            f"{count}",
            f"{sum(view.num_states == count for view, _ in streams)}",
            f"{num_bytes:,}",
            f"{8 * num_bytes / area:.3f}",
            f"{np.mean(scores):.2f} dB",
            f"{min(scores):.2f} dB",
        )
    return table


if __name__ == "__main__":
    main()
