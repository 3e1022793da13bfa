"""A small collection of pictures, and a judge of what became of it."""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from dicmh_ray.archive import EncodedImage, open_snapshot, verify_archive
from dicmh_ray.errors import ArchiveError
from dicmh_ray.reader import ArchiveReader

BLOBS = ("base", "detail", "original")


def make_collection(
    folder: Path, *, images: int, per_tar: int, seed: int, side: int = 64, first_key: int = 0
) -> list[str]:
    """Tars of JPEGs: smooth random pictures of ``side`` to twice as many pixels a side.

    Args:
        folder: where the tars go; it must exist.
        images: how many in all.
        per_tar: how many a tar.
        seed: of the pictures.
        side: shortest width, pixels.
        first_key: number in the first picture's key, so that collections can be added up.

    Returns:
        the tars' paths.
    """
    rng = np.random.default_rng(seed)
    tars = []
    for first in range(first_key, first_key + images, per_tar):
        path = folder / f"shard-{first:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + per_tar, first_key + images)):
                coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
                size = int(rng.integers(side, 2 * side + 1)), side * 3 // 2
                picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                picture.save(buffer, "JPEG", quality=95)
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
        tars.append(str(path))
    return tars


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All that a reader finds in an archive."""

    rows: Mapping[str, EncodedImage]
    """By key, whole."""

    part_sha256: tuple[str, ...] | None
    """Of every part's file, in row order; None where they do not matter.

    A part that a compaction made names the commits that it was made from, each with its attempt.
    """

    @classmethod
    def read(cls, archive: str, storage_options: Mapping[str, Any] | None = None) -> Self:
        """Read everything.

        Raises:
            ValueError: a key is there twice.
        """
        snapshot = open_snapshot(archive, storage_options=storage_options)
        rows: dict[str, EncodedImage] = {}
        for row in ArchiveReader(snapshot).rows(blobs=BLOBS):
            if row.key in rows:
                raise ValueError(f"{row.key!r} is there twice")
            rows[row.key] = row
        return cls(rows=rows, part_sha256=tuple(part.sha256 for part in snapshot.parts))


def judge(
    archive: str, expected: Contents, storage_options: Mapping[str, Any] | None = None
) -> list[str]:
    """What is wrong with an archive: lost, duplicated, unreadable or other rows, or other bytes."""
    report = verify_archive(archive, storage_options=storage_options)
    faults = [str(problem) for problem in report.problems]
    if report.unchecked:
        faults.append(report.unchecked)
    if not report.is_complete:
        faults.append("has no manifest")
    try:
        found = Contents.read(archive, storage_options)
    except (ValueError, ArchiveError) as exc:
        return [*faults, str(exc)]
    faults += [f"{key!r} is missing" for key in expected.rows.keys() - found.rows.keys()]
    faults += [f"{key!r} is not of the source" for key in found.rows.keys() - expected.rows.keys()]
    faults += [
        f"{key!r} differs from the undisturbed run"
        for key in expected.rows.keys() & found.rows.keys()
        if found.rows[key] != expected.rows[key]
    ]
    if expected.part_sha256 not in (None, found.part_sha256):
        faults.append("its parts have other bytes than the undisturbed run's")
    return faults
