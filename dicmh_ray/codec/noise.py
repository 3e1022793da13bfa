"""Standard normal noise that is the same on every machine and belongs to a place.

Device generators differ between processors and between vector widths of one processor, so noise
here is integers, which Philox makes alike everywhere, through a table of normal quantiles that
travels in the checkpoint. It is addressed by stream, evaluation and cell: a window of a picture gets
the noise of the whole, and a picture the same alone as in a batch.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LANE_BITS = 16
"""Bits of an integer of noise: a table has at most ``2**LANE_BITS`` entries."""


def noise_key(first_state: bytes) -> int:
    """Seed of a stream's noise, from the bytes of its first state: the same for every prefix."""
    return int.from_bytes(hashlib.sha256(first_state).digest()[:8], "little")


def normal_table(levels: int) -> Tensor:
    """Normal quantiles of ``levels`` equally likely bins, float32, ascending.

    Made once, when a checkpoint is; then it is read, for the last bit of a quantile depends on the
    mathematics library.
    """
    middles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    return (math.sqrt(2) * torch.erfinv(2 * middles - 1)).float()


def window_noise(
    key: int,
    evaluation: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    channels: int,
    normals: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Standard normal noise of a window of cells, ``[channels, rows, columns]``.

    Each row of cells has a Philox counter of its own, so any window is found without the rest.

    Args:
        key: see :func:`noise_key`.
        evaluation: number of the evaluation of the network that it is for.
        rows: first row and the one after the last; ``columns`` likewise.
        channels: values of a cell.
        normals: a :func:`normal_table`; its length is a power of two up to 65,536.
    """
    levels = len(normals)
    if levels & (levels - 1) or not 0 < levels <= 1 << LANE_BITS:
        raise ValueError(f"a normal table has {levels} entries, wanted a power of 2 up to 65536")
    lanes_per_word = 64 // LANE_BITS
    words = -(-columns[1] * channels // lanes_per_word)
    out = np.empty((rows[1] - rows[0], columns[1] - columns[0], channels), np.float32)
    for i, row in enumerate(range(*rows)):
        generator = np.random.Philox(key=[key, evaluation], counter=[0, 0, row, 0])
        lanes = generator.random_raw(words).astype("<u8").view("<u2")[: columns[1] * channels]
        cells = lanes.reshape(columns[1], channels)[columns[0] :] & np.uint16(levels - 1)
        out[i] = normals[cells]
    return np.moveaxis(out, 2, 0)
