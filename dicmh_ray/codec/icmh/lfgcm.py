"""lfgcm, the latent coder of Diff-ICMH: image and VAE latent <-> y and z.

    image, ref ──encoder──> y ──hyper_enc(ref)──> z
    z_hat ──hyper_dec──> hyper ──coding steps──> scales and means of y, slice by slice
    y_hat, f_c(z_hat) ──decoder──> an estimate of ref

y is cut into slices of channels, and each slice into anchors and the others of a checkerboard. The
order of these steps, and what each may know, is :func:`coding_steps` alone: rate estimate, encoder
and decoder, in floating point here and in :mod:`.official_coder`, in integers in :mod:`.exact`,
all draw their steps from it.

Attribute names are the keys of the official checkpoints under ``preprocess_model.`` (compressai
1.2.8 names). Shape suffixes: B images, M channels of y, N of z, C of the VAE latent; H W pixels,
h w the grid at 1/8, i j at 1/16 (y), k l at 1/64 (z).
"""

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dicmh_ray.codec.icmh.compressai_parts import (
    EntropyBottleneck,
    GaussianConditional,
    conv,
    conv1x1,
    conv3x3,
    deconv,
    get_scale_table,
)
from dicmh_ray.codec.icmh.config import LatentCoderConfig
from dicmh_ray.codec.icmh.layers import (
    ChannelContext,
    EntropyParameters,
    FeatureTransform,
    ResidualBottleneck,
    ResidualStride,
    ResidualTransform,
    ResidualUpsample,
    conv5x5,
    guide,
    guide_up,
    joint_guide,
    round_through,
)

ALIGNMENT = 64
"""Sides of an image are multiples of this many pixels."""

Y_STRIDE = 16
Z_STRIDE = 64
"""Pixels per cell of y and of z."""


@dataclass(frozen=True, slots=True)
class CodingStep:
    """Symbols that are coded together: one slice at the positions of one parity."""

    index: int
    """Of the slice."""

    channels: slice
    """Of y."""

    is_anchor: bool
    """The anchors of a slice come before its other positions."""

    parameters: Any
    """What :meth:`ContextNetworks.from_contexts` made."""


class ContextNetworks(Protocol):
    """The networks between what is decoded and the parameters of what comes next."""

    def from_channels(self, index: int, decoded: Tensor) -> Tensor:
        """The channel context of slice ``index``, from all slices before it."""

    def from_anchors(self, index: int, anchors: Tensor) -> Tensor:
        """The local context of slice ``index``, from its anchors, zero at the other positions."""

    def from_contexts(self, index: int, is_anchor: bool, contexts: Sequence[Tensor]) -> Any:
        """The entropy parameters, from the contexts in the order of the official concatenation."""


def coding_steps(
    networks: ContextNetworks, hyper: Tensor, slices: Sequence[int]
) -> Generator[CodingStep, Tensor, Tensor]:
    """The steps of one coding of y, in order.

    Args:
        networks: evaluated between steps, on whatever numbers they work on.
        hyper: what the hyper-decoder made, ``[B, 2M, i, j]``.
        slices: channels of each slice.

    Yields:
        One step. Send the decoded values of its channels, ``[B, c, i, j]``, zero at the positions of
        the other parity.

    Returns:
        The decoded y, ``[B, M, i, j]``.
    """
    decoded: list[Tensor] = []
    stops = itertools.accumulate(slices)
    for index, (count, stop) in enumerate(zip(slices, stops, strict=True)):
        channels = slice(stop - count, stop)
        contexts = [hyper]
        if index:
            contexts.insert(0, networks.from_channels(index, torch.cat(decoded, 1)))
        parameters = networks.from_contexts(index, True, contexts)
        anchors = yield CodingStep(index, channels, True, parameters)
        contexts.insert(0, networks.from_anchors(index, anchors))
        parameters = networks.from_contexts(index, False, contexts)
        others = yield CodingStep(index, channels, False, parameters)
        decoded.append(anchors + others)
    return torch.cat(decoded, 1)


def run_steps(
    steps: Generator[CodingStep, Tensor, Tensor], visit: Callable[[CodingStep], Tensor]
) -> Tensor:
    """Answer every step with what ``visit`` returns for it; returns the decoded y."""
    answer: Any = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = visit(step)


def anchor_mask(grid: Sequence[int], device: torch.device) -> Tensor:
    """bool ``[i, j]``: where row and column differ in parity."""
    rows = torch.arange(grid[0], device=device)
    columns = torch.arange(grid[1], device=device)
    return (rows[:, None] + columns[None, :]) % 2 == 1


def pack(values: Tensor, is_anchor: bool) -> Tensor:
    """The positions of one parity: ``[..., i, j]`` -> ``[..., i, j / 2]``; j even."""
    packed = values.new_empty(*values.shape[:-1], values.shape[-1] // 2)
    packed[..., 0::2, :] = values[..., 0::2, int(is_anchor) :: 2]
    packed[..., 1::2, :] = values[..., 1::2, int(not is_anchor) :: 2]
    return packed


def unpack(packed: Tensor, is_anchor: bool) -> Tensor:
    """The inverse of :func:`pack`, zero at the positions of the other parity."""
    values = packed.new_zeros(*packed.shape[:-1], packed.shape[-1] * 2)
    values[..., 0::2, int(is_anchor) :: 2] = packed[..., 0::2, :]
    values[..., 1::2, int(not is_anchor) :: 2] = packed[..., 1::2, :]
    return values


class GaussianParameters(NamedTuple):
    """Of one slice, ``[B, c, i, j]`` each; scales as the network gives them, unbounded."""

    scales: Tensor
    means: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCoderOutput:
    """What one training step needs."""

    estimate: Tensor
    """``[B, C, h, w]``: of the scaled VAE latent."""

    bits: Tensor
    """``[B]``: of y and z under uniform noise in place of rounding; differentiable."""

    rounded_bits: Tensor
    """``[B]``: of the rounded y and z: what a stream takes. No gradient."""

    y: Tensor
    y_hat: Tensor
    """``[B, M, i, j]``."""

    z: Tensor
    z_hat: Tensor
    """``[B, N, k, l]``."""


class Encoder(nn.Module):
    """Image and VAE latent -> y."""

    def __init__(self, config: LatentCoderConfig) -> None:
        super().__init__()
        prior, shared = config.prior_channels, config.shared_channels
        half, quarter, eighth, last = config.encoder_widths
        self.sft_1_8 = guide(config.latent_channels, prior)
        self.sft_1_16 = guide(prior, prior, stride=2)
        self.sft_1_16_2 = guide(prior, prior)
        self.g_a1 = nn.Sequential(*_down(3, half), *_down(half, quarter), *_down(quarter, eighth))
        self.g_a1_ref = FeatureTransform(eighth, prior, shared)
        self.g_a2 = nn.Sequential(*_down(eighth, last))
        self.g_a2_ref = FeatureTransform(last, prior, shared)
        self.g_a3 = conv3x3(last, last)
        self.g_a4 = ResidualTransform(last, prior, shared)
        self.g_a5 = ResidualTransform(last, prior, shared)
        self.g_a6 = conv3x3(last, config.y_channels)

    def forward(self, x_B3HW: Tensor, ref_BChw: Tensor) -> Tensor:
        prior = self.sft_1_8(ref_BChw)
        out = self.g_a1_ref(self.g_a1(x_B3HW), prior)
        prior = self.sft_1_16(prior)
        out = self.g_a2_ref(self.g_a2(out), prior)
        prior = self.sft_1_16_2(prior)
        out = self.g_a5(self.g_a4(self.g_a3(out), prior), prior)
        return self.g_a6(out)


class HyperEncoder(nn.Module):
    """y and VAE latent -> z."""

    def __init__(self, config: LatentCoderConfig) -> None:
        super().__init__()
        prior, shared, width = config.prior_channels, config.shared_channels, config.z_channels
        self.sft_feature = guide(config.latent_channels, prior, stride=2)
        self.sft_feature_h1 = joint_guide(prior + config.y_channels, prior)
        self.sft_feature_h2 = guide(prior, prior, stride=2)
        self.sft_feature_h3 = guide(prior, prior, stride=2)
        self.h_a0 = conv3x3(config.y_channels, width)
        self.h_a1 = FeatureTransform(width, prior, shared)
        self.h_a2 = nn.GELU()
        self.h_a3 = conv(width, width)
        self.h_a4 = FeatureTransform(width, prior, shared)
        self.h_a5 = nn.GELU()
        self.h_a6 = conv(width, width)
        self.h_a7 = ResidualTransform(width, prior, shared)
        self.h_a8 = ResidualTransform(width, prior, shared)
        self.h_a9 = conv1x1(width, width)

    def forward(self, y_BMij: Tensor, ref_BChw: Tensor) -> Tensor:
        prior = self.sft_feature_h1(torch.cat([self.sft_feature(ref_BChw), y_BMij], 1))
        out = self.h_a2(self.h_a1(self.h_a0(y_BMij), prior))
        prior = self.sft_feature_h2(prior)
        out = self.h_a5(self.h_a4(self.h_a3(out), prior))
        prior = self.sft_feature_h3(prior)
        out = self.h_a8(self.h_a7(self.h_a6(out), prior), prior)
        return self.h_a9(out)


class HyperDecoder(nn.Module):
    """z_hat -> the features that every coding step of y sees."""

    def __init__(self, config: LatentCoderConfig) -> None:
        super().__init__()
        width = config.y_channels
        self.hyper_dec = nn.Sequential(
            deconv(config.z_channels, width),
            nn.GELU(),
            deconv(width, width * 3 // 2),
            nn.GELU(),
            deconv(width * 3 // 2, width * 2, kernel_size=3, stride=1),
        )

    def forward(self, z_hat_BNkl: Tensor) -> Tensor:
        return self.hyper_dec(z_hat_BNkl)


class Decoder(nn.Module):
    """y_hat and a side feature of z_hat -> an estimate of the VAE latent."""

    def __init__(self, config: LatentCoderConfig) -> None:
        super().__init__()
        prior, shared, width = config.prior_channels, config.shared_channels, config.z_channels
        channels = config.y_channels
        self.sft_feature_gs1 = joint_guide(config.z_channels // 4 + channels, prior)
        self.sft_feature_gs2 = guide(prior, prior)
        self.sft_feature_gs3 = guide_up(prior)
        self.g_s0 = ResidualTransform(channels, prior, shared)
        self.g_s1 = ResidualTransform(channels, prior, shared)
        self.g_s2 = nn.Sequential(conv3x3(channels, width), *_bottlenecks(width))
        self.g_s2_ref = FeatureTransform(width, prior, shared)
        self.g_s3 = nn.Sequential(ResidualUpsample(width, width), *_bottlenecks(width))
        self.g_s3_ref = FeatureTransform(width, prior, shared)
        self.g_s4 = conv3x3(width, config.latent_channels)

    def forward(self, y_hat_BMij: Tensor, side_BSij: Tensor) -> Tensor:
        prior = self.sft_feature_gs1(torch.cat([side_BSij, y_hat_BMij], 1))
        out = self.g_s1(self.g_s0(y_hat_BMij, prior), prior)
        prior = self.sft_feature_gs2(prior)
        out = self.g_s2_ref(self.g_s2(out), prior)
        prior = self.sft_feature_gs3(prior)
        out = self.g_s3_ref(self.g_s3(out), prior)
        return self.g_s4(out)


class LatentCoder(nn.Module):
    """The latent coder: networks and entropy models."""

    def __init__(self, config: LatentCoderConfig) -> None:
        super().__init__()
        if sum(config.slices) != config.y_channels:
            raise ValueError(f"slices {config.slices} do not sum to {config.y_channels}")
        self.config = config
        side = config.z_channels // 4
        self.encoder = Encoder(config)
        self.hyper_enc = HyperEncoder(config)
        self.hyper_dec = HyperDecoder(config)
        self.decoder = Decoder(config)
        self.f_c = nn.Sequential(
            deconv(config.z_channels, config.z_channels // 2),
            nn.GELU(),
            deconv(config.z_channels // 2, side),
            nn.GELU(),
            deconv(side, side, kernel_size=3, stride=1),
        )
        self.local_context = nn.ModuleList(conv5x5(c, 2 * c) for c in config.slices)
        starts = [0, *itertools.accumulate(config.slices)]
        # Slice 0 has no channel context; the keys are those of the official list all the same.
        self.channel_context = nn.ModuleList(
            ChannelContext(starts[i], config.context_widths, 2 * c) if i else nn.Identity()
            for i, c in enumerate(config.slices)
        )
        contexts = [
            2 * config.y_channels + (2 * c if i else 0) for i, c in enumerate(config.slices)
        ]
        self.entropy_parameters_anchor = nn.ModuleList(
            EntropyParameters(width, 2 * c)
            for c, width in zip(config.slices, contexts, strict=True)
        )
        self.entropy_parameters_nonanchor = nn.ModuleList(
            EntropyParameters(width + 2 * c, 2 * c)
            for c, width in zip(config.slices, contexts, strict=True)
        )
        self.entropy_bottleneck = EntropyBottleneck(config.z_channels)
        self.gaussian_conditional = GaussianConditional(None)

    def analyse(self, x_B3HW: Tensor, ref_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of images, before they are rounded.

        Args:
            x_B3HW: float32 in 0..1; H and W multiples of 64.
            ref_BChw: float32, the scaled VAE latent of the images.

        Returns:
            y ``[B, M, H/16, W/16]`` and z ``[B, N, H/64, W/64]``.

        Raises:
            ValueError: the sides are no multiples of 64, or the latent is of another size.
        """
        height, width = x_B3HW.shape[2:]
        if height % ALIGNMENT or width % ALIGNMENT:
            raise ValueError(f"{height}x{width} pixels are not whole multiples of {ALIGNMENT}")
        if tuple(ref_BChw.shape[2:]) != (height // 8, width // 8):
            raise ValueError(
                f"the VAE latent is {tuple(ref_BChw.shape)} of {height}x{width} pixels"
            )
        y = self.encoder(x_B3HW, ref_BChw)
        return y, self.hyper_enc(y, ref_BChw)

    def forward(self, x_B3HW: Tensor, ref_BChw: Tensor) -> LatentCoderOutput:
        """Estimate and rate of images; arguments and errors as :meth:`analyse`."""
        y, z = self.analyse(x_B3HW, ref_BChw)
        z_hat = self.round_z(z)
        parameters, y_hat = self.round_y(y, z_hat)
        _, y_noisy = self.gaussian_conditional(y, *parameters, training=True)
        _, z_noisy = self.entropy_bottleneck(z, training=True)
        with torch.no_grad():
            _, y_rounded = self.gaussian_conditional(y, *parameters, training=False)
            _, z_rounded = self.entropy_bottleneck(z, training=False)
        return LatentCoderOutput(
            estimate=self.estimate(y_hat, z_hat),
            bits=_bits(y_noisy) + _bits(z_noisy),
            rounded_bits=_bits(y_rounded) + _bits(z_rounded),
            y=y,
            y_hat=y_hat,
            z=z,
            z_hat=z_hat,
        )

    def estimate(self, y_hat_BMij: Tensor, z_hat_BNkl: Tensor) -> Tensor:
        """The estimate of the scaled VAE latent, ``[B, C, h, w]``, from decoded latents."""
        return self.decoder(y_hat_BMij, self.f_c(z_hat_BNkl))

    def round_z(self, z_BNkl: Tensor) -> Tensor:
        """z rounded around the medians of its channels; gradient as if it were not rounded."""
        medians = self.medians()[:, None, None]
        return round_through(z_BNkl - medians) + medians

    def round_y(self, y_BMij: Tensor, z_hat_BNkl: Tensor) -> tuple[GaussianParameters, Tensor]:
        """y rounded around its means as a decoder gets it, and the parameters of all its symbols.

        Gradient: as if y were not rounded.
        """
        mask = anchor_mask(y_BMij.shape[2:], y_BMij.device)
        anchors: list[GaussianParameters] = []
        merged: list[GaussianParameters] = []

        def visit(step: CodingStep) -> Tensor:
            scales, means = step.parameters
            if step.is_anchor:
                anchors.append(step.parameters)
            else:
                first = anchors[step.index]
                merged.append(
                    GaussianParameters(
                        torch.where(mask, first.scales, scales),
                        torch.where(mask, first.means, means),
                    )
                )
            rounded = round_through(y_BMij[:, step.channels] - means) + means
            return rounded * (mask if step.is_anchor else ~mask)

        y_hat = run_steps(self.coding_steps(z_hat_BNkl), visit)
        return GaussianParameters(
            *(torch.cat(part, 1) for part in zip(*merged, strict=True))
        ), y_hat

    def coding_steps(self, z_hat_BNkl: Tensor) -> Generator[CodingStep, Tensor, Tensor]:
        """:func:`coding_steps` of these networks; parameters are :class:`GaussianParameters`."""
        return coding_steps(self, self.hyper_dec(z_hat_BNkl), self.config.slices)

    def from_channels(self, index: int, decoded: Tensor) -> Tensor:
        """See :class:`ContextNetworks`."""
        return self.channel_context[index](decoded)

    def from_anchors(self, index: int, anchors: Tensor) -> Tensor:
        """See :class:`ContextNetworks`."""
        return self.local_context[index](anchors)

    def from_contexts(
        self, index: int, is_anchor: bool, contexts: Sequence[Tensor]
    ) -> GaussianParameters:
        """See :class:`ContextNetworks`. The networks' first half of channels are the scales."""
        networks = (
            self.entropy_parameters_anchor if is_anchor else self.entropy_parameters_nonanchor
        )
        return GaussianParameters(*networks[index](torch.cat(list(contexts), 1)).chunk(2, 1))

    def medians(self) -> Tensor:
        """``[N]``: what z is rounded around. No gradient: only :meth:`aux_loss` moves them."""
        return self.entropy_bottleneck.quantiles[:, 0, 1].detach()

    def aux_loss(self) -> Tensor:
        """Distance of the quantiles of z from where they belong; for an optimiser of their own."""
        return self.entropy_bottleneck.loss()

    def update_tables(self) -> None:
        """Build compressai's 16-bit tables anew from the weights: for the official container alone.

        Two machines may build tables that differ by a count, and such a stream is lost. Streams of
        this package use the frozen tables of :mod:`.exact`.
        """
        self.entropy_bottleneck.update(force=True)
        self.gaussian_conditional.update_scale_table(get_scale_table(), force=True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Tables are empty in a training checkpoint and full after an update: either is loaded.
        for name in ("entropy_bottleneck", "gaussian_conditional"):
            module: nn.Module = getattr(self, name)
            for key, buffer in list(module.named_buffers(recurse=False)):
                found = state_dict.get(f"{prefix}{name}.{key}")
                if found is not None:
                    setattr(module, key, buffer.new_empty(found.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _bits(likelihoods: Tensor) -> Tensor:
    """``[B, ...]`` -> ``[B]``."""
    return likelihoods.log().flatten(1).sum(1) / -math.log(2)


def _down(inputs: int, outputs: int) -> list[nn.Module]:
    return [ResidualStride(inputs, outputs), *_bottlenecks(outputs)]


def _bottlenecks(channels: int) -> list[nn.Module]:
    return [ResidualBottleneck(channels) for _ in range(3)]
