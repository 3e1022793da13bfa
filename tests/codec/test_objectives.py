"""What training minimises, against independent implementations."""

import json
from pathlib import Path

import pytest
import torch
from pytorch_msssim import ms_ssim
from safetensors.torch import save_file

from dicmh_ray.codec.human_training import feature_distance, texture_distance
from dicmh_ray.codec.objectives import FeatureTeacher, StructuralDistance
from dicmh_ray.errors import WeightsError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty layers of a chain: strided at 0, 4, 11 and 22, depthwise at 1, an addition at 9."""
    torch.manual_seed(3)
    layers, tensors, channels = [], {}, 3
    for i in range(40):
        if i == 9:
            layers.append({"i": i, "op": "add", "src": [i - 1, i - 2]})
            continue
        depthwise = i == 1
        stride = 2 if i in (0, 4, 11, 22) else 1
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
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(tensors, path, {"layers": json.dumps(layers)})
    return path


def test_structural_distance_is_one_minus_ms_ssim() -> None:
    torch.manual_seed(1)
    x = torch.rand(3, 1, 192, 192) * 255
    y = (x + 30 * torch.randn_like(x)).clamp(0, 255)
    wanted = 1 - ms_ssim(x, y, data_range=255, size_average=False)
    found = StructuralDistance(192, CPU).of_planes(x[:, 0], y[:, 0])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_structural_distance_of_equal_pictures_is_zero_whatever_the_colour_plane() -> None:
    x = torch.rand(8, 3, 176, 176) * 255
    assert StructuralDistance(176, CPU)(x, x).abs().max() < 1e-6


def test_structural_distance_refuses_crops_without_room_for_its_windows() -> None:
    with pytest.raises(ValueError, match="176"):
        StructuralDistance(160, CPU)


def test_a_teachers_distance_is_zero_for_equal_pictures_and_grows_with_noise(
    teacher_file: Path,
) -> None:
    teacher = FeatureTeacher(teacher_file)
    x = torch.rand(2, 3, 64, 64) * 255
    noise = torch.randn_like(x)
    distances = [float(teacher.distance(x, x + s * noise).mean()) for s in (0, 8, 40)]
    assert abs(distances[0]) < 1e-5
    assert distances[0] < distances[1] < distances[2]
    assert [a.shape[2] for a in teacher.activations(x)] == [32, 16, 8, 4, 4]


def test_a_teacher_hands_gradients_to_the_picture_only(teacher_file: Path) -> None:
    teacher = FeatureTeacher(teacher_file)
    x = torch.rand(1, 3, 64, 64) * 255
    y = (x + 5).requires_grad_()
    torch.autograd.backward(teacher.distance(x, y).sum())
    assert y.grad is not None
    assert y.grad.abs().sum() > 0
    assert not list(teacher.parameters())


def test_a_file_that_describes_no_layers_is_no_teacher(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match="no teacher"):
        FeatureTeacher(path)


def test_the_texture_distance_ignores_where_detail_lies_and_sees_that_it_is_gone() -> None:
    a = torch.rand(2, 5, 16, 16)
    turned = a.reshape(2, 5, 2, 8, 2, 8).flip(3, 5).reshape(2, 5, 16, 16)
    assert float(texture_distance([a], [turned])) < 1e-5
    assert float(feature_distance([a], [turned])) > 0.05
    blurred = torch.nn.functional.avg_pool2d(a, 3, 1, 1, count_include_pad=False)
    assert float(texture_distance([a], [blurred])) > 0.3
