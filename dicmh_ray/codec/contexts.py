"""Which table codes which symbol: integer sums over symbols that the decoder already has.

State k is coded given all of state k-1. Each symbol's table is chosen by two integer sums: how
large this symbol may be (``spread``) and where in its parent's cell it should lie (``offset``).
Spreads are matrix products in float32, small enough to be exact whatever the order of summation
(proved from the weights when the tables are loaded); offsets are integers; nothing else enters: no
network, no probability computed in floating point. Any machine finds the same tables.

Order of coding in a state: channel groups; in each group first the cells of a coarse lattice, then
those of its refinements, each of which lies between four that are known (:func:`interlaced`): the
nearer the neighbours, the more they tell, and only few cells have none. Cells are kept in that order,
so that a pass is a block of rows; channels that are zero everywhere, as most are in coarse states,
stay out of the products; and other arrays have the narrowest type that holds their values, because
nearly all the time goes into moving them.

Shapes: ``C`` channels, ``i, j`` the latent grid, ``n = i j`` its cells in coding order, ``p`` those
of one pass. Channels come last.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
Bytes = npt.NDArray[np.uint8]
Indexes = npt.NDArray[np.intp]
Integers = npt.NDArray[np.signedinteger[Any]]

MAX_PARENT = MAX_VALUE // RATIO
"""Parents are clipped to this magnitude before they enter an offset."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Symbols that are coded together: some channels in the cells of one refinement."""

    channels: slice
    rows: slice
    """Of the tile's cells in coding order."""

    positions: Indexes
    """``[p]``: indexes into the tile's cells, row by row."""

    base: Symbols
    """``[p, channels]``: what is coded is relative to it. Valid during the visit."""

    shift: Integers
    """``[p, channels]``: the offset from the base; where negative, the residual's sign is turned."""

    spread: Floats
    """``[p, channels]``: the spread sum."""

    busy: Indexes
    """Flat indexes, ascending, of the symbols whose table is not table 0."""

    is_busy: npt.NDArray[np.bool_]
    """``[p * channels]``: the same as a mask."""

    busy_tables: npt.NDArray[np.unsignedinteger[Any]]
    """Their rows of the state's frequency table."""

    @property
    def tables(self) -> npt.NDArray[np.uint16]:
        """``[p, channels]``: row of the state's frequency table of each symbol."""
        tables = np.zeros(self.base.shape, np.uint16)
        tables.reshape(-1)[self.busy] = self.busy_tables
        return tables

    @property
    def levels(self) -> npt.NDArray[np.uint16]:
        """``[p, channels]``: the clipped spread sum."""
        return np.clip(self.spread, 0, SPREAD_LEVELS - 1).astype(np.uint16)

    def codes(self, symbols: Symbols, middle: int) -> Symbols:
        """What is coded for symbols, ``0 .. 2 middle`` where they have a code."""
        everywhere = np.arange(symbols.size)
        return (self.residuals(symbols, everywhere) + np.int16(middle)).reshape(symbols.shape)

    def residuals(self, symbols: Symbols, where: Indexes) -> Symbols:
        """What is coded for the symbols at flat indexes, before the middle is added."""
        difference: Symbols = symbols.reshape(-1)[where] - self.base.reshape(-1)[where]
        difference *= self._signs(where)
        return difference

    def exceptions(self, symbols: Symbols) -> Indexes:
        """Flat indexes of the symbols of table 0 that are not their base."""
        differs = (symbols != self.base).reshape(-1)
        return (differs > self.is_busy).nonzero()[0]

    def add(self, symbols: Symbols, where: Indexes, residuals: Symbols) -> None:
        """The inverse of :meth:`residuals`, on symbols that begin as a copy of the base."""
        symbols.reshape(-1)[where] += residuals * self._signs(where)

    def _signs(self, where: Indexes) -> npt.NDArray[np.int8]:
        return np.int8(1) - 2 * (self.shift.reshape(-1)[where] < 0).view(np.int8)


_SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))
_CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))

Visit = Callable[[Pass], Symbols]
"""Gets a pass, returns its symbols ``[p, channels]``: known (encoder) or decoded (decoder)."""


class ContextModel:
    """Walks a state in coding order and finds the table of every symbol."""

    def __init__(self, tables: ContextTables) -> None:
        self.tables = tables
        self._index_type = np.uint8 if tables.num_tables() <= 256 else np.uint16
        # Spreads below have bucket 0, whatever the buckets above.
        self._quiet = [_first_nonzero(buckets) for buckets in tables.spread_buckets]
        # For each state and group, all that its spreads are summed from, stacked for one product.
        self._spread = [
            [self._stacked(state, first, last) for first, last in itertools.pairwise(tables.groups)]
            for state in range(tables.num_states)
        ]
        # For each state, group and refinement, those of the near cells' magnitudes.
        self._near = [
            [
                [self._beside(state, step, first, last) for step in range(depth)]
                for first, last in itertools.pairwise(tables.groups)
            ]
            for state, depth in enumerate(tables.depths)
        ]
        # [K, 3 + R, C]: weights of the parent (less its symbol's base, three times the parent), of
        # its sides and its corners, and of this state's near cells in each refinement.
        parent = tables.offset_parent.transpose(0, 2, 1) * RATIO
        parent[:, 0] -= RATIO * OFFSET_UNIT
        self._offset = np.concatenate([parent, tables.offset_near], 1).astype(np.int32)

    def order(self, state: int, shape: tuple[int, int]) -> "Interlacing":
        """The coding order of a state's cells in a tile of some shape."""
        return interlaced(*shape, self.tables.depths[state])

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
        t, grid = self.tables, self.order(state, shape)
        if parent is None:
            parent = np.zeros((*shape, t.channels), np.int16)
        result = parent * np.int16(RATIO)
        inputs, used = self._parent_inputs(parent, grid, active)
        for group, (first, last) in enumerate(itertools.pairwise(t.groups)):
            if first >= active:
                break
            channels = slice(first, min(last, active))
            weights = self._spread[state][group].take(used, 0)[:, : channels.stop - first]
            spread = inputs[:, : used.size] @ weights
            # From here on arrays are contiguous: numpy is several times slower on slices.
            group_parent = np.ascontiguousarray(parent[:, :, channels])
            offset = self._parent_offset(state, group_parent, grid, channels)
            parents = grid.arrange(group_parent)
            # One row more than there are cells: what lies beyond the edge is zero.
            symbols = np.zeros((grid.size + 1, channels.stop - first), np.int16)
            np.multiply(parents, np.int16(RATIO), out=symbols[:-1])
            values = np.zeros_like(symbols)
            magnitudes = np.zeros(symbols.shape, np.uint8)
            for rows, step, near in grid.passes:
                if near is not None:
                    beside = grid.sums(magnitudes, near).astype(np.float32)
                    weights = self._near[state][group][step][:, : channels.stop - first]
                    spread[rows] += beside @ weights[1 : 1 + channels.stop - first]
                    spread[rows] += weights[0]
                    slopes = self._offset[state, 3 + step, channels].astype(offset.dtype)
                    offset[rows] += grid.sums(values, near) * slopes
                base, shift = symbols[rows], offset[rows]
                if state == 0:
                    predicted = (shift + OFFSET_UNIT // 2) // OFFSET_UNIT
                    base, shift = predicted.astype(np.int16), shift - predicted * OFFSET_UNIT
                busy = self._busy(state, spread[rows], shift, parents[rows])
                visited = Pass(channels, rows, grid.order[rows], base, shift, spread[rows], *busy)
                symbols[rows] = known = visit(visited)
                values[rows] = known.clip(-MAX_VALUE, MAX_VALUE)
                magnitudes[rows] = _magnitudes(known)
            result.reshape(grid.size, -1)[grid.order, channels] = symbols[:-1]
            if channels.stop < active:
                start = used.size
                used = np.append(used, 1 + 2 * t.channels + np.arange(first, channels.stop))
                inputs[:, start : used.size] = magnitudes[:-1]
        return result

    def _stacked(self, state: int, first: int, last: int) -> Floats:
        """Rows: bias, weights of the parent, of the parents around, of earlier groups."""
        t, group = self.tables, slice(first, last)
        return np.concatenate(
            [
                t.spread_bias[state, None, group],
                t.spread_parent[state, group].T,
                t.spread_around[state, group].T,
                t.spread_current[state, group, :first].T,
            ]
        )

    def _beside(self, state: int, step: int, first: int, last: int) -> Floats:
        """Rows: what a refinement adds, weights of the group's magnitudes in the near cells."""
        t, group = self.tables, slice(first, last)
        weights = t.spread_current[state, group, group].T + np.diag(
            t.spread_near[state, step, group]
        )
        return np.concatenate([t.spread_step[state, step, None, group], weights])

    def _parent_inputs(
        self, parent: Symbols, grid: "Interlacing", active: int
    ) -> tuple[Floats, Indexes]:
        """What spreads are summed from, filled as far as state k-1 tells.

        Args:
            parent: int16 ``[i, j, C]``.
            grid: the order of the cells.
            active: channels of this state to leave room for.

        Returns:
            float32 ``[n, inputs]``; the row of :meth:`_stacked` of each input so far.
        """
        magnitude = _magnitudes(parent)
        live = magnitude.reshape(grid.size, -1).max(0).nonzero()[0]
        magnitude = magnitude[:, :, live]
        around, corners = _neighbour_sums(magnitude)
        around += around  # 2 * 4 * 15 + 4 * 15 still is a byte
        around += corners
        inputs = np.empty((grid.size, 1 + 2 * live.size + active), np.float32)
        inputs[:, 0] = 1
        inputs[:, 1 : 1 + live.size] = grid.arrange(magnitude)
        inputs[:, 1 + live.size : 1 + 2 * live.size] = grid.arrange(around)
        return inputs, np.concatenate([[0], 1 + live, 1 + self.tables.channels + live])

    def _parent_offset(
        self, state: int, parent: Symbols, grid: "Interlacing", channels: slice
    ) -> Integers:
        """Where state k-1 says that a group's symbols lie, relative to their base.

        Args:
            state: k.
            parent: int16 ``[i, j, channels]``.
            grid: the order of the cells.
            channels: the group.

        Returns:
            ``[n, channels]``, in the narrowest integers that hold it and what is added later.
        """
        peak = max(int(parent.max()), -int(parent.min()))
        weights = np.abs(self._offset[state, :, channels])
        reach = np.array([1, 4, 4]) @ weights[:3] + 4 * weights[3:].max(0)
        reach *= RATIO * peak + 1
        narrow = state > 0 and peak <= MAX_PARENT and reach.max() < 1 << 15
        kind = np.int16 if narrow else np.int32
        if peak == 0:
            return np.zeros((grid.size, parent.shape[2]), kind)
        own, side, corner = self._offset[state, :3, channels].astype(kind)
        values = parent.clip(-MAX_PARENT, MAX_PARENT)
        sides, corners = _neighbour_sums(values)
        offset = values * own
        offset += sides * side
        offset += corners * corner
        if peak > MAX_PARENT:
            offset -= (parent - values).astype(kind) * (RATIO * OFFSET_UNIT)
        return grid.arrange(offset)

    def _busy(
        self, state: int, spread: Floats, shift: Integers, parents: Symbols
    ) -> tuple[Indexes, npt.NDArray[np.bool_], npt.NDArray[np.unsignedinteger[Any]]]:
        """Where the table is not table 0, and which it is there.

        Table 0 is that of small spread, small offset and parent zero: in all but the first
        channels of the finest states nearly every symbol's. Only the others are looked up.
        """
        t = self.tables
        is_busy = spread >= self._quiet[state]
        is_busy |= np.abs(shift) >= min(t.offset_edges, default=0)
        is_busy |= parents != 0
        is_busy = is_busy.reshape(-1)
        busy = is_busy.nonzero()[0]
        distance = np.abs(shift.reshape(-1)[busy])
        rows = _magnitudes(parents.reshape(-1)[busy], NUM_PARENT_CLASSES - 1)
        rows = rows.astype(self._index_type)
        rows *= self._index_type(t.num_offset_buckets)
        for edge in t.offset_edges:
            rows += distance >= edge
        rows *= self._index_type(t.num_spread_buckets)
        level = spread.reshape(-1)[busy].astype(np.intp)
        rows += t.spread_buckets[state].take(level, mode="clip")
        if not rows.all():  # nothing forbids bucket 0 again above another
            is_busy[busy[rows == 0]] = False
            busy, rows = busy[rows != 0], rows[rows != 0]
        return busy, is_busy, rows


@dataclass(frozen=True, slots=True)
class Interlacing:
    """The coding order of a tile's cells: of a coarse lattice first, then of its refinements."""

    order: Indexes
    """``[n]``: indexes into the cells row by row."""

    passes: tuple[tuple[slice, int, Indexes | None], ...]
    """Rows in that order; the refinement, counted from the last; and of its near cells ``[4, p]``
    the places in the order, ``n`` beyond the edge. The first pass may have none. No pass is empty."""

    @property
    def size(self) -> int:
        return self.order.size

    def arrange(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``[i, j, C]`` -> ``[n, C]`` in coding order."""
        return values.reshape(self.size, values.shape[2]).take(self.order, 0)

    @staticmethod
    def sums(values: npt.NDArray[Any], near: Indexes) -> npt.NDArray[Any]:
        """Sums over near cells ``[4, p]``; of ``[n + 1, C]``, the last row zero."""
        total = values.take(near[0], 0)
        for neighbour in near[1:]:
            total += values.take(neighbour, 0)
        return total


@functools.lru_cache(maxsize=32)
def interlaced(rows: int, columns: int, depth: int) -> Interlacing:
    """The order for a tile's shape.

    Each refinement doubles the cells, by those amid squares of four coded ones: at first the middles
    of a square lattice's squares, whose near cells are their corners, then the middles of the
    tilted squares that this makes, whose near cells are at their sides. Counted from the last:
    refinement 0 has the cells with odd ``i + j`` and near cells at their sides, refinement 1 those
    with odd ``i`` and odd ``j`` and near cells at their corners, 2 and 3 the same on the lattice of
    even ``i`` and even ``j``, and so on.
    """
    i, j = np.indices((rows, columns))
    steps = np.full((rows, columns), depth)
    for step in reversed(range(depth)):
        distance = 1 << step // 2
        on_lattice = (i % distance == 0) & (j % distance == 0)
        between = (
            ((i // distance % 2 == 1) & (j // distance % 2 == 1))
            if step % 2
            else ((i + j) // distance % 2 == 1)
        )
        steps[on_lattice & between] = step
    order = np.argsort(depth - steps.ravel(), kind="stable")
    margin = 1 << max(depth - 1, 0) // 2
    place = np.full((rows + 2 * margin, columns + 2 * margin), order.size)
    place[margin:-margin, margin:-margin].flat[order] = np.arange(order.size)
    passes = []
    start = 0
    for step in reversed(range(depth + 1)):
        stop = start + int(np.count_nonzero(steps == step))
        if stop > start:
            row, column = np.divmod(order[start:stop], columns)
            near = None
            if step < depth:
                distance = 1 << step // 2
                ways = _CORNERS if step % 2 else _SIDES
                near = np.stack(
                    [
                        place[row + margin + a * distance, column + margin + b * distance]
                        for a, b in ways
                    ]
                )
            passes.append((slice(start, stop), step, near))
        start = stop
    return Interlacing(order, tuple(passes))


def last_nonzero_channel(symbols: Symbols) -> int:
    """Number of channels up to and including the last that holds a nonzero."""
    used = np.flatnonzero(symbols.reshape(-1, symbols.shape[2]).any(0))
    return int(used[-1]) + 1 if used.size else 0


def _magnitudes(symbols: Symbols, limit: int = MAX_MAGNITUDE) -> Bytes:
    clipped = symbols.clip(-limit, limit)
    return np.abs(clipped, out=clipped).astype(np.uint8)


def _first_nonzero(buckets: Bytes) -> float:
    """The least spread whose bucket is not 0. All negative spreads have the bucket of spread 0."""
    nonzero = np.flatnonzero(buckets)
    if not nonzero.size:
        return np.inf
    return float(nonzero[0]) if nonzero[0] else -np.inf


def _neighbour_sums(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Sums over the four side and the four corner neighbours, zero beyond the edge; ``[i, j, C]``."""
    rows, columns, channels = values.shape
    padded = np.zeros((rows + 2, columns + 2, channels), values.dtype)
    padded[1:-1, 1:-1] = values
    upright = padded[:-2] + padded[2:]
    sides = upright[:, 1:-1] + padded[1:-1, :-2]
    sides += padded[1:-1, 2:]
    return sides, upright[:, :-2] + upright[:, 2:]
