"""z <-> y: the latent of the layered coder and the nested quantisers of its states.

``y`` lives on the 1/16 grid. State k rounds it with step ``step_k = step_0 / 3**k``; because the
ratio is odd, every cell of state k is the middle or a side third of a cell of state k-1, so the
symbols of all states follow from those of the finest by integer arithmetic alone:
``q[k-1] = floor((q[k] + 1) / 3)``.

The rounding error of state k has the variance ``step_k**2 / 12`` of a diffusion state
(DESIGN 3, spec F3): the rate is chosen by choosing the diffusion state.

Shape suffixes: B images, C channels, h w the 1/8 grid, i j the 1/16 grid.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicmh_ray.codec.tables import RATIO
from dicmh_ray.codec.transform import ActivityGain, BottleneckBlock, ResidualBlock


def merge_matrix(num_luma: int, num_chroma: int, num_merged: int) -> Tensor:
    """The orthonormal matrix that y starts with: Haar over 2x2 cells of the lowest frequencies.

    Merging four cells pays where neighbours agree, that is for the lowest ``num_merged``
    frequencies of each plane; higher frequencies stay where they are.

    Returns:
        Float32 ``[4 C, 4 C]`` for channels in ``pixel_unshuffle`` order (channel, then cell).
    """
    haar = 0.5 * torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    first = (0, num_luma, num_luma + num_chroma)
    merged = {start + i for start in first for i in range(num_merged)}
    channels = num_luma + 2 * num_chroma
    matrix = torch.zeros(channels, 4, channels, 4)
    for c in range(channels):
        matrix[c, :, c] = haar if c in merged else torch.eye(4)
    return matrix.reshape(4 * channels, 4 * channels)


class LatentTransform(nn.Module):
    """z <-> y, and the decoder's first estimate of z from a dequantised y."""

    def __init__(
        self,
        *,
        num_luma: int,
        num_chroma: int,
        num_merged: int,
        blocks: int,
        restore_blocks: int,
        hidden: int,
        gain_hidden: int,
        num_states: int,
    ) -> None:
        super().__init__()
        self.channels = 4 * (num_luma + 2 * num_chroma)
        self.split = nn.Conv2d(self.channels, self.channels, 1)
        self.merge = nn.Conv2d(self.channels, self.channels, 1)
        self.analysis_blocks = nn.ModuleList(
            BottleneckBlock(self.channels, hidden) for _ in range(blocks)
        )
        self.synthesis_blocks = nn.ModuleList(
            BottleneckBlock(self.channels, hidden, num_states=num_states)
            for _ in range(restore_blocks)
        )
        self.divide = ActivityGain(self.channels, gain_hidden) if gain_hidden else None
        self.multiply = (
            ActivityGain(self.channels, gain_hidden, num_states=num_states) if gain_hidden else None
        )
        self.y_scale: Tensor
        self.register_buffer("y_scale", torch.ones(self.channels))
        self.log_gain = nn.Parameter(torch.zeros(self.channels))
        matrix = merge_matrix(num_luma, num_chroma, num_merged)
        with torch.no_grad():
            self.merge.weight.copy_(matrix[:, :, None, None])
            self.split.weight.copy_(matrix.T[:, :, None, None])
            for layer in (self.merge, self.split):
                if layer.bias is not None:
                    layer.bias.zero_()

    def set_basis(self, z_scale: Tensor, order: Tensor, y_scale: Tensor) -> None:
        """Fix units and channel order before training.

        The two 1x1 matrices absorb the units of z (``z_scale``, ``[C]``) and the order of y
        (``order``, int64 ``[4 C]``: largest variance first), so that y starts as the orthonormal
        coefficients in ``y_scale`` units, ``[4 C]``.
        """
        units = z_scale.repeat_interleave(4)
        with torch.no_grad():
            merge = self.merge.weight[:, :, 0, 0][order]
            split = merge.T
            self.merge.weight.copy_((merge * units[None, :] / y_scale[:, None])[..., None, None])
            self.split.weight.copy_((split * y_scale[None, :] / units[:, None])[..., None, None])
            self.y_scale.copy_(y_scale)

    def analyse(self, z_BChw: Tensor) -> Tensor:
        """z -> y in units of the sample values times the learned gain, ``[B, 4 C, i, j]``."""
        y = self.merge(F.pixel_unshuffle(z_BChw, 2))
        for block in self.analysis_blocks:
            y = block(y)
        if self.divide is not None:
            y = y * torch.exp(-self.divide(y))
        return y * self.unit()[:, None, None]

    def unit(self) -> Tensor:
        """What y is multiplied by before rounding, ``[4 C]``."""
        unit: Tensor = self.y_scale * self.log_gain.exp()
        return unit

    def synthesise(self, y_BCij: Tensor, state_B: Tensor) -> Tensor:
        """Dequantised y of known states (int64 ``[B]``) -> first estimate of z, ``[B, C, h, w]``."""
        y = y_BCij / self.unit()[:, None, None]
        if self.multiply is not None:
            y = y * torch.exp(self.multiply(y, state_B))
        for block in self.synthesis_blocks:
            y = block(y, state_B)
        return F.pixel_shuffle(self.split(y), 2)


class OneShotRestorer(nn.Module):
    """E[z | state]: one pass, no generation. Told the diffusion state through scales and shifts."""

    def __init__(self, *, channels: int, blocks: int, hidden: int, num_states: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(channels, hidden, num_states=num_states) for _ in range(blocks)
        )

    def forward(self, z_BChw: Tensor, state_B: Tensor) -> Tensor:
        for block in self.blocks:
            z_BChw = block(z_BChw, state_B)
        return z_BChw


def parent_symbols(symbols: Tensor) -> Tensor:
    """Symbols of state k -> symbols of state k-1, exactly (integers in, integers out)."""
    return torch.div(symbols + 1, RATIO, rounding_mode="floor")
