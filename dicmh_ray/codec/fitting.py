"""Find the integers of the entropy model: context weights, buckets, frequency tables.

The last step of making a checkpoint. Weights are fitted in floating point, by maximum likelihood
of training symbols under logistic distributions cut to the parent's cell, then rounded to
integers; from there on only integers are counted. What comes out is frozen in the checkpoint.

Shape suffixes: N tiles, C channels, i j the latent grid.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicmh_ray.codec.contexts import ContextModel, Interlacing, Pass, Symbols, interlaced
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

OFFSET_EDGES = (8, 20, 40, 64, 96, 128)
"""Offsets, in 1/128 of a step, that separate the offset buckets."""

NUM_SPREAD_BUCKETS = 16

COARSEST_DEPTH = 6
"""Refinements of state 0, which has no parents: near cells tell most of what is known."""

DEPTH = 4
"""Those of the others."""

LEVELS_A_CELL = 8
"""Spread levels that are never parted by a bucket's edge."""

WHITENING_FLOOR = 0.03
"""Deviation added to that of every magnitude, so that rare ones get no wild weights."""

WHITENING_BATCH = 32
"""Tiles read at a time for the covariance of the magnitudes."""

WHITENED_RATE = 3e-3
"""Adam's peak rate for the weights of whitened magnitudes."""

NEAR_RATE = 2e-3
"""The same for those of the group's magnitudes in the near cells."""

OTHER_RATE = 1.2e-2
"""The same for everything else, of which each channel has little."""

COARSEST_RATE = 3.2e-2
"""The same in state 0, whose symbols are the largest."""


class _Whitening:
    """Decorrelates the magnitudes that spreads are summed from: without it the fit crawls.

    Neighbouring channels and states are large together, so the sums are ill conditioned. The
    Cholesky factor is triangular: a whitened magnitude is made of itself and those before it alone,
    which keeps to the order of coding.
    """

    def __init__(self, tiles: Sequence[Symbols], state: int, num_states: int, live: Tensor) -> None:
        total = torch.zeros(3 * len(live), dtype=torch.float64)
        product, count = torch.outer(total, total), 0
        for start in range(0, len(tiles), WHITENING_BATCH):
            levels = _levels(tiles[start : start + WHITENING_BATCH], state, num_states)
            magnitudes = _magnitudes(*(level[:, live] for level in levels))
            rows = magnitudes.permute(0, 2, 3, 1).flatten(0, 2).double()
            total += rows.sum(0)
            product += rows.T @ rows
            count += len(rows)
        mean = total / count
        covariance = product / count - torch.outer(mean, mean)
        self.mean = mean.float()
        covariance += WHITENING_FLOOR**2 * torch.eye(len(mean))
        self.factor = torch.linalg.cholesky(covariance)
        """``[3 C, 3 C]``, float64, lower triangular: magnitudes = factor @ whitened + mean."""
        self.inverse = torch.linalg.inv(self.factor).float()


class _StateContext(nn.Module):
    """Float twin of one state of :class:`ContextModel`, over the channels that live in it."""

    def __init__(self, groups: Sequence[int], state: int, live: Tensor, white: _Whitening) -> None:
        super().__init__()
        self.state, self.live, self.white = state, live, white
        self.depth = DEPTH if state else COARSEST_DEPTH
        channels = len(live)
        group = torch.bucketize(live, torch.tensor(groups[1:]), right=True)
        earlier = (group[None, :] < group[:, None]).float()
        self._same = (group[None, :] == group[:, None]).float()
        self._allowed = torch.cat([torch.ones(channels, 2 * channels), earlier], 1)
        eye = torch.eye(channels, dtype=torch.float64)
        start = torch.cat([0.5 * eye, 0.05 * eye, 0 * eye], 1)
        self.whitened = nn.Parameter((start @ white.factor).float())
        self.level = nn.Parameter(torch.full((channels,), -2.0) + start.float() @ white.mean)
        self.group_near = nn.Parameter(torch.zeros(channels, channels))
        self.near = nn.Parameter(torch.full((self.depth, channels), 0.05))
        self.step = nn.Parameter(torch.zeros(self.depth, channels))
        offset = torch.zeros(channels, 3)
        offset[:, 0] = 0.95 if state else 0.0
        self.offset = nn.Parameter(offset)
        # Without a parent, a symbol is best guessed as the mean of its near cells.
        between = 0.0 if state else 0.25
        self.offset_near = nn.Parameter(torch.full((self.depth, channels), between))

    @property
    def weights(self) -> Tensor:
        """Of the magnitudes, ``[C, 3 C]``: of parents, of parents around, of earlier groups."""
        return (self.whitened * self._allowed) @ self.white.inverse

    @property
    def beside(self) -> Tensor:
        """Of the magnitudes of the same group in the near cells, ``[C, C]``."""
        return self.group_near * self._same

    def bias(self, weights: Tensor) -> Tensor:
        """What is added to the weighted magnitudes, ``[C]``."""
        return self.level - weights @ self.white.mean

    def forward(self, symbols_NCij: Tensor, parent_NCij: Tensor) -> Tensor:
        """Bits of the symbols of this state given their parents', ``[N, C, i, j]``."""
        value = RATIO * parent_NCij.clamp(-(MAX_VALUE // 3), MAX_VALUE // 3)
        own = symbols_NCij.clamp(-MAX_VALUE, MAX_VALUE)
        weights = self.weights
        magnitudes = _magnitudes(symbols_NCij, parent_NCij)
        order = interlaced(*symbols_NCij.shape[2:], self.depth)
        beside = _near_sums(magnitudes[:, -len(self.live) :], order)
        spread = (
            F.conv2d(magnitudes, weights[:, :, None, None], self.bias(weights))
            + F.conv2d(beside, self.beside[:, :, None, None])
            + _by_refinement(self.near, order, beside) * beside
            + _by_refinement(self.step, order, beside)
        )
        sides, corners = _sums(value)
        mean = (
            self.offset[:, 0, None, None] * value
            + self.offset[:, 1, None, None] * sides
            + self.offset[:, 2, None, None] * corners
            + _by_refinement(self.offset_near, order, own) * _near_sums(own, order)
        )
        scale = F.softplus(spread) + 0.02
        bits = -_log_mass(symbols_NCij, 0.5, mean, scale)
        if self.state:
            bits = bits + _log_mass(RATIO * parent_NCij, RATIO / 2, mean, scale)
        return bits / math.log(2)


def _magnitudes(symbols_NCij: Tensor, parent_NCij: Tensor) -> Tensor:
    """Of parents, of parents around (sides twice, corners once), of symbols: ``[N, 3 C, i, j]``."""
    parent = parent_NCij.abs().clamp_max(MAX_MAGNITUDE)
    sides, corners = _sums(parent)
    return torch.cat([parent, 2 * sides + corners, symbols_NCij.abs().clamp_max(MAX_MAGNITUDE)], 1)


def _sums(values: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(values, (1, 1, 1, 1))
    upright = padded[:, :, :-2] + padded[:, :, 2:]
    sides = upright[..., 1:-1] + padded[:, :, 1:-1, :-2] + padded[:, :, 1:-1, 2:]
    return sides, upright[..., :-2] + upright[..., 2:]


def _near_sums(values_NCij: Tensor, order: Interlacing) -> Tensor:
    """Sums over the near cells of each cell; zero in the cells that are coded first."""
    cells = values_NCij.flatten(2)
    arranged = F.pad(cells[:, :, torch.from_numpy(order.order)], (0, 1))
    sums = torch.zeros_like(cells)
    for rows, _, near in order.passes:
        if near is not None:
            where = torch.from_numpy(order.order[rows])
            sums[:, :, where] = arranged[:, :, torch.from_numpy(near)].sum(2)
    return sums.view_as(values_NCij)


def _by_refinement(weights_RC: Tensor, order: Interlacing, like_NCij: Tensor) -> Tensor:
    """The weight of each channel and cell, ``[C, i, j]``; zero in the cells that are coded first."""
    steps = torch.full((order.size,), len(weights_RC))
    for rows, step, _ in order.passes:
        steps[torch.from_numpy(order.order[rows])] = step
    cells = F.pad(weights_RC, (0, 0, 0, 1))[steps].T
    return cells.reshape(like_NCij.shape[1:])


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
    steps: int = 600,
    batch: int = 8,
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
    fitted = [
        _fit_state(
            tiles, state, num_states, groups, steps=steps, batch=batch, seed=seed, report=report
        )
        for state in range(num_states)
    ]
    return _freeze(fitted, tiles, num_states, groups, report)


def _fit_state(
    tiles: Sequence[Symbols],
    state: int,
    num_states: int,
    groups: Sequence[int],
    *,
    steps: int,
    batch: int,
    seed: int,
    report: Callable[[str], None] | None,
) -> _StateContext:
    rng = np.random.default_rng([seed, state])
    live = _live_channels(tiles, state, num_states)
    context = _StateContext(groups, state, live, _Whitening(tiles, state, num_states, live))
    matrices = ("whitened", "group_near")
    others = [p for name, p in context.named_parameters() if name not in matrices]
    rates: list[dict[str, Any]] = [
        {"params": [context.whitened], "lr": WHITENED_RATE},
        {"params": [context.group_near], "lr": NEAR_RATE},
        {"params": others, "lr": OTHER_RATE if state else COARSEST_RATE},
    ]
    optimiser = torch.optim.Adam(rates, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    total = 0.0
    for step in range(steps):
        chosen = rng.choice(len(tiles), size=min(batch, len(tiles)), replace=False)
        levels = _levels([tiles[i] for i in chosen], state, num_states)
        bits = context(*(level[:, live] for level in levels))
        loss = bits.sum((1, 2, 3)).mean() / (tiles[0].shape[0] * tiles[0].shape[1])
        optimiser.zero_grad(set_to_none=True)
        (loss / len(live)).backward()
        optimiser.step()
        schedule.step()
        total += max(0.05, 1 / (step + 1)) * (float(loss.detach()) - total)
    if report is not None:
        report(f"state {state}: {total:.4f} bits per cell under the fitted contexts")
    return context


def _live_channels(tiles: Sequence[Symbols], state: int, num_states: int) -> Tensor:
    """Channels that are not zero everywhere in a state, int64, ascending; at least one."""
    live = np.zeros(tiles[0].shape[2], bool)
    for tile in tiles:
        live |= nested_symbols(tile, num_states)[state].any((0, 1))
    return torch.from_numpy(live.nonzero()[0] if live.any() else np.zeros(1, np.int64))


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
    channels, steps = groups[-1], max(context.depth for context in fitted)
    integers = [_integers(context, channels, steps) for context in fitted]
    weights = {name: np.stack([state[name] for state in integers]) for name in integers[0]}
    # Before the levels are divided, tables tell the classes of parent and offset alone.
    undivided = np.zeros((num_states, SPREAD_LEVELS), np.uint8)
    classes = NUM_PARENT_CLASSES * (len(OFFSET_EDGES) + 1)
    uniform = [_distributions(np.ones((classes, num_symbols(k)))) for k in range(num_states)]
    tables = ContextTables(
        **weights,
        depths=tuple(context.depth for context in fitted),
        groups=tuple(groups),
        spread_buckets=undivided,
        offset_edges=OFFSET_EDGES,
        frequencies=tuple(uniform),
    )
    for state in range(num_states):
        tables = recount(tables, tiles, state, report=report)
    tables.validate("fitted tables")
    return tables


def recount(
    tables: ContextTables,
    tiles: Sequence[Symbols],
    state: int,
    *,
    report: Callable[[str], None] | None = None,
) -> ContextTables:
    """The tables with a state's spreads divided, and its codes counted, anew.

    Args:
        tables: their context weights stay.
        tiles: finest symbols, each int16 ``[i, j, C]``.
        state: k.
        report: called with a line of text.
    """
    undivided = dataclasses.replace(tables, spread_buckets=np.zeros_like(tables.spread_buckets))
    counts = _count(undivided, tiles, state)
    buckets = best_buckets(counts, NUM_SPREAD_BUCKETS)
    divided, frequencies = tables.spread_buckets.copy(), list(tables.frequencies)
    divided[state] = np.repeat(buckets, SPREAD_LEVELS // len(buckets))
    starts = np.searchsorted(buckets, np.arange(NUM_SPREAD_BUCKETS))
    counts = np.add.reduceat(counts, starts, 1).reshape(-1, num_symbols(state))
    frequencies[state] = _distributions(counts)
    if report is not None:
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        bits = -(counts * np.log2(np.maximum(share, 1e-12))).sum() / len(tiles)
        report(f"state {state}: {bits / tiles[0][..., 0].size:.4f} bits per cell in its tables")
    return dataclasses.replace(tables, spread_buckets=divided, frequencies=tuple(frequencies))


def _integers(
    context: _StateContext, channels: int, steps: int
) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of a state in integers, for all channels and ``steps`` refinements.

    Channels that do not live have table 0.
    """
    live = context.live.numpy()
    each = np.ix_(np.arange(context.depth), live)
    square = np.ix_(live, live)

    def everywhere(
        values: Tensor, unit: int, default: npt.NDArray[np.float32], where: Any = live
    ) -> npt.NDArray[np.float32]:
        default[where] = (values.detach() * unit).round().clamp(-32767, 32767).float().numpy() + 0.0
        return default

    def zeros(*shape: int) -> npt.NDArray[np.float32]:
        return np.zeros(shape, np.float32)

    weights = context.weights
    parent, around, current = weights.chunk(3, 1)
    bias = context.bias(weights) + SPREAD_ORIGIN
    in_the_middle = zeros(channels, 3)
    in_the_middle[:, 0] = OFFSET_UNIT
    return {
        "spread_bias": everywhere(bias, SPREAD_UNIT, zeros(channels)),
        "spread_parent": everywhere(parent, SPREAD_UNIT, zeros(channels, channels), square),
        "spread_around": everywhere(around, SPREAD_UNIT, zeros(channels, channels), square),
        "spread_current": everywhere(
            current + context.beside, SPREAD_UNIT, zeros(channels, channels), square
        ),
        "spread_step": everywhere(context.step, SPREAD_UNIT, zeros(steps, channels), each),
        "spread_near": everywhere(context.near, SPREAD_UNIT, zeros(steps, channels), each),
        "offset_parent": everywhere(context.offset, OFFSET_UNIT, in_the_middle),
        "offset_near": everywhere(context.offset_near, OFFSET_UNIT, zeros(steps, channels), each),
    }


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


def _count(tables: ContextTables, tiles: Sequence[Symbols], state: int) -> npt.NDArray[np.float64]:
    """How often each code meets each class and spread: ``[classes, cells of levels, codes]``."""
    codes, cells = num_symbols(state), SPREAD_LEVELS // LEVELS_A_CELL
    counts = np.zeros(tables.num_tables() * cells * codes)

    def visit(step: Pass, wanted: Symbols) -> None:
        code = np.clip(step.codes(wanted, codes // 2), 0, codes - 1)
        where = step.tables.astype(np.intp) * cells + step.levels // LEVELS_A_CELL
        np.add.at(counts, (where * codes + code).ravel(), 1)

    _walk_all(tables, tiles, state, visit)
    return counts.reshape(-1, cells, codes)


def best_buckets(counts: npt.NDArray[np.float64], number: int) -> npt.NDArray[np.intp]:
    """Divide an ordered axis into the stretches that cost the fewest bits, by dynamic programming.

    Args:
        counts: ``[classes, n, codes]``; each class in each stretch has a table of its own.
        number: of stretches, at most n.

    Returns:
        ``[n]``: the stretch of each place, ascending from 0 to ``number - 1``.
    """
    n = counts.shape[1]
    sums = np.concatenate([np.zeros((len(counts), 1, counts.shape[2])), counts.cumsum(1)], 1)
    bits = np.full((n + 1, n + 1), np.inf)
    """Of a stretch from a to b, without b."""
    for a in range(n):
        inside = sums[:, a + 1 :] - sums[:, a : a + 1]
        share = inside / np.maximum(inside.sum(2, keepdims=True), 1)
        bits[a, a + 1 :] = -(inside * np.log2(np.maximum(share, 1e-12))).sum((0, 2))
    least, starts = bits[0], []
    for _ in range(number - 1):
        through = least[:, None] + bits
        starts.append(through.argmin(0))
        least = through.min(0)
    buckets, stop = np.zeros(n, np.intp), n
    for start in reversed(starts):
        stop = start[stop]
        buckets[stop:] += 1
    return buckets


def _distributions(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Counts -> integer frequencies >= 1 that sum to 2**24 in each row."""
    prior = counts.sum(0) + 1.0
    smoothed = counts + 2.0 * prior / prior.sum()
    share = smoothed / smoothed.sum(1, keepdims=True)
    frequencies = np.maximum(np.floor(share * PRECISION), 1).astype(np.int64)
    largest = frequencies.argmax(1)
    frequencies[np.arange(len(frequencies)), largest] += PRECISION - frequencies.sum(1)
    return frequencies.astype(np.int32)
