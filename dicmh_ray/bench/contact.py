"""Contact sheets: what the figures look like, and where the codec fails worst.

Pictures are kept as thumbnails and crops while a set is measured, so a sheet of the worst can be
chosen at the end without holding the set.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dicmh_ray.bench.equal_bytes import Contender, contenders
from dicmh_ray.bench.metrics import Yardstick
from dicmh_ray.bench.rd import BenchOptions
from dicmh_ray.bench.sheet import Cell, draw_sheet
from dicmh_ray.bench.subject import Subject
from dicmh_ray.vision.onnx_net import Picture

CELL_PX = 240
CROP_PX = 160
TILE_PX = 64
PAGE_PICTURES = 2
NUM_WORST = 6
MAX_SHEET_BYTES = 390_000
FAILURE_BPP = 0.15
"""Failures are looked for at the state nearest to this rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exhibit:
    """What the sheets show of one picture."""

    name: str
    rows: tuple[tuple[Cell, ...], ...]
    """For up to three states the original, then every method at equal bytes."""

    failure: tuple[Cell, ...]
    """The row of the failures' state."""

    crops: tuple[Cell, ...]
    """The same around our worst tile."""

    distance: float | None
    """Of our first view at that state, by the first judge; None without a judge."""

    worst_tile_psnr: float
    """Of our first view at that state, dB."""


def exhibit(
    subject: Subject,
    yardstick: Yardstick,
    states: Sequence[int],
    failure_state: int,
    options: BenchOptions,
) -> Exhibit:
    """Prepare one picture's part of the sheets.

    Args:
        subject: the picture.
        yardstick: measures it; what it knows already costs nothing.
        states: of which the lowest, middle and highest are shown.
        failure_state: one of ``states``.
        options: as for the evaluation that goes with the sheets.
    """
    shown = sorted({states[0], states[len(states) // 2], states[-1], failure_state})
    rows: dict[int, list[Contender]] = {state: [] for state in shown}
    for one in contenders(subject, shown, options):
        rows[one.state].append(one)
    ours = rows[failure_state][0]
    metrics = yardstick.measure(ours.method, ours.setting, ours.decoded)
    distances = [value for name, value in metrics.items() if name.startswith("distance:")]
    corner = worst_corner(subject.image, ours.decoded.image)

    def whole(image: Picture) -> Picture:
        thumbnail = Image.fromarray(image)
        thumbnail.thumbnail((CELL_PX, CELL_PX), Image.Resampling.LANCZOS)
        return np.asarray(thumbnail)

    def crop(image: Picture) -> Picture:
        top, left = corner
        return image[top : top + CROP_PX, left : left + CROP_PX].copy()

    def row(state: int, view: Callable[[Picture], Picture]) -> tuple[Cell, ...]:
        return (
            Cell(image=view(subject.image), caption=f"{subject.name}\noriginal"),
            *(
                Cell(image=view(one.decoded.image), caption=_caption(subject, yardstick, one))
                for one in rows[state]
            ),
        )

    return Exhibit(
        name=subject.name,
        rows=tuple(row(state, whole) for state in shown),
        failure=row(failure_state, whole),
        crops=row(failure_state, crop),
        distance=distances[0] if distances else None,
        worst_tile_psnr=metrics["worst_tile_psnr"],
    )


def write_sheets(exhibits: Sequence[Exhibit], folder: str | Path, *, pages: int) -> list[Path]:
    """Write ``sheet-N.jpg``, ``worst-by-distance.jpg`` and ``worst-tiles.jpg``; returns paths.

    Args:
        exhibits: at least one.
        folder: is created.
        pages: of two pictures each, from the first ones.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for page in range(min(pages, -(-len(exhibits) // PAGE_PICTURES))):
        shown = exhibits[page * PAGE_PICTURES : (page + 1) * PAGE_PICTURES]
        rows = [row for one in shown for row in one.rows]
        written.append(_write(rows, folder / f"sheet-{page + 1}.jpg", CELL_PX))
    judged = [one for one in exhibits if one.distance is not None]
    if judged:
        worst = sorted(judged, key=lambda one: -(one.distance or 0.0))[:NUM_WORST]
        rows = [one.failure for one in worst]
        written.append(_write(rows, folder / "worst-by-distance.jpg", CELL_PX))
    worst = sorted(exhibits, key=lambda one: one.worst_tile_psnr)[:NUM_WORST]
    rows = [one.crops for one in worst]
    written.append(_write(rows, folder / "worst-tiles.jpg", CROP_PX))
    return written


def worst_corner(original: Picture, decoded: Picture) -> tuple[int, int]:
    """Top and left of a crop around the tile with the largest error, inside the picture."""
    error = np.square(original.astype(np.float32) - decoded).sum(axis=2)
    height, width = error.shape
    rows, columns = np.arange(0, height, TILE_PX), np.arange(0, width, TILE_PX)
    sums = np.add.reduceat(np.add.reduceat(error, rows, axis=0), columns, axis=1)
    areas = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    tile_row, tile_column = np.unravel_index(int((sums / areas).argmax()), sums.shape)
    margin = (CROP_PX - TILE_PX) // 2
    top = min(int(rows[tile_row]) - margin, height - CROP_PX)
    left = min(int(columns[tile_column]) - margin, width - CROP_PX)
    return max(0, top), max(0, left)


def _caption(subject: Subject, yardstick: Yardstick, one: Contender) -> str:
    psnr = yardstick.measure(one.method, one.setting, one.decoded)["psnr"]
    name = f"{one.method} (generated)" if one.method.endswith(" human") else one.method
    over = ", smallest" if one.is_over else ""
    return f"{name}{over}\n{subject.bpp(one.decoded.num_bytes):.3f} bpp, {psnr:.1f} dB"


def _write(rows: Sequence[Sequence[Cell]], path: Path, cell_px: int) -> Path:
    """As a JPEG of the best quality that stays small."""
    sheet = draw_sheet(rows, cell_px=cell_px)
    for quality in (88, 80, 70, 60, 45):
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality, optimize=True, progressive=True)
        if file.tell() <= MAX_SHEET_BYTES:
            break
    path.write_bytes(file.getvalue())
    return path
