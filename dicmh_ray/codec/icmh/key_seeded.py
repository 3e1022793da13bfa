"""Weights that follow from a parameter's official name and shape alone (rule: reference README)."""

import math
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor


def key_seeded(key: str, shape: Iterable[int]) -> Tensor:
    """The float32 value of a parameter; ``key`` carries the full official prefix."""
    shape = tuple(shape)
    generator = np.random.RandomState(zlib.crc32(key.encode()))
    value = np.asarray(generator.standard_normal(shape)).astype(np.float32)
    if len(shape) >= 2:
        value = value / np.float32(math.sqrt(math.prod(shape[1:])))
    elif key.endswith("weight"):
        value = 1 + np.float32(0.1) * value
    else:
        value = np.float32(0.05) * value
    return torch.from_numpy(np.asarray(value, np.float32))


def key_seeded_state(prefix: str, shapes: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """Official state without prefix; ``scale_list`` is a constant and no weight."""
    return {
        key: torch.ones(tuple(shape)) if key == "scale_list" else key_seeded(prefix + key, shape)
        for key, shape in shapes.items()
    }
