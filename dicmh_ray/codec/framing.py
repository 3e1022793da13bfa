"""What a header keeps of a picture, and what it gives back to the samples that a network decodes."""

import numpy as np
import numpy.typing as npt

from dicmh_ray.bitstream import MAX_AREA_PX, MAX_SIDE_PX, Header
from dicmh_ray.errors import EncodeError

Image = npt.NDArray[np.uint8]


def header_of(image: Image, *, codec_id: str, exif_orientation: int, num_states: int) -> Header:
    """The header of a picture, uint8 ``[H, W, 3]``: its size, and whether it is grey.

    Raises:
        ValueError: the array is no picture.
        EncodeError: the picture is larger than a header can say.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is {image.dtype} {image.shape}, wanted uint8 [H, W, 3]")
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE_PX or height * width > MAX_AREA_PX:
        raise EncodeError(
            f"the picture is {width}x{height}, wanted sides of at most {MAX_SIDE_PX} "
            f"and {MAX_AREA_PX} pixels in all"
        )
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    return Header(
        codec_id=codec_id,
        width=width,
        height=height,
        exif_orientation=exif_orientation,
        is_grey=bool((red == green).all() and (red == blue).all()),
        num_states=num_states,
    )


def framed(image: Image, header: Header, reduction: int = 1) -> Image:
    """A decoded picture without the padding of its last cells, and grey where the original was.

    With a ``reduction``, each sample stands for that many in both directions.
    """
    height, width = -(-header.height // reduction), -(-header.width // reduction)
    image = np.ascontiguousarray(image[:height, :width])
    if header.is_grey:
        image[:] = np.rint(image.mean(2, keepdims=True, dtype=np.float32)).astype(np.uint8)
    return image
