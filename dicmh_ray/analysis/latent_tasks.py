"""Tasks that read latents: entropy decoding is all the decoding they need.

A latent is what the first states of a stream say of a picture, cell by cell. Most of its channels say how
rough a cell is and how it is textured, which a shift by a few pixels turns into other numbers; some
say how bright it is and of which colour, and these are alike in pictures that look alike.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dicmh_ray.analysis.task import Batch, Task
from dicmh_ray.codec import ImageCodec

GRID = 8
"""Regions a side that a latent is averaged in."""

DIMENSIONS = 3 * GRID * GRID
"""Numbers of an embedding."""

FLAT_COLOURS = np.array(
    [[0, 0, 0], [64] * 3, [128] * 3, [192] * 3, [255] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255]],
    np.uint8,
)
"""Pictures of one colour, whose latents tell how a codec writes colours."""

FLAT_SIDE = 256

Latent = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]


class EmbedLatent(Task):
    """A vector of unit length for each picture, from the first states of its stream.

    The latent is averaged in 8 x 8 regions and read as colours, by what the codec makes of pictures
    of one colour; the average over the picture is taken off, so that layout counts and not
    brightness. A picture without any layout has the vector zero.
    """

    name = "embed-latent"
    version = "2"
    reads = "latent"
    schema = pa.schema([("embedding", pa.list_(pa.float32()))])

    def __init__(self, *, states: int | None = 2) -> None:
        """
        Args:
            states: of the stream that are read; None is all.
        """
        self.states = states
        self._colours: Floats | None = None

    def parameters(self) -> Mapping[str, Any]:
        """Regions."""
        return {"grid": GRID}

    def meet(self, load_codec: Callable[[], ImageCodec]) -> None:
        """Find out how the codec writes colours."""
        self._colours = colours_of(load_codec())

    def __call__(self, batch: Batch) -> pa.Table:
        """See :class:`Task`."""
        if self._colours is None:
            raise RuntimeError("called before meet")
        return batch.table(
            embedding=[embedding(latent, self._colours).tolist() for latent in batch.values]
        )


def colours_of(codec: ImageCodec) -> Floats:
    """What reads the mean colour off a cell: float32 ``[3, C]``, to be multiplied with the latent.

    Least squares over pictures of one colour, of which a cell's latent is taken to be a linear
    function; what other channels say drops out.
    """
    count = len(FLAT_COLOURS)
    pictures = [np.full((FLAT_SIDE, FLAT_SIDE, 3), colour, np.uint8) for colour in FLAT_COLOURS]
    streams = codec.encode(pictures, tags=[()] * count, exif_orientations=[1] * count)
    # The middle: the cells at the edges know that there is nothing beyond.
    means = np.stack([_middle(latent).mean(axis=(1, 2)) for latent in codec.decode_latent(streams)])
    known = np.column_stack([FLAT_COLOURS / 255.0, np.ones(count)])
    written = np.linalg.lstsq(known, means, rcond=None)[0][:3]
    return np.asarray(np.linalg.pinv(written.T, rcond=1e-3), np.float32)


def embedding(latent: Latent, colours: Floats) -> Floats:
    """Of a latent float16 ``[C, h, w]``: float32 ``[192]`` of length 1, or zeros.

    Args:
        latent: of one picture.
        colours: of its codec, from :func:`colours_of`.
    """
    layout = np.einsum("kc,chw->khw", colours, pooled(latent, GRID))
    layout -= layout.mean(axis=(1, 2), keepdims=True)
    vector = layout.ravel()
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


def _middle(latent: Latent) -> Floats:
    height, width = latent.shape[1:]
    middle = latent[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
    return middle.astype(np.float32)
