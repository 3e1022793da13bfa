"""The fit of the entropy model: divided where it pays, in the order of coding, better than no fit."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from dicmh_ray.codec.fitting import best_buckets, fit_tables
from dicmh_ray.codec.symbols import SymbolCoder, as_rounded, nested_symbols
from dicmh_ray.codec.tables import ContextTables

GROUPS = (0, 2, 5, 8)
DEAD = 3
"""A channel that is zero everywhere in the training symbols."""


def _tiles(count: int, seed: int) -> list[npt.NDArray[np.int16]]:
    """Busy and calm cells: where one channel is large the others are, too."""
    rng = np.random.default_rng(seed)
    tiles = []
    for _ in range(count):
        busy = np.repeat(np.repeat(rng.random((4, 4)) < 0.3, 4, 0), 4, 1)
        deviation = np.where(busy, 12.0, 0.3)[:, :, None] * np.linspace(1.5, 0.5, GROUPS[-1])
        tile = np.rint(rng.normal(size=deviation.shape) * deviation).astype(np.int16)
        tile[:, :, DEAD] = 0
        tiles.append(tile)
    return tiles


@pytest.fixture(scope="module")
def tables() -> ContextTables:
    return fit_tables(_tiles(48, 1), num_states=3, groups=GROUPS, steps=150)


def test_no_division_is_cheaper() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 40, (2, 7, 3)).astype(float)

    def cost(edges: tuple[int, ...]) -> float:
        bits = 0.0
        for start, stop in itertools.pairwise((0, *edges, 7)):
            inside = counts[:, start:stop].sum(1)
            bits -= float(
                (inside * np.log2(np.maximum(inside, 1e-9) / inside.sum(1)[:, None])).sum()
            )
        return bits

    found = best_buckets(counts, 3)
    assert (found[0], found[-1]) == (0, 2)
    assert (np.diff(found) >= 0).all()
    edges = tuple(np.searchsorted(found, [1, 2]).tolist())
    assert cost(edges) == pytest.approx(min(map(cost, itertools.combinations(range(1, 7), 2))))


def test_nothing_counts_that_is_decoded_later(tables: ContextTables) -> None:
    for first, last in itertools.pairwise(GROUPS):
        assert not tables.spread_current[:, first:last, last:].any()
    assert tables.spread_current.any()
    assert tables.depths == (6, 4, 4)
    assert tables.spread_near.any()
    assert tables.offset_near.any()


def test_a_neighbourhood_tells_what_it_holds(tables: ContextTables) -> None:
    coder = SymbolCoder(tables)
    fresh = _tiles(8, 2)
    spent = sum(
        len(state.payload) * 8 for tile in fresh for state in coder.encode(as_rounded(tile))
    )
    symbols = np.stack(fresh)
    busy = np.broadcast_to((np.abs(symbols).max(3, keepdims=True) > 3), symbols.shape)
    blind = _entropy(symbols)
    told = _entropy(symbols[busy]) + _entropy(symbols[~busy])
    assert spent < blind - 0.8 * (blind - told)


def _entropy(symbols: npt.NDArray[np.int16]) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def test_a_channel_that_never_lived_is_coded_all_the_same(tables: ContextTables) -> None:
    coder = SymbolCoder(tables)
    tile = _tiles(1, 3)[0]
    tile[5, 6, DEAD] = 40
    tile[9, 2, DEAD] = -7
    parent = None
    for state, (coded, wanted) in enumerate(
        zip(coder.encode(as_rounded(tile)), nested_symbols(tile, 3), strict=True)
    ):
        parent = coder.decode(state, parent, tile.shape[:2], coded.payload).symbols
        assert (parent == wanted).all()
