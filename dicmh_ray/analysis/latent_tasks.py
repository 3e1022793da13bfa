"""Tasks that read latents: entropy decoding is all the decoding they need.

A latent is what the first states of a stream say of a picture, cell by cell: what lies where, how
bright, how rough. Two pictures that look alike have latents that are alike.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dicmh_ray.analysis.task import Batch, Task

GRID = 4
"""Regions a side that a latent is averaged in."""

DIMENSIONS = 256
"""Numbers of an embedding."""

Latent = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]


class EmbedLatent(Task):
    """A vector of unit length for each picture, from the first states of its stream.

    The latent is averaged in 4 x 4 regions; of each channel the average over the picture is taken
    off, so that layout counts and not brightness; the rest is projected to 256 numbers along random
    directions that are the same everywhere. A picture without any layout has the vector zero.
    """

    name = "embed-latent"
    version = "1"
    reads = "latent"
    schema = pa.schema([("embedding", pa.list_(pa.float32()))])

    def __init__(self, *, states: int | None = 1) -> None:
        """
        Args:
            states: of the stream that are read; None is all.
        """
        self.states = states

    def parameters(self) -> Mapping[str, Any]:
        """Regions and length."""
        return {"grid": GRID, "dimensions": DIMENSIONS}

    def __call__(self, batch: Batch) -> pa.Table:
        """See :class:`Task`."""
        return batch.table(embedding=[embedding(latent).tolist() for latent in batch.values])


def embedding(latent: Latent) -> Floats:
    """Of a latent float16 ``[C, h, w]``: float32 ``[256]`` of length 1, or zeros."""
    layout = pooled(latent, GRID)
    layout -= layout.mean(axis=(1, 2), keepdims=True)
    flat = layout.ravel()
    vector = directions(len(flat)) @ flat
    norm = float(np.linalg.norm(vector))
    return np.asarray(vector / norm if norm > 1e-6 else np.zeros_like(vector), np.float32)


def pooled(latent: Latent, grid: int) -> Floats:
    """Means in ``grid x grid`` regions of a latent ``[C, h, w]``: float32 ``[C, grid, grid]``.

    A side with fewer cells than regions repeats them.
    """
    values = latent.astype(np.float32)
    for axis in (1, 2):
        length = values.shape[axis]
        starts = np.arange(grid) * length // grid
        stops = np.maximum(starts + 1, (np.arange(grid) + 1) * length // grid)
        sums = np.insert(np.cumsum(values, axis=axis), 0, 0, axis=axis)
        counts = (stops - starts).reshape([-1 if a == axis else 1 for a in range(3)])
        values = (np.take(sums, stops, axis=axis) - np.take(sums, starts, axis=axis)) / counts
    return values


@functools.lru_cache(maxsize=4)
def directions(length: int) -> Floats:
    """Random signs, float32 ``[256, length]``: the same on every machine and with every numpy."""
    bits = hashlib.shake_128(f"dicmh embedding {length}".encode()).digest(DIMENSIONS * length // 8)
    signs = np.unpackbits(np.frombuffer(bits, np.uint8)).astype(np.float32)
    return signs.reshape(DIMENSIONS, length) * 2 - 1
