"""The checkpoint in the package: it is whole, it is ours, and it beats JPEG."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec, layered_codec, load_codec, read_checkpoint
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.transform import native_precision

JPEG_QUALITIES = (5, 10, 20, 30, 40, 55, 70, 85)


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return load_codec(device="cpu")


def test_it_says_what_it_was_trained_on_and_carries_the_attributions() -> None:
    checkpoint = read_checkpoint()
    assert checkpoint.config["provenance"]["photographs"] > 0
    assert b"CC BY-SA" in checkpoint.files["ATTRIBUTION.md"]
    assert sum(map(len, checkpoint.files.values())) < 40 * 2**20


# One pixel is all corner, where three of the four overlapping blocks are missing.
@pytest.mark.parametrize(("size", "least"), [((1, 1), 20), ((7, 300), 25), ((129, 63), 25)])
def test_small_and_odd_pictures_come_back(
    codec: ImageCodec, size: tuple[int, int], least: float
) -> None:
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([x % 256, y % 256, (x + y) // 2 % 256], -1).astype(np.uint8)
    data = codec.encode([image], tags=[("gradient",)], exif_orientations=[1])[0]
    decoded = codec.decode([data])[0]
    assert codec.measure([image], [decoded])[0].psnr > least


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_flat_picture_stays_flat(codec: ImageCodec, level: int) -> None:
    image = np.full((100, 120, 3), level, np.uint8)
    data = codec.encode([image], tags=[()], exif_orientations=[1])[0]
    assert codec.measure([image], codec.decode([data]))[0].psnr > 45


def test_the_human_view_is_offered_and_close_in_colour(codec: ImageCodec) -> None:
    assert codec.views == ("machine", "human")
    rng = np.random.default_rng(2)
    coarse = rng.integers(40, 215, (6, 8, 3)).repeat(32, 0).repeat(32, 1)
    image = (coarse + rng.normal(0, 8, coarse.shape)).clip(0, 255).astype(np.uint8)
    data = codec.encode([image], tags=[("dog",)], exif_orientations=[1])[0]
    human = codec.decode([data], states=3, view="human")[0]
    assert (human != codec.decode([data], states=3)[0]).any()
    means = [p.reshape(6, 32, 8, 32, 3).mean((1, 3)) for p in (image, human)]
    assert np.abs(means[0] - means[1]).mean() < 8


def test_what_a_pixel_costs_is_what_the_model_card_says() -> None:
    network = CodecNetwork(NetworkConfig.from_dict(read_checkpoint().config["network"])).eval()
    state, words = torch.tensor([1]), torch.zeros(1, len(network.config.human_words))
    height, width = 512, 768

    def kmac(function: Callable[..., torch.Tensor], *inputs: object) -> tuple[torch.Tensor, float]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = function(*inputs)
        return output, counter.get_total_flops() / 2 / 1000 / (height * width)

    y, encode = kmac(network.encode, torch.zeros(1, 3, height, width))
    z, estimate = kmac(network.estimate, y, state)
    z, diffusion = kmac(
        network.human.sample, z, state, words, [z] * network.config.human_evaluations
    )
    _, synthesis = kmac(network.autoencoder.decode, z)
    machine = estimate + synthesis
    found = [round(cost, 1) for cost in (encode, machine, machine + diffusion)]
    assert found == [16.8, 24.9, 76.1]


def test_native_precision_and_float32_decode_to_nearly_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layered_codec, "native_precision", lambda _: torch.bfloat16)
    reduced = load_codec(device="cpu")
    exact = load_codec(device="cpu", precision="float32")
    rng = np.random.default_rng(4)
    coarse = rng.integers(0, 255, (12, 16, 3)).repeat(16, 0).repeat(16, 1)
    image = (coarse + rng.normal(0, 12, coarse.shape)).clip(0, 255).astype(np.uint8)
    streams = exact.encode([image], tags=[()], exif_orientations=[1])
    for view, most in (("machine", 0.001), ("human", 0.03)):
        for states in (1, 3, 5):
            pair = [c.decode(streams, states=states, view=view)[0] for c in (reduced, exact)]
            apart = np.abs(pair[0].astype(int) - pair[1])
            assert 0 < (apart > 0).mean() < 0.3
            assert (apart > 1).mean() < most
            assert apart.max() <= 5


@pytest.mark.parametrize(
    ("capabilities", "wanted"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_bfloat16_is_native_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], wanted: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert native_precision(torch.device("cpu")) == wanted
    assert native_precision(torch.device("meta")) == torch.float32


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
