"""Nested symbols <-> bytes: integer contexts, frozen integer tables, ANS.

State k is coded given all of state k-1. Each symbol's table is chosen by two integer sums over
symbols that the decoder already has: how large this symbol may be (``spread``) and where in its
parent's cell it should lie (``offset``). The sums are small enough to be exact in float32 whatever
the order of summation (proved from the weights when the tables are loaded), and nothing else
enters: no network, no probability computed in floating point. Any machine finds the same tables.

Order of coding in a state: channel groups; in each group first the positions with even ``i + j``,
then the others; in each such pass the symbols are grouped by table, so that the coder runs over
long stretches of one table. Payload layout and arithmetic: ``schemas/layered-payload.v1.md``.

Needs numpy and constriction, not torch.

Shapes: ``C`` channels, ``i, j`` the latent grid, ``p`` positions of one parity. Channels come last, so
that the positions of a pass are whole rows of memory.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

from dicmh_ray.errors import EncodeError, SymbolError, WeightsError

Symbols = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]

RATIO = 3
PRECISION = 1 << 24
"""Sum of the frequencies of every table."""

MAX_MAGNITUDE = 15
"""Magnitudes are clipped here before they enter a sum."""

MAX_VALUE = 511
"""Signed symbols are clipped to this magnitude before they enter a sum."""

SPREAD_LEVELS = 4096
"""The spread sum is clipped to ``[0, SPREAD_LEVELS)`` and looked up in the bucket table."""

OFFSET_UNIT = 128
"""The offset sum counts in 1/128 of a quantiser step."""

COARSEST_LIMIT = 32
"""Largest magnitude of a symbol of state 0, relative to its prediction, that has a code."""

SPREAD_UNIT = 256
"""The spread sum counts in 1/256; the networks play no part in it."""

EXACT_LIMIT = float(1 << 24)
"""Sums of integers below this magnitude are exact in float32."""

ZERO_BELOW = 0.6
"""Values below this share of the finest step become zero. An encoder's choice, no part of the format:
a nonzero there costs more bits than its half step of error is worth (on training photographs 0.2 dB
at equal rate, for the last state)."""

MAX_SYMBOL = 32_767
"""Largest magnitude of a finest symbol: what int16 holds."""

NUM_PARENT_CLASSES = 3
"""Parent symbol zero, plus or minus one, larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextTables:
    """The integers of one checkpoint's entropy model; K states, C channels.

    Weights are integers held as float32, ready for exact matrix products.
    """

    spread_bias: Floats
    """``[K, C]``."""

    spread_parent: Floats
    """``[K, C, C]``: weight of the parent magnitude of channel b for channel a."""

    spread_around: Floats
    """``[K, C, C]``: weight of the parent magnitudes around, sides twice, corners once."""

    spread_current: Floats
    """``[K, C, C]``: weight of this state's magnitudes of earlier groups at the same place."""

    spread_sides: Floats
    """``[K, C]``: weight of this state's four side neighbours, in the second pass."""

    offset_parent: Floats
    """``[K, C, 3]``: weights of the parent itself, its side and its corner neighbours."""

    offset_sides: Floats
    """``[K, C]``: weight of the sum of this state's four side neighbours, in the second pass."""

    groups: tuple[int, ...]
    """First channel of each group, and C at the end."""

    spread_buckets: npt.NDArray[np.uint8]
    """``[K, SPREAD_LEVELS]``: bucket of each clipped spread sum."""

    offset_edges: tuple[int, ...]
    """Bucket of an offset = number of edges that are at most its magnitude, in 1/128 steps."""

    frequencies: tuple[npt.NDArray[np.int32], ...]
    """For each state ``[tables, symbols]``: integer frequencies >= 1 that sum to 2**24."""

    @property
    def num_states(self) -> int:
        return len(self.frequencies)

    @property
    def channels(self) -> int:
        return int(self.spread_bias.shape[1])

    @property
    def num_spread_buckets(self) -> int:
        return int(self.spread_buckets.max()) + 1

    @property
    def num_offset_buckets(self) -> int:
        return len(self.offset_edges) + 1

    def num_tables(self) -> int:
        """Tables of one state."""
        return NUM_PARENT_CLASSES * self.num_offset_buckets * self.num_spread_buckets

    def validate(self, name: str) -> None:
        """Check every invariant that decoding relies on.

        Raises:
            WeightsError: a table is not a distribution, or a sum might not be exact.
        """
        for state, table in enumerate(self.frequencies):
            if table.shape[0] != self.num_tables() or table.min() < 1:
                raise WeightsError(name, f"state {state}: bad frequency table")
            if (table.astype(np.int64).sum(1) != PRECISION).any():
                raise WeightsError(name, f"state {state}: frequencies do not sum to 2**24")
            if table.shape[1] != num_symbols(state):
                raise WeightsError(name, f"state {state}: wrong number of symbols")
        spread = (
            np.abs(self.spread_bias)
            + MAX_MAGNITUDE * np.abs(self.spread_parent).sum(2)
            + 12 * MAX_MAGNITUDE * np.abs(self.spread_around).sum(2)
            + MAX_MAGNITUDE * np.abs(self.spread_current).sum(2)
            + 4 * MAX_MAGNITUDE * np.abs(self.spread_sides)
        )
        offset = MAX_VALUE * (
            np.abs(self.offset_parent) @ np.array([1, 4, 4], np.float32)
            + 4 * np.abs(self.offset_sides)
        )
        for sums in (spread, offset):
            if not sums.max() < EXACT_LIMIT:
                raise WeightsError(name, f"context sums may reach {sums.max():.0f}, not exact")
        for weights in (self.spread_bias, self.spread_parent, self.offset_parent):
            if (weights != np.rint(weights)).any():
                raise WeightsError(name, "context weights are not integers")
        if tuple(sorted(set(self.groups))) != self.groups or self.groups[0] != 0:
            raise WeightsError(name, f"channel groups are {self.groups}")
        if self.groups[-1] != self.channels:
            raise WeightsError(name, f"channel groups end at {self.groups[-1]}")

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named arrays for ``tables.safetensors``; weights as int16."""
        arrays: dict[str, npt.NDArray[Any]] = {
            name: getattr(self, name).astype(np.int16)
            for name in (
                "spread_bias",
                "spread_parent",
                "spread_around",
                "spread_current",
                "spread_sides",
                "offset_parent",
                "offset_sides",
            )
        }
        arrays["groups"] = np.array(self.groups, np.int32)
        arrays["spread_buckets"] = self.spread_buckets
        arrays["offset_edges"] = np.array(self.offset_edges, np.int32)
        for state, table in enumerate(self.frequencies):
            arrays[f"frequencies_{state}"] = table
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], name: str) -> "ContextTables":
        """Rebuild and validate what :meth:`to_arrays` gave.

        Raises:
            WeightsError: an array is missing or breaks an invariant.
        """
        try:
            weights = {
                field: np.ascontiguousarray(arrays[field], np.float32)
                for field in (
                    "spread_bias",
                    "spread_parent",
                    "spread_around",
                    "spread_current",
                    "spread_sides",
                    "offset_parent",
                    "offset_sides",
                )
            }
            tables = cls(
                **weights,
                groups=tuple(int(g) for g in arrays["groups"]),
                spread_buckets=np.ascontiguousarray(arrays["spread_buckets"], np.uint8),
                offset_edges=tuple(int(e) for e in arrays["offset_edges"]),
                frequencies=tuple(
                    np.ascontiguousarray(arrays[f"frequencies_{k}"], np.int32)
                    for k in range(weights["spread_bias"].shape[0])
                ),
            )
        except KeyError as exc:
            raise WeightsError(name, f"table {exc} is missing") from exc
        tables.validate(name)
        return tables


def num_symbols(state: int) -> int:
    """Size of the alphabet of a state: a third of the parent's cell, or a coarsest symbol."""
    return 2 * COARSEST_LIMIT + 1 if state == 0 else RATIO


@dataclass(frozen=True, slots=True)
class Pass:
    """Symbols that are coded together: some channels at the positions of one parity."""

    channels: slice
    positions: npt.NDArray[np.intp]
    """``[p]``: indexes into the tile's cells, row by row."""

    tables: npt.NDArray[np.uint16]
    """``[p, channels]``: row of the state's frequency table of each symbol."""

    base: Symbols | np.int16
    """``[p, channels]``: what the coded residual is relative to."""

    turned: npt.NDArray[np.bool_]
    """``[p, channels]``: the residual's sign is turned before coding."""

    levels: npt.NDArray[np.uint16]
    """``[p, channels]``: the clipped spread sum that chose the bucket."""

    def codes(self, symbols: Symbols, middle: int) -> Symbols:
        """Symbols -> what is coded, ``0 .. 2 middle``."""
        residual = symbols - self.base
        return np.where(self.turned, -residual, residual) + np.int16(middle)

    def symbols(self, codes: Symbols, middle: int) -> Symbols:
        """The inverse of :meth:`codes`."""
        residual = codes - np.int16(middle)
        return self.base + np.where(self.turned, -residual, residual)


Visit = Callable[[Pass], Symbols]
"""Gets a pass, returns its symbols ``[p, channels]``: known (encoder) or decoded (decoder)."""


class ContextModel:
    """Walks a state in coding order and finds the table of every symbol."""

    def __init__(self, tables: ContextTables) -> None:
        self.tables = tables
        per_class = tables.num_offset_buckets * tables.num_spread_buckets
        distances = np.arange(256)[:, None] >= np.array(tables.offset_edges)[None, :]
        self._offset_rows = (distances.sum(1) * tables.num_spread_buckets).astype(np.uint16)
        self._class_rows = (np.arange(NUM_PARENT_CLASSES) * per_class).astype(np.uint16)
        # Transposed for products of cells by channels: [K, from channel, to channel].
        self._parent = np.ascontiguousarray(tables.spread_parent.transpose(0, 2, 1))
        self._around = np.ascontiguousarray(tables.spread_around.transpose(0, 2, 1))
        self._current = np.ascontiguousarray(tables.spread_current.transpose(0, 2, 1))

    def walk(
        self, state: int, parent: Symbols | None, shape: tuple[int, int], active: int, visit: Visit
    ) -> Symbols:
        """Visit the passes of a state; what ``visit`` returns becomes context of later passes.

        Args:
            state: k.
            parent: int16 ``[i, j, C]``, the symbols of state k-1; None for state 0.
            shape: ``(i, j)``.
            active: channels from here on are not coded: they keep three times their parent.
            visit: called for each non-empty pass.

        Returns:
            int16 ``[i, j, C]``: the symbols of state k.
        """
        t, (rows, columns) = self.tables, shape
        size = rows * columns
        if parent is None:
            parent = np.zeros((rows, columns, t.channels), np.int16)
        result = parent * np.int16(RATIO)
        if active == 0:
            return result
        parity = (np.add.outer(np.arange(rows), np.arange(columns)) % 2).ravel()
        spread, offset = self._from_parent(state, parent, active)
        parent_cells = parent.reshape(size, t.channels)
        cells = result.reshape(size, t.channels)
        cells[:, :active] = 0
        for first, last in itertools.pairwise(t.groups):
            if first >= active:
                break
            channels = slice(first, min(last, active))
            group = spread[:, channels]
            if first:
                magnitude = np.minimum(np.abs(cells[:, :first]), MAX_MAGNITUDE)
                weights = self._current[state, :first, channels]
                group = group + magnitude.astype(np.float32) @ weights
            for odd in (0, 1):
                positions = np.flatnonzero(parity == odd)
                if not positions.size:
                    continue
                spread_p = np.take(group, positions, 0)
                offset_p = np.take(offset[:, channels], positions, 0)
                if odd:
                    value = result[:, :, channels]
                    sides = _neighbour_sums(_clipped_magnitude(value))[0].reshape(size, -1)
                    spread_p += np.take(sides, positions, 0) * t.spread_sides[state, channels]
                    clipped = np.clip(value, -MAX_VALUE, MAX_VALUE).astype(np.float32)
                    sides = _neighbour_sums(clipped)[0].reshape(size, -1)
                    offset_p += np.take(sides, positions, 0) * t.offset_sides[state, channels]
                parent_p = np.take(parent_cells[:, channels], positions, 0)
                step = self._choose(state, channels, positions, spread_p, offset_p, parent_p)
                cells[positions, channels] = visit(step)
        return result

    def _from_parent(self, state: int, parent: Symbols, active: int) -> tuple[Floats, Floats]:
        """What state k-1 says of every symbol: spread and offset, float32 ``[i j, active]``."""
        t = self.tables
        size, used = parent.shape[0] * parent.shape[1], _last_nonzero_channel(parent)
        spread = np.repeat(t.spread_bias[state, None, :active], size, 0)
        offset = np.zeros((size, active), np.float32)
        if used == 0:
            return spread, offset
        magnitude = _clipped_magnitude(parent[:, :, :used])
        sides, corners = _neighbour_sums(magnitude)
        spread += magnitude.reshape(size, used) @ self._parent[state, :used, :active]
        around = (2 * sides + corners).reshape(size, used)
        spread += around @ self._around[state, :used, :active]
        near, limit = min(used, active), MAX_VALUE // RATIO
        value = np.clip(parent[:, :, :near], -limit, limit).astype(np.float32) * RATIO
        sides, corners = _neighbour_sums(value)
        weights = t.offset_parent[state, :near]
        weighted = value * weights[:, 0] + sides * weights[:, 1] + corners * weights[:, 2]
        offset[:, :near] = weighted.reshape(size, near)
        return spread, offset

    def _choose(
        self,
        state: int,
        channels: slice,
        positions: npt.NDArray[np.intp],
        spread_p: Floats,
        offset_p: Floats,
        parent_p: Symbols,
    ) -> Pass:
        if state == 0:
            predicted = np.floor_divide(offset_p + OFFSET_UNIT // 2, OFFSET_UNIT)
            base = predicted.astype(np.int16)
        else:
            base = parent_p * np.int16(RATIO)
        offset = offset_p - base.astype(np.float32) * OFFSET_UNIT
        levels = np.clip(spread_p, 0, SPREAD_LEVELS - 1).astype(np.uint16)
        distance = np.minimum(np.abs(offset), 255).astype(np.uint8)
        tables = np.take(self._offset_rows, distance)
        if state:
            classes = np.minimum(np.abs(parent_p), NUM_PARENT_CLASSES - 1)
            tables += np.take(self._class_rows, classes)
        tables += np.take(self.tables.spread_buckets[state], levels)
        return Pass(channels, positions, tables, base, offset < 0, levels)


@dataclass(frozen=True, slots=True)
class CodedTile:
    """One state of one tile."""

    payload: bytes
    symbols: Symbols
    """int16 ``[i, j, C]``."""

    refinement: bytes
    """What the state's symbol checksum covers: the symbols it adds, int8, active channels only."""


class SymbolCoder:
    """Encodes and decodes the symbols of one tile, state by state."""

    def __init__(self, tables: ContextTables) -> None:
        self.tables = tables
        self.contexts = ContextModel(tables)
        # Integer weights that sum to 2**24 - n make constriction's float arithmetic exact: symbol
        # s gets the cumulative frequency sum(w[:s]) + s, that is sum(frequencies[:s]).
        self._models = [
            [
                constriction.stream.model.Categorical((row - 1).astype(np.float64), perfect=False)
                for row in table
            ]
            for table in tables.frequencies
        ]

    def encode(self, finest: Symbols) -> list[CodedTile]:
        """Encode all states of a tile.

        Args:
            finest: int16 ``[i, j, C]``: symbols of the last state, magnitudes at most 32,767.

        Returns:
            One payload for each state, coarsest first.

        Raises:
            EncodeError: a symbol of state 0 lies further from its prediction than has a code.
        """
        parent: Symbols | None = None
        coded = []
        for state, symbols in enumerate(nested_symbols(finest, self.tables.num_states)):
            coded.append(self._encode_state(state, parent, symbols))
            parent = symbols
        return coded

    def decode(
        self, state: int, parent: Symbols | None, shape: tuple[int, int], payload: bytes
    ) -> CodedTile:
        """Decode one state of a tile.

        Args:
            state: k.
            parent: int16 ``[i, j, C]``: the tile's symbols of state k-1; None for state 0.
            shape: ``(i, j)``, the cells of the tile.
            payload: what :meth:`encode` gave for this state.

        Raises:
            SymbolError: the payload cannot have been written by :meth:`encode`.
        """
        section = f"state {state}"
        if len(payload) < 2 or len(payload) % 4 != 2:
            raise SymbolError(section, f"{len(payload)} bytes are no whole number of words")
        active = int.from_bytes(payload[:2], "little")
        if active > self.tables.channels:
            raise SymbolError(section, f"{active} active channels of {self.tables.channels}")
        words = np.frombuffer(payload, "<u4", offset=2).astype(np.uint32)
        if words.size and words[-1] == 0:
            raise SymbolError(section, "the last word is zero")
        coder = constriction.stream.stack.AnsCoder(words)
        models, middle = self._models[state], num_symbols(state) // 2

        def visit(step: Pass) -> Symbols:
            order, runs = _runs(step.tables)
            sorted_codes = np.empty(order.size, np.int16)
            for table, start, stop in runs:
                sorted_codes[start:stop] = coder.decode(models[table], stop - start)
            codes = np.empty(order.size, np.int16)
            codes[order] = sorted_codes
            return step.symbols(codes.reshape(step.tables.shape), middle)

        symbols = self.contexts.walk(state, parent, shape, active, visit)
        if not coder.is_empty():
            raise SymbolError(section, "bytes are left after the last symbol")
        return CodedTile(payload, symbols, _refinement(symbols, parent, active))

    def _encode_state(self, state: int, parent: Symbols | None, symbols: Symbols) -> CodedTile:
        active = active_channels(symbols, parent)
        rows, columns, channels = symbols.shape
        cells = symbols.reshape(rows * columns, channels)
        middle = num_symbols(state) // 2
        runs: list[tuple[int, npt.NDArray[np.int32]]] = []

        def visit(step: Pass) -> Symbols:
            wanted = np.take(cells[:, step.channels], step.positions, 0)
            codes = step.codes(wanted, middle)
            if codes.min() < 0 or codes.max() > 2 * middle:
                raise EncodeError(f"a symbol of state {state} is too far from its prediction")
            order, stretches = _runs(step.tables)
            sorted_codes = np.take(codes.ravel(), order).astype(np.int32)
            runs.extend((table, sorted_codes[start:stop]) for table, start, stop in stretches)
            return wanted

        self.contexts.walk(state, parent, (rows, columns), active, visit)
        coder = constriction.stream.stack.AnsCoder()
        for table, stretch in reversed(runs):
            coder.encode_reverse(stretch, self._models[state][table])
        words = coder.get_compressed().astype("<u4").tobytes()
        payload = active.to_bytes(2, "little") + words
        return CodedTile(payload, symbols, _refinement(symbols, parent, active))


def round_latent(latent: Floats, step: float) -> Symbols:
    """Finest symbols of a latent: rounding, with a wider zero.

    Args:
        latent: float32 ``[..., C]``.
        step: the finest quantiser step.

    Raises:
        EncodeError: a value is not finite; it must not reach the coder.
    """
    if not np.isfinite(latent).all():
        raise EncodeError("the latent is not finite")
    scaled = latent / np.float32(step)
    rounded = np.where(np.abs(scaled) < ZERO_BELOW, np.float32(0), np.rint(scaled))
    return np.clip(rounded, -MAX_SYMBOL, MAX_SYMBOL).astype(np.int16)


def nested_symbols(finest: Symbols, num_states: int) -> list[Symbols]:
    """The symbols of every state, coarsest first, from those of the finest."""
    levels = [np.ascontiguousarray(finest, np.int16)]
    for _ in range(num_states - 1):
        levels.append((levels[-1] + np.int16(1)) // np.int16(RATIO))
    return levels[::-1]


def active_channels(symbols: Symbols, parent: Symbols | None) -> int:
    """Number of channels up to and including the last that refines its parent."""
    return _last_nonzero_channel(symbols if parent is None else symbols - parent * np.int16(RATIO))


def _refinement(symbols: Symbols, parent: Symbols | None, active: int) -> bytes:
    """What a state adds in its active channels, as int8 in row, column, channel order."""
    rest = symbols[:, :, :active]
    if parent is not None:
        rest = rest - parent[:, :, :active] * np.int16(RATIO)
    return rest.astype(np.int8).tobytes()


def _last_nonzero_channel(symbols: Symbols) -> int:
    used = np.flatnonzero(symbols.reshape(-1, symbols.shape[2]).any(0))
    return int(used[-1]) + 1 if used.size else 0


def _clipped_magnitude(symbols: Symbols) -> Floats:
    return np.minimum(np.abs(symbols), MAX_MAGNITUDE).astype(np.float32)


def _neighbour_sums(values: Floats) -> tuple[Floats, Floats]:
    """Sums over the four side and the four corner neighbours, zero beyond the edge; ``[i, j, C]``."""
    rows, columns, channels = values.shape
    padded = np.zeros((rows + 2, columns + 2, channels), np.float32)
    padded[1:-1, 1:-1] = values
    upright = padded[:-2] + padded[2:]
    sides = upright[:, 1:-1] + padded[1:-1, :-2]
    sides += padded[1:-1, 2:]
    return sides, upright[:, :-2] + upright[:, 2:]


def _runs(
    tables: npt.NDArray[np.uint16],
) -> tuple[npt.NDArray[np.intp], list[tuple[int, int, int]]]:
    """Order symbols by table, stably; and the stretches of one table: table, start, stop."""
    flat = tables.ravel()
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat)
    used = np.flatnonzero(counts)
    stops = np.cumsum(counts[used])
    starts = stops - counts[used]
    return order, list(zip(used.tolist(), starts.tolist(), stops.tolist(), strict=True))
