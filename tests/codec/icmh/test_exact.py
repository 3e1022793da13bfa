"""Integers decide: the same bytes and the same latents, whatever surrounds the arithmetic."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray.codec.icmh.config import LatentCoderConfig
from dicmh_ray.codec.icmh.entropy_tables import (
    MAX_SYMBOL,
    PRECISION,
    FrozenTables,
    SymbolReader,
    SymbolWriter,
    TableCoder,
    TableDraft,
)
from dicmh_ray.codec.icmh.exact import CodedLatent, ExactEntropyModel
from dicmh_ray.codec.icmh.integer_nets import EXACT_LIMIT, IntegerLayer
from dicmh_ray.codec.icmh.official_coder import OfficialCoder
from dicmh_ray.errors import EncodeError, SymbolError, WeightsError
from tests.codec.icmh.small_latent_coder import (
    lively_coder,
    pictures,
    reference_coder,
    reference_tensors,
)

SCHEMA = Path(__file__).parents[3] / "schemas" / "lfgcm-payload.v1.md"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from more, and wait for all of them on a busy machine."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def model() -> ExactEntropyModel:
    coder = lively_coder()
    return ExactEntropyModel.fit(coder, [pictures(2, 128, 128, seed) for seed in range(2)])


@pytest.fixture(scope="module")
def latents() -> tuple[np.ndarray, np.ndarray]:
    return analysed(lively_coder(), 1, 128, 192)[0]


@pytest.fixture(scope="module")
def coded(model: ExactEntropyModel, latents: tuple[np.ndarray, np.ndarray]) -> CodedLatent:
    return model.encode(*latents)


@pytest.fixture(scope="module")
def small(model: ExactEntropyModel) -> CodedLatent:
    """A payload short enough for damage everywhere."""
    return model.encode(*analysed(lively_coder(), 1, 64, 64)[0])


def analysed(coder, count: int, height: int, width: int) -> list[tuple[np.ndarray, np.ndarray]]:
    with torch.no_grad():
        y, z = coder.analyse(*pictures(count, height, width, seed=9))
    return [(y[n].numpy(), z[n].numpy()) for n in range(count)]


def assert_decodes(model: ExactEntropyModel, coded: CodedLatent) -> None:
    decoded = model.decode(coded.payload, coded.y_hat.shape[1:])
    np.testing.assert_array_equal(decoded.y_hat, coded.y_hat)
    np.testing.assert_array_equal(decoded.z_hat, coded.z_hat)
    assert decoded.symbol_crc == coded.symbol_crc


def test_a_coder_whose_latents_are_not_numbers_is_refused() -> None:
    coder = lively_coder()
    with torch.no_grad():
        next(coder.parameters()).fill_(torch.nan)
    with pytest.raises(WeightsError, match="not finite"):
        ExactEntropyModel.fit(coder, [pictures(1, 64, 64, 0)])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    spread=st.sampled_from([0.0, 0.3, 5.0, 300.0, 1e5, 1e30]),
)
def test_any_latents_come_back(
    model: ExactEntropyModel, seed: int, rows: int, columns: int, spread: float
) -> None:
    chance = np.random.default_rng(seed)
    y = chance.laplace(size=(model.y_channels, 4 * rows, 4 * columns)) * spread
    z = chance.laplace(size=(model.z_channels, rows, columns)) * spread
    coded = model.encode(y.astype(np.float32), z.astype(np.float32))
    assert_decodes(model, coded)
    if spread <= 300:
        assert np.abs(coded.y_hat - y).max() <= 0.5 + 1e-4
        assert np.abs(coded.z_hat - z).max() <= 0.5 + 1e-4


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def no_onednn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of TF32 whenever these flags are set
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@pytest.mark.parametrize(
    "surroundings",
    [
        nullcontext,
        no_onednn,
        lambda: threads(1),
        lambda: threads(2),
        lambda: default_dtype(torch.float64),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
    ],
    ids=["plain", "oneDNN off", "1 thread", "2 threads", "float64", "bf16 autocast", "inference"],
)
@pytest.mark.parametrize("engine", ["float64", "float64-matmul", "int64"])
def test_every_setting_writes_the_same_bytes_and_decodes_them(
    model: ExactEntropyModel,
    latents: tuple[np.ndarray, np.ndarray],
    coded: CodedLatent,
    engine: str,
    surroundings: Callable[[], AbstractContextManager],
) -> None:
    with surroundings():
        other = ExactEntropyModel.from_arrays(model.to_arrays(), engine=engine)
        assert other.encode(*latents).payload == coded.payload
        assert_decodes(other, coded)


def test_layouts_and_batches_of_the_analysis_do_not_matter(model: ExactEntropyModel) -> None:
    coder = lively_coder()
    for pair in (analysed(coder, 2, 64, 128), analysed(coder, 1, 64, 128)):
        for y, z in pair:
            last = y.transpose(1, 2, 0).copy().transpose(2, 0, 1)  # channels last in memory
            first = model.encode(y, z)
            assert model.encode(last, z).payload == first.payload
            assert_decodes(model, first)


def test_large_layers_are_done_in_bands_with_the_same_result(
    model: ExactEntropyModel,
    latents: tuple[np.ndarray, np.ndarray],
    coded: CodedLatent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicmh_ray.codec.icmh.integer_nets._MAX_COLUMNS", 3000)
    assert model.encode(*latents).payload == coded.payload


def test_a_payload_cut_anywhere_is_refused(model: ExactEntropyModel, small: CodedLatent) -> None:
    assert is_accepted(model, small, small.payload)
    for cut in range(len(small.payload)):
        assert not is_accepted(model, small, small.payload[:cut])


def test_a_changed_bit_anywhere_is_noticed(model: ExactEntropyModel, small: CodedLatent) -> None:
    for byte in range(len(small.payload)):
        damaged = bytearray(small.payload)
        damaged[byte] ^= 1 << byte % 8
        assert not is_accepted(model, small, bytes(damaged)), byte


def is_accepted(model: ExactEntropyModel, coded: CodedLatent, payload: bytes) -> bool:
    """Whether a payload decodes with the right checksum of symbols."""
    try:
        decoded = model.decode(payload, coded.y_hat.shape[1:])
    except SymbolError:
        return False
    return decoded.symbol_crc == coded.symbol_crc


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_decode_or_are_refused(model: ExactEntropyModel, payload: bytes) -> None:
    try:
        decoded = model.decode(payload, (4, 8))
    except SymbolError:
        return
    assert np.isfinite(decoded.y_hat).all()
    assert np.isfinite(decoded.z_hat).all()


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\1\0\0", "whole number of words"),
        (b"\1\0\0\0\0\0\0\0", "last word"),
        (b"\1" * 4096, "bytes for"),
    ],
)
def test_what_no_encoder_ends_with_is_refused(
    model: ExactEntropyModel, payload: bytes, reason: str
) -> None:
    with pytest.raises(SymbolError, match=reason):
        model.decode(payload, (4, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_are_not_encoded(
    model: ExactEntropyModel, latents: tuple[np.ndarray, np.ndarray], value: float
) -> None:
    for which in (0, 1):
        broken = [latent.copy() for latent in latents]
        broken[which][-1, -1, -1] = value
        with pytest.raises(EncodeError, match="finite"):
            model.encode(*broken)


def test_grids_that_cannot_be_are_refused(model: ExactEntropyModel) -> None:
    for grid in ((0, 4), (4, -4), (6, 4)):
        with pytest.raises(ValueError, match="multiples of 4"):
            model.decode(b"", grid)
    with pytest.raises(ValueError, match="z is"):
        model.encode(np.zeros((10, 4, 4), np.float32), np.zeros((8, 1, 2), np.float32))


def test_integers_cost_nothing_that_counts(reference: Path) -> None:
    coder, tensors = reference_coder(reference), reference_tensors(reference)
    coder.update_tables()
    exact = ExactEntropyModel.fit(coder, [pictures(2, 128, 128, seed) for seed in range(3)])
    with torch.no_grad():
        y, z = coder.analyse(tensors["x"], tensors["ref"])
    coded = exact.encode(y[0].numpy(), z[0].numpy())
    official = OfficialCoder(coder).encode(y, z)
    assert len(coded.payload) <= 1.005 * (len(official.y_string) + len(official.z_string))
    # Its means are those of the float coder but for rounding, so it is as faithful.
    assert np.abs(coded.y_hat - y[0].numpy()).max() <= 0.5 + 1e-4
    found, wanted = (np.square(hat - y[0].numpy()).mean() for hat in (coded.y_hat, official.y_hat))
    assert found == pytest.approx(wanted.item(), rel=0.01)


def test_widths_that_divide_badly_are_served() -> None:
    config = LatentCoderConfig(
        encoder_widths=(2, 2, 2, 2),
        z_channels=4,
        y_channels=3,
        prior_channels=1,
        shared_channels=1,
        context_widths=(1, 3),
        slices=(1, 2),
    )
    coder = lively_coder(config)
    model = ExactEntropyModel.fit(coder, [pictures(1, 64, 64)])
    for y, z in analysed(coder, 2, 64, 192):
        assert_decodes(model, model.encode(y, z))


def test_no_sum_can_leave_what_float64_holds_exactly(model: ExactEntropyModel) -> None:
    arrays = model.to_arrays()
    layers = [layer for net in model._model.nets.values() for layer in net]
    assert max(layer.largest_sum() for layer in layers) < EXACT_LIMIT >> 8
    name = "local_context.0.0"
    for change in (
        {f"{name}.weight": arrays[f"{name}.weight"].astype(np.int64) << 30},
        {f"{name}.bias": arrays[f"{name}.bias"] + EXACT_LIMIT},
        {f"{name}.shift": arrays[f"{name}.shift"] * 0},
        {f"{name}.weight": arrays[f"{name}.weight"].astype(np.float32)},
        {f"{name}.weight": arrays[f"{name}.weight"][:, :1]},
        {f"{name}.bias": arrays[f"{name}.bias"][:1]},
        {"scale_thresholds": arrays["scale_thresholds"][::-1]},
        {"y.frequencies": arrays["y.frequencies"] + 1},
        {"z.lowest": arrays["z.lowest"] - MAX_SYMBOL},
        {"y_fraction": np.array([9], np.uint8)},
    ):
        with pytest.raises(WeightsError):
            ExactEntropyModel.from_arrays(arrays | change)
    for missing in arrays:
        with pytest.raises(WeightsError):
            ExactEntropyModel.from_arrays({k: v for k, v in arrays.items() if k != missing})


def test_arrays_of_others_are_left_alone(model: ExactEntropyModel, coded: CodedLatent) -> None:
    arrays = model.to_arrays() | {"normals": np.ones(4, np.float32)}
    assert_decodes(ExactEntropyModel.from_arrays(arrays), coded)


def test_arrays_hold_integers_only(model: ExactEntropyModel) -> None:
    assert all(np.issubdtype(array.dtype, np.integer) for array in model.to_arrays().values())


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(3, 5, 5, padding=2),
        torch.nn.ConvTranspose2d(3, 5, 3, padding=1),
        torch.nn.Conv2d(3, 5, 1),
    ],
    ids=["5x5", "transposed 3x3", "1x1"],
)
def test_rounded_layers_stay_near_their_floats(layer: torch.nn.Module) -> None:
    rounded = IntegerLayer.fit(layer, [10, 9, 11], [12] * 5, has_gelu=False)
    assert np.abs(rounded.weight).max() in range(1 << 14, 1 << 15)
    rounded.validate("layer")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-MAX_SYMBOL, MAX_SYMBOL)), max_size=60))
def test_escapes_carry_every_symbol(pairs: list[tuple[int, int]]) -> None:
    drafts = [TableDraft.gaussian(scale) for scale in (0.11, 3.0, 256.0)]
    tables = FrozenTables.freeze(drafts)
    tables.validate("tables")
    assert all(int(row.sum()) == PRECISION for row in tables.rows())
    coder, writer = TableCoder(tables), SymbolWriter()
    indexes, symbols = np.array(pairs, np.int64).reshape(-1, 2).T
    writer.write(coder, indexes, symbols)
    reader = SymbolReader(writer.finish(), symbols.size, "test")
    np.testing.assert_array_equal(reader.read(coder, indexes), symbols)
    reader.finish()


def test_tables_learn_how_many_outliers_there_are() -> None:
    plain, rich = TableDraft.gaussian(0.11), TableDraft.gaussian(0.11)
    plain.count(np.zeros(100_000))
    rich.count(np.repeat([0.0, 1.0, -1.0], [100_000, 500, 500]))
    quiet, lively = (FrozenTables.freeze([draft]).rows()[0] / PRECISION for draft in (plain, rich))
    assert quiet[8] > 1 - 1e-4
    assert lively[9] == pytest.approx(0.005, rel=0.5)


def test_the_document_of_the_format_travels_with_checkpoints() -> None:
    shipped = SCHEMA.parents[1] / "dicmh_ray" / "codec" / "formats" / SCHEMA.name
    assert shipped.read_bytes() == SCHEMA.read_bytes()
