"""Bytes -> upright 8-bit RGB, exactly; or a reason why not.

Nothing is converted that would lose information in silence. What is neither grey, palette nor RGB
with 8 bits and one picture is *unsupported* (the pipeline keeps the original); what is damaged, cut
off or too large is *unreadable*. The bytes decide what the format is, never a name. One thing goes
unseen: a JPEG whose scan is cut but closed by an end marker, or flipped in the middle, which
libjpeg fills in without telling Pillow.

Pillow is called below ``Image.open``: that function warns about large images through the process's
global filters, and its limit is global. Sizes are checked here, before anything is decoded.
"""

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from dicmh_ray.bitstream import MAX_SIDE_PX
from dicmh_ray.errors import SourceImageError, UnreadableImageError, UnsupportedImageError
from dicmh_ray.source import structure
from dicmh_ray.source.magic import sniff_format

DEFAULT_MAX_PIXELS = 268_435_456

_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "AVIF": AvifImagePlugin.AvifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}
_UNSUPPORTED_MODES = {
    "CMYK": "cmyk",
    "F": "float",
    "HSV": "hsv",
    "I": "32-bit",
    "LAB": "lab",
    "RGBX": "extra-channel",
    "YCbCr": "ycbcr",
}
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"})
_TIFF_BITS, _TIFF_ORIENTATION, _TIFF_SAMPLE_FORMAT = 258, 274, 339
# These plugins report oddities of a file, or its size, through the global warning filters, which only
# a lock makes safe to set for a moment.
_WARNING_FORMATS = frozenset({"AVIF", "GIF", "TIFF"})
_STRIP_PIXELS = 2**22
_warnings_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixels:
    """A decoded image."""

    image: npt.NDArray[np.uint8] = field(repr=False)
    """``uint8 [H, W, 3]``, RGB, upright, C-contiguous."""

    exif_orientation: int
    """1..8 as the source states it; already applied."""

    exif: bytes | None = field(repr=False)
    """The Exif block verbatim."""

    icc: bytes | None = field(repr=False)
    """The colour profile verbatim; the samples are as stored, not converted."""

    format: str
    """"JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM" or "JPEG2000"."""

    is_grey: bool
    """The source has one channel, or a palette of greys."""


def load_pixels(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Decode one image to upright RGB.

    Grey and bilevel become RGB with three equal channels, palettes are looked up, alpha that is
    opaque everywhere is dropped.

    Args:
        data: a whole file of any format.
        max_pixels: width times height; checked before decoding.

    Raises:
        UnreadableImageError: ``empty``, ``not an image``, ``truncated``, ``damaged``,
            ``too many pixels``, ``out of memory``.
        UnsupportedImageError: ``alpha``, ``16-bit`` (also ``10-bit``, ``12-bit``, ``32-bit``,
            ``float``), ``cmyk``, ``ycck``, ``lab``, ``animated``, ``multi-frame``,
            ``multi-picture``, ``side above 65535 pixels``, or the name of a format that is known but not read (``heif``, ...).
    """
    if not data:
        raise UnreadableImageError("empty")
    name = sniff_format(data)
    if name is None:
        raise UnreadableImageError("not an image")
    if name not in _OPENERS:
        raise UnsupportedImageError(name.lower())
    try:
        with _quiet(name):
            return _load(data, name, max_pixels)
    except SourceImageError:
        raise
    except MemoryError as exc:
        raise UnreadableImageError("out of memory") from exc
    except Image.DecompressionBombError as exc:
        raise UnreadableImageError("too many pixels") from exc
    except Exception as exc:
        # Plugins meet hostile bytes with every exception there is (struct.error, KeyError, ...).
        reason = "truncated" if "truncated" in str(exc).lower() else "damaged"
        raise UnreadableImageError(reason) from exc


def stated_pixels(data: bytes) -> int:
    """Width times height as the header states it, nothing decoded; 0 where no header can be read.

    For planning memory, before :func:`load_pixels` says what the file really is.
    """
    name = sniff_format(data) if data else None
    if name not in _OPENERS:
        return 0
    try:
        with _quiet(name), _OPENERS[name](io.BytesIO(data)) as image:
            return image.width * image.height
    except Exception:  # noqa: BLE001  as in load_pixels, which will give the reason
        return 0


def _load(data: bytes, name: str, max_pixels: int) -> Pixels:
    exif = None
    if name == "JPEG":
        data, exif = structure.check_jpeg(data)
    else:
        _check_structure(data, name, max_pixels)
    with _OPENERS[name](io.BytesIO(data)) as image:
        if image.width * image.height > max_pixels:
            raise UnreadableImageError("too many pixels")
        if image.width == 0 or image.height == 0:
            raise UnreadableImageError("damaged")
        _check_kind(image, name)
        if max(image.size) > MAX_SIDE_PX:
            raise UnsupportedImageError(f"side above {MAX_SIDE_PX} pixels")
        turned = None
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # This plugin turns the picture itself while it loads.
            stated = image.tag_v2.get(_TIFF_ORIENTATION, 1)
            turned = stated if isinstance(stated, int) and 1 <= stated <= 8 else 1
        if name == "PNG":
            structure.check_png_rows(data)
        icc = image.info.get("icc_profile")
        image.load()
        exif = exif or _exif(image)  # not before: a PNG may have it behind its samples
        rgb, is_grey = _rgb(image, data, name)
        image.close()
    orientation = structure.exif_orientation(exif) if turned is None else turned
    return Pixels(
        image=np.ascontiguousarray(rgb if turned is not None else _upright(rgb, orientation)),
        exif_orientation=orientation,
        exif=exif,
        icc=icc if isinstance(icc, bytes) and icc else None,
        format=name,
        is_grey=is_grey,
    )


def _check_structure(data: bytes, name: str, max_pixels: int) -> None:
    match name:
        case "PNG":
            structure.check_png(data)
        case "GIF":
            structure.check_gif(data, max_pixels)
        case "WEBP":
            structure.check_webp(data)
        case "AVIF":
            structure.check_avif(data)
        case "JPEG2000":
            structure.check_jpeg2000(data)


def _check_kind(image: ImageFile.ImageFile, name: str) -> None:
    """Refuse what the header already shows to be of an unserved kind."""
    mode = image.mode
    if name == "TIFF":
        if getattr(image, "n_frames", 1) > 1:
            raise UnsupportedImageError("multi-frame")
        _check_tiff_samples(image)
    elif getattr(image, "n_frames", 1) > 1:
        raise UnsupportedImageError("animated")
    if mode == "CMYK" and name == "JPEG" and image.info.get("adobe_transform") == 2:
        raise UnsupportedImageError("ycck")
    if mode.startswith("I;16") or (mode == "I" and name in ("PNG", "PPM", "JPEG2000")):
        raise UnsupportedImageError("16-bit")
    if mode in _UNSUPPORTED_MODES:
        raise UnsupportedImageError(_UNSUPPORTED_MODES[mode])
    if mode not in _MODES:
        raise UnsupportedImageError(f"mode {mode}")
    if name == "PPM":
        args = image.tile[0].args
        if isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255:
            raise UnsupportedImageError("16-bit")


def _check_tiff_samples(image: ImageFile.ImageFile) -> None:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    formats = image.tag_v2.get(_TIFF_SAMPLE_FORMAT, (1,))
    bits = image.tag_v2.get(_TIFF_BITS, (1,))
    if 3 in (formats if isinstance(formats, tuple) else (formats,)):
        raise UnsupportedImageError("float")
    depth = max(bits if isinstance(bits, tuple) else (bits,))
    if depth > 8:
        raise UnsupportedImageError("32-bit" if depth > 16 else "16-bit")


def _exif(image: ImageFile.ImageFile) -> bytes | None:
    exif = image.info.get("exif")
    if isinstance(exif, bytes) and exif:
        return exif
    # ImageMagick's way of putting Exif into a PNG: three lines of heading, then hex digits.
    text = image.info.get("Raw profile type exif")
    if isinstance(text, str):
        try:
            return bytes.fromhex("".join(text.split("\n")[3:])) or None
        except ValueError:
            return None
    return None


def _rgb(image: Image.Image, data: bytes, name: str) -> tuple[npt.NDArray[np.uint8], bool]:
    """The samples as ``[H, W, 3]`` and whether the source is grey.

    Raises:
        UnsupportedImageError: a pixel is not opaque.
    """
    mode = image.mode
    if mode == "P":
        return _palette_rgb(image)
    if mode in ("PA", "La", "RGBa"):
        image = image.convert("RGBA" if mode != "La" else "LA")
        mode = image.mode
    if mode in ("LA", "RGBA") and image.getextrema()[-1] != (255, 255):
        raise UnsupportedImageError("alpha")
    samples = _samples(image, 1 if mode in ("1", "L", "LA") else 3)
    transparent = image.info.get("transparency")
    if transparent is not None and mode in ("1", "L", "RGB"):
        _check_colour_key(samples, transparent, data, name)
    if samples.shape[2] == 1:
        return np.repeat(samples, 3, axis=2), True
    return samples, False


def _samples(image: Image.Image, num_channels: int) -> npt.NDArray[np.uint8]:
    """The first channels as ``[H, W, num_channels]``, in strips: Pillow's own export of a whole
    picture holds it three times."""
    samples = np.empty((image.height, image.width, num_channels), np.uint8)
    num_rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        strip = np.asarray(image.crop((0, top, image.width, bottom)))
        strip = strip.reshape(bottom - top, image.width, -1)[..., :num_channels]
        samples[top:bottom] = strip
    if image.mode == "1":
        samples *= 255
    return samples


def _check_colour_key(
    samples: npt.NDArray[np.uint8], transparent: object, data: bytes, name: str
) -> None:
    """Refuse an image that uses its transparent colour (PNG's tRNS)."""
    if samples.shape[2] == 3:
        is_clear = (samples == np.asarray(transparent)).all(axis=2)
    elif not isinstance(transparent, int):
        raise UnsupportedImageError("alpha")
    else:
        # Pillow scales samples of 1, 2 and 4 bits but, depending on the version, not the key.
        scale = structure.png_grey_scale(data) if name == "PNG" else 1
        is_clear = np.isin(samples, [transparent & 0xFFFF, transparent * scale & 0xFFFF])
    if is_clear.any():
        raise UnsupportedImageError("alpha")


def _palette_rgb(image: Image.Image) -> tuple[npt.NDArray[np.uint8], bool]:
    indexes = np.asarray(image)
    alpha = np.full(256, 255, np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, bytes):
        alpha[: min(256, len(transparent))] = np.frombuffer(transparent[:256], np.uint8)
    elif isinstance(transparent, int):
        alpha[transparent & 255] = 0
    if image.palette is not None and image.palette.mode == "RGBA":
        stored = np.asarray(image.getpalette("RGBA"), np.uint8).reshape(-1, 4)[:, 3]
        alpha[: len(stored)] = np.minimum(alpha[: len(stored)], stored)
    is_used = np.bincount(indexes.ravel(), minlength=256) > 0
    if (alpha[is_used] != 255).any():
        raise UnsupportedImageError("alpha")
    palette = np.zeros((256, 3), np.uint8)
    colours = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    palette[: len(colours)] = colours
    used = palette[is_used]
    is_grey = bool((used[:, 0] == used[:, 1]).all() and (used[:, 1] == used[:, 2]).all())
    return palette[indexes], is_grey


def _upright(image: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Undo what the camera's Exif orientation 1..8 says was done to ``[H, W, 3]``."""
    match orientation:
        case 2:
            return image[:, ::-1]
        case 3:
            return image[::-1, ::-1]
        case 4:
            return image[::-1]
        case 5:
            return image.transpose(1, 0, 2)
        case 6:
            return image[::-1].transpose(1, 0, 2)
        case 7:
            return image[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            return image[:, ::-1].transpose(1, 0, 2)
        case _:
            return image


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    if name not in _WARNING_FORMATS:
        yield
        return
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
