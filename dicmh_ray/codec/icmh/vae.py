"""The autoencoder between pixels and the scaled latent, whatever network it is.

Everything outside this module sees one convention: pixels ``[B, 3, H, W]`` in -1..1, latents
``[B, C, h, w]`` multiplied by ``scaling``, so that their spread is about 1. What differs between
networks is the three functions of a :class:`Kind`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from dicmh_ray.codec.icmh.config import VaeConfig
from dicmh_ray.codec.icmh.control import NORM_GROUPS
from dicmh_ray.codec.icmh.patch_vae import build_patch, patch_posterior


class Kind(NamedTuple):
    """One sort of autoencoder network; latents here are unscaled."""

    build: Callable[[dict[str, Any]], nn.Module]
    """Settings of a :class:`VaeConfig` -> network."""

    posterior: Callable[[Any, Tensor], tuple[Tensor, Tensor | None]]
    """Network and pixels -> mean and standard deviation; None: the network is deterministic."""

    decode: Callable[[Any, Tensor], Tensor]
    """Network and latent -> pixels, not clamped."""


class Vae(nn.Module):
    """Pixels <-> scaled latents.

    ``network`` holds the weights: its ``state_dict`` is the ``vae`` part of a checkpoint.
    """

    def __init__(self, config: VaeConfig) -> None:
        """Raises ValueError for a kind that is not in :data:`KINDS`."""
        super().__init__()
        if config.kind not in KINDS:
            raise ValueError(f"vae kind is {config.kind!r}, wanted one of {', '.join(KINDS)}")
        self.config = config
        self.kind = KINDS[config.kind]
        self.network = self.kind.build(config.settings)

    def encode(self, x_B3HW: Tensor) -> Tensor:
        """The mode of the posterior, scaled: what a stream is made from."""
        mean, _ = self.kind.posterior(self.network, x_B3HW)
        return mean * self.config.scaling

    def sample(self, x_B3HW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw from the posterior, scaled: the target of training. Never used in coding."""
        mean, spread = self.kind.posterior(self.network, x_B3HW)
        if spread is None:
            return mean * self.config.scaling
        normal = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return (mean + spread * normal) * self.config.scaling

    def decode(self, z_BChw: Tensor) -> Tensor:
        """Pixels of a scaled latent; in -1..1 up to over- and undershoot."""
        return self.kind.decode(self.network, z_BChw / self.config.scaling)


def _build_kl(settings: dict[str, Any]) -> nn.Module:
    widths = tuple(settings["block_out_channels"])
    chosen = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "norm_num_groups": math.gcd(NORM_GROUPS, *widths),
        **settings,
        "block_out_channels": widths,
    }
    return _untyped(AutoencoderKL)(**chosen)


def _kl_posterior(network: Any, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    posterior = network.encode(x_B3HW).latent_dist
    return posterior.mean, posterior.std


def _build_tiny(settings: dict[str, Any]) -> nn.Module:
    return _untyped(AutoencoderTiny)(
        **{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    )


def _untyped(network_class: Any) -> Any:
    """diffusers' constructors carry no types."""
    return network_class


KINDS: dict[str, Kind] = {
    "kl": Kind(_build_kl, _kl_posterior, lambda network, z: network.decode(z).sample),
    "patch": Kind(build_patch, patch_posterior, lambda network, z: network.decode(z)),
    "tiny": Kind(
        _build_tiny,
        lambda network, x: (network.encode(x).latents, None),
        lambda network, z: network.decode(z).sample,
    ),
}
"""The autoencoders there are, by the name a configuration gives them."""
