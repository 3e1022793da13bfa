"""Codecs and training on a device that is not the CPU: nothing of theirs is left on the other one."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from dicmh_ray.codec import ImageCodec, ReducingCodec, load_codec, stage, training
from dicmh_ray.codec.checkpoint import Checkpoint
from dicmh_ray.icmh_recipe import ICMH_PRESETS, train_icmh_checkpoint
from dicmh_ray.recipe import PRESETS, train_checkpoint
from tests.codec.second_device import DeviceMixError, second_device

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")

TINY = PRESETS["tiny"]
TINY_ICMH = ICMH_PRESETS["diff-icmh-tiny"]
LABELS = {"0.png": "dog", "1.png": "cat"}


@pytest.fixture
def on_second_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second device, of which only this thread knows: crops are drawn in it, too."""
    monkeypatch.setattr(stage, "DRAWING_THREADS", 0)
    with second_device():
        yield


def picture(seed: int) -> npt.NDArray[np.uint8]:
    y, x = np.mgrid[:200, :240]
    waves = np.stack([np.sin(x / (2 + seed)), np.cos(y / (3 + seed)), np.sin((x + y) / 5)], -1)
    return (127 + 90 * waves).astype(np.uint8)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for n in range(4):
        Image.fromarray(picture(n)).save(folder / f"{n}.png")
    return folder


def train_tiny(
    photographs: Path, run: Path, teacher: Path, *, steps: int, start_from: Path | None = None
) -> Checkpoint:
    """Both stages of the tiny preset, with every loss that the default one has."""
    shares = {"structure": 0.6, "crop": 192, "batch": 3}
    return train_checkpoint(
        [str(photographs)],
        run,
        preset="tiny",
        options=dataclasses.replace(TINY.options, **shares, steps=steps, report_steps=1),
        human=dataclasses.replace(TINY.human, steps=steps, minutes=9.0, report_steps=1),
        device="cuda",
        teacher=teacher,
        labels=LABELS,
        start_from=start_from,
    )


def train_icmh(photographs: Path, run: Path, *, steps: int) -> Checkpoint:
    options, prior = TINY_ICMH.codec, TINY_ICMH.prior
    assert prior is not None
    return train_icmh_checkpoint(
        [str(photographs)],
        run,
        preset="diff-icmh-tiny",
        options=dataclasses.replace(options, steps=steps, minutes=9.0, report_steps=1),
        prior=dataclasses.replace(prior, steps=steps, minutes=9.0, report_steps=1),
        device="cuda",
        labels=LABELS,
    )


def views_of(codec: ImageCodec, stream: bytes) -> dict[str, npt.NDArray[np.generic]]:
    """All that a codec makes of a stream."""
    found: dict[str, npt.NDArray[np.generic]] = {
        view: codec.decode([stream], view=view)[0] for view in codec.views
    }
    found["latent"] = codec.decode_latent([stream])[0]
    if isinstance(codec, ReducingCodec):
        found["reduced"] = codec.decode_reduced([stream], [4])[0]
    return found


def require_equal_views(checkpoint: Path) -> None:
    """A stream of the second device is the CPU's, and so is what is made of it."""
    image, tags, upright = [picture(7)], [["dog"]], [1]
    here = load_codec(checkpoint, device="cpu", precision="float32")
    there = load_codec(checkpoint, device="cuda")
    stream = there.encode(image, tags=tags, exif_orientations=upright)[0]
    # Codecs remember what they have just encoded: this one reads the stream.
    found = views_of(load_codec(checkpoint, device="cuda"), stream)
    assert stream == here.encode(image, tags=tags, exif_orientations=upright)[0]
    wanted = views_of(here, stream)
    assert found.keys() == wanted.keys() >= {"machine", "human", "latent"}
    for view, values in wanted.items():
        np.testing.assert_array_equal(found[view], values, view)


def test_the_default_codec_is_trained_and_goes_on_on_it(
    photographs: Path,
    tmp_path: Path,
    teacher_file: Path,
    on_second_device: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "WARM_START_STEPS", 1)
    for steps in (1, 2):
        train_tiny(photographs, tmp_path / "new", teacher_file, steps=steps)
    checkpoint = tmp_path / "new" / "checkpoint"
    train_tiny(photographs, tmp_path / "further", teacher_file, steps=2, start_from=checkpoint)


def test_what_it_encodes_and_decodes_is_the_cpus(
    photographs: Path, tmp_path: Path, teacher_file: Path, on_second_device: None
) -> None:
    train_tiny(photographs, tmp_path, teacher_file, steps=1)
    require_equal_views(tmp_path / "checkpoint")


def test_diff_icmh_is_trained_and_goes_on_on_it_and_codes_as_on_the_cpu(
    photographs: Path, tmp_path: Path, on_second_device: None
) -> None:
    for steps in (1, 2):
        train_icmh(photographs, tmp_path, steps=steps)
    require_equal_views(tmp_path / "checkpoint")


def test_what_is_left_on_the_other_device_is_found(on_second_device: None) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert (there + 1).to("cpu").tolist() == [2.0] * 3
    assert there.device.type == "cuda"
    with pytest.raises(DeviceMixError, match="add"):
        here + there
    with pytest.raises(DeviceMixError, match="index"):
        here[torch.zeros(1, dtype=torch.int64, device="cuda")]
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
