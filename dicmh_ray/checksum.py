"""CRC-32C (Castagnoli, reflected polynomial 0x82F63B78).

From the google-crc32c library where it is installed, as it is with this package; from numpy alone,
over 100 MB/s on one core for long inputs, where this module is used without it.
"""

import struct
from functools import cache

import numpy as np
import numpy.typing as npt

try:
    from google_crc32c import extend as _extend
except ImportError:
    _extend = None

_U32 = struct.Struct("<I")
_LOOP_BYTES = 2048
_BLOCK_BYTES = 2**18


def crc32c(data: bytes, value: int = 0) -> int:
    """CRC-32C of ``data``; ``value`` continues an earlier one, as in :func:`zlib.crc32`."""
    if _extend is None:
        return crc32c_numpy(data, value)
    return int(_extend(value, data))


def crc32c_numpy(data: bytes, value: int = 0) -> int:
    """The same without the library.

    Short inputs go through one table byte by byte. Long ones are summed as a tree: a CRC is linear
    over GF(2), so neighbouring words, then pairs, then fours are joined by the constant operator
    "append 4, 8, 16, ... zero bytes to the left one", a whole level in a few numpy calls.
    """
    register = value ^ 0xFFFFFFFF
    pos = 0
    while len(data) - pos >= _LOOP_BYTES:
        block = data[pos : pos + _BLOCK_BYTES]
        register = _crc_tree(block, register)
        pos += len(block)
    table = _byte_table()
    for byte in data[pos:]:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ 0xFFFFFFFF


def _crc_tree(block: bytes, register: int) -> int:
    # Zeros in front change nothing while the register is zero; the real register is the same as
    # zero once it is XORed onto the first four bytes.
    pad = -len(block) % 4
    padded = np.zeros(len(block) + pad, np.uint8)
    padded[pad:] = np.frombuffer(block, np.uint8)
    padded[pad : pad + 4] ^= np.frombuffer(_U32.pack(register), np.uint8)
    words = padded.view("<u4").astype(np.uint32, copy=False)
    level = 0
    while len(words) > 1:
        if len(words) % 2:
            words = np.concatenate([np.zeros(1, np.uint32), words])
        words = _append_zeros(words[0::2], level) ^ words[1::2]
        level += 1
    return int(_append_zeros(words, 0)[0])


def _append_zeros(registers: npt.NDArray[np.uint32], level: int) -> npt.NDArray[np.uint32]:
    """Each register after 4 * 2**level more zero bytes."""
    tables = _zero_tables(level)
    out: npt.NDArray[np.uint32] = tables[0][registers & 0xFF]
    for j in (1, 2, 3):
        out ^= tables[j][registers >> np.uint32(8 * j) & 0xFF]
    return out


@cache
def _byte_table() -> tuple[int, ...]:
    table = []
    for register in range(256):
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
        table.append(register)
    return tuple(table)


@cache
def _zero_tables(level: int) -> npt.NDArray[np.uint32]:
    """uint32 [4, 256]: what byte j of a register becomes after 4 * 2**level zero bytes."""
    if level:
        half = _zero_tables(level - 1)
        return np.stack([_append_zeros(row, level - 1) for row in half])
    table = np.array(_byte_table(), np.uint32)
    registers = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(4):
        registers = table[registers & 0xFF] ^ registers >> np.uint32(8)
    return registers
