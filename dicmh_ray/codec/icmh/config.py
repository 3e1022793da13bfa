"""Shapes of a Diff-ICMH codec. Part of its checkpoint: everything here changes decoded pixels.

The defaults are the official codec at full width, around Stable Diffusion 2.1-base.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

KIND = "diff-icmh"
"""``config.json``'s ``codec``: which classes a checkpoint directory is for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCoderConfig:
    """Widths of ``lfgcm``. ``N``, ``M``: compressai's names of the channels of z and y."""

    latent_channels: int = 4
    """Channels of the VAE's latent: the guide of the encoder and what the decoder estimates."""

    encoder_widths: tuple[int, int, int, int] = (64, 128, 192, 192)
    """Channels of the encoder at 1/2, 1/4, 1/8 and 1/16."""

    z_channels: int = 192
    """N."""

    y_channels: int = 320
    """M: the sum of ``slices``."""

    prior_channels: int = 64
    """Channels of the guiding features."""

    shared_channels: int = 128
    """Channels inside a feature transform, between guiding features and scale and shift."""

    context_widths: tuple[int, int] = (224, 128)
    """Hidden channels of the channel contexts."""

    slices: tuple[int, ...] = (8, 8, 8, 8, 16, 16, 32, 32, 96, 96)
    """Channels of y that are coded together, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig:
    """The autoencoder between pixels and the latent at 1/8."""

    kind: Literal["kl", "tiny", "patch"] = "kl"
    """``kl``: diffusers' AutoencoderKL. ``tiny``: its AutoencoderTiny. ``patch``: the autoencoder of
    this package's layered codec."""

    settings: dict[str, Any] = field(
        default_factory=lambda: {
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 4,
        }
    )
    """Keyword arguments of the class."""

    scaling: float = 0.18215
    """What the autoencoder's latent is multiplied by everywhere else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestorerConfig:
    """The U-Net and its control branch."""

    block_widths: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of the levels; the last has no attention."""

    layers_per_block: int = 2

    context_channels: int = 1024
    """Width of the text embedding."""

    head_width: int = 64
    """Channels of an attention head of the base U-Net."""

    control_head_width: int = 16
    """The same of the control branch: 16 in the official code (spec 0.4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The text encoder: transformers' CLIP text model without its last block."""

    width: int = 1024
    layers: int = 23
    heads: int = 16
    feed_forward: int = 4096
    vocabulary_size: int = 49408
    max_tokens: int = 77
    """Longer texts are cut; shorter ones are padded with id 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How a human view is drawn."""

    kind: Literal["ddpm", "ddim", "dpm-solver++", "euler"] = "ddpm"
    """``ddpm``: the official spaced ancestral sampler; the others are diffusers' schedulers."""

    steps: int = 50
    guidance: float = 5.0
    """Weight of the tags, s of classifier-free guidance; 1: the conditional prediction alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IcmhConfig:
    """All parts of one codec."""

    vae: VaeConfig = field(default_factory=VaeConfig)
    latent_coder: LatentCoderConfig = field(default_factory=LatentCoderConfig)
    restorer: RestorerConfig = field(default_factory=RestorerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, and the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises TypeError for a field that there is not."""
        return cls(
            vae=VaeConfig(**values["vae"]),
            latent_coder=LatentCoderConfig(**_with_tuples(values["latent_coder"])),
            restorer=RestorerConfig(**_with_tuples(values["restorer"])),
            text=TextConfig(**values["text"]),
            sampler=SamplerConfig(**values["sampler"]),
        )


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where these classes have tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
