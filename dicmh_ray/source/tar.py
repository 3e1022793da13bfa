"""The members of a tar, one after the other, from bytes that may want to do harm.

Reads v7, ustar, GNU (long names, base-256 sizes) and pax (``path``, ``size``) archives. Unlike
``tarfile`` in stream mode it checks every header's sum, caps headers and members, goes on after an
end mark that more members follow (``cat a.tar b.tar``), and calls an archive that ends without its
end mark truncated, because a tar that was cut between two members looks exactly like that.

    512-byte header  [long name | pax records]*  header  data, padded to 512  ...  two zero blocks
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from dicmh_ray.errors import SourceFormatError
from dicmh_ray.source.options import SourceOptions
from dicmh_ray.source.unpack import TarBytes

BLOCK_BYTES = 512
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_MAX_SIZE = 2**63 - 1
_REGULAR = b"\x00" + b"07"
NOT_A_FILE = frozenset({"tar hard link", "tar symbolic link", "tar device", "tar fifo"})
"""Problems of members that have no bytes of their own."""

_KINDS_WITHOUT_DATA = {
    b"1": "tar hard link",
    b"2": "tar symbolic link",
    b"3": "tar device",
    b"4": "tar device",
    b"5": "tar directory",
    b"6": "tar fifo",
}


class TarMember(NamedTuple):
    """One member. ``data`` is None where it was not read; ``problem`` says why, in a few words."""

    name: bytes
    data: bytes | None
    data_offset: int
    num_bytes: int
    problem: str | None


class _Extension:
    """What long-name and pax headers say about the next member."""

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.num_bytes: int | None = None
        self.header_bytes = 0
        self.problem: str | None = None


def iter_members(
    stream: TarBytes, options: SourceOptions, *, wanted: Callable[[bytes, int], str | None]
) -> Iterator[TarMember]:
    """Yield every member in order, directories excepted.

    Args:
        stream: positioned at the first header.
        options: the caps.
        wanted: asked with name and size before a member's data are read; returns None to have
            them read, else the problem to report instead.

    Raises:
        SourceFormatError: a header is damaged or the archive ends early; what came before has
            been yielded. The message has the offset.
    """
    extension = _Extension()
    while (header := _next_header(stream)) is not None:
        header_offset = stream.offset - BLOCK_BYTES
        kind = header[156:157]
        num_bytes = _number(stream, header, 124, 12, header_offset)
        if kind in b"LKxXg":
            _read_extension(stream, kind, num_bytes, extension, options)
            continue
        if extension.num_bytes is not None:
            num_bytes = extension.num_bytes
        name = extension.name if extension.name is not None else _header_name(header)
        problem, extension = extension.problem, _Extension()
        if kind in _KINDS_WITHOUT_DATA or (kind == b"\x00" and name.endswith(b"/")):
            what = _KINDS_WITHOUT_DATA.get(kind, "tar directory")
            if what != "tar directory":
                yield TarMember(name, None, stream.offset, 0, what)
            continue
        if kind == b"S":
            _skip_sparse_map(stream, header)
            problem = "tar sparse member"
        elif kind not in _REGULAR:
            problem = problem or "tar member of unknown kind"
        data_offset = stream.offset
        problem = problem or wanted(name, num_bytes)
        data = None if problem else stream.read(num_bytes)
        found = stream.skip(num_bytes) if data is None else len(data)
        if found < num_bytes:
            raise SourceFormatError(
                stream.uri,
                f"ends at byte {stream.offset}, inside a member of {num_bytes} bytes "
                f"that starts at {data_offset}",
            )
        stream.skip(-num_bytes % BLOCK_BYTES)
        yield TarMember(name, data, data_offset, num_bytes, problem)


def _next_header(stream: TarBytes) -> bytes | None:
    """The next header block with a right checksum; None at a proper end."""
    num_zero_blocks = 0
    while True:
        offset = stream.offset
        block = stream.read(BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            if num_zero_blocks and not block.strip(b"\x00"):
                return None
            what = "inside a header" if block else "without the end mark"
            raise SourceFormatError(stream.uri, f"is cut off at byte {stream.offset}, {what}")
        if block == _ZERO_BLOCK:
            num_zero_blocks += 1
            continue
        if not _has_right_checksum(block):
            what = "after the end mark" if num_zero_blocks else "a bad header checksum"
            raise SourceFormatError(stream.uri, f"no tar header at byte {offset}: {what}")
        return block


def _has_right_checksum(header: bytes) -> bool:
    field = header[148:156].strip(b" \x00")
    if not field or len(field) > 8 or field.strip(b"01234567"):
        return False
    stated = int(field, 8)
    rest = header[:148] + b" " * 8 + header[156:]
    found = sum(rest)
    # Some old writers summed signed characters.
    return stated == found or stated == found - 256 * sum(byte > 127 for byte in rest)


def _number(stream: TarBytes, header: bytes, start: int, length: int, offset: int) -> int:
    """A numeric field: octal text, or base 256 where the first bit is set."""
    field = header[start : start + length]
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    else:
        text = field.split(b"\x00", 1)[0].strip()
        if text.strip(b"01234567"):
            raise SourceFormatError(stream.uri, f"bad size in the tar header at byte {offset}")
        value = int(text or b"0", 8)
    if value > _MAX_SIZE:
        raise SourceFormatError(stream.uri, f"impossible size in the tar header at byte {offset}")
    return value


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\x00", 1)[0]
    # GNU headers ("ustar  ") keep times where POSIX has the prefix.
    if header[257:263] == b"ustar\x00":
        prefix = header[345:500].split(b"\x00", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def _read_extension(
    stream: TarBytes, kind: bytes, num_bytes: int, extension: _Extension, options: SourceOptions
) -> None:
    """Take in a header that describes the next member, or pass over it where it is too large."""
    start = stream.offset
    extension.header_bytes += num_bytes
    if extension.header_bytes > options.max_header_bytes:
        extension.problem = "tar header too large"
        body = b""
        found = stream.skip(num_bytes)
    else:
        body = stream.read(num_bytes)
        found = len(body)
    if found < num_bytes:
        raise SourceFormatError(stream.uri, f"is cut off at byte {stream.offset}, inside a header")
    stream.skip(-num_bytes % BLOCK_BYTES)
    if not body:
        return
    if kind == b"L":
        extension.name = body.split(b"\x00", 1)[0]
    elif kind in b"xX":
        for keyword, value in _pax_records(stream.uri, body, start):
            if keyword == b"path":
                extension.name = value
            elif keyword == b"size":
                if not value.isdigit() or len(value) > 19 or int(value) > _MAX_SIZE:
                    raise SourceFormatError(stream.uri, f"bad pax size at byte {start}")
                extension.num_bytes = int(value)
            elif keyword.startswith(b"GNU.sparse."):
                extension.problem = "tar sparse member"
                if keyword == b"GNU.sparse.name":
                    extension.name = value
    # Link names ("K") and records for the whole archive ("g") change nothing that is read here.


def _pax_records(uri: str, body: bytes, start: int) -> Iterator[tuple[bytes, bytes]]:
    """``"<length> <keyword>=<value>\\n"``, the length counting itself."""
    pos = 0
    while pos < len(body) and body[pos] != 0:
        space = body.find(b" ", pos, pos + 20)
        digits = body[pos:space] if space > 0 else b""
        end = pos + int(digits) if digits.isdigit() else 0
        keyword, equals, value = body[space + 1 : end - 1].partition(b"=")
        if end <= space or end > len(body) or body[end - 1 : end] != b"\n" or not equals:
            raise SourceFormatError(uri, f"bad pax record at byte {start + pos}")
        yield keyword, value
        pos = end


def _skip_sparse_map(stream: TarBytes, header: bytes) -> None:
    """Old GNU sparse members carry further 512-byte blocks of the map before their data."""
    is_extended = header[482] != 0
    while is_extended:
        block = stream.read(BLOCK_BYTES)
        is_extended = len(block) == BLOCK_BYTES and block[504] != 0
