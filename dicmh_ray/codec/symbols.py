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

Shape suffixes: C channels, i j the latent grid, p positions of one parity.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

from dicmh_ray.errors import EncodeError, SymbolError, WeightsError

Ints = npt.NDArray[np.int32]
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
    tables: npt.NDArray[np.int32]
    """``[channels, p]``: row of the state's frequency table of each symbol."""

    base: Ints
    """``[channels, p]``: what the coded residual is relative to."""

    sign: Ints
    """``[channels, p]``: +1, or -1 where the residual's sign is turned before coding."""

    levels: npt.NDArray[np.int32]
    """``[channels, p]``: the clipped spread sum that chose the bucket."""


Visit = Callable[[Pass], Ints]
"""Gets a pass, returns its symbols ``[channels, p]``: known (encoder) or decoded (decoder)."""


class ContextModel:
    """Walks a state in coding order and finds the table of every symbol."""

    def __init__(self, tables: ContextTables) -> None:
        self.tables = tables

    def walk(
        self, state: int, parent: Ints | None, shape: tuple[int, int], active: int, visit: Visit
    ) -> Ints:
        """Visit the passes of a state; what ``visit`` returns becomes context of later passes.

        Args:
            state: k.
            parent: int32 ``[C, i, j]``, the symbols of state k-1; None for state 0.
            shape: ``(i, j)``.
            active: channels from here on are not coded: they keep three times their parent.
            visit: called for each non-empty pass.

        Returns:
            int32 ``[C, i, j]``: the symbols of state k.
        """
        t, (rows, columns) = self.tables, shape
        size = rows * columns
        current = np.zeros((t.channels, rows + 2, columns + 2), np.int32)
        inner = current[:, 1:-1, 1:-1]
        if parent is not None:
            inner[active:] = RATIO * parent[active:]
        parity = (np.add.outer(np.arange(rows), np.arange(columns)) % 2).ravel()
        by_parity = [np.flatnonzero(parity == 0), np.flatnonzero(parity == 1)]
        spread = np.repeat(t.spread_bias[state, :active, None], size, 1)
        offset = np.zeros((active, size), np.float32)
        parent_flat = np.zeros((active, size), np.int32)
        if parent is not None:
            self._from_parent(state, parent, active, spread, offset)
            parent_flat = parent[:active].reshape(active, size)
        for first, last in zip(t.groups[:-1], t.groups[1:], strict=True):
            channels = slice(first, min(last, active))
            if first >= active:
                break
            group = spread[channels]
            if first:
                magnitude = np.minimum(np.abs(inner[:first]), MAX_MAGNITUDE).astype(np.float32)
                weights = t.spread_current[state, channels, :first]
                group += weights @ magnitude.reshape(first, size)
            for positions in by_parity:
                if not positions.size:
                    continue
                spread_p, offset_p = group[:, positions], offset[channels][:, positions]
                if positions is by_parity[1]:
                    self._from_sides(state, channels, current, positions, spread_p, offset_p)
                step = self._choose(
                    state, channels, positions, spread_p, offset_p, parent_flat[channels]
                )
                symbols = visit(step)
                grid_i, grid_j = np.divmod(positions, columns)
                current[channels, grid_i + 1, grid_j + 1] = symbols
        return np.ascontiguousarray(inner)

    def _from_parent(
        self, state: int, parent: Ints, active: int, spread: Floats, offset: Floats
    ) -> None:
        t = self.tables
        used = _last_nonzero_channel(parent)
        size = spread.shape[1]
        if used == 0:
            return
        magnitude = np.minimum(np.abs(parent[:used]), MAX_MAGNITUDE).astype(np.float32)
        sides, corners = _neighbour_sums(magnitude)
        spread += t.spread_parent[state, :active, :used] @ magnitude.reshape(used, size)
        around = (2 * sides + corners).reshape(used, size)
        spread += t.spread_around[state, :active, :used] @ around
        near = min(used, active)
        value = (RATIO * np.clip(parent[:near], -(MAX_VALUE // 3), MAX_VALUE // 3)).astype(
            np.float32
        )
        sides, corners = _neighbour_sums(value)
        weights = t.offset_parent[state, :near]
        offset[:near] += (
            weights[:, 0, None] * value.reshape(near, size)
            + weights[:, 1, None] * sides.reshape(near, size)
            + weights[:, 2, None] * corners.reshape(near, size)
        )

    def _from_sides(
        self,
        state: int,
        channels: slice,
        current: Ints,
        positions: npt.NDArray[np.intp],
        spread_p: Floats,
        offset_p: Floats,
    ) -> None:
        """Add what the four side neighbours, coded in the first pass, say of the second."""
        t = self.tables
        columns = current.shape[2] - 2
        group = current[channels]
        flat = group.reshape(group.shape[0], -1)
        at = positions + 2 * (positions // columns) + columns + 3
        stride = columns + 2
        value = np.zeros(spread_p.shape, np.float32)
        magnitude = np.zeros(spread_p.shape, np.float32)
        for shift in (-stride, -1, 1, stride):
            symbols = flat[:, at + shift]
            value += np.clip(symbols, -MAX_VALUE, MAX_VALUE)
            magnitude += np.minimum(np.abs(symbols), MAX_MAGNITUDE)
        spread_p += t.spread_sides[state, channels, None] * magnitude
        offset_p += t.offset_sides[state, channels, None] * value

    def _choose(
        self,
        state: int,
        channels: slice,
        positions: npt.NDArray[np.intp],
        spread_p: Floats,
        offset_p: Floats,
        parent_group: Ints,
    ) -> Pass:
        t = self.tables
        parent_p = parent_group[:, positions]
        location = offset_p.astype(np.int32)
        predicted = (location + OFFSET_UNIT // 2) // OFFSET_UNIT
        base = predicted if state == 0 else RATIO * parent_p
        offset = location - OFFSET_UNIT * base
        sign = np.where(offset < 0, np.int32(-1), np.int32(1))
        distance = np.abs(offset)
        bucket = np.zeros(distance.shape, np.int32)
        for edge in t.offset_edges:
            bucket += distance >= edge
        bucket += t.num_offset_buckets * np.minimum(np.abs(parent_p), NUM_PARENT_CLASSES - 1)
        levels = np.clip(spread_p, 0, SPREAD_LEVELS - 1).astype(np.int32)
        tables = t.num_spread_buckets * bucket + t.spread_buckets[state][levels]
        return Pass(channels, positions, tables, base.astype(np.int32), sign, levels)


@dataclass(frozen=True, slots=True)
class CodedTile:
    """One state of one tile."""

    payload: bytes
    symbols: Ints
    """int32 ``[C, i, j]``."""

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

    def encode(self, finest: Ints) -> list[CodedTile]:
        """Encode all states of a tile.

        Args:
            finest: int32 ``[C, i, j]``: symbols of the last state.

        Returns:
            One payload for each state, coarsest first.

        Raises:
            EncodeError: a symbol of state 0 lies further from its prediction than has a code.
        """
        parent: Ints | None = None
        coded = []
        for state, symbols in enumerate(nested_symbols(finest, self.tables.num_states)):
            coded.append(self._encode_state(state, parent, symbols))
            parent = symbols
        return coded

    def decode(
        self, state: int, parent: Ints | None, shape: tuple[int, int], payload: bytes
    ) -> CodedTile:
        """Decode one state of a tile.

        Args:
            state: k.
            parent: int32 ``[C, i, j]``: the tile's symbols of state k-1; None for state 0.
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
        models, shift = self._models[state], num_symbols(state) // 2

        def visit(step: Pass) -> Ints:
            tables = step.tables.ravel()
            order = np.argsort(tables.astype(np.uint16), kind="stable")
            codes = np.empty(tables.size, np.int32)
            for table, start, stop in _runs(tables[order]):
                codes[order[start:stop]] = coder.decode(models[table], stop - start)
            residual = codes.reshape(step.tables.shape) - np.int32(shift)
            return step.base + residual * step.sign

        symbols = self.contexts.walk(state, parent, shape, active, visit)
        if not coder.is_empty():
            raise SymbolError(section, "bytes are left after the last symbol")
        return CodedTile(payload, symbols, _refinement(symbols, parent, active))

    def _encode_state(self, state: int, parent: Ints | None, symbols: Ints) -> CodedTile:
        active = active_channels(symbols, parent)
        flat = symbols.reshape(symbols.shape[0], -1)
        runs: list[tuple[int, Ints]] = []
        shift = num_symbols(state) // 2

        def visit(step: Pass) -> Ints:
            wanted = flat[step.channels][:, step.positions]
            codes = ((wanted - step.base) * step.sign + shift).ravel()
            if codes.size and (codes.min() < 0 or codes.max() > 2 * shift):
                raise EncodeError(f"a symbol of state {state} is too far from its prediction")
            tables = step.tables.ravel()
            order = np.argsort(tables.astype(np.uint16), kind="stable")
            for table, start, stop in _runs(tables[order]):
                runs.append((table, codes[order[start:stop]]))
            return wanted

        self.contexts.walk(state, parent, (symbols.shape[1], symbols.shape[2]), active, visit)
        coder = constriction.stream.stack.AnsCoder()
        for table, codes in reversed(runs):
            coder.encode_reverse(codes, self._models[state][table])
        words = coder.get_compressed().astype("<u4").tobytes()
        payload = active.to_bytes(2, "little") + words
        return CodedTile(payload, symbols, _refinement(symbols, parent, active))


def nested_symbols(finest: Ints, num_states: int) -> list[Ints]:
    """The symbols of every state, coarsest first, from those of the finest."""
    levels = [np.ascontiguousarray(finest, np.int32)]
    for _ in range(num_states - 1):
        levels.append((levels[-1] + 1) // RATIO)
    return levels[::-1]


def active_channels(symbols: Ints, parent: Ints | None) -> int:
    """Number of channels up to and including the last that refines its parent."""
    rest = symbols if parent is None else symbols - RATIO * parent
    return _last_nonzero_channel(rest)


def _refinement(symbols: Ints, parent: Ints | None, active: int) -> bytes:
    """What a state adds in its active channels, as int8 in channel, row, column order."""
    rest = symbols[:active] if parent is None else symbols[:active] - RATIO * parent[:active]
    return rest.astype(np.int8).tobytes()


def _last_nonzero_channel(symbols: Ints) -> int:
    used = np.flatnonzero(symbols.reshape(symbols.shape[0], -1).any(1))
    return int(used[-1]) + 1 if used.size else 0


def _neighbour_sums(values: Floats) -> tuple[Floats, Floats]:
    """Sums over the four side and the four corner neighbours, zero beyond the edge; ``[C, i, j]``."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    upright = padded[:, :-2] + padded[:, 2:]
    sides = upright[:, :, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    corners = upright[:, :, :-2] + upright[:, :, 2:]
    return sides, corners


def _runs(ordered: npt.NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """Stretches of equal values of a sorted array: value, start, stop."""
    if not ordered.size:
        return []
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts = np.concatenate([[0], edges])
    stops = np.concatenate([edges, [ordered.size]])
    return [
        (int(ordered[start]), int(start), int(stop))
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
    ]
