"""A forecast from every image is what the job does; one from a sample is near it."""

import pytest

from dicmh_ray.pipeline import EncodePolicy
from dicmh_ray.pipeline.forecast import ForecastOptions, draw_sample, forecast
from dicmh_ray.ray_plugin import compress
from dicmh_ray.source import SourceOptions, plan_units
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, poison, write_tar, write_tars

SOURCE = SourceOptions()


def foresee(tars, policy=None, *, sample=40, **options):
    return forecast(
        plan_units(tars, options=SOURCE),
        FakeCodec(),
        policy or EncodePolicy(),
        options=ForecastOptions(sample=sample, **options),
    )


@pytest.fixture
def tars(tmp_path):
    """Sound pictures, some that keep their originals, and some that fail."""
    odd = {"a": b"junk" * 600, "b": bmp(poison()), "c": bmp(picture(1, step=1))}
    return [*write_tars(tmp_path), write_tar(tmp_path / "odd.tar", odd)]


def size_of(archive):
    """Bytes of all its objects."""
    return sum(path.stat().st_size for path in archive.rglob("*") if path.is_file())


@pytest.mark.parametrize("keep", ["never", "below-floor", "always"])
def test_every_row_of_a_forecast_from_all_images_is_what_that_job_writes(keep, tars, tmp_path):
    policy = EncodePolicy(keep_original=keep)
    found = foresee(tars, policy, sample=400)
    assert (found.sampled_images, found.sampled_units) == (21, 4)
    assert found.images.value == pytest.approx(21, rel=0.05)
    for outcome in (found.asked, *found.by_states):
        wanted = EncodePolicy(keep_original=keep, states=outcome.states)
        report = compress(
            tars, str(tmp_path / f"{outcome.states}"), codec=FakeCodec, policy=wanted,
            runtime="local", failure_budget=1.0,
        )  # fmt: skip
        tally = report.tally
        assert outcome.kept_original == pytest.approx(tally.kept_original / 21)
        assert outcome.below_floor == pytest.approx(tally.causes.get("below-floor", 0) / 21) or (
            keep == "never"
        )
        if outcome.states is None or keep == "never":
            assert outcome.bpp == pytest.approx(report.mean_bpp)
            assert outcome.psnr == pytest.approx(report.mean_psnr)
        stored = size_of(tmp_path / f"{outcome.states}")
        assert outcome.archive_bytes.value == pytest.approx(stored, rel=0.15)
    assert [outcome.states for outcome in found.by_states] == [1, 2, 3]
    bpps = [outcome.bpp for outcome in found.by_states]
    assert bpps == sorted(bpps)
    assert found.causes["unreadable"] == 1


def test_nothing_is_written_and_the_same_seed_draws_the_same_images(tars, tmp_path):
    before = sorted(tmp_path.iterdir())
    units = plan_units(tars, options=SOURCE)
    drawn = [
        [
            image.key
            for one in draw_sample(units, 8, options=SOURCE, seed=seed)
            for image in one.images
        ]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 8
    foresee(tars, sample=5)
    assert sorted(tmp_path.iterdir()) == before


def test_a_sample_is_spread_over_the_units_and_its_ranges_hold_the_truth(tmp_path):
    tars = write_tars(tmp_path, tars=12, images=8)
    found = foresee(tars, sample=24)
    assert (found.sampled_units, found.sampled_images, found.resampled) == (12, 24, "units")
    whole = foresee(tars, sample=400)
    low, high = found.asked.archive_bytes[1:]
    assert low <= found.asked.archive_bytes.value <= high
    assert low * 0.9 <= whole.asked.archive_bytes.value <= high * 1.1
    assert found.images.low <= 96 <= found.images.high * 1.02


def test_prices_follow_size_and_time(tars):
    plain = foresee(tars)
    assert plain.asked.compute_price is plain.asked.storage_price_per_month is None
    found = foresee(tars, workers=4, price_per_hour=2.0, price_per_gb_month=0.02)
    asked = found.asked
    assert asked.compute_price == pytest.approx(2.0 * 4 * asked.hours.value)
    assert asked.storage_price_per_month == pytest.approx(0.02 * asked.archive_bytes.value / 1e9)
    assert asked.saved_bytes.value == pytest.approx(found.source_bytes - asked.archive_bytes.value)


def test_each_image_is_encoded_once_for_all_numbers_of_states(tars):
    codec = FakeCodec()
    units = plan_units(tars[:3], options=SOURCE)
    found = forecast(units, codec, EncodePolicy(), options=ForecastOptions(sample=18))
    assert codec.num_encoded == found.sampled_images + 1, "and one to warm up"


def test_units_without_images_have_no_forecast(tmp_path):
    empty = write_tar(tmp_path / "empty.tar", {})
    assert foresee([empty]) is None


@pytest.mark.parametrize(
    "fields", [{"sample": 0}, {"workers": 0}, {"price_per_hour": -1.0}, {"price_per_gb_month": -1}]
)
def test_options_without_meaning_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        ForecastOptions(**fields)
