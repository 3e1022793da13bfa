"""Strings of the official program: the same bytes, the same latents, and no trust in either."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray.codec.icmh import official_coder
from dicmh_ray.codec.icmh.compressai_parts import BufferedRansEncoder, RansDecoder
from dicmh_ray.codec.icmh.official_coder import (
    MAX_SYMBOL,
    CheckedRansDecoder,
    OfficialCoder,
    OfficialLatents,
    OfficialTables,
)
from dicmh_ray.errors import BitstreamError, EncodeError, SymbolError, TruncatedBitstreamError
from tests.codec.icmh.small_latent_coder import (
    lively_coder,
    pictures,
    reference_coder,
    reference_tensors,
    reference_values,
)

TABLES = OfficialTables(
    cdfs=[[0, 1, 60000, 65535, 65536], [0, 65535, 65536], [0, 20000, 40000, 60000, 65000, 65536]],
    sizes=[5, 3, 6],
    offsets=[-1, 0, -2],
)


@pytest.fixture(scope="module")
def coder() -> OfficialCoder:
    networks = lively_coder()
    networks.update_tables()
    return OfficialCoder(networks)


@pytest.fixture(scope="module")
def latents(coder: OfficialCoder) -> OfficialLatents:
    with torch.no_grad():
        return coder.encode(*coder._coder.analyse(*pictures(1, 64, 128, seed=5)))


def compressai_bytes(symbols: list[int], indexes: list[int]) -> bytes:
    encoder = BufferedRansEncoder()
    encoder.encode_with_indexes(symbols, indexes, TABLES.cdfs, TABLES.sizes, TABLES.offsets)
    return encoder.flush()


def decode_all(data: bytes, indexes: np.ndarray) -> list[int]:
    decoder = CheckedRansDecoder(data, "y")
    symbols = decoder.decode(indexes, TABLES)
    decoder.finish()
    return symbols


def test_symbols_indexes_and_bytes_are_those_of_the_reference(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, tensors = reference_coder(reference), reference_tensors(reference)
    networks.update_tables()
    written = []
    encode = official_coder._encode
    monkeypatch.setattr(
        official_coder, "_encode", lambda *args: written.append(args[:2]) or encode(*args)
    )
    with torch.no_grad():
        coded = OfficialCoder(networks).encode(*networks.analyse(tensors["x"], tensors["ref"]))
    values = reference_values(reference)
    assert coded.y_string.hex() == values["codec/y_string"]["hex"]
    assert coded.z_string.hex() == values["codec/z_string"]["hex"]
    _, (symbols, indexes) = written
    assert symbols == tensors["codec/symbols"].tolist()
    assert indexes == tensors["codec/indexes"].tolist()


def test_the_bytes_of_the_reference_decode_to_its_latent(reference: Path) -> None:
    networks, values = reference_coder(reference), reference_values(reference)
    networks.update_tables()
    decoded = OfficialCoder(networks).decode(
        bytes.fromhex(values["codec/y_string"]["hex"]),
        bytes.fromhex(values["codec/z_string"]["hex"]),
        values["codec/z_shape"],
    )
    with torch.no_grad():
        estimate = networks.estimate(decoded.y_hat, decoded.z_hat)
    wanted = reference_tensors(reference)["codec/decoded"]
    torch.testing.assert_close(estimate, wanted, rtol=0, atol=1e-5)


def test_what_was_encoded_is_decoded(coder: OfficialCoder, latents: OfficialLatents) -> None:
    decoded = coder.decode(latents.y_string, latents.z_string, (1, 2))
    assert torch.equal(decoded.y_hat, latents.y_hat)
    assert torch.equal(decoded.z_hat, latents.z_hat)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(-4, 4), st.integers(-MAX_SYMBOL, MAX_SYMBOL)), st.integers(0, 2)
        ),
        min_size=4,
        max_size=200,
    )
)
def test_the_checked_decoder_reads_what_compressai_writes(pairs: list[tuple[int, int]]) -> None:
    symbols, indexes = ([pair[i] for pair in pairs] for i in (0, 1))
    data = compressai_bytes(symbols, indexes)
    decoder = CheckedRansDecoder(data, "y")
    half = len(symbols) // 2
    assert decoder.decode(np.array(indexes[:half], np.int32), TABLES) == symbols[:half]
    assert decoder.decode(np.array(indexes[half:]), TABLES) == symbols[half:]
    decoder.finish()
    theirs = RansDecoder().decode_with_indexes(
        data, indexes, TABLES.cdfs, TABLES.sizes, TABLES.offsets
    )
    assert theirs == symbols


def test_a_string_cut_anywhere_is_refused(coder: OfficialCoder, latents: OfficialLatents) -> None:
    for cut in range(len(latents.z_string)):
        with pytest.raises(BitstreamError, match="'z'"):
            coder.decode(latents.y_string, latents.z_string[:cut], (1, 2))
    for cut in [*range(24), *range(24, len(latents.y_string), 31)]:
        with pytest.raises(BitstreamError, match="'y'"):
            coder.decode(latents.y_string[:cut], latents.z_string, (1, 2))


def test_every_cut_of_a_long_stretch_of_symbols_is_refused() -> None:
    chance = np.random.default_rng(0)
    indexes = chance.integers(0, 3, 300)
    data = compressai_bytes(chance.integers(-40, 40, 300).tolist(), indexes.tolist())
    for cut in range(len(data)):
        wanted = TruncatedBitstreamError if cut < 8 or cut % 4 == 0 else SymbolError
        with pytest.raises(wanted):
            CheckedRansDecoder(data[:cut], "y").decode(indexes, TABLES)


def test_a_flipped_bit_is_refused_or_makes_the_very_stream_of_other_symbols() -> None:
    chance = np.random.default_rng(1)
    indexes = chance.integers(0, 3, 100)
    symbols = chance.integers(-9, 9, 100).tolist()
    data = compressai_bytes(symbols, indexes.tolist())
    refused = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = decode_all(bytes(damaged), indexes)
        except BitstreamError:
            refused += 1
        else:  # raw bits of an escape
            assert found != symbols
            assert compressai_bytes(found, indexes.tolist()) == damaged
    assert refused > 0.8 * 8 * len(data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        symbols = decode_all(data, np.arange(30) % 3)
    except BitstreamError:
        return
    assert compressai_bytes(symbols, [i % 3 for i in range(30)]) == data


def test_an_endless_escape_is_refused() -> None:
    escape = OfficialTables(cdfs=[[0, 1, 65536]], sizes=[3], offsets=[0])
    with pytest.raises(SymbolError, match="digits"):
        CheckedRansDecoder(b"\xff" * 400, "y").decode(np.zeros(4, np.int32), escape)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -2.0 * MAX_SYMBOL])
def test_latents_without_a_symbol_are_not_encoded(coder: OfficialCoder, value: float) -> None:
    y, z = torch.zeros(1, 10, 4, 4), torch.zeros(1, 8, 1, 1)
    y[0, 3, 1, 2] = value
    with pytest.raises(EncodeError):
        coder.encode(y, z)
    with pytest.raises(EncodeError):
        coder.encode(torch.zeros_like(y), torch.full_like(z, value))


def test_a_coder_without_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="update_tables"):
        OfficialCoder(lively_coder())


def test_too_few_symbols_never_reach_the_official_coder() -> None:
    with pytest.raises(EncodeError, match="too few"):
        official_coder._encode([0, 1, 0], [0, 0, 0], TABLES)
