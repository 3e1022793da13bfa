"""The reference's small latent coder, and lively random ones that need no file."""

import functools
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from dicmh_ray.codec.icmh.config import LatentCoderConfig
from dicmh_ray.codec.icmh.lfgcm import LatentCoder

SMALL = LatentCoderConfig(
    encoder_widths=(4, 4, 6, 6),
    z_channels=8,
    y_channels=10,
    prior_channels=4,
    shared_channels=8,
    context_widths=(12, 8),
    slices=(2, 3, 5),
)


@functools.cache
def reference_tensors(reference: Path) -> dict[str, Tensor]:
    """Everything in ``latent_codec_tiny.safetensors``."""
    return safetensors.torch.load_file(reference / "latent_codec_tiny.safetensors")


@functools.cache
def reference_values(reference: Path) -> dict:
    """Everything in ``latent_codec_tiny.json``."""
    return json.loads((reference / "latent_codec_tiny.json").read_text())


def reference_coder(reference: Path) -> LatentCoder:
    """The official module that the reference tensors were made with."""
    official = reference_values(reference)["config"]
    coder = LatentCoder(
        LatentCoderConfig(
            latent_channels=official["out_nc"],
            encoder_widths=tuple(official["enc_mid"]),
            z_channels=official["N"],
            y_channels=official["M"],
            prior_channels=official["prior_nc"],
            slices=tuple(official["slice_ch"]),
        )
    )
    state = {
        key.removeprefix("state_dict/"): tensor
        for key, tensor in reference_tensors(reference).items()
        if key.startswith("state_dict/")
    }
    coder.load_state_dict(state, strict=True)
    return coder.eval()


def lively_coder(config: LatentCoderConfig = SMALL, seed: int = 0) -> LatentCoder:
    """Random weights under which latents, scales and means all vary by a few units."""
    torch.manual_seed(seed)
    coder = LatentCoder(config)
    x, ref = pictures(1, 128, 128, seed, channels=config.latent_channels)

    def rescale(layer: nn.Module, values: Tensor, wanted: float) -> None:
        for parameter in layer.parameters():
            parameter *= wanted / values.std()

    with torch.no_grad():
        rescale(coder.encoder.g_a6, coder.encoder(x, ref), 4.0)
        rescale(coder.hyper_enc.h_a9, coder.analyse(x, ref)[1], 4.0)
        y, z = coder.analyse(x, ref)
        z_hat = coder.round_z(z)
        rescale(coder.hyper_dec.hyper_dec[-1], coder.hyper_dec(z_hat), 2.0)
        for networks in (coder.entropy_parameters_anchor, coder.entropy_parameters_nonanchor):
            for network in networks:
                for layer in (network.fusion[0], network.fusion[2], network.fusion[4]):
                    layer.weight *= 1.7
                count = network.fusion[4].bias.numel() // 2
                network.fusion[4].bias[:count] += 1.5  # scales are more often positive than not
        rescale(coder.f_c[-1], coder.f_c(z_hat), 1.0)
        rescale(coder.decoder.g_s4, coder.estimate(y, z_hat), 1.0)
    return coder.eval()


def pictures(
    count: int, height: int, width: int, seed: int = 0, *, channels: int = 4
) -> tuple[Tensor, Tensor]:
    """Smooth random pictures ``[B, 3, H, W]`` in 0..1 and latents ``[B, channels, H/8, W/8]``."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 16, width // 16, generator=generator)
    images = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return images, torch.randn(count, channels, height // 8, width // 8, generator=generator)
