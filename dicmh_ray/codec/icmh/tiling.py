"""Large pictures in overlapping tiles, so that the memory of the networks is bounded by a tile's.

    |<---- tile ---->|
    ████████████▓▓▒▒░░              weight of each tile, row by row and column by column:
                ░░▒▒▓▓████████      they add up to 1 everywhere

A picture that fits in one tile goes through in one call, so tiling changes nothing of it. In larger
ones a network sees no farther than its tile: attention and the statistics of group normalisation are
a tile's, which the overlap blends over. Of sampling, only the network's predictions are tiled; state
and noise are the whole picture's, and every step joins the tiles again.

Sizes are in cells of the latent (8x8 pixels). Tiles are visited in reading order and added in
float32: the result is the same every time.

Shape suffixes: B images, C latent channels, h w the latent grid, H W pixels, T text tokens, D text
width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dicmh_ray.codec.icmh.sampling import NoisePredictor
from dicmh_ray.codec.icmh.vae import Vae

CELL = 8
"""Pixels of a side of a latent cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How one network's work is cut."""

    tile: int
    """Longest side of a tile, cells. Memory grows with its square."""

    overlap: int
    """Cells that neighbours share. More hides seams better and costs more."""

    align: int = 1
    """Tiles begin at multiples of this: the coarsest grid inside the network stays in place."""

    def __post_init__(self) -> None:
        if self.align < 1 or not 0 <= self.overlap <= self.tile // 2:
            raise ValueError(
                f"overlap {self.overlap} of a tile of {self.tile}: wanted 0..half of it"
            )
        if self.tile % self.align or self.overlap % self.align:
            raise ValueError(
                f"tile {self.tile} and overlap {self.overlap} are no multiples of {self.align}"
            )
        if self.tile == self.overlap:
            raise ValueError("a tile has at least one cell")


VAE_TILING = Tiling(tile=96, overlap=16)
"""768 pixels."""

RESTORER_TILING = Tiling(tile=96, overlap=32, align=8)
"""768 pixels; 8 cells are one of the coarsest level of four."""


class Span(NamedTuple):
    """One tile along one axis: cells ``start`` to ``stop``, and how much each counts."""

    start: int
    stop: int
    weight: npt.NDArray[np.float32]


def axis_spans(length: int, tiling: Tiling) -> list[Span]:
    """Tiles along an axis of ``length`` cells: none longer than ``tile``, their weights adding to 1.

    The last is moved up to the one before rather than cut short, as far as ``align`` allows.
    """
    if length <= tiling.tile:
        return [Span(0, length, np.ones(length, np.float32))]
    stride = tiling.tile - tiling.overlap
    last = -(-(length - tiling.tile) // tiling.align) * tiling.align
    starts = [*range(0, last, stride), last]
    weights = np.zeros((len(starts), length))
    for i, start in enumerate(starts):
        stop = min(start + tiling.tile, length)
        cells = np.arange(start, stop) + 0.5
        weight = np.ones(stop - start)
        if i > 0:
            weight *= _rise((cells - start) / max(1, starts[i - 1] + tiling.tile - start))
        if i < len(starts) - 1:
            weight *= _rise((stop - cells) / max(1, stop - starts[i + 1]))
        weights[i, start:stop] = weight
    weights /= weights.sum(0)
    return [
        Span(start, min(start + tiling.tile, length), row[start : start + tiling.tile])
        for start, row in zip(starts, weights.astype(np.float32), strict=True)
    ]


def _rise(place: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """0 at the edge of a tile, 1 at the far side of the overlap; opposite ones add up to 1."""
    return np.sin(np.pi / 2 * np.clip(place, 0, 1)) ** 2


def tiled(
    function: Callable[[Tensor, tuple[int, int], tuple[int, int]], Tensor],
    x: Tensor,
    tiling: Tiling,
    *,
    cell: int = 1,
) -> Tensor:
    """Apply a network tile by tile and blend the results.

    Args:
        function: a tile of ``x``, its rows and its columns (cells, first and one after last) -> its
            result, with the same cells but any number of channels and any size of a cell. It may
            move the tile to another device: the whole stays on that of ``x``.
        x: ``[B, channels, rows * cell, columns * cell]``.
        tiling: in cells.
        cell: pixels of a side of a cell of ``x``.

    Returns:
        In the type of the results where the picture fits in one tile, else float32.
    """
    rows, columns = (side // cell for side in x.shape[2:])
    downs, acrosses = axis_spans(rows, tiling), axis_spans(columns, tiling)
    if len(downs) == len(acrosses) == 1:
        return function(x, (0, rows), (0, columns)).to(x.device)
    whole: Tensor | None = None
    for down in downs:
        for across in acrosses:
            tile = x[
                :,
                :,
                down.start * cell : down.stop * cell,
                across.start * cell : across.stop * cell,
            ]
            made = function(tile, (down.start, down.stop), (across.start, across.stop))
            made = made.to(x.device, torch.float32)
            size = made.shape[2] // (down.stop - down.start)
            if whole is None:
                whole = made.new_zeros((*made.shape[:2], rows * size, columns * size))
            weight = _weights(down, size, made)[:, None] * _weights(across, size, made)
            whole[
                :,
                :,
                down.start * size : down.stop * size,
                across.start * size : across.stop * size,
            ] += made * weight
    if whole is None:
        raise ValueError(f"there are no cells in {tuple(x.shape)}")
    return whole


def _weights(span: Span, size: int, like: Tensor) -> Tensor:
    """Weights of the pixels of a span: those of its cells."""
    return torch.from_numpy(span.weight).to(like.device).repeat_interleave(size)


def encode_tiled(vae: Vae, x_B3HW: Tensor, tiling: Tiling = VAE_TILING) -> Tensor:
    """``vae.encode`` in bounded memory, ``[B, C, H/8, W/8]``.

    Args:
        vae: on any device; tiles go there, the whole stays where ``x`` is.
        x_B3HW: pixels in -1..1; sides are multiples of 8.
        tiling: in cells of the latent.
    """
    device = _device(vae)
    return tiled(lambda x, _, __: vae.encode(x.to(device)), x_B3HW, tiling, cell=CELL)


def decode_tiled(vae: Vae, z_BChw: Tensor, tiling: Tiling = VAE_TILING) -> Tensor:
    """``vae.decode`` in bounded memory, ``[B, 3, 8h, 8w]``. Else as :func:`encode_tiled`."""
    device = _device(vae)
    return tiled(lambda z, _, __: vae.decode(z.to(device)), z_BChw, tiling)


def _device(vae: Vae) -> torch.device:
    return next(vae.parameters()).device


class TiledUNet:
    """A :class:`.NoisePredictor` that sees one tile at a time: what a sampler is given."""

    def __init__(self, model: NoisePredictor, tiling: Tiling = RESTORER_TILING) -> None:
        self._model = model
        self._tiling = tiling

    def __call__(
        self, x_BChw: Tensor, t_B: Tensor, context_BTD: Tensor, hint_BChw: Tensor | None
    ) -> Tensor:
        def predict(x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
            hint = None
            if hint_BChw is not None:
                hint = hint_BChw[:, :, slice(*rows), slice(*columns)]
            return self._model(x, t_B, context_BTD, hint)

        return tiled(predict, x_BChw, self._tiling)
