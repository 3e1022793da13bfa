"""A classifier as :class:`dicmh_ray.codec.objectives.FeatureTeacher` reads it, random and small."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

STRIDED = (0, 4, 11, 22, 45)


def write_teacher(path: Path) -> Path:
    """58 layers in a chain: some strided, depthwise at 1, an addition at 9."""
    torch.manual_seed(3)
    layers, tensors, channels = [], {}, 3
    for i in range(58):
        if i == 9:
            layers.append({"i": i, "op": "add", "src": [i - 1, i - 2]})
            continue
        depthwise = i == 1
        stride = 2 if i in STRIDED else 1
        size = 3 if stride == 2 or depthwise else 1
        shape = (8, 1 if depthwise else channels, size, size)
        layers.append(
            {"i": i, "op": "dw" if depthwise else "conv", "src": i - 1}
            | {"k": size, "s": stride, "relu6": i % 3 == 0}
        )
        tensors[f"{i}.w"] = torch.randint(0, 256, shape, dtype=torch.uint8)
        tensors[f"{i}.scale"] = torch.tensor([0.006])
        tensors[f"{i}.zp"] = torch.tensor([128], dtype=torch.int32)
        tensors[f"{i}.b"] = torch.randn(8) * 0.1
        channels = 8
    save_file(tensors, path, {"layers": json.dumps(layers)})
    return path
