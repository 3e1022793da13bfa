"""What training minimises beside squared error: structure (MS-SSIM) and features of a teacher.

Shape suffixes: B images, C channels, H W pixels.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicmh_ray.errors import WeightsError

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales (Wang, Simoncelli and Bovik 2003)."""

WINDOW_TAPS = 11
WINDOW_SIGMA = 1.5

MIN_MS_SSIM_CROP = 176
"""Pixels per side below which the coarsest scale has no room for a window."""

LUMA = (0.299, 0.587, 0.114)

COLOUR_ROWS = (LUMA, LUMA, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
"""What structure is compared on, drawn for each image: luma, twice as often as each of R, G and B."""


class StructuralDistance:
    """``1 - MS-SSIM`` of square crops, differentiable, on one random colour plane of each image.

    The Gaussian windows are products with band matrices: several times faster on a CPU than the
    depthwise convolutions of the usual implementations, and equal to them.
    """

    def __init__(self, crop: int, device: torch.device) -> None:
        if crop < MIN_MS_SSIM_CROP:
            raise ValueError(f"crops of {crop} pixels, MS-SSIM needs {MIN_MS_SSIM_CROP}")
        sizes = [crop // 2**scale for scale in range(len(MS_SSIM_WEIGHTS))]
        self._bands = [_gaussian_band(size).to(device) for size in sizes]
        self._colours = torch.tensor(COLOUR_ROWS, device=device)

    def __call__(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        """Distance of each pair of crops of 8-bit sample values, ``[B]``, 0 where they are equal."""
        rows = torch.randint(len(self._colours), (len(x_B3HW),), device=x_B3HW.device)
        weights = self._colours[rows][:, :, None, None]
        return self.of_planes((x_B3HW * weights).sum(1), (y_B3HW * weights).sum(1))

    def of_planes(self, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
        """As calling, for planes that the caller chose."""
        product = torch.ones(len(x_BHW), device=x_BHW.device)
        last = len(MS_SSIM_WEIGHTS) - 1
        for scale, (exponent, band) in enumerate(zip(MS_SSIM_WEIGHTS, self._bands, strict=True)):
            luminance, contrast = _ssim_terms(x_BHW, y_BHW, band)
            term = contrast * luminance if scale == last else contrast
            product = product * term.mean((1, 2)).clamp_min(1e-4) ** exponent
            if scale < last:
                x_BHW, y_BHW = (F.avg_pool2d(p[:, None], 2)[:, 0] for p in (x_BHW, y_BHW))
        return 1 - product


def _ssim_terms(x_BHW: Tensor, y_BHW: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
    stacked = torch.cat([x_BHW, y_BHW, x_BHW * x_BHW, y_BHW * y_BHW, x_BHW * y_BHW])
    mean_x, mean_y, xx, yy, xy = (band @ stacked @ band.T).chunk(5)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variances = xx - mean_x**2 + yy - mean_y**2
    return luminance, (2 * (xy - mean_x * mean_y) + c2) / (variances + c2)


def _gaussian_band(size: int) -> Tensor:
    """``[size - 10, size]``: each row an 11-tap Gaussian window, float32."""
    taps = torch.arange(WINDOW_TAPS, dtype=torch.float64) - WINDOW_TAPS // 2
    window = torch.exp(-(taps**2) / (2 * WINDOW_SIGMA**2))
    window /= window.sum()
    band = torch.zeros(size - WINDOW_TAPS + 1, size, dtype=torch.float64)
    for row in range(len(band)):
        band[row, row : row + WINDOW_TAPS] = window
    return band.float()


class FeatureTeacher(nn.Module):
    """A frozen convolutional classifier whose features must survive coding.

    The semantic-consistency (SC) loss of Diff-ICMH (arXiv:2511.22549), with a classifier in the
    place of the diffusion prior.

    Reads a safetensors file whose header describes the layers: ``layers`` is a JSON list of
    ``{"i", "op": "conv" | "dw" | "add", "src", "k", "s", "relu6"}``; tensors ``{i}.w``
    (uint8, O I H W), ``{i}.scale``, ``{i}.zp``, ``{i}.b``.
    """

    TAPS = (0, 6, 13, 24, 39, 57)
    """Layers whose activations can be compared: strides 2, 4, 8, 16, 16 and 32 of a MobileNetV2."""

    SEMANTIC_TAPS = slice(1, None)
    """Those of them that the SC loss compares."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        content = path.read_bytes()
        self.identity = {"name": path.name, "sha256": hashlib.sha256(content).hexdigest()}
        try:
            with safetensors.safe_open(path, "pt") as file:
                layers = json.loads((file.metadata() or {})["layers"])
            self._layers: list[dict[str, Any]] = layers[: 1 + max(self.TAPS)]
            tensors = safetensors.torch.load(content)
            for layer in self._layers:
                if layer["op"] != "add":
                    i = layer["i"]
                    weight = (tensors[f"{i}.w"].float() - tensors[f"{i}.zp"]) * tensors[
                        f"{i}.scale"
                    ]
                    self.register_buffer(f"weight_{i}", weight)
                    self.register_buffer(f"bias_{i}", tensors[f"{i}.b"])
        except (KeyError, ValueError, safetensors.SafetensorError) as exc:
            raise WeightsError(str(path), f"no teacher: {exc}") from exc
        if len(self._layers) <= max(self.TAPS):
            raise WeightsError(
                str(path), f"no teacher: {len(layers)} layers, wanted {1 + max(self.TAPS)} or more"
            )

    def activations(self, x_B3HW: Tensor) -> list[Tensor]:
        """Sample values 0..255 -> activations at :attr:`TAPS`, ``[B, C, H / stride, W / stride]``."""
        x = ((x_B3HW - 128) / 128).contiguous(memory_format=torch.channels_last)
        outputs: dict[int, Tensor] = {-1: x}
        for layer in self._layers:
            source = layer["src"]
            if layer["op"] == "add":
                outputs[layer["i"]] = outputs[source[0]] + outputs[source[1]]
            else:
                outputs[layer["i"]] = self._convolve(layer, outputs[source])
        return [outputs[tap] for tap in self.TAPS]

    def distance(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        """Sum over :attr:`SEMANTIC_TAPS` of the mean of ``1 - cosine`` of channel vectors, ``[B]``."""
        with torch.no_grad():
            wanted = self.activations(x_B3HW)[self.SEMANTIC_TAPS]
        found = self.activations(y_B3HW)[self.SEMANTIC_TAPS]
        terms = [
            1 - F.cosine_similarity(a, b, dim=1, eps=1e-4).mean((1, 2))
            for a, b in zip(wanted, found, strict=True)
        ]
        return torch.stack(terms).sum(0)

    def _convolve(self, layer: dict[str, Any], x: Tensor) -> Tensor:
        weight = getattr(self, f"weight_{layer['i']}")
        pad = 0
        if layer["k"] == 3 and layer["s"] == 2:
            x = F.pad(x, (0, 1, 0, 1))
        elif layer["k"] == 3:
            pad = 1
        groups = x.shape[1] if layer["op"] == "dw" else 1
        bias = getattr(self, f"bias_{layer['i']}")
        out = F.conv2d(x, weight, bias, stride=layer["s"], padding=pad, groups=groups)
        return out.clamp(0, 6) if layer["relu6"] else out
