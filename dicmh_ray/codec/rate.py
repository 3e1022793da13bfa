"""The rate the networks are trained against: a differentiable stand-in for the integer tables.

The archive's coder (:mod:`dicmh_ray.codec.symbols`) predicts each symbol from integer sums over
neighbours that are already known. Training uses the same idea with float weights: the symbols of
one state follow a logistic distribution whose scale is an affine function of the magnitudes, and
whose mean is a linear function of the values, of causal neighbours (left and above in the same
channel, coarser channels at the same place). Nothing of this reaches a bitstream.

Shape suffixes: B images, C channels, i j the 1/16 grid.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_MAGNITUDE = 15.0
"""Neighbour magnitudes are clipped here, as the integer contexts clip theirs."""

MIN_LIKELIHOOD = 1e-9

MIN_SCALE = 0.004
"""Floor of the logistic scale. The additive noise makes a symbol that is surely zero cost about
2.4 times this many bits, so it must be small where most symbols are."""


class ContextRate(nn.Module):
    """Estimated bits of the rounded latent, for one state per image."""

    def __init__(self, channels: int, num_states: int) -> None:
        super().__init__()
        self.channels = channels
        causal = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        self.causal: Tensor
        self.register_buffer("causal", causal)
        self.lower: Tensor
        self.register_buffer("lower", torch.tril(torch.ones(channels, channels), -1))
        self.mean_taps = nn.Parameter(torch.zeros(num_states, channels, 3, 3))
        self.spread = nn.Parameter(0.15 * torch.ones(num_states, channels, 3, 3))
        self.across = nn.Parameter(torch.full((num_states, channels, channels), 0.3 / channels))
        self.beside = nn.Parameter(torch.full((num_states, channels, channels), 0.2 / channels))
        self.floor = nn.Parameter(torch.full((num_states, channels), -3.0))

    def forward(self, y_BCij: Tensor, step_B: Tensor, state_B: Tensor) -> tuple[Tensor, Tensor]:
        """Round y and price it.

        Args:
            y_BCij: the latent.
            step_B: float ``[B]``: quantiser step of the state of each image.
            state_B: int64 ``[B]``.

        Returns:
            The rounded latent times its step, with a straight-through gradient, ``[B, C, i, j]``;
            and the estimated bits of each image, ``[B]``.
        """
        scaled = y_BCij / step_B[:, None, None, None]
        rounded = scaled + (scaled.round() - scaled).detach()
        noisy = scaled + torch.rand_like(scaled) - 0.5 if self.training else rounded
        bits = torch.zeros_like(step_B)
        for state in sorted(set(state_B.tolist())):
            rows = (state_B == state).nonzero()[:, 0]
            mean, scale = self._predict(rounded[rows], state)
            bits = bits.index_add(0, rows, self._bits(noisy[rows], mean, scale).sum((1, 2, 3)))
        return rounded * step_B[:, None, None, None], bits

    def _predict(self, symbols: Tensor, state: int) -> tuple[Tensor, Tensor]:
        magnitude = symbols.abs().clamp_max(MAX_MAGNITUDE)
        mean = F.conv2d(
            symbols,
            (self.mean_taps[state] * self.causal)[:, None],
            padding=1,
            groups=self.channels,
        )
        around = F.conv2d(
            magnitude,
            (self.spread[state].abs() * self.causal)[:, None],
            padding=1,
            groups=self.channels,
        )
        across = (self.across[state] * self.lower)[:, :, None, None]
        beside = self.beside[state][:, :, None, None]
        scale = F.conv2d(magnitude, across) + F.conv2d(around, beside) + around
        return mean, F.softplus(scale + self.floor[state][:, None, None]) + MIN_SCALE

    @staticmethod
    def _bits(values: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        distance = (values - mean).abs()
        upper = torch.sigmoid((0.5 - distance) / scale)
        lower = torch.sigmoid((-0.5 - distance) / scale)
        return -(upper - lower).clamp_min(MIN_LIKELIHOOD).log() / math.log(2)
