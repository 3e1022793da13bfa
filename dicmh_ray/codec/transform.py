"""Pixels <-> z: the small autoencoder of the default codec.

A lapped 8x8 block transform that starts as an orthonormal colour transform and DCT, and residual
blocks at 1/8 resolution around an identity path. At step 0 of training it *is* the DCT, so that
little compute goes far; everything in it is then learned.

Shape suffixes: B images, C channels, H W pixels, h w the 1/8 grid.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 8
"""Pixels per side of a cell of z."""


def colour_basis() -> Tensor:
    """Float32 ``[3, 3]`` orthonormal rows: luma, red-blue, green-magenta."""
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    return rows / rows.norm(dim=1, keepdim=True)


def dct_basis(size: int = PATCH) -> Tensor:
    """Float32 ``[size, size]`` orthonormal DCT-II rows."""
    n = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (n[None, :] + 0.5) * n[:, None] / size) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.float()


def patch_basis(num_luma: int = 64, num_chroma: int = 16) -> Tensor:
    """The colour-DCT basis functions that z starts with.

    Returns:
        Float32 ``[num_luma + 2 num_chroma, 3, 8, 8]``, orthonormal; in each plane the lowest
        frequencies, ordered by ``u + v``.
    """
    dct, colour = dct_basis(), colour_basis()
    order = sorted(
        ((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda f: (sum(f), max(f), f)
    )
    kernels = []
    for plane, count in ((0, num_luma), (1, num_chroma), (2, num_chroma)):
        for u, v in order[:count]:
            kernels.append(torch.einsum("c,y,x->cyx", colour[plane], dct[u], dct[v]))
    return torch.stack(kernels)


class Block(nn.Module, ABC):
    """Adds to its input what its branch makes of it.

    The input stays in float32. The branch, where nearly all multiplications are, is computed in
    :attr:`precision`: its error is small against what it is added to.
    """

    precision = torch.float32

    def forward(self, x_BChw: Tensor, condition: Tensor | None = None) -> Tensor:
        return x_BChw + self.branch_in_precision(x_BChw, condition)

    def branch_in_precision(self, x_BChw: Tensor, condition: Tensor | None) -> Tensor:
        """The branch, computed in :attr:`precision`, or in float32 in the caller's."""
        if self.precision == torch.float32:
            return self.branch(x_BChw, condition)
        with torch.autocast(x_BChw.device.type, self.precision):
            return self.branch(x_BChw, condition)

    @abstractmethod
    def branch(self, x_BChw: Tensor, condition: Tensor | None) -> Tensor:
        """What the block adds to its input, ``[B, C, h, w]``.

        ``condition`` is the state of each image, int64 ``[B]``, or its vector, ``[B, E]``.
        """


def native_precision(device: torch.device) -> torch.dtype:
    """``torch.bfloat16`` where the device multiplies it faster than float32; else ``torch.float32``."""
    if device.type == "cuda":
        is_native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # Unknown to early versions of torch, which compute in float32 then.
        found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        is_native = device.type == "cpu" and (
            found.get("avx512_bf16", False) or found.get("amx_bf16", False)
        )
    return torch.bfloat16 if is_native else torch.float32


class ResidualBlock(Block):
    """Two 3x3 convolutions; the last one starts at zero, so the block is the identity.

    With ``num_states`` the hidden activations are scaled and shifted by the state.
    """

    def __init__(self, channels: int, hidden: int, *, num_states: int = 0) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv_out = nn.Conv2d(hidden, channels, 3, padding=1)
        self.film = StateFilm(num_states, hidden) if num_states else None
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(_bias(self.conv_out))

    def branch(self, x_BChw: Tensor, condition: Tensor | None) -> Tensor:
        hidden = self.conv_in(x_BChw)
        if self.film is not None:
            hidden = self.film(hidden, condition)
        out: Tensor = self.conv_out(F.leaky_relu(hidden, 0.1, inplace=True))
        return out


class BottleneckBlock(Block):
    """As :class:`ResidualBlock`, with its 3x3 convolution in a narrow middle."""

    def __init__(self, channels: int, hidden: int, *, num_states: int = 0) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.film = StateFilm(num_states, hidden) if num_states else None
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(_bias(self.expand))

    def branch(self, x_BChw: Tensor, condition: Tensor | None) -> Tensor:
        hidden = self.conv(F.leaky_relu(self.reduce(x_BChw), 0.1, inplace=True))
        if self.film is not None:
            hidden = self.film(hidden, condition)
        out: Tensor = self.expand(F.leaky_relu(hidden, 0.1, inplace=True))
        return out


class ActivityGain(BottleneckBlock):
    """A gain for each coefficient from the activity around it: what divisive normalisation does.

    The encoder divides by it, so that busy places, which hide errors, get coarser steps; the
    decoder multiplies by its own estimate, from dequantised coefficients and the state. Starts at 1.
    """

    MAX_LOG = 1.5
    """The gain stays within ``exp(-1.5) .. exp(1.5)``."""

    def forward(self, x_BChw: Tensor, state_B: Tensor | None = None) -> Tensor:
        """Coefficients, in units of their deviation -> logarithm of the gain, both ``[B, C, i, j]``."""
        log_gain = self.branch_in_precision(x_BChw.abs().log1p(), state_B).float()
        return self.MAX_LOG * torch.tanh(log_gain / self.MAX_LOG)


class StateFilm(nn.Module):
    """A scale and a shift for each channel and diffusion state; starts as the identity."""

    def __init__(self, num_states: int, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_states, channels))
        self.shift = nn.Parameter(torch.zeros(num_states, channels))

    def forward(self, x_BChw: Tensor, state_B: Tensor | None) -> Tensor:
        if state_B is None:
            raise ValueError("a block with states needs to be told the state of each image")
        scale, shift = (p[state_B].to(x_BChw.dtype) for p in (self.scale, self.shift))
        return x_BChw * scale[:, :, None, None] + shift[:, :, None, None]


class PatchAutoencoder(nn.Module):
    """Pixels <-> z at 1/8 resolution, in units of 8-bit sample values.

    z is expressed in multiples of ``z_scale``, a fixed standard deviation for each channel, so
    that the blocks see values of order one whatever the frequency.
    """

    def __init__(self, *, num_luma: int, num_chroma: int, blocks: int, hidden: int) -> None:
        super().__init__()
        self.channels = num_luma + 2 * num_chroma
        self.analysis = nn.Conv2d(3, self.channels, 2 * PATCH, stride=PATCH, padding=PATCH // 2)
        self.synthesis = nn.ConvTranspose2d(
            self.channels, 3, 2 * PATCH, stride=PATCH, padding=PATCH // 2
        )
        self.blocks = nn.ModuleList(ResidualBlock(self.channels, hidden) for _ in range(blocks))
        self.z_scale: Tensor
        self.register_buffer("z_scale", torch.ones(self.channels))
        basis = F.pad(patch_basis(num_luma, num_chroma), [PATCH // 2] * 4)
        with torch.no_grad():
            for layer in (self.analysis, self.synthesis):
                layer.weight.copy_(basis)
                _bias(layer).zero_()

    def encode(self, x_B3HW: Tensor) -> Tensor:
        """Sample values 0..255 -> z, float ``[B, C, H/8, W/8]``; H and W are multiples of 8."""
        z = self.analysis(x_B3HW - 128.0) / self.z_scale[:, None, None]
        for block in self.blocks:
            z = block(z)
        return z

    def decode(self, z_BChw: Tensor, reduction: int = 1) -> Tensor:
        """z -> sample values, float ``[B, 3, H/r, W/r]``, not clamped.

        With a ``reduction`` r of 2, 4 or 8 each sample is the mean of r x r samples of the whole
        picture, which itself is not made: the mean of what the layer draws is drawn by its mean.
        """
        kernel, padding = self.synthesis.weight, PATCH // 2
        if reduction > 1:
            # To whole patches on every side, so that the blocks of a mean begin where a patch does.
            whole = F.pad(kernel, [PATCH // 2] * 4)
            kernel, padding = F.avg_pool2d(whole, reduction), PATCH // reduction
        scaled = z_BChw * self.z_scale[:, None, None]
        x = overlap_add(scaled, kernel, PATCH // reduction, padding)
        return x + (_bias(self.synthesis)[:, None, None] + 128.0)

    def residual(self, z_BChw: Tensor) -> Tensor:
        """What adding ``z_BChw`` to z adds to the decoded samples, ``[B, 3, H, W]``."""
        scaled = z_BChw * self.z_scale[:, None, None]
        return overlap_add(scaled, self.synthesis.weight, PATCH, PATCH // 2)

    def project(self, x_B3HW: Tensor) -> Tensor:
        """About the inverse of :meth:`residual`: differences of samples -> differences of z."""
        z = F.conv2d(x_B3HW, self.analysis.weight, stride=PATCH, padding=PATCH // 2)
        return z / self.z_scale[:, None, None]


def overlap_add(z_BChw: Tensor, kernel_CPKK: Tensor, stride: int, padding: int) -> Tensor:
    """``conv_transpose2d`` with a kernel of whole strides, to P planes; several times faster on a CPU.

    Each patch of the result is a small convolution over the cells of z whose kernels reach it.

    Args:
        z_BChw: what is drawn.
        kernel_CPKK: what each channel draws; K is a multiple of ``stride``.
        stride: samples from one cell to the next.
        padding: samples cut off on every side.

    Returns:
        ``[B, P, (h - 1) stride + K - 2 padding, (w - 1) stride + K - 2 padding]``.
    """
    channels, planes, size, _ = kernel_CPKK.shape
    reach = size // stride
    patches = kernel_CPKK.reshape(channels, planes, reach, stride, reach, stride)
    weight = patches.permute(1, 3, 5, 0, 2, 4).reshape(-1, channels, reach, reach).flip(2, 3)
    weight = weight.contiguous(memory_format=torch.channels_last)
    x = F.pixel_shuffle(F.conv2d(z_BChw, weight, padding=reach - 1), stride)
    return x[:, :, padding : x.shape[2] - padding, padding : x.shape[3] - padding]


def _bias(layer: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    if layer.bias is None:
        raise ValueError("the layer has no bias")
    return layer.bias
