"""Which table codes which symbol: integer sums over symbols that the decoder already has.

State k is coded given all of state k-1. Each symbol's table is chosen by two integer sums: how
large this symbol may be (``spread``) and where in its parent's cell it should lie (``offset``).
The sums are small enough to be exact in float32 whatever the order of summation (proved from the
weights when the tables are loaded), and nothing else enters: no network, no probability computed in
floating point. Any machine finds the same tables.

Order of coding in a state: channel groups; in each group first the positions with even ``i + j``,
then the others.

Shapes: ``C`` channels, ``i, j`` the latent grid, ``p`` positions of one parity. Channels come last,
so that the positions of a pass are whole rows of memory.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dicmh_ray.codec.tables import (
    MAX_MAGNITUDE,
    MAX_VALUE,
    NUM_PARENT_CLASSES,
    OFFSET_UNIT,
    RATIO,
    SPREAD_LEVELS,
    ContextTables,
    Floats,
)

Symbols = npt.NDArray[np.int16]


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
        size, used = parent.shape[0] * parent.shape[1], last_nonzero_channel(parent)
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


def last_nonzero_channel(symbols: Symbols) -> int:
    """Number of channels up to and including the last that holds a nonzero."""
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
