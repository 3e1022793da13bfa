"""Convolutional networks on integers: the same result on every machine, proved.

Values between layers are 16-bit integers ``v`` that mean ``v / 2**f``, with an ``f`` for each layer's
output. A layer correlates them with integer weights, adds an integer bias, and shifts the sum right,
rounding half up, to the fraction of its output; then it saturates, and looks GELU up in a table. No
sum can reach 2**53 whatever the input: that is proved from the weights when they are loaded. So it
comes out the same in int64 and in float64, in any order of summation, with any blocking, on any
number of threads, with or without fused multiplication; the float64 engine is there because it is
several times faster.

Shapes: ``O`` and ``I`` channels out and in; networks take and give ``[1, C, i, j]``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dicmh_ray.errors import WeightsError

Arrays = Mapping[str, npt.NDArray[Any]]
Integers = npt.NDArray[np.int64]

Engine = Literal["float64", "float64-matmul", "int64"]
"""``float64``: torch's convolution, for CPUs. ``float64-matmul``: matrix products, for devices whose
convolutions may transform their input. ``int64``: matrix products of integers, the reference."""

LOWEST, HIGHEST = -(1 << 15), (1 << 15) - 1
"""What a value between layers may be."""

WIDE = 1 << 22
"""Magnitude that a network's last values may reach if no layer reads them."""

EXACT_LIMIT = 1 << 53
"""Sums of integers below this magnitude are exact in float64."""

_MAX_WEIGHT = (1 << 15) - 1
_MAX_FRACTION = 14
_MAX_SHIFT = 24
_HEADROOM = 2.0
"""How far beyond the largest value of the calibration a layer's output reaches before it saturates."""

_MAX_COLUMNS = 1 << 24
"""Values of one matrix of neighbourhoods: 128 MiB. Larger layers are done in bands of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegerLayer:
    """One convolution of a network, on integers."""

    weight: Integers
    """``[O, I, k, k]``, of a correlation with zeros around; k odd."""

    bias: Integers
    """``[O]``, in the unit of the sums."""

    shift: Integers
    """``[O]``: bits by which sums are shifted right, 1 at least."""

    gelu: int | None
    """Fraction of the output, input and output of GELU. None: no activation."""

    @classmethod
    def fit(
        cls,
        layer: nn.Module,
        input_fraction: Sequence[int],
        output_fraction: Sequence[int],
        *,
        has_gelu: bool,
    ) -> "IntegerLayer":
        """Round a convolution's weights.

        Args:
            layer: Conv2d of stride 1, or ConvTranspose2d of stride 1 or 2, as compressai makes them.
            input_fraction: of each channel in.
            output_fraction: of each channel out.
            has_gelu: whether GELU follows.
        """
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            raise TypeError(f"{type(layer).__name__} is no convolution")
        weight = layer.weight.detach().double().cpu().numpy()
        if isinstance(layer, nn.ConvTranspose2d):
            # A transposed convolution correlates its input, zeros put between, with this.
            weight = np.flip(weight.transpose(1, 0, 2, 3), (2, 3))
        if layer.bias is None:
            raise TypeError("a convolution without bias")
        bias = layer.bias.detach().double().cpu().numpy()
        in_fraction = np.asarray(input_fraction)[None, :, None, None]
        out_fraction = np.asarray(output_fraction)
        # The finest unit of the sums under which an output channel's weights have 16 bits; finer
        # than the output's in any case.
        peaks = np.abs(np.ldexp(weight, -in_fraction)).max((1, 2, 3))
        finest = np.floor(np.log2(_MAX_WEIGHT / np.maximum(peaks, 1e-30))).astype(np.int64)
        shift = np.clip(finest - out_fraction, 1, _MAX_SHIFT)
        sum_fraction = out_fraction + shift
        return cls(
            weight=np.rint(
                np.ldexp(weight, sum_fraction[:, None, None, None] - in_fraction)
            ).astype(np.int64),
            bias=np.rint(np.ldexp(bias, sum_fraction)).astype(np.int64),
            shift=shift,
            gelu=int(out_fraction[0]) if has_gelu else None,
        )

    def largest_sum(self) -> int:
        """A bound of the magnitude of every sum, with what rounding adds, for any input."""
        weights = np.abs(self.weight).sum((1, 2, 3))
        return int((weights * -LOWEST + np.abs(self.bias) + (1 << (self.shift - 1))).max())

    def validate(self, name: str) -> None:
        """Raises WeightsError unless the layer's sums are exact, whatever its input."""
        outputs, _, height, width = self.weight.shape
        if self.bias.shape != (outputs,) or self.shift.shape != (outputs,):
            raise WeightsError(name, "bias or shift does not fit the weights")
        if height != width or height % 2 == 0:
            raise WeightsError(name, f"a kernel of {height}x{width}")
        if self.shift.min() < 1 or self.shift.max() > _MAX_SHIFT:
            raise WeightsError(name, "a shift is out of range")
        # Within these the bound itself cannot overflow.
        if max(-self.weight.min(), self.weight.max()) >= 1 << 31:
            raise WeightsError(name, "a weight is out of range")
        if max(-self.bias.min(), self.bias.max()) >= EXACT_LIMIT:
            raise WeightsError(name, "a bias is out of range")
        if self.largest_sum() >= EXACT_LIMIT:
            raise WeightsError(name, f"sums may reach {self.largest_sum()}, not exact")

    def to_arrays(self, prefix: str) -> dict[str, npt.NDArray[Any]]:
        """Named arrays, the inverse of :meth:`from_arrays`."""
        narrow = np.abs(self.weight).max(initial=0) <= HIGHEST
        arrays: dict[str, npt.NDArray[Any]] = {
            f"{prefix}.weight": self.weight.astype(np.int16 if narrow else np.int64),
            f"{prefix}.bias": self.bias,
            f"{prefix}.shift": self.shift.astype(np.uint8),
        }
        if self.gelu is not None:
            arrays[f"{prefix}.gelu"] = np.array([self.gelu], np.uint8)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays, prefix: str) -> "IntegerLayer":
        """Raises WeightsError if an array is missing or of the wrong kind, or a sum is not exact."""
        weight, bias, shift = (
            integers(arrays, f"{prefix}.{name}", ndim)
            for name, ndim in (("weight", 4), ("bias", 1), ("shift", 1))
        )
        has_gelu = f"{prefix}.gelu" in arrays
        gelu = int(integers(arrays, f"{prefix}.gelu", 1)[0]) if has_gelu else None
        layer = cls(weight=weight, bias=bias, shift=shift, gelu=gelu)
        layer.validate(prefix)
        return layer


class IntegerNet:
    """Layers one after the other."""

    def __init__(
        self,
        layers: Sequence[IntegerLayer],
        gelu_tables: Mapping[int, npt.NDArray[np.int16]],
        *,
        engine: Engine,
        device: torch.device,
        upsamples: Sequence[bool] = (),
        is_wide: bool = False,
    ) -> None:
        """Prepare layers for an engine.

        Args:
            layers: validated.
            gelu_tables: as :func:`gelu_table`, by fraction.
            engine: how the sums are done.
            device: where.
            upsamples: whether a layer first doubles the grid with zeros; by default none does.
            is_wide: whether the last values may reach ``WIDE`` instead of 16 bits.
        """
        self._layers = [
            _Prepared(layer, gelu_tables, engine, device, upsample, is_wide and layer is layers[-1])
            for layer, upsample in zip(layers, upsamples or [False] * len(layers), strict=True)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """Integers in the engine's type, 16 bits each -> the same."""
        for layer in self._layers:
            x = layer(x)
        return x


class _Prepared:
    """A layer in the engine's type."""

    def __init__(
        self,
        layer: IntegerLayer,
        gelu_tables: Mapping[int, npt.NDArray[np.int16]],
        engine: Engine,
        device: torch.device,
        upsample: bool,
        is_wide: bool,
    ) -> None:
        dtype = engine_dtype(engine)
        weight = torch.from_numpy(layer.weight).to(device, dtype)
        self._is_integer = engine == "int64"
        self._is_convolution = engine == "float64"
        self._upsample = upsample
        # A grid that zeros double meets every other row and column of the kernel: four small
        # kernels, one for each parity of the output, do the same without the zeros.
        self._kernels = (
            {(a, b): weight[:, :, a::2, b::2].contiguous() for a in (0, 1) for b in (0, 1)}
            if upsample
            else {(0, 0): weight}
        )
        self._bias = torch.from_numpy(layer.bias).to(device, dtype)[:, None, None]
        shift = torch.from_numpy(layer.shift).to(device)[:, None, None]
        self._shift = (
            shift if self._is_integer else torch.ldexp(torch.ones_like(shift, dtype=dtype), -shift)
        )
        self._half = (1 << (shift - 1)) if self._is_integer else None
        self._limits = (-WIDE, WIDE) if is_wide else (LOWEST, HIGHEST)
        self._gelu = (
            None
            if layer.gelu is None
            else torch.from_numpy(gelu_tables[layer.gelu]).to(device, dtype)
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self._upsample:
            _, _, rows, columns = x.shape
            first = self._kernels[0, 0]
            sums = x.new_empty(1, first.shape[0], 2 * rows, 2 * columns)
            for (a, b), kernel in self._kernels.items():
                sums[:, :, a::2, b::2] = self._correlate(F.pad(x, (1 - b, 1, 1 - a, 1)), kernel)
        else:
            (kernel,) = self._kernels.values()
            sums = self._correlate(F.pad(x, (kernel.shape[-1] // 2,) * 4), kernel)
        sums += self._bias
        if self._half is not None:
            shifted = (sums + self._half) >> self._shift
        else:
            shifted = sums.mul_(self._shift).add_(0.5).floor_()
        shifted = shifted.clamp_(*self._limits)
        if self._gelu is not None:
            return self._gelu[shifted.long() - LOWEST]
        return shifted

    def _correlate(self, padded: Tensor, kernel: Tensor) -> Tensor:
        """Sums of all whole neighbourhoods, some rows at a time."""
        outputs, inputs, height, width = kernel.shape
        rows, columns = padded.shape[2] - height + 1, padded.shape[3] - width + 1
        band = max(1, _MAX_COLUMNS // (inputs * height * width * columns))
        parts = []
        for top in range(0, rows, band):
            part = padded[:, :, top : min(top + band, rows) + height - 1]
            if self._is_convolution:
                parts.append(F.conv2d(part, kernel))
            else:
                windows = part[0].unfold(1, height, 1).unfold(2, width, 1)  # I, rows, columns, k, k
                matrix = windows.permute(0, 3, 4, 1, 2).reshape(inputs * height * width, -1)
                sums = kernel.reshape(outputs, -1) @ matrix
                parts.append(sums.reshape(1, outputs, -1, columns))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def engine_dtype(engine: Engine) -> torch.dtype:
    """Raises ValueError for an engine that there is not."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine is {engine!r}, wanted one of {get_args(Engine)}")
    return torch.int64 if engine == "int64" else torch.float64


def fraction_for(peak: float, limit: int = _MAX_FRACTION) -> int:
    """Fraction under which values up to ``peak``, and some headroom, have 16 bits."""
    return max(0, min(limit, math.floor(math.log2(HIGHEST / (max(peak, 1e-9) * _HEADROOM)))))


def gelu_table(fraction: int) -> npt.NDArray[np.int16]:
    """int16 ``[65536]``: the exact GELU of every 16-bit value, lowest first, rounded.

    Made once, when a model is fitted, and shipped: erf may differ between machines.
    """
    x = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.float64) / 2**fraction
    return torch.round(F.gelu(x) * 2**fraction).to(torch.int16).numpy()


def integers(arrays: Arrays, name: str, ndim: int) -> Integers:
    """An array of integers as int64. Raises WeightsError if it is missing or another kind."""
    if name not in arrays:
        raise WeightsError(name, "the array is missing")
    array = arrays[name]
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != ndim or array.size == 0:
        raise WeightsError(name, f"the array is {array.dtype} {array.shape}")
    return np.ascontiguousarray(array, np.int64)
