"""Bitstream v1: the bytes of one image, framed and checked. The contract is schemas/bitstream.v1.md.

    header | header CRC || state 0 | symbol CRC | CRC || state 1 | symbol CRC | CRC || ...

The checksum after a state covers everything before it, so a stream cut after any state is itself
a complete stream of fewer states. This module knows nothing of what a state's payload means, needs
no more than numpy, and raises a :class:`~dicmh_ray.errors.BitstreamError` on any bytes whatever:
no length is believed, and nothing is allocated from it, before it is compared with the bytes there.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from dicmh_ray.checksum import crc32c
from dicmh_ray.errors import (
    ChecksumError,
    InvalidHeaderError,
    NotABitstreamError,
    TruncatedBitstreamError,
    UnsupportedVersionError,
)
from dicmh_ray.tags import MAX_TAGS_BYTES, Vocabulary, decode_tags, encode_tags

__all__ = [
    "Bitstream",
    "Header",
    "State",
    "Vocabulary",
    "crc32c",
    "parse_bitstream",
    "prefix_bytes",
    "write_bitstream",
]

MAGIC = b"DICM"
VERSION = 1

MAX_SIDE_PX = 65_535
MAX_AREA_PX = 268_435_456
MAX_STATES = 16
MAX_PAYLOAD_BYTES = 64 * 2**20

_FIXED = struct.Struct("<4sBB8sHHBH")
_U32 = struct.Struct("<I")
_APPLIED, _GREY, _RESERVED = 0x08, 0x10, 0xE0


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a stream says about its image. Raises ValueError for a field outside its range."""

    codec_id: str
    """SHA-256 of the checkpoint, 64 lower-case hex digits. Only the first 16 travel in the stream:
    a parsed header has 16, and compares equal to a written one only by ``codec_id[:16]``."""

    width: int
    """Pixels, 1..65535; ``width * height`` is at most 268,435,456."""

    height: int
    """Pixels, 1..65535."""

    exif_orientation: int = 1
    """EXIF orientation (1..8) found in the source."""

    orientation_applied: bool = True
    """The coded picture is upright; nothing is left for a viewer to turn."""

    is_grey: bool = False
    """The source had one channel."""

    num_states: int
    """States (1..16) of the stream as first encoded. A prefix has fewer and keeps this number."""

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{16}|[0-9a-f]{64}", self.codec_id):
            raise ValueError(f"codec_id is {self.codec_id!r}, wanted 16 or 64 hex digits")
        if not 1 <= self.exif_orientation <= 8:
            raise ValueError(f"exif_orientation is {self.exif_orientation}, wanted 1..8")
        for name, found, wanted in _range_faults(self.width, self.height, self.num_states):
            raise ValueError(f"{name} is {found}, wanted {wanted}")


@dataclass(frozen=True, slots=True)
class State:
    """One state: what the coder wrote, and how the reader knows that it decoded right."""

    payload: bytes
    """The codec's bytes, at most 64 MiB."""

    symbol_crc: int
    """CRC-32C of the symbols the payload decodes to; which bytes those are is the codec's spec."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bitstream:
    """A parsed stream or prefix. Every checksum but the symbols' has been verified."""

    header: Header
    tags: tuple[str, ...]
    states: tuple[State, ...]

    prefix_bytes: tuple[int, ...]
    """End offset of each state: ``data[:prefix_bytes[k]]`` is a valid stream of ``k + 1`` states."""


def write_bitstream(
    header: Header,
    tags: Sequence[str],
    states: Sequence[State],
    *,
    vocabulary: Vocabulary | None = None,
) -> bytes:
    """Frame states as one stream.

    Args:
        header: as it should be read back, except that only 16 digits of ``codec_id`` are kept.
        tags: at most 256, each 1..255 bytes of UTF-8, none twice, no control characters.
        states: the first ones of ``header.num_states``, in order; at least one.
        vocabulary: codes the tags it contains by number; the reader then needs it too.

    Raises:
        ValueError: an argument is outside its range, or the tags need more than 4096 bytes.
    """
    if not 1 <= len(states) <= header.num_states:
        raise ValueError(f"{len(states)} states for a header of {header.num_states}")
    tags_section = encode_tags(tags, vocabulary)
    flags = header.exif_orientation - 1
    flags |= _APPLIED * header.orientation_applied | _GREY * header.is_grey
    head = _FIXED.pack(
        MAGIC,
        VERSION,
        flags,
        bytes.fromhex(header.codec_id[:16]),
        header.width,
        header.height,
        header.num_states,
        len(tags_section),
    )
    out = [head, tags_section]
    crc = crc32c(head + tags_section)
    out.append(_U32.pack(crc))
    for k, state in enumerate(states):
        if len(state.payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"state {k} has {len(state.payload)} bytes, over {MAX_PAYLOAD_BYTES}")
        if not 0 <= state.symbol_crc < 2**32:
            raise ValueError(f"state {k} has symbol_crc {state.symbol_crc}, wanted 32 bits")
        section = (_U32.pack(len(state.payload)), state.payload, _U32.pack(state.symbol_crc))
        for piece in section:
            crc = crc32c(piece, crc)
        out += [*section, _U32.pack(crc)]
    return b"".join(out)


def parse_bitstream(
    data: bytes, *, vocabulary: Vocabulary | None = None, drop_cut_state: bool = False
) -> Bitstream:
    """Read a stream, or a prefix of one that ends after a state, and verify its checksums.

    The symbol checksums are left to the codec, which alone can compute them.

    Args:
        data: the whole of the bytes: anything after the last state is an error.
        vocabulary: needed when the tags were written with one.
        drop_cut_state: bytes that end inside state ``k >= 1`` give the ``k`` states before it
            instead of an error. For previews of a download in progress; a damaged length can then
            pass for a cut.

    Raises:
        NotABitstreamError: the magic number is missing.
        UnsupportedVersionError: a version other than 1.
        TruncatedBitstreamError: the bytes end inside the header, inside a state, or before any.
        InvalidHeaderError: a field is outside its range, the vocabulary is missing or another,
            or bytes follow the last state.
        ChecksumError: the bytes were changed.
    """
    header, tags_section, states, ends = _walk(data, drop_cut_state)
    return Bitstream(
        header=header,
        tags=decode_tags(tags_section, vocabulary),
        states=states,
        prefix_bytes=ends,
    )


def read_header(data: bytes) -> Header:
    """The header of a stream alone; needs no vocabulary. Raises as ``parse_bitstream``."""
    return _read_header(bytes(data))[0]


def prefix_bytes(data: bytes) -> tuple[int, ...]:
    """End offset of every state of a stream; needs no vocabulary. Raises as ``parse_bitstream``."""
    return _walk(data, drop_cut_state=False)[3]


def _walk(
    data: bytes, drop_cut_state: bool
) -> tuple[Header, bytes, tuple[State, ...], tuple[int, ...]]:
    data = bytes(data)
    header, tags_section, crc, pos = _read_header(data)
    states: list[State] = []
    ends: list[int] = []
    while not states or pos < len(data):
        name = f"state {len(states)}"
        if len(states) == header.num_states:
            raise InvalidHeaderError("trailing bytes", len(data) - pos, f"none before {name}")
        try:
            end_of_length = _need(data, pos, 4, name)
            (length,) = _U32.unpack_from(data, pos)
            if length > MAX_PAYLOAD_BYTES:
                raise InvalidHeaderError(f"{name} length", length, f"0..{MAX_PAYLOAD_BYTES}")
            end = _need(data, end_of_length, length + 8, name)
        except TruncatedBitstreamError:
            if drop_cut_state and states:
                break
            raise
        symbol_crc, found = struct.unpack_from("<II", data, end - 8)
        crc = crc32c(data[pos : end - 4], crc)
        if crc != found:
            raise ChecksumError(name, found, crc)
        states.append(State(data[end_of_length : end - 8], symbol_crc))
        ends.append(end)
        pos = end
    return header, tags_section, tuple(states), tuple(ends)


def _read_header(data: bytes) -> tuple[Header, bytes, int, int]:
    """The header, its tags section, its CRC (which the states continue) and where it ends."""
    if not MAGIC.startswith(data[:4]):
        raise NotABitstreamError(data[:4])
    _need(data, 0, 5, "header")
    if data[4] != VERSION:
        raise UnsupportedVersionError(data[4], VERSION)
    tags_at = _need(data, 0, _FIXED.size, "header")
    _, _, flags, codec_id, width, height, num_states, tags_bytes = _FIXED.unpack_from(data)
    if tags_bytes > MAX_TAGS_BYTES:
        raise InvalidHeaderError("tags length", tags_bytes, f"0..{MAX_TAGS_BYTES}")
    end = _need(data, tags_at, tags_bytes + 4, "header")
    crc = crc32c(data[: end - 4])
    (found,) = _U32.unpack_from(data, end - 4)
    if crc != found:
        raise ChecksumError("header", found, crc)
    if flags & _RESERVED:
        raise InvalidHeaderError("flags", flags, "bits 5-7 zero")
    for fault in _range_faults(width, height, num_states):
        raise InvalidHeaderError(*fault)
    header = Header(
        codec_id=codec_id.hex(),
        width=width,
        height=height,
        exif_orientation=(flags & 7) + 1,
        orientation_applied=bool(flags & _APPLIED),
        is_grey=bool(flags & _GREY),
        num_states=num_states,
    )
    return header, data[tags_at : end - 4], crc, end


def _range_faults(width: int, height: int, num_states: int) -> list[tuple[str, int, str]]:
    """The same limits for writer and reader; each says it with its own error."""
    rules = (
        ("width", width, MAX_SIDE_PX),
        ("height", height, MAX_SIDE_PX),
        ("num_states", num_states, MAX_STATES),
        ("area", width * height, MAX_AREA_PX),
    )
    return [(name, n, f"1..{limit}") for name, n, limit in rules if not 1 <= n <= limit]


def _need(data: bytes, pos: int, length: int, section: str) -> int:
    """``pos + length``, after making sure that the bytes are there."""
    if len(data) - pos < length:
        raise TruncatedBitstreamError(section, length, len(data) - pos)
    return pos + length
