"""The strings of the official container: y and z through compressai's rANS, scales in floating point.

Only for reading and writing files of the official program. Such a stream decodes where its scales
come out as they did in the encoder, bit by bit: same kernels, same layout, same threads, or luck
(spec 0.7). Streams of this package are written by :mod:`.exact`.

compressai's own decoder reads beyond its buffer when bytes are missing and never says no. So
strings are read by :class:`CheckedRansDecoder`, a decoder of the same format that knows where its
bytes end; about a microsecond a symbol.

The rANS of compressai (ryg's rans64): little-endian 32-bit words, a 64-bit state that starts as the
first two words (low word first) and is refilled by one word whenever it falls below 2**31; 16-bit
frequencies. The last entry of each table is the escape: then a number of 4-bit digits (15: more
follow), the digits themselves from low to high, each a raw read of 4 bits; the number r they form
means the r/2-th value above the table (r even) or the (r+1)/2-th below it (r odd). An encoder starts
from 2**31, so that is what the state must be when all symbols are read, with no word left.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dicmh_ray.codec.icmh.compressai_parts import BufferedRansEncoder
from dicmh_ray.codec.icmh.lfgcm import CodingStep, LatentCoder, pack, run_steps, unpack
from dicmh_ray.errors import EncodeError, SymbolError, TruncatedBitstreamError

Indexes = npt.NDArray[np.integer[Any]]
"""Row of the tables of each symbol."""

MAX_SYMBOL = 1 << 20
"""Largest magnitude of a symbol that is written."""

_MIN_SYMBOLS = 4
"""compressai's encoder allots a word a symbol, and writes beyond them if there are fewer than these."""

_PRECISION_BITS = 16
_MASK = (1 << _PRECISION_BITS) - 1
_STATE_FLOOR = 1 << 31
_DIGIT_BITS = 4
_DIGIT_MASK = (1 << _DIGIT_BITS) - 1
_MAX_DIGITS = 6  # of 2 * MAX_SYMBOL + 1


class CheckedRansDecoder:
    """Reads compressai's rANS and believes nothing: :mod:`.official_coder` has the format."""

    def __init__(self, data: bytes, section: str) -> None:
        """Raises TruncatedBitstreamError or SymbolError where the string has no state in it."""
        if len(data) < 8:
            raise TruncatedBitstreamError(section, 8, len(data))
        if len(data) % 4:
            raise SymbolError(section, f"{len(data)} bytes are no whole number of words")
        self._section = section
        self._num_bytes = len(data)
        self._words: list[int] = np.frombuffer(data, "<u4").tolist()
        self._state = self._words[0] | self._words[1] << 32
        self._next = 2

    def decode(self, indexes: Indexes, tables: "OfficialTables") -> list[int]:
        """The next symbols.

        Args:
            indexes: row of the tables of each symbol.
            tables: which they are.

        Raises:
            TruncatedBitstreamError: there are fewer words than symbols need.
            SymbolError: an escape is longer than any encoder's.
        """
        state, position, words = self._state, self._next, self._words
        cdfs, offsets = tables.cdfs, tables.offsets
        symbols = []
        try:
            for index in indexes.tolist():
                cdf = cdfs[index]
                low = state & _MASK
                symbol = bisect_right(cdf, low) - 1
                start = cdf[symbol]
                state = (cdf[symbol + 1] - start) * (state >> _PRECISION_BITS) + low - start
                if state < _STATE_FLOOR:
                    state = state << 32 | words[position]
                    position += 1
                if symbol == len(cdf) - 2:
                    self._state, self._next = state, position
                    symbol = self._escape(symbol)
                    state, position = self._state, self._next
                symbols.append(symbol + offsets[index])
        except IndexError as exc:  # of words: bisect stays within a table that starts at 0
            raise self._truncated() from exc
        self._state, self._next = state, position
        return symbols

    def finish(self) -> None:
        """Raises SymbolError unless exactly all of the string has been read."""
        if self._next != len(self._words):
            left = 4 * (len(self._words) - self._next)
            raise SymbolError(self._section, f"{left} bytes are left after the last symbol")
        if self._state != _STATE_FLOOR:
            raise SymbolError(self._section, f"the coder ends in state {self._state:#x}")

    def _escape(self, limit: int) -> int:
        count = digit = self._digit()
        while digit == _DIGIT_MASK:
            digit = self._digit()
            count += digit
            if count > _MAX_DIGITS:
                break
        if count > _MAX_DIGITS:
            raise SymbolError(self._section, f"an escape of {count} digits")
        raw = 0
        for place in range(count):
            digit = self._digit()
            raw |= digit << (_DIGIT_BITS * place)
        if count and not digit:
            raise SymbolError(self._section, "an escape has leading zeros")
        return -(raw // 2) - 1 if raw % 2 else limit + raw // 2

    def _digit(self) -> int:
        digit = self._state & _DIGIT_MASK
        self._state >>= _DIGIT_BITS
        if self._state < _STATE_FLOOR:
            self._state = self._state << 32 | self._words[self._next]
            self._next += 1
        return digit

    def _truncated(self) -> TruncatedBitstreamError:
        return TruncatedBitstreamError(self._section, self._num_bytes + 4, self._num_bytes)


@dataclass(frozen=True, slots=True)
class OfficialTables:
    """compressai's tables of one entropy model, as lists: what its coder and ours read."""

    cdfs: list[list[int]]
    """Of each table, from 0 to 2**16; the last entry is the escape."""

    sizes: list[int]
    offsets: list[int]
    """Symbol of the first entry."""

    @classmethod
    def of(cls, model: nn.Module) -> "OfficialTables":
        """Raises ValueError if the model has no tables: call ``update_tables`` first."""
        cdf, sizes, offsets = (
            getattr(model, name) for name in ("_quantized_cdf", "_cdf_length", "_offset")
        )
        if cdf.numel() == 0:
            raise ValueError("the entropy model has no tables: call update_tables() first")
        lengths: list[int] = sizes.tolist()
        rows: list[list[int]] = cdf.tolist()
        cut = [row[:size] for row, size in zip(rows, lengths, strict=True)]
        return cls(cut, lengths, offsets.tolist())


@dataclass(frozen=True, slots=True)
class OfficialLatents:
    """The two strings of one image, and what decoding them gives."""

    y_string: bytes
    z_string: bytes
    y_hat: Tensor
    """float32 ``[1, M, i, j]``."""

    z_hat: Tensor
    """float32 ``[1, N, k, l]``."""


class OfficialCoder:
    """Writes and reads the official strings with the tables of a latent coder."""

    def __init__(self, coder: LatentCoder) -> None:
        """Raises ValueError if the coder has no tables: call its ``update_tables`` first."""
        self._coder = coder
        self._y_tables = OfficialTables.of(coder.gaussian_conditional)
        self._z_tables = OfficialTables.of(coder.entropy_bottleneck)

    @torch.no_grad()
    def encode(self, y_1Mij: Tensor, z_1Nkl: Tensor) -> OfficialLatents:
        """The strings of one image.

        Args:
            y_1Mij: float32, from :meth:`LatentCoder.analyse`.
            z_1Nkl: the same.

        Raises:
            EncodeError: a latent is not finite or too large.
        """
        medians = self._coder.medians()[:, None, None]
        z_symbols = torch.round(_finite(z_1Nkl) - medians)
        z_hat = z_symbols + medians
        z_indexes = _channel_indexes(z_symbols[0])
        z_string = _encode(_integers(z_symbols), z_indexes.tolist(), self._z_tables)
        _finite(y_1Mij)
        symbols: list[int] = []
        indexes: list[int] = []

        def visit(step: CodingStep) -> Tensor:
            scales, means = (pack(p, step.is_anchor) for p in step.parameters)
            rounded = torch.round(pack(y_1Mij[:, step.channels], step.is_anchor) - means)
            symbols.extend(_integers(rounded))
            indexes.extend(self._indexes(scales).tolist())
            return unpack(rounded + means, step.is_anchor)

        y_hat = run_steps(self._coder.coding_steps(z_hat), visit)
        y_string = _encode(symbols, indexes, self._y_tables)
        return OfficialLatents(y_string, z_string, y_hat, z_hat)

    @torch.no_grad()
    def decode(self, y_string: bytes, z_string: bytes, z_shape: Sequence[int]) -> OfficialLatents:
        """The latents of one image.

        Args:
            y_string: compressai's rANS stream of y.
            z_string: the same of z.
            z_shape: rows and columns of z, checked by the caller: time and memory follow them.

        Raises:
            TruncatedBitstreamError: a string ends too early.
            SymbolError: a string is damaged, or was written where scales came out otherwise.
        """
        medians = self._coder.medians()[:, None, None]
        shape = (1, medians.shape[0], *z_shape)
        decoder = CheckedRansDecoder(z_string, "z")
        z_symbols = decoder.decode(_channel_indexes(medians.new_empty(shape[1:])), self._z_tables)
        decoder.finish()
        z_hat = medians.new_tensor(z_symbols).reshape(shape) + medians
        decoder = CheckedRansDecoder(y_string, "y")

        def visit(step: CodingStep) -> Tensor:
            scales, means = (pack(p, step.is_anchor) for p in step.parameters)
            symbols = decoder.decode(self._indexes(scales), self._y_tables)
            return unpack(means.new_tensor(symbols).reshape(means.shape) + means, step.is_anchor)

        y_hat = run_steps(self._coder.coding_steps(z_hat), visit)
        decoder.finish()
        return OfficialLatents(y_string, z_string, y_hat, z_hat)

    def _indexes(self, scales: Tensor) -> Indexes:
        return self._coder.gaussian_conditional.build_indexes(scales).flatten().cpu().numpy()


def _channel_indexes(z_Nkl: Tensor) -> Indexes:
    return np.repeat(np.arange(z_Nkl.shape[0]), z_Nkl.shape[1] * z_Nkl.shape[2])


def _finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise EncodeError("the latent is not finite")
    return values


def _integers(rounded: Tensor) -> list[int]:
    # Not only for the range: a mean that is not finite must not reach compressai's coder, either.
    if not bool((rounded.abs() <= MAX_SYMBOL).all()):
        raise EncodeError(f"a symbol is beyond {MAX_SYMBOL}, or not a number")
    return rounded.flatten().int().tolist()


def _encode(symbols: list[int], indexes: list[int], tables: OfficialTables) -> bytes:
    if len(symbols) < _MIN_SYMBOLS:
        raise EncodeError(f"{len(symbols)} symbols are too few for the official coder")
    encoder = BufferedRansEncoder()
    encoder.encode_with_indexes(symbols, indexes, tables.cdfs, tables.sizes, tables.offsets)
    return encoder.flush()
