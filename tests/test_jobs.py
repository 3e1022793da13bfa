"""What an operator runs, in small: the jobs' own verdicts are the tests."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dicmh_ray import SourceOptions, load_pixels
from dicmh_ray.errors import SourceImageError, UnreadableImageError
from dicmh_ray.source import plan_units, read_unit
from jobs import compare_codecs, demo

JOBS = Path(demo.__file__).parent


def refusal_of(name: str, *arguments: str) -> str:
    """What a job says that must find fault with its arguments."""
    result = subprocess.run(
        [sys.executable, JOBS / name, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stdout + result.stderr
    return result.stderr


def run_job(name: str, *arguments: str) -> str:
    """Output of a job that must end well."""
    result = subprocess.run(
        [sys.executable, JOBS / name, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("layout", ["1", "2"])
def test_a_thousand_mutated_streams_end_in_documented_errors(layout: str) -> None:
    cases = ("--cases", "600", "--stride", "50", "--seed", "2")
    output = run_job("fuzz_streams.py", "--layout", layout, *cases)
    assert "0 faults, no crash, no hang" in output
    assert int(output.rsplit(" cases", 1)[0].rsplit("\n", 1)[1]) > 1000


def test_flipped_and_cut_objects_are_named() -> None:
    assert "0 cases not found or not named" in run_job("check_damage.py", "--stride", "499")


def test_a_collection_with_broken_images_is_accounted_for() -> None:
    """Its verdict on speed needs more images: here any is good enough."""
    output = run_job("poison_run.py", "--images", "60", "--poison", "0.2", "--tolerance", "1")
    assert "causes: {'encode-failed': 2, 'unreadable': 10}" in output


def test_training_curves_are_drawn_from_the_logs_of_runs(tmp_path: Path) -> None:
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        lines = [{"step": 50 * i, "bpp": [0.1, 1.0], "psnr": [20.0, 30.0]} for i in range(1, 9)]
        (tmp_path / run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    losses = [{"step": 50 * i, "perceptual": 0.4, "texture": 0.6} for i in range(1, 9)]
    (tmp_path / "second" / "human.jsonl").write_text("\n".join(map(json.dumps, losses)))
    picture = tmp_path / "curves.png"
    run_job(
        "plot_training.py", str(tmp_path / "first"), str(tmp_path / "second"), "-o", str(picture)
    )
    assert load_pixels(picture.read_bytes()).image.shape[1] > 800
    warming_up = {"step": 50, "log_bits": 9.0}
    (tmp_path / "second" / "log.jsonl").write_text(json.dumps(warming_up))
    for run in ("second", "none"):
        assert "no curve yet" in refusal_of("plot_training.py", str(tmp_path / run))


def test_a_codec_against_itself_costs_nothing_more_even_on_patterns(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    small, large = (tmp_path / "pictures" / name for name in ("small.png", "wide.png"))
    image = load_pixels(next(iter(demo.photographs())).data).image
    Image.fromarray(np.resize(image, (384, 400, 3))).save(large)
    Image.fromarray(image[:200, :200]).save(small)
    (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
    arguments = ["one=default", "two=default", "--pictures", str(small.parent), "--patterns"]
    found = json.loads(run_job("compare_codecs.py", *arguments, "--json"))
    assert found["pictures"] == 1
    assert [len(states) for states in found["codecs"].values()] == [5, 5]
    rates = found["bd_rates_against_one"]["two"]
    assert {rate["all"] for rate in rates.values()} == {0.0}
    again = ["one=default", "one=other", *arguments[2:]]
    assert "two codecs have one name" in refusal_of("compare_codecs.py", *again)


def test_bytes_beyond_the_first_codecs_are_counted_at_equal_quality() -> None:
    once = [
        {"bpp": bpp, "psnr": psnr, "ms_ssim": 1 - 0.1 / psnr, "ms_ssim_rgb": 1 - 0.2 / psnr}
        for bpp, psnr in ((0.05, 24.0), (0.2, 28.0), (0.8, 33.0))
    ]
    twice = [{**facts, "bpp": 2 * facts["bpp"]} for facts in once]
    rates = compare_codecs.bd_rates(once, twice)
    assert set(rates) == {"psnr", "ms_ssim", "ms_ssim_rgb"}
    for rate in rates.values():
        assert rate == pytest.approx({"all": 100.0, "headline": 100.0})


def test_the_demo_collection_comes_back_whole(tmp_path: Path) -> None:
    items = [*demo.photographs(), *demo.crops(), *demo.awkward_kinds()]
    sources = demo.write_collection(items, tmp_path / "collection")
    options = SourceOptions(tag_fields=("tags",))
    units = plan_units([str(source) for source in sources], options=options)
    images = [image for unit in units for image in read_unit(unit, options=options)]
    assert len({image.key for image in images}) == len(images)
    found = {image.metadata["name"]: (image.data, image.tags) for image in images}
    assert found == {item.name: (item.data, item.tags) for item in items}


def test_the_demo_collection_has_every_awkward_kind() -> None:
    reasons = {}
    for item in demo.awkward_kinds():
        try:
            reasons[item.name] = str(load_pixels(item.data).exif_orientation)
        except UnreadableImageError:
            reasons[item.name] = "unreadable"
        except SourceImageError as exc:
            reasons[item.name] = exc.reason
    assert reasons == {
        "cat-vignette": "alpha",
        "camera-16bit": "16-bit",
        "coffee-cmyk": "cmyk",
        "cat-turned": "6",
        "pixel": "1",
        "cat-broken": "unreadable",
    }


@pytest.mark.parametrize("name", sorted(path.name for path in JOBS.glob("*.py")))
def test_a_job_says_how_it_is_run(name: str) -> None:
    assert f"python jobs/{name}" in (JOBS / name).read_text().partition('"""\n\n')[0]
