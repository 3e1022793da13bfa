"""Patterns that training draws over photographs."""

import numpy as np
import numpy.typing as npt
import pytest

from dicmh_ray.codec.patterns import MAX_PERIOD, MIN_PERIOD, lay_pattern

SIZE = 96


def crop_of(seed: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 190, SIZE)[:, None, None] + rng.uniform(-40, 40, 3)
    return np.broadcast_to(ramp, (SIZE, SIZE, 3)).astype(np.uint8)


def drawn(seed: int) -> npt.NDArray[np.uint8]:
    return lay_pattern(crop_of(seed), np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(12))
def test_a_pattern_is_drawn_by_the_generator_alone_and_leaves_its_crop_alone(seed: int) -> None:
    crop = crop_of(seed)
    kept = crop.copy()
    first, second = (lay_pattern(crop, np.random.default_rng(seed)) for _ in range(2))
    assert first.shape == crop.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert np.array_equal(crop, kept)
    assert not np.array_equal(first, crop)


def test_patterns_cover_all_of_some_crops_and_a_part_of_others() -> None:
    covered = [(drawn(seed) != crop_of(seed)).any(2).mean() for seed in range(60)]
    assert sum(share > 0.97 for share in covered) >= 10
    assert sum(0.05 < share < 0.9 for share in covered) >= 20


def test_patterns_are_of_all_frequencies_up_to_what_pixels_can_hold() -> None:
    """By the strongest period of each, in pixels."""
    periods = []
    for seed in range(80):
        change = drawn(seed).astype(float).mean(2) - crop_of(seed).astype(float).mean(2)
        spectrum = np.abs(np.fft.fft2(change - change.mean())) ** 2
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE)))
        spectrum[frequency < 1 / MAX_PERIOD] = 0  # light, and edges of the cover
        periods.append(1 / frequency.flat[spectrum.argmax()])
    assert min(periods) < 1.3 * MIN_PERIOD
    assert sum(period < 4 for period in periods) >= 8
    assert sum(period > 8 for period in periods) >= 8
