"""The layered codec's patch autoencoder as the VAE of a small Diff-ICMH codec.

It is trained already and a hundred times cheaper than a convolutional VAE: what a small codec of our own
stands on. Its latent has a channel for each spatial frequency, in units of that channel's deviation;
here the units are changed so that the low frequencies, which matter, are also large.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dicmh_ray.codec.transform import PatchAutoencoder


class PatchVae(nn.Module):
    """Deterministic: pixels in -1..1 <-> latent ``[B, num_luma + 2 num_chroma, H/8, W/8]``.

    Args:
        num_luma: see :class:`PatchAutoencoder`, and so the following.
        emphasis: power of a channel's deviation that its unit keeps: 0 makes all channels alike, 1
            makes distances those of pixels.
    """

    def __init__(
        self, *, num_luma: int, num_chroma: int, blocks: int, hidden: int, emphasis: float
    ) -> None:
        super().__init__()
        self.autoencoder = PatchAutoencoder(
            num_luma=num_luma, num_chroma=num_chroma, blocks=blocks, hidden=hidden
        )
        self.emphasis = emphasis

    def encode(self, x_B3HW: Tensor) -> Tensor:
        """Latent with a mean square of about 1 over all channels."""
        z: Tensor = self.autoencoder.encode((x_B3HW + 1) * 127.5)
        return z * self._unit()[:, None, None]

    def decode(self, z_BChw: Tensor) -> Tensor:
        """Pixels, not clamped."""
        x: Tensor = self.autoencoder.decode(z_BChw / self._unit()[:, None, None])
        return x / 127.5 - 1

    def _unit(self) -> Tensor:
        weight = self.autoencoder.z_scale**self.emphasis
        return weight / weight.square().mean().sqrt()


def build_patch(settings: dict[str, Any]) -> nn.Module:
    """For the table of autoencoders in :mod:`.vae`."""
    return PatchVae(**settings)


def patch_posterior(network: Any, x_B3HW: Tensor) -> tuple[Tensor, None]:
    """As every autoencoder's: mean, and no deviation."""
    return network.encode(x_B3HW), None


def take_autoencoder(network: PatchVae, weights: dict[str, Tensor]) -> None:
    """Copy the autoencoder out of a layered codec's weights (``autoencoder.…``).

    Raises:
        RuntimeError: it has another shape.
    """
    prefix = "autoencoder."
    own = {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
    with torch.no_grad():
        network.autoencoder.load_state_dict(own)
