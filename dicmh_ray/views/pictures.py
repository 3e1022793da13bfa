"""Originals that an archive kept, as pictures; and pictures made smaller."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dicmh_ray.errors import UnreadableImageError, UnsupportedImageError
from dicmh_ray.source import load_pixels

Picture = npt.NDArray[np.uint8]


def picture_of(data: bytes) -> Picture:
    """An original as an upright uint8 ``[H, W, 3]`` RGB picture, whatever its kind.

    Raises:
        UnreadableImageError: the bytes are damaged, or no image.
    """
    try:
        return load_pixels(data).image
    except UnsupportedImageError:
        pass  # a sound picture of another kind: it can be shown, only not coded
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return _shown(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise UnreadableImageError(f"original cannot be shown: {exc}") from exc


def reduced(image: Picture, max_side: int) -> Picture:
    """The picture no longer than ``max_side`` on either side, by Pillow's antialiased bicubic.

    Returns:
        uint8 ``[h, w, 3]``; a picture that is small enough is returned as it is.
    """
    height, width = image.shape[:2]
    return reduced_further(image, 1, height, width, max_side)


def reduction_for(height: int, width: int, max_side: int) -> int:
    """The largest of 1, 2, 4, 8 by which a picture can be reduced and is not below ``max_side``."""
    if max_side < 1:
        raise ValueError(f"max_side is {max_side}, wanted 1 or more")
    longest = max(height, width)
    return max(r for r in (1, 2, 4, 8) if r == 1 or r * max_side <= longest)


def reduced_further(
    image: Picture, reduction: int, height: int, width: int, max_side: int
) -> Picture:
    """The rest of the way from a picture that is reduced already.

    Args:
        image: uint8 ``[ceil(height / reduction), ceil(width / reduction), 3]``.
        reduction: its factor.
        height: of the whole picture.
        width: the same.
        max_side: of the result.
    """
    if max_side < 1:
        raise ValueError(f"max_side is {max_side}, wanted 1 or more")
    if max(height, width) <= max_side:
        return image
    scale = max_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # The last column and row may lie partly beyond the whole picture's edge.
    bottom, right = min(height / reduction, len(image)), min(width / reduction, len(image[0]))
    inside = (0, 0, right, bottom)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, inside))


def _shown(image: Image.Image) -> Picture:
    if image.mode.startswith("I") or image.mode == "F":
        samples = np.asarray(image, np.float64)
        scale = 1 / 257 if samples.max(initial=0) > 255 else 1
        grey = np.clip(np.rint(samples * scale), 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))
