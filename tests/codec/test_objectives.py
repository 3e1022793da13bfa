"""What training minimises, against independent implementations."""

from pathlib import Path

import pytest
import torch
from pytorch_msssim import ms_ssim
from safetensors.torch import save_file

from dicmh_ray.codec.human_training import feature_distance, texture_distance
from dicmh_ray.codec.objectives import FeatureTeacher, StructuralDistance
from dicmh_ray.codec.training import SEMANTICS_UNIT, Distortion, TrainOptions
from dicmh_ray.errors import WeightsError

CPU = torch.device("cpu")


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
    assert [a.shape[2] for a in teacher.activations(x)] == [32, 16, 8, 4, 4, 2]


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


def test_a_classifier_without_the_layers_that_are_compared_is_no_teacher(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    save_file({"a": torch.zeros(2)}, path, {"layers": "[]"})
    with pytest.raises(WeightsError, match="0 layers, wanted 58"):
        FeatureTeacher(path)


def test_the_texture_distance_ignores_where_detail_lies_and_sees_that_it_is_gone() -> None:
    a = torch.rand(2, 5, 16, 16)
    turned = a.reshape(2, 5, 2, 8, 2, 8).flip(3, 5).reshape(2, 5, 16, 16)
    assert float(texture_distance([a], [turned])) < 1e-5
    assert float(feature_distance([a], [turned])) > 0.05
    blurred = torch.nn.functional.avg_pool2d(a, 3, 1, 1, count_include_pad=False)
    assert float(texture_distance([a], [blurred])) > 0.3


def test_the_first_states_answer_to_a_teacher_by_its_share_and_others_do_not(
    teacher_file: Path,
) -> None:
    torch.manual_seed(2)
    x = 255 * torch.rand(4, 3, 64, 64)
    decoded = x + 20 * torch.randn_like(x)
    states = torch.tensor([3, 1, 4, 2])

    def distortion(semantics: float) -> torch.Tensor:
        options = TrainOptions(structure=0, semantics=semantics, semantic_states=3)
        return Distortion(options, 5, CPU, teacher_file)(x, decoded, states)[1]

    without, half, whole = (distortion(share) for share in (0.0, 0.5, 1.0))
    assert torch.equal(without[::2], whole[::2])
    distance = FeatureTeacher(teacher_file).distance(
        *(torch.nn.functional.avg_pool2d(images[1::2], 2) for images in (x, decoded))
    )
    torch.testing.assert_close(whole[1::2], SEMANTICS_UNIT * distance)
    torch.testing.assert_close(half, (without + whole) / 2)
