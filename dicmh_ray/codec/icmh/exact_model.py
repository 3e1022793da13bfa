"""All integers of an exact entropy model: what a checkpoint's tables hold, proved when loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dicmh_ray.codec.icmh.entropy_tables import FrozenTables
from dicmh_ray.codec.icmh.integer_nets import (
    HIGHEST,
    LOWEST,
    Arrays,
    IntegerLayer,
    Integers,
    integers,
)
from dicmh_ray.errors import WeightsError

MAX_LATENT_FRACTION = 8
"""Of y and z: an integer of 16-bit symbols then still is an exact float32."""

SCALE_FRACTION = 12
"""Scales count in 1/4096."""

NUM_SCALES = 64

HYPER = "hyper_dec.hyper_dec"
"""The hyper-decoder, by its name in the official checkpoint."""


def channel_net(index: int) -> str:
    """Name of the channel context of a slice; the first slice has none."""
    return f"channel_context.{index}.fushion"


def local_net(index: int) -> str:
    """Name of the local context of a slice."""
    return f"local_context.{index}"


def parameters_net(index: int, is_anchor: bool) -> str:
    """Name of the entropy parameters of a step."""
    return f"entropy_parameters_{'anchor' if is_anchor else 'nonanchor'}.{index}.fusion"


def net_sizes(slices: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Name and number of layers of every network."""
    yield HYPER, 3
    for index in range(len(slices)):
        if index:
            yield channel_net(index), 3
        yield local_net(index), 1
        yield parameters_net(index, True), 3
        yield parameters_net(index, False), 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactModel:
    """The integers. :meth:`from_arrays` proves what decoding relies on."""

    slices: tuple[int, ...]
    y_fraction: int
    z_fraction: int
    z_medians: Integers
    """``[N]``, in z's fixed point."""

    scale_thresholds: Integers
    """``[63]``: the table of a scale is the number of thresholds below it."""

    nets: Mapping[str, tuple[IntegerLayer, ...]]
    """By the names of the official checkpoint."""

    gelu_tables: Mapping[int, npt.NDArray[np.int16]]
    y_tables: FrozenTables
    z_tables: FrozenTables

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named integer arrays for ``tables.safetensors``."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "slices": np.array(self.slices, np.int32),
            "y_fraction": np.array([self.y_fraction], np.uint8),
            "z_fraction": np.array([self.z_fraction], np.uint8),
            "z_medians": self.z_medians.astype(np.int32),
            "scale_thresholds": self.scale_thresholds.astype(np.int32),
        }
        for fraction, table in self.gelu_tables.items():
            arrays[f"gelu.{fraction}"] = table
        for name, layers in self.nets.items():
            for number, layer in enumerate(layers):
                arrays |= layer.to_arrays(f"{name}.{number}")
        return arrays | self.y_tables.to_arrays("y") | self.z_tables.to_arrays("z")

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "ExactModel":
        """Raises WeightsError if an array is missing or breaks an invariant; ignores foreign ones."""
        slices = tuple(integers(arrays, "slices", 1).tolist())
        if min(slices) < 1:
            raise WeightsError("slices", f"slices are {slices}")
        nets = {
            name: tuple(IntegerLayer.from_arrays(arrays, f"{name}.{n}") for n in range(size))
            for name, size in net_sizes(slices)
        }
        fractions = {
            layer.gelu for layers in nets.values() for layer in layers if layer.gelu is not None
        }
        model = cls(
            slices=slices,
            y_fraction=int(integers(arrays, "y_fraction", 1)[0]),
            z_fraction=int(integers(arrays, "z_fraction", 1)[0]),
            z_medians=integers(arrays, "z_medians", 1),
            scale_thresholds=integers(arrays, "scale_thresholds", 1),
            nets=nets,
            gelu_tables={f: _gelu_from_arrays(arrays, f"gelu.{f}") for f in fractions},
            y_tables=FrozenTables.from_arrays(arrays, "y"),
            z_tables=FrozenTables.from_arrays(arrays, "z"),
        )
        _validate(model)
        return model


def _gelu_from_arrays(arrays: Arrays, name: str) -> npt.NDArray[np.int16]:
    table = integers(arrays, name, 1)
    if table.size != HIGHEST - LOWEST + 1 or table.min() < LOWEST or table.max() > HIGHEST:
        raise WeightsError(name, "no table of 16-bit values")
    return table.astype(np.int16)


def _validate(model: ExactModel) -> None:
    """What no layer or table can know alone."""
    for name, fraction in (("y_fraction", model.y_fraction), ("z_fraction", model.z_fraction)):
        if not 0 <= fraction <= MAX_LATENT_FRACTION:
            raise WeightsError(name, f"is {fraction}, wanted 0..{MAX_LATENT_FRACTION}")
    z_channels, y_channels = model.z_medians.size, sum(model.slices)
    if model.z_tables.sizes.size != z_channels or model.y_tables.sizes.size != NUM_SCALES:
        raise WeightsError("tables", "wrong number of tables")
    if np.abs(model.z_medians).max() >= 1 << 23:
        raise WeightsError("z_medians", "out of range")
    thresholds = model.scale_thresholds
    if thresholds.size != NUM_SCALES - 1 or (np.diff(thresholds) < 0).any():
        raise WeightsError("scale_thresholds", "no ascending thresholds between the tables")
    hyper = model.nets[HYPER][-1].weight.shape[0]
    wanted = {HYPER: (z_channels, hyper)}
    start = 0
    for index, count in enumerate(model.slices):
        contexts = hyper + (2 * count if index else 0)
        if index:
            wanted[channel_net(index)] = (start, 2 * count)
        wanted[local_net(index)] = (count, 2 * count)
        wanted[parameters_net(index, True)] = (contexts, 2 * count)
        wanted[parameters_net(index, False)] = (contexts + 2 * count, 2 * count)
        start += count
    if start != y_channels:
        raise WeightsError("slices", "do not sum to the channels of y")
    for name, (inputs, outputs) in wanted.items():
        layers = model.nets[name]
        widths = [inputs, *(layer.weight.shape[0] for layer in layers)]
        if widths[:-1] != [layer.weight.shape[1] for layer in layers] or widths[-1] != outputs:
            raise WeightsError(name, "layers do not fit each other")
        if [layer.gelu is not None for layer in layers] != [True] * (len(layers) - 1) + [False]:
            raise WeightsError(name, "GELU belongs between layers, and only there")
        is_pointwise = name.startswith("entropy_parameters")
        if any(layer.weight.shape[2] != 1 for layer in layers) and is_pointwise:
            raise WeightsError(name, "entropy parameters see their own position only")
    if any(layer.weight.shape[2] != 5 for layer in model.nets[HYPER][:2]):
        raise WeightsError(HYPER, "a kernel that doubles the grid is 5x5")
