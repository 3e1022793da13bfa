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
    """The picture no longer than ``max_side`` on either side: means of the pixels under each one.

    Returns:
        uint8 ``[h, w, 3]``; a picture that is small enough is returned as it is.
    """
    if max_side < 1:
        raise ValueError(f"max_side is {max_side}, wanted 1 or more")
    height, width = image.shape[:2]
    if max(height, width) <= max_side:
        return image
    scale = max_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


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
