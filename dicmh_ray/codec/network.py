"""The networks of the default codec in one module: autoencoder, latent transform, restorer."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dicmh_ray.codec.human import DiffusionRestorer
from dicmh_ray.codec.layered import LatentTransform, OneShotRestorer
from dicmh_ray.codec.tables import RATIO
from dicmh_ray.codec.transform import Block, PatchAutoencoder

ALIGNMENT = 16
"""Pictures are padded to multiples of this many pixels: one cell of y."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Shape of the networks. Part of the checkpoint: it changes decoded pixels.

    The defaults are the shape of the checkpoint in the package, but for gains and human view, which
    early checkpoints do not mention because they have none.
    """

    num_luma: int = 64
    """Luma channels of z, of 64 in an 8x8 cell."""

    num_chroma: int = 16
    """Channels of z of each of the two chroma planes."""

    num_merged: int = 6
    """Lowest frequencies of each plane whose 2x2 neighbours y merges at the start of training."""

    encoder_blocks: int = 3
    """Residual blocks at 1/8 resolution between pixels and z."""

    analysis_blocks: int = 7
    """Bottleneck blocks at 1/16 resolution between z and y."""

    synthesis_blocks: int = 10
    """Bottleneck blocks at 1/16 resolution from y back."""

    restorer_blocks: int = 5
    """Residual blocks at 1/8 resolution of the one-shot restorer."""

    hidden: int = 96
    """Width inside the residual blocks."""

    bottleneck: int = 128
    """Width inside the bottleneck blocks."""

    gain_hidden: int = 0
    """Width inside the activity gains of y; 0: none."""

    human_width: int = 0
    """Width of the human view's diffusion restorer at 1/8 resolution; 0: no human view."""

    human_blocks: int = 3
    """Its blocks before, below and after the 1/16 resolution, each."""

    human_evaluations: int = 2
    """Evaluations of it for a picture."""

    human_words: tuple[str, ...] = ()
    """Tags it has learned to be guided by."""

    num_states: int = 5
    """States of a full stream, coarsest first."""

    finest_step: float = 17.0
    """Quantiser step of the last state, in units of an 8-bit sample for an orthonormal basis."""

    def __post_init__(self) -> None:
        if not (self.finest_step > 0 and math.isfinite(self.finest_step)):
            raise ValueError(f"finest_step is {self.finest_step}, wanted a finite one above 0")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "human_words": tuple(values.get("human_words", ()))})

    @property
    def z_channels(self) -> int:
        return self.num_luma + 2 * self.num_chroma

    @property
    def y_channels(self) -> int:
        return 4 * self.z_channels

    @property
    def encode_margin(self) -> int:
        """Cells of y around a window of pixels that its y depends on."""
        return 1 + self.encoder_blocks + self.analysis_blocks + bool(self.gain_hidden)

    @property
    def decode_margin(self) -> int:
        """Cells of y around a window that its pixels depend on."""
        return 1 + self.restorer_blocks + self.synthesis_blocks + bool(self.gain_hidden)

    @property
    def human_margin(self) -> int:
        """Cells of y around a window that its human view depends on beyond :attr:`decode_margin`."""
        return self.human_evaluations * (2 + 2 * self.human_blocks) if self.human_width else 0

    @property
    def steps(self) -> tuple[float, ...]:
        """Quantiser step of each state, coarsest first."""
        return tuple(
            self.finest_step * RATIO ** (self.num_states - 1 - k) for k in range(self.num_states)
        )


class CodecNetwork(nn.Module):
    """Pixels -> y, and dequantised y -> pixels."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = PatchAutoencoder(
            num_luma=config.num_luma,
            num_chroma=config.num_chroma,
            blocks=config.encoder_blocks,
            hidden=config.hidden,
        )
        self.latent = LatentTransform(
            num_luma=config.num_luma,
            num_chroma=config.num_chroma,
            num_merged=config.num_merged,
            blocks=config.analysis_blocks,
            restore_blocks=config.synthesis_blocks,
            hidden=config.bottleneck,
            gain_hidden=config.gain_hidden,
            num_states=config.num_states,
        )
        self.restorer = OneShotRestorer(
            channels=config.z_channels,
            blocks=config.restorer_blocks,
            hidden=config.hidden,
            num_states=config.num_states,
        )

        self.human = (
            DiffusionRestorer(
                channels=config.z_channels,
                width=config.human_width,
                blocks=config.human_blocks,
                num_states=config.num_states,
                words=config.human_words,
            )
            if config.human_width
            else None
        )

    def encode(self, x_B3HW: Tensor) -> Tensor:
        """Sample values 0..255, ``[B, 3, H, W]`` (multiples of 16) -> y ``[B, C, H/16, W/16]``."""
        y: Tensor = self.latent.analyse(self.autoencoder.encode(x_B3HW))
        return y

    def decode(self, y_BCij: Tensor, state_B: Tensor) -> Tensor:
        """Dequantised y and the state of each image -> sample values, not clamped."""
        return self.autoencoder.decode(self.estimate(y_BCij, state_B))

    def estimate(self, y_BCij: Tensor, state_B: Tensor) -> Tensor:
        """Dequantised y and the state of each image -> the machine estimate of z."""
        z: Tensor = self.restorer(self.latent.synthesise(y_BCij, state_B), state_B)
        return z

    def compute_in(self, precision: torch.dtype) -> None:
        """Compute what the blocks add, nearly all of the work, in float32 or in bfloat16."""
        for module in self.modules():
            if isinstance(module, Block):
                module.precision = precision

    @torch.no_grad()
    def initialise_units(self, x_B3HW: Tensor) -> None:
        """Set scales and channel order from a batch of photographs, before training."""
        z = self.autoencoder.analysis(x_B3HW - 128.0)
        z_scale = z.square().mean((0, 2, 3)).sqrt().clamp_min(2.0)
        self.autoencoder.z_scale.copy_(z_scale)
        merged = self.latent.merge(nn.functional.pixel_unshuffle(z, 2))
        deviation = merged.square().mean((0, 2, 3)).sqrt()
        order = torch.argsort(deviation, descending=True, stable=True)
        self.latent.set_basis(z_scale, order, deviation[order].clamp_min(2.0))
