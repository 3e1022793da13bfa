"""Frozen integer frequency tables, and the coder that runs over symbols grouped by table.

Tables are made once, when a checkpoint's entropy model is fitted, and never computed again. A table
covers a run of consecutive symbols; its last entry is the escape of all others, whose value follows
as 16 raw bits. Frequencies have 24 bits: most symbols of a latent coder are zeros that are almost
certain, and 16 bits would charge them for every outlier's place in their table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

from dicmh_ray.codec.icmh.integer_nets import Integers, integers
from dicmh_ray.errors import SymbolError, WeightsError

PRECISION = 1 << 24
"""Sum of the frequencies of every table."""

MAX_SYMBOL = (1 << 15) - 1
"""Largest magnitude of a symbol. Latents beyond are clipped to it."""

MAX_BITS = 40
"""What a symbol takes at most: the rarest entry of a table and the raw value behind it."""

_RAW = 1 << 16
_OUTLIER_SHARES = np.exp2(-np.arange(3.0, 21.0))
_TAIL = 6.2  # in standard deviations: 6e-10 of a Gaussian's mass lies beyond
_MIN_REACH = 8

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenTables:
    """Frequency tables of the symbols ``lowest .. lowest + size - 2`` and of the escape."""

    frequencies: npt.NDArray[np.int32]
    """Of all tables, one behind the other; each at least 1, a table's sum ``2**24``."""

    sizes: Integers
    """``[T]``: entries of each table, the escape included."""

    lowest: Integers
    """``[T]``: the symbol of a table's first entry."""

    def rows(self) -> list[npt.NDArray[np.int32]]:
        """The tables one by one."""
        return np.split(self.frequencies, np.cumsum(self.sizes)[:-1])

    def validate(self, name: str) -> None:
        """Raises WeightsError unless every table is a distribution of symbols that there are."""
        if self.sizes.shape != self.lowest.shape or self.sizes.min() < 2:
            raise WeightsError(name, "bad sizes of tables")
        if self.sizes.sum() != self.frequencies.size or self.frequencies.min() < 1:
            raise WeightsError(name, "bad frequencies")
        sums = np.add.reduceat(
            self.frequencies.astype(np.int64), np.cumsum(self.sizes) - self.sizes
        )
        if (sums != PRECISION).any():
            raise WeightsError(name, "frequencies do not sum to 2**24")
        highest = self.lowest + self.sizes - 2
        if self.lowest.min() < -MAX_SYMBOL or highest.max() > MAX_SYMBOL:
            raise WeightsError(name, "a table covers symbols that there are not")

    def to_arrays(self, prefix: str) -> dict[str, npt.NDArray[Any]]:
        """Named arrays, the inverse of :meth:`from_arrays`."""
        return {
            f"{prefix}.frequencies": self.frequencies,
            f"{prefix}.sizes": self.sizes.astype(np.int32),
            f"{prefix}.lowest": self.lowest.astype(np.int32),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> "FrozenTables":
        """Raises WeightsError if an array is missing or breaks an invariant."""
        frequencies, sizes, lowest = (
            integers(arrays, f"{prefix}.{name}", 1) for name in ("frequencies", "sizes", "lowest")
        )
        if frequencies.max() > PRECISION:
            raise WeightsError(prefix, "bad frequencies")
        tables = cls(frequencies=frequencies.astype(np.int32), sizes=sizes, lowest=lowest)
        tables.validate(prefix)
        return tables

    @classmethod
    def freeze(cls, drafts: Sequence["TableDraft"]) -> "FrozenTables":
        """Integer tables, each with as many outliers as its draft has met."""
        rows = [_frequencies(draft.mixture()) for draft in drafts]
        return cls(
            frequencies=np.concatenate(rows),
            sizes=np.array([row.size for row in rows]),
            lowest=np.array([draft.lowest for draft in drafts]),
        )


class TableDraft:
    """A model's distribution of a symbol, and how often each symbol was met in the calibration."""

    def __init__(self, probability: Floats, lowest: int, spread: float) -> None:
        """Start without counts.

        Args:
            probability: of the symbols from ``lowest`` on; what misses to 1 is the escape's.
            lowest: the first symbol.
            spread: length over which outliers fall by a factor e.
        """
        self.lowest = lowest
        self._probability = probability
        self._counts = np.zeros(probability.size + 1)
        self._spread = spread

    @classmethod
    def gaussian(cls, scale: float) -> "TableDraft":
        """Of the integers under a Gaussian around zero."""
        reach = max(_MIN_REACH, math.ceil(_TAIL * scale))
        width = scale * math.sqrt(2)
        # One tail only: there differences of erfc keep their digits.
        edges = [(symbol - 0.5) / width for symbol in range(reach + 2)]
        half = -np.diff([math.erfc(edge) for edge in edges]) / 2
        return cls(np.concatenate([half[:0:-1], half]), -reach, max(1.0, scale))

    def count(self, symbols: npt.NDArray[np.floating[Any]]) -> None:
        """Add symbols that were met."""
        size = self._probability.size
        codes = symbols.ravel() - self.lowest
        codes = np.where((codes >= 0) & (codes < size), codes, size).astype(np.int64)
        self._counts += np.bincount(codes, minlength=size + 1)

    def mixture(self) -> Floats:
        """With the share of a two-sided exponential under which the counts cost least; escape last."""
        inside = np.append(self._probability, max(0.0, 1 - self._probability.sum()))
        inside /= inside.sum()
        distance = np.abs(self.lowest + np.arange(self._probability.size))
        tail = np.append(distance, max(distance[0], distance[-1]) + 1)
        outliers = np.exp(-tail / self._spread)
        outliers /= outliers.sum()
        mixtures = [(1 - share) * inside + share * outliers for share in _OUTLIER_SHARES]
        # Half an outlier counts as met: what met none in the calibration will meet some.
        costs = [
            -(self._counts * np.log2(mixture)).sum() - np.log2(share) / 2
            for mixture, share in zip(mixtures, _OUTLIER_SHARES, strict=True)
        ]
        return mixtures[int(np.argmin(costs))]


class TableCoder:
    """The coder's models of frozen tables."""

    def __init__(self, tables: FrozenTables) -> None:
        # Integer weights that sum to 2**24 - n make constriction's float arithmetic exact: entry s
        # gets the cumulative frequency sum(w[:s]) + s, that is sum(frequencies[:s]).
        self.models = [
            constriction.stream.model.Categorical((row - 1).astype(np.float64), perfect=False)
            for row in tables.rows()
        ]
        self.lowest = tables.lowest
        self.escape = tables.sizes - 1


class SymbolWriter:
    """Collects blocks of symbols; the coder is a stack, so that all are encoded at the end."""

    def __init__(self) -> None:
        self._runs: list[tuple[Any, npt.NDArray[np.int32]]] = []
        self._raw = constriction.stream.model.Uniform(_RAW)

    def write(self, coder: TableCoder, tables: Integers, symbols: Integers) -> None:
        """Append a block.

        Args:
            coder: has the tables.
            tables: ``[n]``: the table of each symbol.
            symbols: ``[n]``, magnitudes at most ``MAX_SYMBOL``.
        """
        order, runs = _runs(tables)
        tables, symbols = tables[order], symbols[order]
        codes, escape = symbols - coder.lowest[tables], coder.escape[tables]
        escapes = (codes < 0) | (codes >= escape)
        codes = np.where(escapes, escape, codes).astype(np.int32)
        self._runs.extend([(coder.models[table], codes[start:stop]) for table, start, stop in runs])
        if escapes.any():
            self._runs.append((self._raw, (symbols[escapes] + _RAW // 2).astype(np.int32)))

    def finish(self) -> bytes:
        """The words of the coder, little-endian."""
        coder = constriction.stream.stack.AnsCoder()
        for model, codes in reversed(self._runs):
            coder.encode_reverse(codes, model)
        return coder.get_compressed().astype("<u4").tobytes()


class SymbolReader:
    """Reads blocks of symbols in the order in which they were written."""

    def __init__(self, payload: bytes, num_symbols: int, section: str) -> None:
        """Take a payload.

        Args:
            payload: what :meth:`SymbolWriter.finish` gave.
            num_symbols: how many symbols will be read.
            section: its name in errors.

        Raises:
            SymbolError: no writer ends so.
        """
        if len(payload) % 4:
            raise SymbolError(section, f"{len(payload)} bytes are no whole number of words")
        if 8 * (len(payload) - 8) > MAX_BITS * num_symbols:
            raise SymbolError(section, f"{len(payload)} bytes for {num_symbols} symbols")
        words = np.frombuffer(payload, "<u4").astype(np.uint32)
        if words.size and words[-1] == 0:
            raise SymbolError(section, "the last word is zero")
        self._coder = constriction.stream.stack.AnsCoder(words)
        self._raw = constriction.stream.model.Uniform(_RAW)
        self._section = section

    def read(self, coder: TableCoder, tables: Integers) -> Integers:
        """The next block; arguments as of :meth:`SymbolWriter.write`.

        Raises:
            SymbolError: an escape stands for a symbol that needs none, or that there is not.
        """
        order, runs = _runs(tables)
        tables = tables[order]
        codes = np.empty(order.size, np.int64)
        for table, start, stop in runs:
            codes[start:stop] = self._coder.decode(coder.models[table], stop - start)
        escape = coder.escape[tables]
        escapes = codes == escape
        codes += coder.lowest[tables]
        count = int(np.count_nonzero(escapes))
        if count:
            values = self._coder.decode(self._raw, count).astype(np.int64) - _RAW // 2
            beyond = values - coder.lowest[tables[escapes]]
            if ((beyond >= 0) & (beyond < escape[escapes])).any() or values.min() < -MAX_SYMBOL:
                raise SymbolError(self._section, "an escape that no encoder writes")
            codes[escapes] = values
        symbols = np.empty_like(codes)
        symbols[order] = codes
        return symbols

    def finish(self) -> None:
        """Raises SymbolError if bytes are left."""
        if not self._coder.is_empty():
            raise SymbolError(self._section, "bytes are left after the last symbol")


def _frequencies(probability: Floats) -> npt.NDArray[np.int32]:
    """Integers of at least 1 that sum to ``2**24``; the largest takes what rounding leaves."""
    row = 1 + np.floor(probability * (PRECISION - probability.size)).astype(np.int64)
    row[np.argmax(row)] += PRECISION - row.sum()
    return row.astype(np.int32)


def _runs(tables: Integers) -> tuple[npt.NDArray[np.intp], list[tuple[int, int, int]]]:
    """Order symbols by table, stably; and the stretches of one table: table, start, stop."""
    order = np.argsort(tables, kind="stable")
    counts = np.bincount(tables)
    used = counts.nonzero()[0]
    stops = counts[used].cumsum()
    starts = stops - counts[used]
    return order, list(zip(used.tolist(), starts.tolist(), stops.tolist(), strict=True))
