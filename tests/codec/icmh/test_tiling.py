"""Tiles join into what the whole would have been, and never grow."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dicmh_ray.codec.icmh.config import RestorerConfig, SamplerConfig, VaeConfig
from dicmh_ray.codec.icmh.control import ControlledUNet
from dicmh_ray.codec.icmh.noise import StreamNoise
from dicmh_ray.codec.icmh.sampling import Sampler
from dicmh_ray.codec.icmh.tiling import (
    RESTORER_TILING,
    VAE_TILING,
    TiledUNet,
    Tiling,
    axis_spans,
    decode_tiled,
    encode_tiled,
    tiled,
)
from dicmh_ray.codec.icmh.vae import Vae
from dicmh_ray.codec.noise import normal_table


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    align = draw(st.sampled_from([1, 2, 8]))
    tile = align * draw(st.integers(1, 6))
    overlap = align * draw(st.integers(0, tile // 2 // align))
    return Tiling(tile=tile, overlap=overlap, align=align)


@settings(max_examples=60, deadline=None)
@given(tilings(), st.integers(1, 60), st.integers(1, 60), st.integers(1, 2), st.integers(1, 2))
def test_tiles_of_the_identity_are_the_identity(
    tiling: Tiling, rows: int, columns: int, cell: int, larger: int
) -> None:
    x = torch.arange(2.0 * rows * cell * columns * cell).reshape(1, 2, rows * cell, columns * cell)
    x = torch.sin(x)
    sizes: list[tuple[int, int]] = []

    def enlarge(tile: Tensor, down: tuple[int, int], across: tuple[int, int]) -> Tensor:
        assert tile.shape[2:] == ((down[1] - down[0]) * cell, (across[1] - across[0]) * cell)
        assert down[0] % tiling.align == across[0] % tiling.align == 0
        sizes.append((down[1] - down[0], across[1] - across[0]))
        return tile.repeat_interleave(larger, 2).repeat_interleave(larger, 3)

    found = tiled(enlarge, x, tiling, cell=cell)
    expected = x.repeat_interleave(larger, 2).repeat_interleave(larger, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert max(map(max, sizes)) <= tiling.tile
    if max(rows, columns) <= tiling.tile:
        assert len(sizes) == 1
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@settings(max_examples=100, deadline=None)
@given(tilings(), st.integers(1, 300))
def test_weights_add_up_to_1_and_neighbours_share_the_overlap(tiling: Tiling, length: int) -> None:
    spans = axis_spans(length, tiling)
    total = np.zeros(length)
    for span in spans:
        assert len(span.weight) == span.stop - span.start <= tiling.tile
        assert (span.weight >= 0).all()
        total[span.start : span.stop] += span.weight
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)
    assert spans[0].start == 0
    assert spans[-1].stop == length
    for before, after in itertools.pairwise(spans):
        assert before.stop - after.start >= tiling.overlap


def test_the_edge_of_a_tile_inside_a_picture_hardly_counts() -> None:
    first, second = axis_spans(56, Tiling(tile=32, overlap=8))
    assert first.weight[0] == second.weight[-1] == 1
    assert first.weight[-1] < 0.01
    assert second.weight[0] < 0.01
    assert (first.weight[:24] == 1).all()


@pytest.mark.parametrize(
    ("tile", "overlap", "align"),
    [(8, 5, 1), (8, -1, 1), (12, 4, 8), (16, 4, 8), (8, 0, 0), (0, 0, 1)],
)
def test_a_tiling_that_cannot_be_is_refused(tile: int, overlap: int, align: int) -> None:
    with pytest.raises(ValueError, match="tile"):
        Tiling(tile=tile, overlap=overlap, align=align)


def test_pictures_of_the_usual_size_go_through_whole() -> None:
    for tiling in (VAE_TILING, RESTORER_TILING):
        assert len(axis_spans(64, tiling)) == len(axis_spans(96, tiling)) == 1


@pytest.fixture(scope="module")
def vae() -> Vae:
    torch.manual_seed(2)
    settings = {"block_out_channels": [16] * 4, "layers_per_block": 1, "latent_channels": 4}
    return Vae(VaeConfig(settings=settings)).eval().requires_grad_(requires_grad=False)


def picture(rows: int, columns: int) -> Tensor:
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    waves = [torch.sin(down / (5 + c) + across / (7 - c)) for c in range(3)]
    return torch.stack(waves)[None] * 0.8


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / (expected - expected.mean()).norm())


def test_an_autoencoder_in_tiles_is_close_to_the_whole(vae: Vae) -> None:
    # Noise, which is alike everywhere: what remains is the edges of tiles.
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1, 3, 8 * 40, 8 * 56, generator=generator) * 2 - 1
    tiling = Tiling(tile=32, overlap=16)
    z = vae.encode(x)
    assert 0 < error(encode_tiled(vae, x, tiling), z) < 0.1
    z = 0.18 * torch.randn(1, 4, 40, 56, generator=generator)
    whole, tiles = vae.decode(z), decode_tiled(vae, z, tiling)
    assert 0 < error(tiles, whole) < 0.2
    torch.testing.assert_close(decode_tiled(vae, z, tiling), tiles, rtol=0, atol=0)
    z = vae.encode(x)
    whole = vae.decode(z)
    for fitting in (VAE_TILING, Tiling(tile=56, overlap=8)):
        torch.testing.assert_close(decode_tiled(vae, z, fitting), whole, rtol=0, atol=0)
        torch.testing.assert_close(encode_tiled(vae, x, fitting), z, rtol=0, atol=0)


def test_sampling_in_tiles_is_close_to_the_whole() -> None:
    torch.manual_seed(4)
    config = RestorerConfig(
        block_widths=(16, 32), layers_per_block=1, context_channels=8, head_width=8
    )
    model = ControlledUNet(config, 4).eval().requires_grad_(requires_grad=False)
    for conv in (*model.control.zero_down, model.control.zero_middle, *model.control.zero_up):
        torch.nn.init.normal_(conv.weight, 0, 0.1)
    hint = picture(32, 48)[:, [0, 1, 2, 0]]
    largest = 0

    def watch(x: Tensor, t: Tensor, context: Tensor, hint: Tensor | None) -> Tensor:
        nonlocal largest
        assert hint is not None
        assert hint.shape == x.shape
        largest = max(largest, *x.shape[2:])
        return model(x, t, context, hint)

    sampler = Sampler(SamplerConfig(kind="ddpm", steps=2, guidance=2.0))

    def draw(predictor) -> Tensor:
        return sampler.draw(
            predictor,
            shape=(1, 4, 32, 48),
            context_BTD=torch.linspace(-1, 1, 40).reshape(1, 5, 8),
            empty_context_BTD=torch.zeros(1, 5, 8),
            hint_BChw=hint,
            noise=StreamNoise([b"a stream"], 4, normal_table(4096).numpy()),
        )

    whole = draw(model)
    tiles = draw(TiledUNet(watch, Tiling(tile=32, overlap=8, align=2)))
    assert largest == 32
    assert 0 < error(tiles, whole) < 0.1
    torch.testing.assert_close(draw(TiledUNet(model)), whole, rtol=0, atol=0)
