"""Small pictures, a codec with every metric, and ONNX nets of a few nodes: nothing is downloaded."""

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dicmh_ray import bench
from dicmh_ray.codec import Quality
from tests.fake_codec import FakeCodec

JPEG, WEBP, AVIF, JPEG_XL = bench.PEERS
QUICK = tuple(dataclasses.replace(peer, qualities=(10, 40, 80)) for peer in (JPEG, WEBP))


def a_picture(height=40, width=56, seed=0):
    """Smooth waves and a little noise: something that compresses, but not to nothing."""
    y, x = np.mgrid[:height, :width] / 9
    waves = np.stack([np.sin(x + seed), np.sin(y), np.cos(x - y)], axis=2) * 100 + 128
    noise = np.random.default_rng(seed).normal(0, 6, waves.shape)
    return (waves + noise).clip(0, 255).astype(np.uint8)


class CodecWithMsSsim(FakeCodec):
    """Gives every pair an MS-SSIM, so that all metrics have curves."""

    def measure(self, originals, decoded):
        return [
            Quality(one.psnr, one.worst_tile_psnr, 1 - 10 ** (-one.psnr / 15))
            for one in super().measure(originals, decoded)
        ]


def save_net(path, nodes, inputs, outputs, constants=()):
    """Write an ONNX file; ``inputs`` and ``outputs`` are name -> shape."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in dict(constants).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def save_feature_net(path, size=16):
    """Two strided convolutions with inner tensors ``shallow`` and ``deep``, logits of 5 classes."""
    rng = np.random.default_rng(1)
    return save_net(
        path,
        [
            helper.make_node("Conv", ["x", "w0"], ["c0"], strides=[2, 2], kernel_shape=[3, 3]),
            helper.make_node("Relu", ["c0"], ["shallow"]),
            helper.make_node("Conv", ["shallow", "w1"], ["c1"], strides=[2, 2]),
            helper.make_node("Relu", ["c1"], ["deep"]),
            helper.make_node("GlobalAveragePool", ["deep"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["logits"]),
        ],
        {"x": [1, 3, size, size]},
        {"logits": [1, 5]},
        {
            "w0": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
            "w1": rng.normal(size=(5, 4, 3, 3)).astype(np.float32),
        },
    )


def save_segmenter(path, size=16):
    """Class 1 where red is above the middle, else class 0."""
    weights = np.zeros((2, 3, 1, 1), np.float32)
    weights[1, 0] = 1
    nodes = [helper.make_node("Conv", ["x", "w"], ["logits"])]
    return save_net(
        path, nodes, {"x": [1, 3, size, size]}, {"logits": [1, 2, size, size]}, {"w": weights}
    )


def save_constant(path, outputs, size=16):
    """Gives the same arrays for any picture, plus zero times the picture."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        *(helper.make_node("Add", [f"value-{n}", "nothing"], [n]) for n in outputs),
    ]
    constants = {f"value-{n}": value.astype(np.float32) for n, value in outputs.items()}
    shapes = {n: value.shape for n, value in outputs.items()}
    zero = {"zero": np.float32(0).reshape(())}
    return save_net(path, nodes, {"x": [1, 3, size, size]}, shapes, {**constants, **zero})


def save_lpips(path):
    """The mean absolute difference of two pictures of any size."""
    nodes = [
        helper.make_node("Sub", ["a", "b"], ["d"]),
        helper.make_node("Abs", ["d"], ["m"]),
        helper.make_node("ReduceMean", ["m"], ["y"], keepdims=0),
    ]
    shape = [1, 3, "h", "w"]
    return save_net(path, nodes, {"a": shape, "b": shape}, {"y": []})
