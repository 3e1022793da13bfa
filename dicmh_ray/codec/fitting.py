"""Find the integers of the entropy model: context weights, buckets, frequency tables.

The last step of making a checkpoint. Weights are fitted in floating point, by maximum likelihood
of training symbols under logistic distributions cut to the parent's cell, then rounded to
integers; from there on only integers are counted. What comes out is frozen in the checkpoint.

Shape suffixes: N tiles, C channels, i j the latent grid.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicmh_ray.codec.contexts import ContextModel, Pass, Symbols
from dicmh_ray.codec.layered import parent_symbols
from dicmh_ray.codec.symbols import active_channels, nested_symbols
from dicmh_ray.codec.tables import (
    MAX_MAGNITUDE,
    MAX_VALUE,
    NUM_PARENT_CLASSES,
    OFFSET_UNIT,
    PRECISION,
    RATIO,
    SPREAD_LEVELS,
    SPREAD_UNIT,
    ContextTables,
    num_symbols,
)

SPREAD_ORIGIN = 6.0
"""Added to the fitted spread so that its useful range starts at zero."""

OFFSET_EDGES = (8, 32, 80)
"""Offsets of 1/16, 1/4 and 5/8 of a step separate the offset buckets."""

NUM_SPREAD_BUCKETS = 20


class _StateContext(nn.Module):
    """Float twin of one state of :class:`ContextModel`."""

    def __init__(self, channels: int, groups: Sequence[int], state: int) -> None:
        super().__init__()
        self.state = state
        eye = torch.eye(channels)
        earlier = torch.zeros(channels, channels)
        for first, last in itertools.pairwise(groups):
            earlier[first:last, :first] = 1
        self.earlier: Tensor
        self.register_buffer("earlier", earlier)
        self.bias = nn.Parameter(torch.full((channels,), -2.0))
        self.parent = nn.Parameter(0.5 * eye)
        self.around = nn.Parameter(0.05 * eye)
        self.current = nn.Parameter(torch.zeros(channels, channels))
        self.sides = nn.Parameter(torch.full((channels,), 0.05))
        offset = torch.zeros(channels, 3)
        offset[:, 0] = 0.95 if state else 0.0
        self.offset = nn.Parameter(offset)
        self.offset_sides = nn.Parameter(torch.zeros(channels))

    def forward(self, symbols_NCij: Tensor, parent_NCij: Tensor) -> Tensor:
        """Bits of the symbols of this state given their parents', ``[N, C, i, j]``."""
        magnitude = parent_NCij.abs().clamp_max(MAX_MAGNITUDE)
        value = RATIO * parent_NCij.clamp(-(MAX_VALUE // 3), MAX_VALUE // 3)
        own = symbols_NCij.clamp(-MAX_VALUE, MAX_VALUE)
        own_magnitude = symbols_NCij.abs().clamp_max(MAX_MAGNITUDE)
        rows, columns = symbols_NCij.shape[2:]
        second = ((torch.arange(rows)[:, None] + torch.arange(columns)[None, :]) % 2).to(
            symbols_NCij.dtype
        )
        sides, corners = _sums(magnitude)
        spread = (
            _mix(self.parent, magnitude)
            + _mix(self.around, 2 * sides + corners)
            + _mix(self.current * self.earlier, own_magnitude)
            + self.sides[:, None, None] * _sums(own_magnitude)[0] * second
            + self.bias[:, None, None]
        )
        sides, corners = _sums(value)
        mean = (
            self.offset[:, 0, None, None] * value
            + self.offset[:, 1, None, None] * sides
            + self.offset[:, 2, None, None] * corners
            + self.offset_sides[:, None, None] * _sums(own)[0] * second
        )
        scale = F.softplus(spread) + 0.02
        bits = -_log_mass(symbols_NCij, 0.5, mean, scale)
        if self.state:
            bits = bits + _log_mass(RATIO * parent_NCij, RATIO / 2, mean, scale)
        return bits / math.log(2)


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    return F.conv2d(values, weights[:, :, None, None])


def _sums(values: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(values, (1, 1, 1, 1))
    upright = padded[:, :, :-2] + padded[:, :, 2:]
    sides = upright[..., 1:-1] + padded[:, :, 1:-1, :-2] + padded[:, :, 1:-1, 2:]
    return sides, upright[..., :-2] + upright[..., 2:]


def _log_mass(centre: Tensor, half: float, mean: Tensor, scale: Tensor) -> Tensor:
    """Log probability that a logistic variable lies within ``half`` of ``centre``."""
    upper = (centre + half - mean) / scale
    lower = (centre - half - mean) / scale
    gap = -torch.expm1(-2 * half / scale)
    return F.logsigmoid(upper) + F.logsigmoid(-lower) + gap.clamp_min(1e-12).log()


def fit_tables(
    tiles: Sequence[Symbols],
    *,
    num_states: int,
    groups: Sequence[int],
    steps: int = 300,
    batch: int = 16,
    seed: int = 231,
    report: Callable[[str], None] | None = None,
) -> ContextTables:
    """Fit the entropy model of all states to training symbols.

    Args:
        tiles: finest symbols of training crops, each int16 ``[i, j, C]``, all of one shape.
        num_states: K.
        groups: first channel of each group, and C at the end.
        steps: optimiser steps for each state.
        batch: tiles a step.
        seed: of the order of tiles.
        report: called with a line of text for each state.

    Returns:
        Validated tables.
    """
    channels = tiles[0].shape[2]
    rng = np.random.default_rng(seed)
    fitted = []
    for state in range(num_states):
        context = _StateContext(channels, groups, state)
        optimiser = torch.optim.Adam(context.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        total = 0.0
        for _ in range(steps):
            chosen = rng.choice(len(tiles), size=min(batch, len(tiles)), replace=False)
            symbols, parent = _levels([tiles[i] for i in chosen], state, num_states)
            bits = context(symbols, parent)
            loss = bits.mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total = 0.95 * total + 0.05 * float(loss.detach())
        if report is not None:
            report(f"state {state}: {total:.5f} bits per symbol under the fitted contexts")
        fitted.append(context)
    return _freeze(fitted, tiles, num_states, groups, report)


def _levels(tiles: Sequence[Symbols], state: int, num_states: int) -> tuple[Tensor, Tensor]:
    """Symbols of a state and of its parent, float32 ``[N, C, i, j]`` each."""
    symbols = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).to(torch.int32)
    for _ in range(num_states - 1 - state):
        symbols = parent_symbols(symbols)
    if state == 0:
        return symbols.float(), torch.zeros(symbols.shape)
    return symbols.float(), parent_symbols(symbols).float()


def _freeze(
    fitted: Sequence[_StateContext],
    tiles: Sequence[Symbols],
    num_states: int,
    groups: Sequence[int],
    report: Callable[[str], None] | None,
) -> ContextTables:
    def stack(values: list[Tensor], unit: int) -> npt.NDArray[np.float32]:
        integers = (torch.stack(values).detach() * unit).round().clamp(-32767, 32767)
        return integers.float().numpy() + 0.0

    buckets = np.zeros((num_states, SPREAD_LEVELS), np.uint8)
    buckets[:, -1] = NUM_SPREAD_BUCKETS - 1
    offset_tables = NUM_PARENT_CLASSES * (len(OFFSET_EDGES) + 1) * NUM_SPREAD_BUCKETS
    uniform = [_distributions(np.ones((offset_tables, num_symbols(k)))) for k in range(num_states)]
    tables = ContextTables(
        spread_bias=stack([c.bias + SPREAD_ORIGIN for c in fitted], SPREAD_UNIT),
        spread_parent=stack([c.parent for c in fitted], SPREAD_UNIT),
        spread_around=stack([c.around for c in fitted], SPREAD_UNIT),
        spread_current=stack([c.current * c.earlier for c in fitted], SPREAD_UNIT),
        spread_sides=stack([c.sides for c in fitted], SPREAD_UNIT),
        offset_parent=stack([c.offset for c in fitted], OFFSET_UNIT),
        offset_sides=stack([c.offset_sides for c in fitted], OFFSET_UNIT),
        groups=tuple(groups),
        spread_buckets=buckets,
        offset_edges=OFFSET_EDGES,
        frequencies=tuple(uniform),
    )
    frequencies = []
    for state in range(num_states):
        histogram = _spread_histogram(tables, tiles, state)
        buckets[state] = _equal_buckets(histogram)
        counts = _count(tables, tiles, state)
        frequencies.append(_distributions(counts))
        if report is not None:
            share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            bits = -(counts * np.log2(np.maximum(share, 1e-12))).sum() / len(tiles)
            report(f"state {state}: {bits / tiles[0][..., 0].size:.4f} bits per cell in its tables")
    frozen = ContextTables(
        **{
            name: getattr(tables, name)
            for name in tables.__dataclass_fields__
            if name != "frequencies"
        },
        frequencies=tuple(frequencies),
    )
    frozen.validate("fitted tables")
    return frozen


def _walk_all(
    tables: ContextTables,
    tiles: Sequence[Symbols],
    state: int,
    visit: Callable[[Pass, Symbols], None],
) -> None:
    contexts = ContextModel(tables)
    for tile in tiles:
        levels = nested_symbols(tile, tables.num_states)
        symbols = levels[state]
        rows, columns, channels = symbols.shape
        cells = symbols.reshape(rows * columns, channels)

        def seen(step: Pass, cells: Symbols = cells) -> Symbols:
            wanted = np.take(cells[:, step.channels], step.positions, 0)
            visit(step, wanted)
            return wanted

        parent = levels[state - 1] if state else None
        active = active_channels(symbols, parent)
        contexts.walk(state, parent, (rows, columns), active, seen)


def _spread_histogram(
    tables: ContextTables, tiles: Sequence[Symbols], state: int
) -> npt.NDArray[np.float64]:
    """How often each spread level meets a nonzero residual: the levels that cost bits."""
    histogram = np.zeros(SPREAD_LEVELS)

    def visit(step: Pass, wanted: Symbols) -> None:
        nonzero = (wanted != step.base).ravel()
        seen = np.bincount(step.levels.ravel(), minlength=SPREAD_LEVELS)
        hits = np.bincount(step.levels.ravel()[nonzero], minlength=SPREAD_LEVELS)
        histogram[:] += hits + 0.002 * seen

    _walk_all(tables, tiles, state, visit)
    return histogram


def _equal_buckets(histogram: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Split the levels into buckets of equal weight."""
    share = np.cumsum(histogram) / max(histogram.sum(), 1e-9)
    return np.minimum(share * NUM_SPREAD_BUCKETS, NUM_SPREAD_BUCKETS - 1).astype(np.uint8)


def _count(tables: ContextTables, tiles: Sequence[Symbols], state: int) -> npt.NDArray[np.float64]:
    symbols = num_symbols(state)
    counts = np.zeros(tables.num_tables() * symbols)

    def visit(step: Pass, wanted: Symbols) -> None:
        codes = np.clip(step.codes(wanted, symbols // 2), 0, symbols - 1)
        cells = step.tables.astype(np.int32) * symbols + codes
        counts[:] += np.bincount(cells.ravel(), minlength=counts.size)

    _walk_all(tables, tiles, state, visit)
    return counts.reshape(-1, symbols)


def _distributions(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Counts -> integer frequencies >= 1 that sum to 2**24 in each row."""
    prior = counts.sum(0) + 1.0
    smoothed = counts + 2.0 * prior / prior.sum()
    share = smoothed / smoothed.sum(1, keepdims=True)
    frequencies = np.maximum(np.floor(share * PRECISION), 1).astype(np.int64)
    largest = frequencies.argmax(1)
    frequencies[np.arange(len(frequencies)), largest] += PRECISION - frequencies.sum(1)
    return frequencies.astype(np.int32)
