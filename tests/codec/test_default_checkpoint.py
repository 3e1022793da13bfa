"""The checkpoint in the package: it is whole, it is ours, and it beats JPEG."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec, load_codec, read_checkpoint

JPEG_QUALITIES = (5, 10, 20, 30, 40, 55, 70, 85)


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return load_codec(device="cpu")


def test_it_says_what_it_was_trained_on_and_carries_the_attributions() -> None:
    checkpoint = read_checkpoint()
    assert checkpoint.config["provenance"]["photographs"] > 0
    assert b"CC BY-SA" in checkpoint.files["ATTRIBUTION.md"]
    assert sum(map(len, checkpoint.files.values())) < 40 * 2**20


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (129, 63)])
def test_small_and_odd_pictures_come_back(codec: ImageCodec, size: tuple[int, int]) -> None:
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([x % 256, y % 256, (x + y) // 2 % 256], -1).astype(np.uint8)
    data = codec.encode([image], tags=[("gradient",)], exif_orientations=[1])[0]
    decoded = codec.decode([data])[0]
    assert codec.measure([image], [decoded])[0].psnr > 25


def test_on_kodak_each_state_is_better_and_all_need_fewer_bytes_than_jpeg(
    codec: ImageCodec, dicmh_data: Path
) -> None:
    ours, jpeg = [], []
    for path in sorted((dicmh_data / "eval" / "kodak").glob("*.png"))[2:24:6]:
        image = np.asarray(Image.open(path).convert("RGB"))
        ours.append(points_of_states(codec, image))
        jpeg.append(points_of_jpeg(codec, image))
    (our_bpp, our_psnr), (jpeg_bpp, jpeg_psnr) = np.mean(ours, 0).T, np.mean(jpeg, 0).T
    assert (np.diff(our_psnr) > 2).all()
    for psnr in (27.0, 29.0, 31.0, 33.0):
        bpp, other = (
            np.exp(np.interp(psnr, quality, np.log(rate)))
            for rate, quality in ((our_bpp, our_psnr), (jpeg_bpp, jpeg_psnr))
        )
        assert bpp < 0.85 * other, f"{bpp:.3f} bpp against {other:.3f} at {psnr} dB"


def points_of_states(codec: ImageCodec, image: np.ndarray) -> list[tuple[float, float]]:
    """Bits per pixel and PSNR of every state."""
    data = codec.encode([image], tags=[()], exif_orientations=[1])[0]
    points = []
    for end in prefix_bytes(data):
        decoded = codec.decode([data[:end]])[0]
        points.append((bpp_of(end, image), codec.measure([image], [decoded])[0].psnr))
    return points


def points_of_jpeg(codec: ImageCodec, image: np.ndarray) -> list[tuple[float, float]]:
    """The same of JPEG, optimised, 4:2:0."""
    points = []
    for quality in JPEG_QUALITIES:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, optimize=True, subsampling=2)
        decoded = np.asarray(Image.open(buffer))
        psnr = codec.measure([image], [decoded])[0].psnr
        points.append((bpp_of(buffer.tell(), image), psnr))
    return points


def bpp_of(num_bytes: int, image: np.ndarray) -> float:
    return 8 * num_bytes / (image.shape[0] * image.shape[1])
