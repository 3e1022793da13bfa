"""The symbol coder: exact round trips, an independent oracle, and refusal of damaged tables."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray import codec
from dicmh_ray.codec import reference_decoder
from dicmh_ray.codec.contexts import interlaced
from dicmh_ray.codec.symbols import (
    MAX_SYMBOL,
    REACH_UNIT,
    SymbolCoder,
    as_rounded,
    nested_symbols,
    parent_symbols,
    round_latent,
)
from dicmh_ray.codec.tables import COARSEST_LIMIT, MAX_VALUE, PRECISION, ContextTables
from dicmh_ray.errors import DicmhError, EncodeError, SymbolError, WeightsError

GOLDEN = Path(__file__).parents[1] / "golden"
TABLES = GOLDEN / "checkpoint_v2" / "tables.safetensors"
FIRST_TABLES = GOLDEN / "checkpoint" / "tables.safetensors"
SHIPPED_TABLES = Path(codec.__file__).parent / "checkpoints" / "default" / "tables.safetensors"


@pytest.fixture(scope="module", params=[FIRST_TABLES, TABLES], ids=["layout 1", "layout 2"])
def tables(request: pytest.FixtureRequest) -> ContextTables:
    return ContextTables.from_arrays(safetensors.numpy.load_file(request.param), "golden")


@pytest.fixture(scope="module")
def coder(tables: ContextTables) -> SymbolCoder:
    return SymbolCoder(tables)


def random_symbols(seed: int, shape: tuple[int, int, int], spread: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    falling = np.exp(-np.arange(shape[2]) / 8)
    return np.rint(rng.laplace(size=shape) * spread * falling).astype(np.int16)


def decode_all(coder: SymbolCoder, coded: list, shape: tuple[int, int]) -> list[np.ndarray]:
    parent = None
    levels = []
    for state, tile in enumerate(coded):
        parent = coder.decode(state, parent, shape, tile.payload).symbols
        levels.append(parent)
    return levels


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    spread=st.floats(0, 20),
)
def test_every_state_decodes_to_the_symbols_that_were_encoded(
    coder: SymbolCoder, seed: int, rows: int, columns: int, spread: float
) -> None:
    finest = random_symbols(seed, (rows, columns, coder.tables.channels), spread)
    decoded = decode_all(coder, coder.encode(as_rounded(finest)), (rows, columns))
    for wanted, found in zip(nested_symbols(finest, 3), decoded, strict=True):
        np.testing.assert_array_equal(wanted, found)


def test_refinements_are_given_up_where_they_are_not_worth_their_bits(coder: SymbolCoder) -> None:
    shape = (12, 12, coder.tables.channels)
    finest = random_symbols(11, shape, 3.0)
    values = finest + np.random.default_rng(12).uniform(-0.5, 0.5, shape)
    latent = round_latent(values.astype(np.float32), 1.0)
    np.testing.assert_array_equal(latent.symbols, np.rint(values))
    thrifty, all_kept = coder.encode(latent), coder.encode(as_rounded(latent.symbols))
    # Coarser states are what they were; the last is decoded as it was left.
    assert [t.payload for t in thrifty[:-1]] == [t.payload for t in all_kept[:-1]]
    np.testing.assert_array_equal(decode_all(coder, thrifty, shape[:2])[-1], thrifty[-1].symbols)
    changed = thrifty[-1].symbols != latent.symbols
    assert changed.any()
    np.testing.assert_array_equal(
        thrifty[-1].symbols[changed], 3 * parent_symbols(latent.symbols)[changed]
    )
    distances = np.abs(values - thrifty[-1].symbols)[changed]
    np.testing.assert_allclose(distances, latent.reaches[changed] / REACH_UNIT, atol=0.01)
    assert distances.max() < 1.5  # a decoder's symbol never is further off than by a cell
    saved = 8 * (len(all_kept[-1].payload) - len(thrifty[-1].payload))
    kept_error, error = ((values - t[-1].symbols) ** 2 for t in (all_kept, thrifty))
    # By plain rounding a step's worth of error at high rate costs 2 ln(2) / 12 steps a bit.
    assert error.sum() - kept_error.sum() < saved * 2 * np.log(2) / 12


def test_symbols_of_a_coarser_state_follow_from_the_finer_by_integers() -> None:
    finest = np.arange(-40, 41, dtype=np.int16)
    coarse = nested_symbols(finest, 2)[0]
    np.testing.assert_array_equal(coarse, np.rint(finest / 3))
    assert set((finest - 3 * coarse).tolist()) == {-1, 0, 1}


def test_the_largest_symbols_nest_without_overflow() -> None:
    finest = np.array([MAX_SYMBOL, MAX_SYMBOL - 1, -MAX_SYMBOL], np.int16)
    for level, wanted in zip(nested_symbols(finest, 3), (9, 3, 1), strict=True):
        np.testing.assert_array_equal(level, np.rint(finest.astype(np.int64) / wanted))


def check_against_reference(tables: ContextTables, finest: np.ndarray) -> None:
    """Every state of a tile in both decoders."""
    integers = {name: values.astype(np.int64) for name, values in tables.to_arrays().items()}
    parent = np.zeros((tables.channels, *finest.shape[:2]), np.int64)
    for state, tile in enumerate(SymbolCoder(tables).encode(as_rounded(finest))):
        parent, added = reference_decoder.decode_tile(integers, state, parent, tile.payload)
        np.testing.assert_array_equal(np.moveaxis(parent, 0, 2), tile.symbols)
        assert added == tile.refinement


def test_an_independent_decoder_finds_the_same_symbols(tables: ContextTables) -> None:
    check_against_reference(tables, random_symbols(3, (5, 7, tables.channels), 9.0))


def test_an_independent_decoder_agrees_where_parents_are_clipped() -> None:
    shipped = ContextTables.from_arrays(safetensors.numpy.load_file(SHIPPED_TABLES), "shipped")
    finest = random_symbols(4, (3, 4, shipped.channels), 250.0)
    assert np.abs(finest).max() > MAX_VALUE
    check_against_reference(shipped, finest)


def test_an_independent_decoder_agrees_where_buckets_return_to_zero(tables: ContextTables) -> None:
    buckets = tables.spread_buckets.copy()
    buckets[:, 1400:1500] = 0
    buckets[0, :1200] = 2
    spoiled = dataclasses.replace(tables, spread_buckets=buckets)
    check_against_reference(spoiled, random_symbols(6, (4, 6, tables.channels), 5.0))


def test_real_bytes_are_close_to_the_entropy_of_the_tables(
    coder: SymbolCoder, tables: ContextTables
) -> None:
    finest = random_symbols(5, (32, 32, tables.channels), 3.0)
    bits = 0.0
    coded = coder.encode(as_rounded(finest))
    parent = None
    for state, tile in enumerate(coded):
        frequencies = tables.frequencies[state]

        def price(step, symbols=tile.symbols, frequencies=frequencies):
            nonlocal bits
            wanted = symbols.reshape(1024, -1)[step.positions, step.channels]
            codes = step.codes(wanted, frequencies.shape[1] // 2)
            bits -= np.log2(frequencies[step.tables, codes] / PRECISION).sum()
            return wanted

        active = int.from_bytes(tile.payload[:2], "little")
        coder.contexts.walk(state, parent, (32, 32), active, price)
        parent = tile.symbols
    spent = 8 * sum(len(tile.payload) - 2 for tile in coded)
    assert bits <= spent <= bits * 1.001 + 64 * len(coded)


def test_a_flat_tile_costs_two_bytes_a_state(coder: SymbolCoder) -> None:
    coded = coder.encode(as_rounded(np.zeros((4, 4, coder.tables.channels), np.int16)))
    assert [tile.payload for tile in coded] == [b"\0\0"] * 3


def test_a_symbol_beyond_the_coarsest_alphabet_is_refused_at_encoding(coder: SymbolCoder) -> None:
    finest = np.zeros((2, 2, coder.tables.channels), np.int16)
    finest[0, 0, 0] = 9 * (COARSEST_LIMIT + 30)
    with pytest.raises(EncodeError, match="state 0"):
        coder.encode(as_rounded(finest))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_payloads_raise_or_decode_to_the_size_asked_for(
    coder: SymbolCoder, data: st.DataObject
) -> None:
    payload = bytearray(
        coder.encode(as_rounded(random_symbols(7, (4, 4, coder.tables.channels), 4.0)))[0].payload
    )
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    try:
        tile = coder.decode(0, None, (4, 4), bytes(payload[:cut]))
    except SymbolError:
        return
    assert tile.symbols.shape == (4, 4, coder.tables.channels)


@pytest.mark.parametrize(
    ("field", "spoil", "complaint"),
    [
        ("frequencies", lambda f: (f[0], f[1] * 2, f[2]), "sum to 2\\*\\*24"),
        ("frequencies", lambda f: (f[0], f[1] - f[1], f[2]), "bad frequency table"),
        ("spread_parent", lambda w: w * 1e6, "not exact"),
        ("spread_bias", lambda w: w + 0.5, "not integers"),
        ("offset_near", lambda w: w + 2_000, "guesses of state 0"),
        ("groups", lambda g: (*g[:-1], g[-1] + 1), "groups end"),
    ],
)
def test_tables_that_break_an_invariant_are_refused(
    tables: ContextTables, field: str, spoil, complaint: str
) -> None:
    spoiled = dataclasses.replace(tables, **{field: spoil(getattr(tables, field))})
    with pytest.raises(WeightsError, match=complaint):
        spoiled.validate("spoiled")


@pytest.mark.parametrize(
    ("path", "name"), [(FIRST_TABLES, "offset_sides"), (TABLES, "offset_near")]
)
def test_a_missing_table_is_named(path: Path, name: str) -> None:
    arrays = safetensors.numpy.load_file(path)
    del arrays[name]
    with pytest.raises(DicmhError, match=name):
        ContextTables.from_arrays(arrays, "cut")


@pytest.mark.parametrize("shape", [(), (2,), (4, 72), (3, 71)])
def test_first_tables_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    arrays = safetensors.numpy.load_file(FIRST_TABLES)
    arrays["spread_sides"] = np.zeros(shape, np.int16)
    with pytest.raises(WeightsError):
        ContextTables.from_arrays(arrays, "spoiled")


@pytest.mark.parametrize("depths", [(4,), (1, 2, -1), (1, 2, 9)])
def test_depths_that_do_not_fit_are_refused(tables: ContextTables, depths: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match="depths"):
        dataclasses.replace(tables, depths=depths).validate("spoiled")


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), depth=st.integers(0, 8))
def test_every_cell_is_coded_once_and_after_its_near_cells(
    rows: int, columns: int, depth: int
) -> None:
    order = interlaced(rows, columns, depth)
    assert sorted(order.order.tolist()) == list(range(rows * columns))
    assert [r.start for r, _, _ in order.passes] == [
        0,
        *(r.stop for r, _, _ in order.passes[:-1]),
    ]
    for where, step, near in order.passes:
        distance = 1 << step // 2
        for place, cell in enumerate(order.order[where].tolist()):
            i, j = divmod(cell, columns)
            assert step == reference_decoder.refinement(i, j, depth)
            if near is None:
                assert step == depth
                continue
            wanted = set()
            for a, b in ((-1, -1), (-1, 1), (1, -1), (1, 1), (-1, 0), (1, 0), (0, -1), (0, 1)):
                y, x = i + a * distance, j + b * distance
                if bool(a and b) == bool(step % 2) and 0 <= y < rows and 0 <= x < columns:
                    wanted.add((y, x))
            found = near[:, place][near[:, place] < order.size]
            assert (found < where.start).all()
            assert {divmod(int(order.order[n]), columns) for n in found} == wanted
