"""What an image file says of itself, read from its structure before anything is decoded.

Pillow reduces 16-bit samples to 8 in silence, decodes a JPEG whose header promises a thousand times
what its bytes can hold, and shows the first frame of many. The walks here find such files first.
They read headers only, in one pass, and never allocate by what a header says.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from dicmh_ray.errors import UnreadableImageError, UnsupportedImageError

_CHECKED_CHUNKS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL"})
_EXIF_PREFIX = b"Exif\x00\x00"
_INFLATE_BYTES = 2**20
# (first column, first row, column step, row step) of each pass.
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_SOF_NAMES = {0: "baseline", 1: "extended", 2: "progressive"}
_JPEG_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})


class JpegFrame(NamedTuple):
    """The frame header of a JPEG; ``kind`` is the number of its SOF marker."""

    kind: int
    precision: int
    height: int
    width: int
    sampling: tuple[tuple[int, int], ...]
    """(horizontal, vertical) factors of each component."""

    @property
    def num_blocks(self) -> int:
        """8x8 blocks of all components."""
        h_max = max(h for h, _ in self.sampling)
        v_max = max(v for _, v in self.sampling)
        return sum(
            -(-self.width * h // (8 * h_max)) * -(-self.height * v // (8 * v_max))
            for h, v in self.sampling
        )


def check_jpeg(data: bytes) -> tuple[bytes, bytes | None]:
    """Refuse kinds of JPEG that Pillow cannot read exactly, and headers that lie about the size.

    Returns:
        The file without its Exif, which Pillow would parse for a resolution and warn about, and
        the Exif block verbatim, if any.

    Raises:
        UnsupportedImageError: 12 bits, lossless or arithmetic coding, several pictures in one file.
        UnreadableImageError: no frame, or fewer bytes than the smallest code for its blocks.
    """
    frame = None
    exif: list[bytes] = []
    rest: list[bytes] = []
    copied = 0
    for marker, start, end in _jpeg_segments(data):
        body = data[start + 4 : end]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and frame is None:
            frame = _jpeg_frame(marker - 0xC0, body)
        elif marker == 0xE2 and body.startswith(b"MPF\x00"):
            raise UnsupportedImageError("multi-picture")
        elif marker == 0xE1 and body.startswith(_EXIF_PREFIX):
            exif.append(body.removeprefix(_EXIF_PREFIX) if exif else body)
            rest.append(data[copied:start])
            copied = end
    if frame is None:
        raise UnreadableImageError("damaged")
    if frame.precision != 8:
        raise UnsupportedImageError(f"{frame.precision}-bit")
    if frame.kind not in _SOF_NAMES:
        raise UnsupportedImageError("lossless-jpeg" if frame.kind == 3 else "arithmetic-jpeg")
    # A sequential block is at least a DC and an end-of-block code of one bit each; in a progressive
    # file only the DC code is certain.
    min_bits = frame.num_blocks * (1 if frame.kind == 2 else 2)
    if len(data) * 8 < min_bits:
        raise UnreadableImageError("truncated")
    return (b"".join([*rest, data[copied:]]), b"".join(exif)) if exif else (data, None)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the segments up to the first scan, length and marker included."""
    pos = 2
    while pos + 4 <= len(data):
        if data[pos] != 0xFF:
            return
        marker = data[pos + 1]
        if marker == 0xFF:
            pos += 1
        elif marker in _JPEG_STANDALONE:
            pos += 2
        elif marker in (0xD9, 0xDA):
            return
        else:
            length = int.from_bytes(data[pos + 2 : pos + 4], "big")
            end = min(pos + 2 + max(2, length), len(data))
            yield marker, pos, end
            pos = end


def _jpeg_frame(kind: int, body: bytes) -> JpegFrame:
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        raise UnreadableImageError("damaged")
    precision, height, width, num_components = struct.unpack_from(">BHHB", body)
    factors = [body[7 + 3 * i] for i in range(num_components)]
    sampling = tuple((factor >> 4, factor & 15) for factor in factors)
    if not sampling or any(h == 0 or v == 0 for h, v in sampling):
        raise UnreadableImageError("damaged")
    return JpegFrame(kind, precision, height, width, sampling)


def check_png(data: bytes) -> None:
    """Walk the chunks to the end and check the sums of those that make the picture.

    Raises:
        UnsupportedImageError: 16 bits a sample, or animated.
        UnreadableImageError: cut off, or a checksum does not match.
    """
    pos = 8
    is_first = True
    while True:
        if pos + 12 > len(data):
            raise UnreadableImageError("truncated")
        length, kind = struct.unpack_from(">I4s", data, pos)
        end = pos + 12 + length
        if end > len(data):
            raise UnreadableImageError("truncated")
        if kind in _CHECKED_CHUNKS:
            (stated,) = struct.unpack_from(">I", data, end - 4)
            if zlib.crc32(memoryview(data)[pos + 4 : end - 4]) != stated:
                raise UnreadableImageError("damaged")
        if is_first and (kind != b"IHDR" or length != 13):
            raise UnreadableImageError("damaged")
        if kind == b"IHDR" and data[pos + 16] == 16:
            raise UnsupportedImageError("16-bit")
        if kind == b"acTL":
            raise UnsupportedImageError("animated")
        if kind == b"IEND":
            return
        is_first = False
        pos = end


def check_png_rows(data: bytes) -> None:
    """Inflate the rows once, keeping none: Pillow leaves rows black that the stream does not hold.

    To be called on a checked file whose size is within limits; stops at the size it must have.

    Raises:
        UnreadableImageError: too few bytes for the picture, or a damaged stream.
    """
    width, height, bits, colour, *_, is_interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    pixel_bits = bits * {2: 3, 4: 2, 6: 4}.get(colour, 1)
    passes = _ADAM7 if is_interlaced else ((0, 0, 1, 1),)
    missing = 0
    for left, top, step_x, step_y in passes:
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        if columns > 0 and rows > 0:
            missing += rows * (1 + (columns * pixel_bits + 7) // 8)
    inflater = zlib.decompressobj()
    for kind, start, end in _png_chunks(data):
        if kind != b"IDAT":
            continue
        packed = data[start:end]
        while missing > 0 and packed and not inflater.eof:
            missing -= len(inflater.decompress(packed, min(missing, _INFLATE_BYTES)))
            packed = inflater.unconsumed_tail
    if missing > 0:
        raise UnreadableImageError("truncated")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the content of each chunk of a checked file."""
    pos = 8
    while pos + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, pos)
        yield kind, pos + 8, pos + 8 + length
        pos += 12 + length


def png_grey_scale(data: bytes) -> int:
    """What a grey PNG's samples are multiplied by to fill 8 bits: 85 for 2 bits, 17 for 4."""
    return {1: 255, 2: 85, 4: 17}.get(data[24], 1)


def check_gif(data: bytes, max_pixels: int) -> None:
    """Count frames and measure them.

    Raises:
        UnsupportedImageError: more than one frame, or one that leaves part of the screen empty.
        UnreadableImageError: cut off, or over ``max_pixels``.
    """
    if len(data) < 13:
        raise UnreadableImageError("truncated")
    screen_width, screen_height, flags = struct.unpack_from("<HHB", data, 6)
    pos = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    num_frames = 0
    while pos < len(data) and data[pos] != 0x3B:
        introducer = data[pos]
        if introducer == 0x21:
            pos = _after_gif_blocks(data, pos + 2)
        elif introducer == 0x2C and pos + 10 <= len(data):
            num_frames += 1
            if num_frames > 1:
                raise UnsupportedImageError("animated")
            left, top, width, height, flags = struct.unpack_from("<HHHHB", data, pos + 1)
            right, bottom = max(left + width, screen_width), max(top + height, screen_height)
            if right * bottom > max_pixels:
                raise UnreadableImageError("too many pixels")
            if (left, top, width, height) != (0, 0, right, bottom):
                raise UnsupportedImageError("alpha")
            colours = 3 << (flags & 7) + 1 if flags & 0x80 else 0
            pos = _after_gif_blocks(data, pos + 11 + colours)
        else:
            raise UnreadableImageError("damaged")
    if not num_frames or pos >= len(data):
        raise UnreadableImageError("truncated")


def _after_gif_blocks(data: bytes, pos: int) -> int:
    """Position after a run of data blocks, each led by its length, ended by an empty one."""
    while pos < len(data) and data[pos]:
        pos += 1 + data[pos]
    return pos + 1


def check_jpeg2000(data: bytes) -> None:
    """Refuse samples of more than 8 bits.

    Raises:
        UnsupportedImageError: such samples.
        UnreadableImageError: no codestream.
    """
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 43:
        raise UnreadableImageError("truncated")
    (num_components,) = struct.unpack_from(">H", data, start + 40)
    depths = data[start + 42 : start + 42 + 3 * num_components : 3]
    if any((depth & 0x7F) + 1 > 8 for depth in depths):
        raise UnsupportedImageError("16-bit")


def check_avif(data: bytes) -> None:
    """Refuse 10 and 12 bits a sample.

    Raises:
        UnsupportedImageError: such samples.
    """
    for match in re.finditer(b"av1C\x81", data[: 2**20]):
        config = data[match.end() : match.end() + 2]
        if len(config) == 2 and config[1] & 0x40:
            raise UnsupportedImageError("12-bit" if config[1] & 0x20 else "10-bit")


def check_webp(data: bytes) -> None:
    """Refuse a file shorter than its own header says.

    Raises:
        UnreadableImageError: it is.
    """
    if len(data) < 16 or int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise UnreadableImageError("truncated")


def exif_orientation(exif: bytes | None) -> int:
    """The orientation 1..8 that an Exif block states; 1 where it states none or nonsense."""
    if not exif:
        return 1
    exif = exif.removeprefix(_EXIF_PREFIX)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 14:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    if start + 2 > len(exif):
        return 1
    (num_entries,) = struct.unpack_from(f"{order}H", exif, start)
    for pos in range(start + 2, min(start + 2 + 12 * num_entries, len(exif) - 11), 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", exif, pos)
        if tag == 0x0112:
            (value,) = struct.unpack_from(f"{order}H", exif, pos + 8)
            return value if kind == 3 and count == 1 and 1 <= value <= 8 else 1
    return 1
