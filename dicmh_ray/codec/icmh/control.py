"""The restorer: Stable Diffusion's U-Net steered by a control branch.

The branch is a second encoder that sees the decoded latent beside the noisy one. It runs in lock
step with the frozen U-Net and adds to it after every block through 1x1 convolutions that start at
zero, so before training the pair is the U-Net itself. Nothing flows from the U-Net to the branch.

    x ──────────────> base block i ──(+)──> skip i, base block i+1 … ──> middle ──(+)──> …
                                      │                                            │
    cat(x, hint) ──> control block i ─┴──> control block i+1 … ──> control middle ─┘
                           └──────────────────────────────────────> decoder block 11-i

diffusers' own ControlNet inputs add to the skips only after the whole way down, which is another
function; hence the forward pass is written out here, over diffusers' blocks.

Shape suffixes: B images, C latent channels, h w the latent grid, T text tokens, D text width,
F features of a block, E time embedding.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from dicmh_ray.codec.icmh.config import RestorerConfig

NORM_GROUPS = 32
"""Groups of Stable Diffusion's group normalisation."""

UNet: TypeAlias = Any
"""A diffusers ``UNet2DConditionModel``, of which a type checker sees no attributes."""


class EncoderBlock(NamedTuple):
    """One numbered block of the official encoder: a layer, then attention where there is any."""

    layer: nn.Module
    """The first convolution, a residual block or a downsampler."""

    attention: nn.Module | None
    takes_time: bool

    def run(self, x_BFhw: Tensor, time_BE: Tensor, context_BTD: Tensor) -> Tensor:
        x_BFhw = self.layer(x_BFhw, time_BE) if self.takes_time else self.layer(x_BFhw)
        return _attend(self.attention, x_BFhw, context_BTD)


class DecoderBlock(NamedTuple):
    """One numbered block of the official decoder, upsampler included."""

    layer: nn.Module
    attention: nn.Module | None
    upsampler: nn.Module | None

    def run(
        self,
        x_BFhw: Tensor,
        skip_BFhw: Tensor,
        time_BE: Tensor,
        context_BTD: Tensor,
        next_size: torch.Size | None,
    ) -> Tensor:
        """``next_size``: rows and columns of the next skip; odd grids are no plain doubling."""
        x_BFhw = self.layer(torch.cat([x_BFhw, skip_BFhw], 1), time_BE)
        x_BFhw = _attend(self.attention, x_BFhw, context_BTD)
        if self.upsampler is not None:
            doubled = torch.Size(2 * side for side in x_BFhw.shape[2:])
            size = None if next_size is None or next_size == doubled else tuple(next_size)
            x_BFhw = self.upsampler(x_BFhw, size)
        return x_BFhw


def _attend(attention: nn.Module | None, x_BFhw: Tensor, context_BTD: Tensor) -> Tensor:
    if attention is None:
        return x_BFhw
    attended: Tensor = attention(x_BFhw, encoder_hidden_states=context_BTD, return_dict=False)[0]
    return attended


def encoder_blocks(unet: UNet) -> Iterator[EncoderBlock]:
    """The official ``input_blocks`` of a U-Net, in order."""
    yield EncoderBlock(unet.conv_in, None, takes_time=False)
    for level in unet.down_blocks:
        attentions = getattr(level, "attentions", [None] * len(level.resnets))
        for layer, attention in zip(level.resnets, attentions, strict=True):
            yield EncoderBlock(layer, attention, takes_time=True)
        for sampler in level.downsamplers or ():
            yield EncoderBlock(sampler, None, takes_time=False)


def decoder_blocks(unet: UNet) -> Iterator[DecoderBlock]:
    """The official ``output_blocks`` of a U-Net, in order."""
    for level in unet.up_blocks:
        attentions = getattr(level, "attentions", [None] * len(level.resnets))
        for number, (layer, attention) in enumerate(zip(level.resnets, attentions, strict=True)):
            is_last = number == len(level.resnets) - 1
            upsampler = level.upsamplers[0] if is_last and level.upsamplers else None
            yield DecoderBlock(layer, attention, upsampler)


def _middle(unet: UNet, x_BFhw: Tensor, time_BE: Tensor, context_BTD: Tensor) -> Tensor:
    middle: Tensor = unet.mid_block(x_BFhw, time_BE, encoder_hidden_states=context_BTD)
    return middle


def _embed_time(unet: UNet, t_B: Tensor, x_BChw: Tensor) -> Tensor:
    embedding: Tensor = unet.time_embedding(unet.get_time_embed(x_BChw, t_B))
    return embedding


def build_unet(
    config: RestorerConfig, *, in_channels: int, out_channels: int, head_width: int
) -> UNet:
    """diffusers' U-Net in the shape of Stable Diffusion 2.1, with any number of levels.

    Every level but the coarsest has cross-attention. Group normalisation has 32 groups; where a
    width is no multiple of 32, the greatest common divisor.
    """
    widths = config.block_widths
    plain = len(widths) - 1
    untyped: Any = UNet2DConditionModel
    return untyped(
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=("CrossAttnDownBlock2D",) * plain + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * plain,
        block_out_channels=widths,
        layers_per_block=config.layers_per_block,
        norm_num_groups=math.gcd(NORM_GROUPS, *widths),
        cross_attention_dim=config.context_channels,
        # diffusers' name is wrong: this is the number of heads of each level.
        attention_head_dim=tuple(_head_count(width, head_width) for width in widths),
        use_linear_projection=True,
    )


def _head_count(width: int, head_width: int) -> int:
    """Attention heads of about ``head_width`` channels; exactly that where it divides ``width``."""
    return next(n for n in range(max(1, width // head_width), 0, -1) if width % n == 0)


class ControlBranch(nn.Module):
    """The trained half: an encoder that reads the hint, and the 1x1 convolutions out of it.

    Its ``state_dict`` is the ``control`` part of a checkpoint; names: :mod:`.official_keys`.
    """

    def __init__(self, config: RestorerConfig, latent_channels: int) -> None:
        super().__init__()
        self.encoder = build_unet(
            config,
            in_channels=2 * latent_channels,
            out_channels=latent_channels,
            head_width=config.control_head_width,
        )
        # Only the way down is used; the rest would be two thirds of the memory.
        self.encoder.up_blocks = nn.ModuleList()
        del self.encoder.conv_norm_out, self.encoder.conv_act, self.encoder.conv_out

        widths, layers = config.block_widths, config.layers_per_block
        down = [widths[0]]
        for level, width in enumerate(widths):
            down += [width] * (layers + (level < len(widths) - 1))
        # The decoder block n of a level reads what the level below it left, then its own width.
        below = [widths[-1], *reversed(widths)]
        up = [
            before if n == 0 else width
            for before, width in zip(below, reversed(widths), strict=False)
            for n in range(layers + 1)
        ]
        self.zero_down = nn.ModuleList(_zero_conv(width, width) for width in down)
        self.zero_middle = _zero_conv(widths[-1], widths[-1])
        self.zero_up = nn.ModuleList(
            _zero_conv(source, target) for source, target in zip(reversed(down), up, strict=True)
        )
        self.scale_list: Tensor
        self.register_buffer("scale_list", torch.ones(2 * len(down) + 1))


def _zero_conv(source: int, target: int) -> nn.Conv2d:
    conv = nn.Conv2d(source, target, 1)
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ControlledUNet(nn.Module):
    """Noisy latent, time, text and decoded latent -> the noise (epsilon prediction).

    ``unet`` is the prior and comes frozen; ``control`` is what is trained. Each is one part of a
    checkpoint under its own ``state_dict``.
    """

    def __init__(self, config: RestorerConfig, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = latent_channels
        self.unet = build_unet(
            config,
            in_channels=latent_channels,
            out_channels=latent_channels,
            head_width=config.head_width,
        )
        self.unet.requires_grad_(requires_grad=False)
        self.control = ControlBranch(config, latent_channels)

    def initialise_control(self) -> None:
        """Start the control branch as a copy of the U-Net's encoder.

        Its first convolution reads noisy latent and hint, and gets the U-Net's kernel for each; the
        1x1 convolutions are set to zero.
        """
        source = self.unet.state_dict()
        copied = {key: source[key] for key in self.control.encoder.state_dict()}
        copied["conv_in.weight"] = torch.cat([source["conv_in.weight"]] * 2, 1)
        self.control.encoder.load_state_dict(copied)
        for conv in (*self.control.zero_down, self.control.zero_middle, *self.control.zero_up):
            for parameter in conv.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, x_BChw: Tensor, t_B: Tensor, context_BTD: Tensor, hint_BChw: Tensor | None
    ) -> Tensor:
        """The noise in ``x``, ``[B, C, h, w]``.

        Args:
            x_BChw: noisy scaled latent. Any float type; the network computes in the type of its
                weights and answers in that of ``x``.
            t_B: int64 timestep in 0..999 of each image.
            context_BTD: text embedding.
            hint_BChw: decoded latent ``c``; None runs the U-Net alone.
        """
        unet, control, result_type = self.unet, self.control, x_BChw.dtype
        x_BChw, context_BTD = x_BChw.to(unet.dtype), context_BTD.to(unet.dtype)
        time_BE = _embed_time(unet, t_B, x_BChw)
        base, skips = x_BChw, []

        if hint_BChw is None:
            for block in encoder_blocks(unet):
                base = block.run(base, time_BE, context_BTD)
                skips.append(base)
            base = _middle(unet, base, time_BE, context_BTD)
            additions = None
        else:
            steered = torch.cat([x_BChw, hint_BChw.to(unet.dtype)], 1)
            control_time_BE = _embed_time(control.encoder, t_B, x_BChw)
            # One number for each addition, in the order they are made.
            scales = iter(control.scale_list.to(unet.dtype))
            features = []
            for block, follower, zero_conv in zip(
                encoder_blocks(unet),
                encoder_blocks(control.encoder),
                control.zero_down,
                strict=True,
            ):
                base = block.run(base, time_BE, context_BTD)
                steered = follower.run(steered, control_time_BE, context_BTD)
                base = base + zero_conv(steered) * next(scales)
                skips.append(base)
                features.append(steered)
            base = _middle(unet, base, time_BE, context_BTD)
            steered = _middle(control.encoder, steered, control_time_BE, context_BTD)
            base = base + control.zero_middle(steered) * next(scales)
            additions = zip(control.zero_up, reversed(features), scales, strict=True)

        for decoder_block in decoder_blocks(unet):
            if additions is not None:
                zero_conv, feature, scale = next(additions)
                base = base + zero_conv(feature) * scale
            skip = skips.pop()
            next_size = skips[-1].shape[2:] if skips else None
            base = decoder_block.run(base, skip, time_BE, context_BTD, next_size)
        eps_BChw: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(base)))
        return eps_BChw.to(result_type)

    def semantic_features(
        self,
        latent_BChw: Tensor,
        context_BTD: Tensor,
        t: int | Tensor = 0,
        *,
        block: int | None = None,
    ) -> Tensor:
        """What the frozen U-Net makes of a latent taken as its input, ``[B, F, h', w']``.

        Args:
            latent_BChw: scaled latent, without noise as in the paper.
            context_BTD: text embedding.
            t: timestep, one for all or int64 ``[B]``.
            block: number of the encoder block to stop after, from 0; None goes on to the middle.
        """
        unet = self.unet
        t_B = torch.as_tensor(t, device=latent_BChw.device).expand(len(latent_BChw))
        x = latent_BChw.to(unet.dtype)
        context_BTD = context_BTD.to(unet.dtype)
        time_BE = _embed_time(unet, t_B, x)
        for number, step in enumerate(encoder_blocks(unet)):
            x = step.run(x, time_BE, context_BTD)
            if number == block:
                return x
        if block is not None:
            raise ValueError(f"block is {block}, and the encoder has {number + 1} blocks from 0")
        return _middle(unet, x, time_BE, context_BTD)


def semantic_distance(f_BFhw: Tensor, g_BFhw: Tensor) -> Tensor:
    """``1 - cos(f, g)`` over the features, averaged over positions, ``[B]`` in 0..2.

    Computed as half the squared distance of the unit vectors, which is the same number and does not
    cancel: equal features are exactly 0 apart.
    """
    f_BFhw, g_BFhw = (F.normalize(x.float(), dim=1, eps=1e-8) for x in (f_BFhw, g_BFhw))
    return 0.5 * (f_BFhw - g_BFhw).square().sum(1).flatten(1).mean(1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RestorerOptions:
    """How fast the restorer runs. Changes its pixels by rounding, and nothing else of a stream."""

    dtype: torch.dtype = torch.float32
    """float16 and bfloat16 halve the memory; the coder of a stream must stay in float32."""

    compile: bool = False
    """``torch.compile``: worth its minutes for many pictures of one size."""


def apply_options(model: ControlledUNet, options: RestorerOptions) -> None:
    """Change a restorer in place; the names of its state stay."""
    model.to(options.dtype)
    if options.compile:
        model.compile()
