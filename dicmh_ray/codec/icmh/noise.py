"""The noise of a batch of streams: each stream's own, wherever and with whatever it is decoded.

The sampler asks for ``noise(step, rows, columns)``: step 0 is the state it begins with, step k > 0
what the k-th update adds. :mod:`dicmh_ray.codec.noise` says how a number is found.

Shape suffixes: B images, C latent channels, h w the latent grid.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dicmh_ray.codec.noise import LANE_BITS, noise_key, window_noise
from dicmh_ray.errors import WeightsError

NORMAL_LEVELS = 1 << LANE_BITS
"""Entries of the normal table of new checkpoints: 256 KiB of float32."""


class NoiseSource(Protocol):
    """Standard normals ``[B, C, rows, columns]``, float32; spans are first and one after last."""

    def __call__(self, step: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor: ...


class StreamNoise:
    """The noise of some streams of one checkpoint. Implements :class:`NoiseSource`."""

    def __init__(
        self,
        first_states: Sequence[bytes],
        channels: int,
        normals: npt.NDArray[np.float32],
        device: torch.device | str = "cpu",
    ) -> None:
        """Args:
        first_states: payload of the first state of each stream, in batch order.
        channels: of the latent.
        normals: the checkpoint's table, from :func:`check_normals`.
        device: where the sampler runs. The numbers are made on the CPU on every machine.
        """
        self._keys = [noise_key(payload) for payload in first_states]
        self._channels = channels
        self._normals = normals
        self._device = device

    def __call__(self, step: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        drawn = [
            window_noise(key, step, rows, columns, self._channels, self._normals)
            for key in self._keys
        ]
        return torch.from_numpy(np.stack(drawn)).to(self._device)


def check_normals(normals: npt.NDArray[np.float32], checkpoint: str) -> npt.NDArray[np.float32]:
    """A checkpoint's normal table, when it is one.

    Raises:
        WeightsError: another type or shape, no power of two up to 65,536 entries, not finite, not
            ascending, or no standard normal distribution.
    """
    levels = normals.size
    if normals.dtype != np.float32 or normals.ndim != 1:
        raise WeightsError(checkpoint, f"normals are {normals.dtype} {normals.shape}")
    if levels < 2 or levels > NORMAL_LEVELS or levels & (levels - 1):
        raise WeightsError(checkpoint, f"{levels} normals, wanted a power of 2 up to 65536")
    if not np.isfinite(normals).all() or not (np.diff(normals) > 0).all():
        raise WeightsError(checkpoint, "normals are not finite and ascending")
    mean, square = normals.mean(dtype=np.float64), np.square(normals, dtype=np.float64).mean()
    # A table of few levels lacks the tails: 16 levels have a mean square of 0.93.
    if abs(mean) > 1e-3 or abs(square - 1) > 0.5 / np.sqrt(levels):
        raise WeightsError(checkpoint, f"normals have mean {mean:.3g} and mean square {square:.3g}")
    return normals
