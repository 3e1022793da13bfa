"""Pixels and z: the fast synthesis is the transposed convolution that it stands for."""

import pytest
import torch
from torch.nn import functional as F

from dicmh_ray.codec.transform import PATCH, PatchAutoencoder, overlap_add


@pytest.mark.parametrize(
    ("stride", "size", "padding"), [(8, 16, 4), (4, 12, 4), (2, 6, 2), (1, 3, 1)]
)
def test_overlap_add_is_a_transposed_convolution(stride: int, size: int, padding: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 3, size, size, generator=generator, dtype=torch.float64)
    z = torch.randn(2, 5, 4, 7, generator=generator, dtype=torch.float64)
    wanted = F.conv_transpose2d(z, kernel, stride=stride, padding=padding)
    assert torch.allclose(overlap_add(z, kernel, stride, padding), wanted, atol=1e-12)


def test_residual_is_what_a_change_of_z_adds() -> None:
    autoencoder = PatchAutoencoder(num_luma=6, num_chroma=2, blocks=0, hidden=4).double()
    generator = torch.Generator().manual_seed(0)
    z, change = torch.randn(2, 1, 10, 3, 5, generator=generator, dtype=torch.float64)
    found = autoencoder.decode(z + change) - autoencoder.decode(z)
    assert found.shape == (1, 3, 3 * PATCH, 5 * PATCH)
    assert torch.allclose(autoencoder.residual(change), found, atol=1e-9)
