"""A side-by-side sheet: the original, then what each state shows of it, with its price."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec

GAP_PX = 12
FONT_PX = 18
CAPTION_PX = 2 * FONT_PX + 12
MIN_COLUMN_PX = 200  # room for a caption under a small picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One picture of a sheet."""

    image: npt.NDArray[np.uint8]
    """uint8 ``[H, W, 3]``."""

    caption: str
    """One or two lines."""


def comparison_sheet(
    images: Sequence[tuple[str, npt.NDArray[np.uint8]]],
    codec: ImageCodec,
    *,
    view: str = "machine",
    cell_px: int = 384,
) -> Image.Image:
    """Encode images and draw one row for each: original, state 1, state 2, ...

    Args:
        images: name and uint8 ``[H, W, 3]`` picture of each.
        codec: all its states are shown.
        view: which of its views. A human view is marked as generated.
        cell_px: longer side of a picture on the sheet; smaller pictures keep their size.

    Raises:
        EncodeError: an image cannot be encoded.
    """
    pictures = [picture for _, picture in images]
    streams = codec.encode(pictures, tags=[()] * len(images), exif_orientations=[1] * len(images))
    rows = [
        [
            Cell(image=picture, caption=f"{name}\noriginal"),
            *_state_cells(picture, stream, codec, view),
        ]
        for (name, picture), stream in zip(images, streams, strict=True)
    ]
    return draw_sheet(rows, cell_px=cell_px)


def draw_sheet(rows: Sequence[Sequence[Cell]], *, cell_px: int = 384) -> Image.Image:
    """Draw rows of captioned pictures on white. Raises ValueError if there is no cell."""
    if not any(rows):
        raise ValueError("a sheet has at least one cell")
    font = ImageFont.load_default(FONT_PX)
    thumbnails = [[_fitted(cell.image, cell_px) for cell in row] for row in rows]
    column_px = max(MIN_COLUMN_PX, *(image.width for row in thumbnails for image in row))
    row_px = [max((image.height for image in row), default=0) + CAPTION_PX for row in thumbnails]
    sheet = Image.new(
        "RGB",
        (
            max(len(row) for row in rows) * (column_px + GAP_PX) + GAP_PX,
            sum(row_px) + GAP_PX * (len(rows) + 1),
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    top = GAP_PX
    for row, images, height in zip(rows, thumbnails, row_px, strict=True):
        for column, (cell, image) in enumerate(zip(row, images, strict=True)):
            left = GAP_PX + column * (column_px + GAP_PX)
            sheet.paste(image, (left, top))
            lines = [_shortened(line, font, column_px) for line in cell.caption.split("\n")]
            draw.text((left, top + image.height + 4), "\n".join(lines), fill="black", font=font)
        top += height + GAP_PX
    return sheet


def _state_cells(
    picture: npt.NDArray[np.uint8], stream: bytes, codec: ImageCodec, view: str
) -> list[Cell]:
    cells = []
    generated = ", generated" if view == "human" else ""
    for k, end in enumerate(prefix_bytes(stream), start=1):
        (decoded,) = codec.decode([stream[:end]], view=view)
        (quality,) = codec.measure([picture], [decoded])
        bpp = 8 * end / (picture.shape[0] * picture.shape[1])
        caption = f"state {k}{generated}\n{bpp:.3f} bpp, {quality.psnr:.1f} dB"
        cells.append(Cell(image=decoded, caption=caption))
    return cells


def _fitted(image: npt.NDArray[np.uint8], cell_px: int) -> Image.Image:
    picture = Image.fromarray(image)
    picture.thumbnail((cell_px, cell_px), Image.Resampling.LANCZOS)
    return picture


def _shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    """The line, or as much of its end as fits: file names differ at their end."""
    if font.getlength(line) <= width_px:
        return line
    while line and font.getlength("..." + line) > width_px:
        line = line[1:]
    return "..." + line
