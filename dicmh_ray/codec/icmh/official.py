"""The container that the official Diff-ICMH program writes: one file an image, no extension.

All numbers are big-endian u32:

    z height | z width | 2 | length, y bytes | length, z bytes
    [ number of tags | 13 | length, tag payload ]

The part in brackets is there when the program ran with tags. A tag is the 13-bit number of a word
in its list of 4,585; the numbers lie packed, most significant bit first, and end in zero bits.

The container has no magic number, checksum, image size, model or seed. What can be checked is
checked: no length is believed before it is compared with the bytes there, and each fault raises a
:class:`~dicmh_ray.errors.BitstreamError` that names the field. A cut exactly where the tag part
starts leaves a sound file without tags; only a caller who knows that there were tags can tell.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from dicmh_ray.bitstream import MAX_AREA_PX, MAX_SIDE_PX
from dicmh_ray.errors import InvalidHeaderError, TruncatedBitstreamError

PIXELS_PER_Z = 64
"""Pixels, along one side, that one position of z stands for; pictures are padded to multiples."""

TAG_BITS = 13
NUM_TAGS = 4585
"""Words of the official list: tag ids are 0..4584."""

MIN_STRING_BYTES = 8
"""compressai's coder ends each string with two 32-bit words of state, and reads them unasked."""

_WORD_BYTES = 4
_NUM_STRINGS = 2
_U32 = struct.Struct(">I")
_MAX_Z_SIDE = -(-MAX_SIDE_PX // PIXELS_PER_Z)
_MAX_Z_AREA = MAX_AREA_PX // PIXELS_PER_Z**2


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialStream:
    """What an official file says. Raises InvalidHeaderError for a field outside its range."""

    z_shape: tuple[int, int]
    """Rows and columns of z: a 64th of the padded height and width."""

    y_string: bytes
    """compressai's rANS stream of y: whole 32-bit words, two at least."""

    z_string: bytes
    """The same of z."""

    tag_ids: tuple[int, ...] | None
    """Numbers of words, 0..4584, in the order of the file. None: there is no tag part."""

    def __post_init__(self) -> None:
        height, width = self.z_shape
        for name, side in (("z height", height), ("z width", width)):
            if not 1 <= side <= _MAX_Z_SIDE:
                raise InvalidHeaderError(name, side, f"1..{_MAX_Z_SIDE}")
        if height * width > _MAX_Z_AREA:
            raise InvalidHeaderError("z shape", (height, width), f"{_MAX_Z_AREA} positions at most")
        for name, string in (("y", self.y_string), ("z", self.z_string)):
            if len(string) < MIN_STRING_BYTES or len(string) % _WORD_BYTES:
                wanted = f"a multiple of {_WORD_BYTES}, {MIN_STRING_BYTES} at least"
                raise InvalidHeaderError(f"length of {name}", len(string), wanted)
        _check_tag_ids(self.tag_ids or ())

    @property
    def padded_size(self) -> tuple[int, int]:
        """Width and height in pixels of the picture as it was coded, with its padding."""
        height, width = self.z_shape
        return width * PIXELS_PER_Z, height * PIXELS_PER_Z

    def check_size(self, width: int, height: int) -> None:
        """Whether a picture of so many pixels was padded to this stream's size.

        Raises:
            InvalidHeaderError: it was not; the stream is of another picture.
        """
        wanted = (-(-height // PIXELS_PER_Z), -(-width // PIXELS_PER_Z))
        if self.z_shape != wanted:
            raise InvalidHeaderError("z shape", self.z_shape, f"{wanted} for {width}x{height}")


@runtime_checkable
class OfficialTranscoder(Protocol):
    """What a codec of official weights does besides :class:`~dicmh_ray.codec.ImageCodec`."""

    def import_official(self, stream: OfficialStream, *, width: int, height: int) -> bytes:
        """Our stream of the picture, of so many pixels, that an official file holds."""

    def export_official(self, data: bytes) -> bytes:
        """The official file of one of our streams."""


def parse_official(data: bytes, *, has_tags: bool | None = None) -> OfficialStream:
    """Read an official file.

    Args:
        data: the whole file.
        has_tags: whether the program ran with tags. None: they are there if anything is.

    Raises:
        TruncatedBitstreamError: the bytes end within a field, which it names.
        InvalidHeaderError: a field is outside its range, or bytes are left over.
    """
    reader = _Reader(data)
    z_shape = reader.number("z height"), reader.number("z width")
    num_strings = reader.number("number of strings")
    if num_strings != _NUM_STRINGS:
        raise InvalidHeaderError("number of strings", num_strings, str(_NUM_STRINGS))
    y_string = reader.string("y")
    z_string = reader.string("z")
    tag_ids = None
    if has_tags or (has_tags is None and reader.left):
        tag_ids = reader.tags()
    if reader.left:
        raise InvalidHeaderError("bytes after the end", reader.left, "0")
    return OfficialStream(z_shape=z_shape, y_string=y_string, z_string=z_string, tag_ids=tag_ids)


def write_official(stream: OfficialStream) -> bytes:
    """The file of a stream; the inverse of :func:`parse_official`."""
    parts = [_U32.pack(number) for number in (*stream.z_shape, _NUM_STRINGS)]
    for string in (stream.y_string, stream.z_string):
        parts += [_U32.pack(len(string)), string]
    if stream.tag_ids is not None:
        payload = pack_tag_ids(stream.tag_ids)
        parts += [_U32.pack(n) for n in (len(stream.tag_ids), TAG_BITS, len(payload))]
        parts.append(payload)
    return b"".join(parts)


def pack_tag_ids(tag_ids: Sequence[int]) -> bytes:
    """13 bits a tag, most significant bit first, zero bits up to a whole byte.

    Raises:
        InvalidHeaderError: an id is outside 0..4584.
    """
    _check_tag_ids(tag_ids)
    ids = np.asarray(tag_ids, np.uint16)
    bits = ids[:, None] >> np.arange(TAG_BITS - 1, -1, -1, dtype=np.uint16) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def unpack_tag_ids(payload: bytes, count: int) -> tuple[int, ...]:
    """The inverse of :func:`pack_tag_ids`.

    Raises:
        InvalidHeaderError: the payload has not the length of ``count`` tags, does not end in zero
            bits, or has an id outside 0..4584.
    """
    wanted = (count * TAG_BITS + 7) // 8
    if len(payload) != wanted:
        raise InvalidHeaderError("length of tags", len(payload), f"{wanted} for {count} tags")
    bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    if bits[count * TAG_BITS :].any():
        raise InvalidHeaderError("bits after the last tag", payload[-1:].hex(), "zeros")
    places = 1 << np.arange(TAG_BITS - 1, -1, -1)
    ids = bits[: count * TAG_BITS].reshape(count, TAG_BITS) @ places
    tag_ids = tuple(int(one) for one in ids)
    _check_tag_ids(tag_ids)
    return tag_ids


def _check_tag_ids(tag_ids: Sequence[int]) -> None:
    for one in tag_ids:
        if not 0 <= one < NUM_TAGS:
            raise InvalidHeaderError("tag id", one, f"0..{NUM_TAGS - 1}")


class _Reader:
    """A position in the bytes, which never passes their end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, field: str, count: int) -> bytes:
        if count > self.left:
            raise TruncatedBitstreamError(field, count, self.left)
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, field: str) -> int:
        return int(_U32.unpack(self.take(field, _U32.size))[0])

    def string(self, field: str) -> bytes:
        return self.take(field, self.number(f"length of {field}"))

    def tags(self) -> tuple[int, ...]:
        count = self.number("number of tags")
        bits = self.number("bits of a tag")
        if bits != TAG_BITS:
            raise InvalidHeaderError("bits of a tag", bits, str(TAG_BITS))
        return unpack_tag_ids(self.string("tags"), count)
