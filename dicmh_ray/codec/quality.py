"""Distortion of a decoded picture against its source."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from pytorch_msssim import ms_ssim
from torch.nn import functional as F

from dicmh_ray.codec import Quality

TILE = 64
"""Pixels per side of the tiles whose worst is reported."""

MIN_MS_SSIM_SIDE = 176
"""Five scales of an 11-tap window need more than 160 pixels."""

MAX_PSNR = 100.0

MS_SSIM_WINDOW = 2048
"""Larger pictures are compared in windows of this many pixels per side and averaged by area."""


def measure(
    originals: Sequence[npt.NDArray[np.uint8]], decoded: Sequence[npt.NDArray[np.uint8]]
) -> list[Quality]:
    """PSNR, worst-tile PSNR (RGB) and MS-SSIM (BT.601 luma) of pairs of uint8 ``[H, W, 3]``.

    Raises:
        ValueError: the pictures of a pair differ in shape.
    """
    return [_measure_one(a, b) for a, b in zip(originals, decoded, strict=True)]


def psnr(mse: float) -> float:
    """dB for 8-bit samples, at most :data:`MAX_PSNR`."""
    return MAX_PSNR if mse <= 0 else min(MAX_PSNR, float(10 * np.log10(255.0**2 / mse)))


def _measure_one(original: npt.NDArray[np.uint8], decoded: npt.NDArray[np.uint8]) -> Quality:
    if original.shape != decoded.shape:
        raise ValueError(f"shapes {original.shape} and {decoded.shape} differ")
    height, width = original.shape[:2]
    totals, worst = 0, 0.0
    for top in range(0, height, TILE):
        band = original[top : top + TILE].astype(np.int32) - decoded[top : top + TILE]
        squares = (band * band).sum((0, 2), dtype=np.int64)
        totals += int(squares.sum())
        tiles = np.add.reduceat(squares, np.arange(0, width, TILE))
        widths = np.diff(np.append(np.arange(0, width, TILE), width))
        worst = max(worst, float((tiles / (3 * band.shape[0] * widths)).max()))
    mean = totals / (3 * height * width)
    return Quality(psnr(mean), psnr(worst), _ms_ssim(original, decoded))


def _ms_ssim(original: npt.NDArray[np.uint8], decoded: npt.NDArray[np.uint8]) -> float | None:
    height, width = original.shape[:2]
    if min(height, width) < MIN_MS_SSIM_SIDE:
        return None
    total, area = 0.0, 0
    for top, bottom in _windows(height):
        for left, right in _windows(width):
            a, b = (x[top:bottom, left:right] for x in (original, decoded))
            pixels = (bottom - top) * (right - left)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                value = ms_ssim(_luma(a), _luma(b), data_range=255)
            total += float(value) * pixels
            area += pixels
    return min(1.0, max(0.0, total / area))


def _windows(length: int) -> list[tuple[int, int]]:
    """Split a side into windows, none shorter than MS-SSIM needs."""
    count = max(1, round(length / MS_SSIM_WINDOW))
    edges = [length * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _luma(picture: npt.NDArray[np.uint8]) -> torch.Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114])[None, :, None, None]
    rgb = torch.from_numpy(np.array(picture, order="C")).permute(2, 0, 1)[None].float()
    return F.conv2d(rgb, weights)
