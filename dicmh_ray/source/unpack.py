"""A tar's bytes in order, unpacked where they are gzip, bounded where they are a bomb.

The compressed bytes come from a :class:`RetryingFile`, which resumes by range; the decompressor's
state stays in memory, so a dropped connection costs nothing twice even in a ``.tar.gz``.
"""

import zlib
from collections.abc import Callable

from dicmh_ray.errors import SourceFormatError
from dicmh_ray.source.options import SourceOptions
from dicmh_ray.source.store import RetryingFile

_GZIP_MAGIC = b"\x1f\x8b"
_FREE_UNPACKED_BYTES = 64 * 2**20
_REFUSED_MAGIC = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class TarBytes:
    """Sequential reads of unpacked bytes; ``offset`` is where the next one starts.

    Raises:
        SourceFormatError: compressed in a way that is not read here, damaged, cut off, or growing
            beyond ``max_unpacked_ratio``.
    """

    def __init__(self, file: RetryingFile, options: SourceOptions) -> None:
        self.uri = file.uri
        self.offset = 0
        self._file = file
        self._options = options
        self._buffer = memoryview(b"")
        self._packed = b""
        self._num_packed_bytes = 0
        self._num_unpacked_bytes = 0
        first = file.read(options.block_bytes)
        for magic, name in _REFUSED_MAGIC.items():
            if first.startswith(magic):
                raise SourceFormatError(file.uri, f"is {name}, wanted tar or gzip")
        self._next_block: Callable[[], bytes]
        if first.startswith(_GZIP_MAGIC):
            self._packed = first
            self._num_packed_bytes = len(first)
            self._decompressor = zlib.decompressobj(wbits=31)
            self._next_block = self._unpack_block
        else:
            self._buffer = memoryview(first)
            self._next_block = lambda: file.read(options.block_bytes)

    def read(self, num_bytes: int) -> bytes:
        """Exactly ``num_bytes``, fewer at the end only."""
        chunks = []
        missing = num_bytes
        while missing and self._fill():
            chunk = self._buffer[:missing]
            self._buffer = self._buffer[len(chunk) :]
            missing -= len(chunk)
            chunks.append(chunk)
        self.offset += num_bytes - missing
        return b"".join(chunks)

    def skip(self, num_bytes: int) -> int:
        """Pass over bytes without keeping them; returns how many there were."""
        missing = num_bytes
        while missing and self._fill():
            step = min(missing, len(self._buffer))
            self._buffer = self._buffer[step:]
            missing -= step
        self.offset += num_bytes - missing
        return num_bytes - missing

    def _fill(self) -> bool:
        if not self._buffer:
            self._buffer = memoryview(self._next_block())
        return bool(self._buffer)

    def _unpack_block(self) -> bytes:
        """The next unpacked bytes, ``block_bytes`` at most; ``b""`` at the end."""
        while True:
            if self._decompressor.eof:
                # Padding, or another gzip member: `cat a.tar.gz b.tar.gz` is valid gzip.
                self._packed = (self._decompressor.unused_data + self._packed).lstrip(b"\x00")
                if not self._packed and not self._refill():
                    return b""
                self._packed = self._packed.lstrip(b"\x00")
                if not self._packed:
                    continue
                self._decompressor = zlib.decompressobj(wbits=31)
            if not self._packed and not self._refill():
                raise SourceFormatError(self.uri, f"gzip data end early, at {self.offset} unpacked")
            try:
                block = self._decompressor.decompress(self._packed, self._options.block_bytes)
            except zlib.error as exc:
                raise SourceFormatError(
                    self.uri, f"gzip data are damaged before byte {self._num_packed_bytes}: {exc}"
                ) from exc
            self._packed = self._decompressor.unconsumed_tail
            self._num_unpacked_bytes += len(block)
            self._check_ratio()
            if block:
                return block

    def _refill(self) -> bool:
        self._packed = self._file.read(self._options.block_bytes)
        self._num_packed_bytes += len(self._packed)
        return bool(self._packed)

    def _check_ratio(self) -> None:
        ratio = self._options.max_unpacked_ratio
        packed = self._num_packed_bytes - len(self._packed)
        if self._num_unpacked_bytes > _FREE_UNPACKED_BYTES + ratio * packed:
            raise SourceFormatError(
                self.uri, f"unpacks to over {ratio} times its size: a decompression bomb"
            )
