"""The noise of a stream is its own, and the same wherever it is decoded."""

import numpy as np
import pytest
import torch

from dicmh_ray.codec.icmh.noise import NORMAL_LEVELS, StreamNoise, check_normals
from dicmh_ray.codec.noise import noise_key, normal_table, window_noise
from dicmh_ray.errors import WeightsError

TABLE = normal_table(NORMAL_LEVELS).numpy()
STREAMS = [b"first", b"second", b""]
GOLDEN_KEY = 10350902211889566631
GOLDEN_WINDOW = [[[26571, 64542], [61314, 23233]], [[60945, 18219], [21336, 9491]]]


def test_integers_are_the_same_on_every_machine() -> None:
    places = np.arange(NORMAL_LEVELS, dtype=np.float32)
    assert noise_key(b"first") == GOLDEN_KEY
    window = window_noise(noise_key(b"first"), 3, (70, 72), (5, 7), 2, places)
    np.testing.assert_array_equal(window, GOLDEN_WINDOW)


def test_a_stream_decodes_alone_as_in_a_batch() -> None:
    together = StreamNoise(STREAMS, 4, TABLE)(2, (0, 6), (0, 9))
    assert together.shape == (3, 4, 6, 9)
    assert together.dtype == torch.float32
    for i, stream in enumerate(STREAMS):
        alone = StreamNoise([stream], 4, TABLE)(2, (0, 6), (0, 9))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=0)


def test_a_tile_gets_the_noise_of_the_whole() -> None:
    source = StreamNoise(STREAMS, 5, TABLE)
    whole = source(1, (0, 20), (0, 30))
    torch.testing.assert_close(
        source(1, (7, 11), (13, 30)), whole[:, :, 7:11, 13:30], rtol=0, atol=0
    )


def test_noise_is_normal_and_differs_by_stream_step_and_place() -> None:
    source = StreamNoise(STREAMS, 4, TABLE)
    drawn = [source(step, (0, 64), (0, 64)) for step in (0, 1)]
    values = torch.stack(drawn)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    kinds = torch.cat([v.flatten(1) for v in drawn])
    correlation = torch.corrcoef(kinds) - torch.eye(len(kinds))
    assert correlation.abs().max() < 0.03
    shifted = torch.corrcoef(torch.stack([values[..., 1:].flatten(), values[..., :-1].flatten()]))
    assert abs(shifted[0, 1]) < 0.02


def test_a_normal_table_is_symmetric_and_has_unit_variance() -> None:
    assert TABLE.shape == (65536,)
    assert TABLE.dtype == np.float32
    np.testing.assert_allclose(TABLE, -TABLE[::-1], atol=1e-5)
    assert np.square(TABLE, dtype=np.float64).mean() == pytest.approx(1, abs=1e-4)
    for levels in (16, 4096, 65536):
        table = normal_table(levels).numpy()
        assert check_normals(table, "some") is table


@pytest.mark.parametrize(
    "bad",
    [
        TABLE.astype(np.float64),
        TABLE[:1000],
        TABLE.reshape(256, 256),
        TABLE[::-1],
        np.append(TABLE[:-1], np.float32(np.inf)),
        TABLE * np.float32(1.1),
        TABLE + np.float32(0.1),
        TABLE[:0],
    ],
    ids=["float64", "1000", "square", "falling", "infinite", "wide", "moved", "empty"],
)
def test_what_is_no_normal_table_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(WeightsError, match="checkpoint some: "):
        check_normals(bad, "some")


def test_a_table_that_integers_cannot_address_is_refused() -> None:
    with pytest.raises(ValueError, match="1000 entries"):
        window_noise(1, 0, (0, 1), (0, 1), 4, TABLE[:1000])
