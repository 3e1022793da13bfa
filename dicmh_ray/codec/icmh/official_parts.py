"""The five parts of an official Diff-ICMH checkpoint: names, shapes and what else lies beside them.

    file             prefix in the official state dict     tensors at full width
    latent_coder     preprocess_model.                     563
    control          control_model.                        349
    unet             model.diffusion_model.                686
    vae              first_stage_model.                    248
    text             cond_stage_model.model.               280, and 14 that nothing reads

The shapes are asked of our own modules, built on torch's meta device: there is one description of
each network. Spec A.0, A.6, A.7.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dicmh_ray.codec.icmh.config import IcmhConfig
from dicmh_ray.codec.icmh.control import ControlledUNet
from dicmh_ray.codec.icmh.lfgcm import LatentCoder
from dicmh_ray.codec.icmh.official_keys import OFFICIAL_PREFIXES, Part, to_official, to_ours
from dicmh_ray.codec.icmh.text import (
    DROPPED,
    official_shapes,
    text_to_official,
    text_to_ours,
)
from dicmh_ray.codec.icmh.vae import Vae
from dicmh_ray.errors import WeightsError

LATENT_CODER = "latent_coder"
LATENT_CODER_PREFIX = "preprocess_model."

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialPart:
    """One network, as the official checkpoint and as a checkpoint directory has it."""

    name: str
    """Stem of its file in a checkpoint directory."""

    prefix: str
    """What its keys begin with in an official checkpoint."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor that is kept, by its official name without the prefix."""

    to_ours: Callable[[State], dict[str, Tensor]]
    """Official names without prefix -> the ``state_dict`` of our module. Views where it can be."""

    to_official: Callable[[State], dict[str, Tensor]]
    """Its inverse."""

    unread: Callable[[str], bool] = lambda _: False
    """Whether an official name, without prefix, is of a tensor that no network of ours reads."""

    @property
    def is_float32(self) -> bool:
        """Its weights stay so in half-precision checkpoints: they decide how streams decode."""
        return self.name == LATENT_CODER


def official_parts(config: IcmhConfig) -> tuple[OfficialPart, ...]:
    """The parts of a checkpoint of this shape.

    Raises:
        WeightsError: there is no official form of such a codec.
    """
    if config.vae.kind != "kl":
        raise WeightsError(
            "official", f"its autoencoder is of kind 'kl', this configuration's {config.vae.kind!r}"
        )
    with torch.device("meta"):
        coder = LatentCoder(config.latent_coder)
        restorer = ControlledUNet(config.restorer, config.latent_coder.latent_channels)
        vae = Vae(config.vae)
    text = config.text
    unread_block = f"transformer.resblocks.{text.layers}."
    return (
        OfficialPart(
            name=LATENT_CODER,
            prefix=LATENT_CODER_PREFIX,
            shapes=_shapes(coder.state_dict()),
            to_ours=dict,
            to_official=dict,
        ),
        _mapped("control", restorer.control),
        _mapped("unet", restorer.unet),
        _mapped("vae", vae.network),
        OfficialPart(
            name="text",
            prefix="cond_stage_model.model.",
            shapes=official_shapes(text),
            to_ours=lambda state: text_to_ours(state, text),
            to_official=lambda state: text_to_official(state, text),
            unread=lambda name: name in DROPPED or name.startswith(unread_block),
        ),
    )


def _mapped(name: Part, module: nn.Module) -> OfficialPart:
    return OfficialPart(
        name=name,
        prefix=OFFICIAL_PREFIXES[name],
        shapes=_shapes(to_official(name, module.state_dict())),
        to_ours=lambda state: to_ours(name, state),
        to_official=lambda state: to_official(name, state),
    )


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


_NEW_NAMES = {"matrix": "matrices", "bias": "biases", "factor": "factors"}
"""Tensors of compressai's entropy bottleneck: 1.2.4 has ``_matrix0``, 1.2.8 ``matrices.0``."""

_OLD_NAMES = {new: old for old, new in _NEW_NAMES.items()}
_OLD = re.compile(r"(.*entropy_bottleneck\.)_(matrix|bias|factor)(\d+)")
_NEW = re.compile(r"(.*entropy_bottleneck\.)(matrices|biases|factors)\.(\d+)")


def new_bottleneck_names(names: Iterable[str], source: str) -> dict[str, str]:
    """Old name -> new name of the tensors that compressai renamed; empty where all are new.

    Raises:
        WeightsError: some names are old and some new. Which are right cannot be told; a loader
            that is not strict would leave the others random, and decode noise.
    """
    names = list(names)
    old = {name: match for name in names if (match := _OLD.fullmatch(name))}
    new = [name for name in names if _NEW.fullmatch(name)]
    if old and new:
        raise WeightsError(
            source,
            f"its entropy bottleneck is half migrated: {next(iter(old))!r} is a name of "
            f"compressai 1.2.4, {new[0]!r} one of 1.2.8",
        )
    return {name: f"{m[1]}{_NEW_NAMES[m[2]]}.{m[3]}" for name, m in old.items()}


def old_bottleneck_name(name: str) -> str:
    """The name that compressai 1.2.4, which the official program pins, has for a tensor."""
    match = _NEW.fullmatch(name)
    return name if match is None else f"{match[1]}_{_OLD_NAMES[match[2]]}{match[3]}"


_TABLES = re.compile(
    r"entropy_bottleneck\._(offset|quantized_cdf|cdf_length)"
    r"|gaussian_conditional\.(_(offset|quantized_cdf|cdf_length)|scale_table)"
)


def is_table(name: str) -> bool:
    """Whether a name of the latent coder, without prefix, is of a table made from the weights.

    A checkpoint of training has them empty and the official program makes them at start, so those
    of other checkpoints are not kept.
    """
    return _TABLES.fullmatch(name) is not None


_SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
)

_BESIDE = {
    "preprocess_tag_model.": "the tagger RAM++",
    "model_ema.": "averages of training",
    "lpips_metric.": "a metric of validation",
    "first_stage_model.loss.": "the loss of the VAE's training",
    "cond_stage_model.model.attn_mask": "a constant",
    **dict.fromkeys(_SCHEDULE, "the noise schedule, which is computed"),
}
"""What else is in the state dicts of Diff-ICMH and Stable Diffusion: names, or prefixes that end in
a dot."""


def beside(key: str, more: Iterable[str] = ()) -> str | None:
    """The name or prefix by which a tensor of an official state dict is known to be dispensable.

    Args:
        key: with its prefix.
        more: further prefixes that a user has judged to be so.

    Returns:
        None for a key that nobody has explained.
    """
    for known in _BESIDE:
        if key == known or (known.endswith(".") and key.startswith(known)):
            return known
    return next((prefix for prefix in more if key.startswith(prefix)), None)


def control_ratio(shapes: Mapping[str, tuple[int, ...]]) -> float | None:
    """Width of the control branch over that of the U-Net, from the shapes of an official state.

    The released checkpoints have 1.0; the public configuration file says 0.2 (spec 0.3). None: a
    first convolution is missing.
    """
    control = shapes.get("control_model.control_model.input_blocks.0.0.weight")
    base = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    if not control or not base or not base[0]:
        return None
    return control[0] / base[0]
