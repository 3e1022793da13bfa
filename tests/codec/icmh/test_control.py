"""The controlled U-Net computes what the official one does, block by block."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dicmh_ray.codec.icmh.config import RestorerConfig
from dicmh_ray.codec.icmh.control import (
    ControlledUNet,
    RestorerOptions,
    apply_options,
    decoder_blocks,
    encoder_blocks,
    semantic_distance,
)
from dicmh_ray.codec.icmh.key_seeded import key_seeded_state
from dicmh_ray.codec.icmh.official_keys import OFFICIAL_PREFIXES, to_official, to_ours

TINY = RestorerConfig(block_widths=(64, 128, 256, 256), context_channels=64)
SMALL = RestorerConfig(
    block_widths=(16, 24),
    layers_per_block=1,
    context_channels=8,
    head_width=8,
    control_head_width=4,
)


def key_seeded_model(config: RestorerConfig) -> ControlledUNet:
    with torch.device("meta"):
        model = ControlledUNet(config, 4)
    for part, module in (("unet", model.unet), ("control", model.control)):
        shapes = {k: v.shape for k, v in to_official(part, module.state_dict()).items()}
        official = key_seeded_state(OFFICIAL_PREFIXES[part], shapes)
        module.load_state_dict(to_ours(part, official), assign=True)
    return model.eval().requires_grad_(requires_grad=False)


def randomised(model: ControlledUNet) -> ControlledUNet:
    """Every weight away from zero, the 1x1 convolutions too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def model() -> ControlledUNet:
    return key_seeded_model(TINY)


@pytest.fixture(scope="module")
def tensors(reference: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(reference / "control_tiny.safetensors")


@pytest.fixture(scope="module")
def facts(reference: Path) -> dict[str, dict[str, float]]:
    return json.loads((reference / "control_tiny.json").read_text())


@pytest.fixture
def inputs(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tensors["x"], tensors["t"], tensors["context"], tensors["hint"]


def small_inputs(rows: int = 8, columns: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randn, generator=generator)
    return (
        draw(2, 4, rows, columns), torch.tensor([3, 700]), draw(2, 5, 8), draw(2, 4, rows, columns)
    )  # fmt: skip


def test_key_seeded_weights_are_those_of_the_reference(
    model: ControlledUNet, facts: dict[str, dict[str, float]]
) -> None:
    sums = {
        OFFICIAL_PREFIXES[part] + key: value.double().abs().sum().item()
        for part, module in (("unet", model.unet), ("control", model.control))
        for key, value in to_official(part, module.state_dict()).items()
    }
    for key, expected in facts["weight_abs_sums"].items():
        assert sums[key] == pytest.approx(expected, rel=1e-5), key
    assert len(sums) == 686 + 349


def test_noise_is_that_of_the_reference(model: ControlledUNet, tensors, inputs) -> None:
    x, t, context, hint = inputs
    torch.testing.assert_close(model(x, t, context, hint), tensors["eps"], rtol=0, atol=2e-5)
    torch.testing.assert_close(
        model(x, t, context, None), tensors["eps_base_only"], rtol=0, atol=2e-5
    )


def test_every_block_is_that_of_the_reference(model: ControlledUNet, tensors, inputs) -> None:
    seen: dict[str, Tensor] = {}
    watched = {
        "base.temb": model.unet.time_embedding,
        "ctrl.temb": model.control.encoder.time_embedding,
        "base.mid": model.unet.mid_block,
        "ctrl.mid": model.control.encoder.mid_block,
        "zc_mid": model.control.zero_middle,
    }
    for name, unet in (("base", model.unet), ("ctrl", model.control.encoder)):
        for i, block in enumerate(encoder_blocks(unet)):
            watched[f"{name}.in.{i}"] = block.attention or block.layer
    for j, block in enumerate(decoder_blocks(model.unet)):
        watched[f"base.out.{j}"] = block.upsampler or block.attention or block.layer
    for name, convs in (("enc", model.control.zero_down), ("dec", model.control.zero_up)):
        watched.update({f"zc_{name}.{i}": conv for i, conv in enumerate(convs)})

    def watch(name: str, _module, _arguments, result) -> None:
        seen[name] = result[0] if isinstance(result, tuple) else result

    handles = [
        module.register_forward_hook(functools.partial(watch, name))
        for name, module in watched.items()
    ]
    model(*inputs)
    for handle in handles:
        handle.remove()
    expected = {
        key.removeprefix("intermediates/"): value
        for key, value in tensors.items()
        if key.startswith("intermediates/")
    }
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-3, msg=name)


def test_full_width_has_the_parameters_and_the_cost_of_the_official_pair() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = ControlledUNet(RestorerConfig(), 4)
        x, context = torch.empty(1, 4, 64, 96), torch.empty(1, 77, 1024)
        assert model(x, torch.zeros(1, dtype=torch.int64), context, x).shape == x.shape
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.unet, model.control)]
    assert sizes == [865_910_724, 374_019_200]
    assert counter.get_total_flops() == pytest.approx(1.749e12, rel=1e-3)


def test_64_wide_heads_in_the_control_branch_are_another_network(
    model: ControlledUNet, tensors, inputs
) -> None:
    config = dataclasses.replace(TINY, control_head_width=64)
    with torch.device("meta"):
        wide = ControlledUNet(config, 4).eval()
    # The weights fit: only the number of heads differs, which no shape shows.
    wide.load_state_dict(model.state_dict(), assign=True)
    assert (wide(*inputs) - tensors["eps"]).abs().max() > 1e-2


def test_semantic_loss_is_that_of_the_reference(model: ControlledUNet, tensors, facts) -> None:
    x, hint, context = (tensors[name] for name in ("x", "hint", "context"))
    f, g = (model.semantic_features(latent, context) for latent in (x, hint))
    torch.testing.assert_close(f, tensors["sc_mid_x"], rtol=0, atol=1e-4)
    torch.testing.assert_close(g, tensors["sc_mid_hint"], rtol=0, atol=1e-4)
    distance = semantic_distance(f, g)
    assert distance.shape == (2,)
    assert distance.mean().item() == pytest.approx(facts["sc_loss_cos"], abs=1e-5)
    assert (semantic_distance(f, f) == 0).all()


def test_semantic_features_of_any_block_and_time() -> None:
    model = randomised(ControlledUNet(SMALL, 4))
    x, _, context, _ = small_inputs()
    widths = [model.semantic_features(x, context, 0, block=i).shape[1:] for i in range(4)]
    assert widths == [(16, 8, 12), (16, 8, 12), (16, 4, 6), (24, 4, 6)]
    with pytest.raises(ValueError, match="4 blocks"):
        model.semantic_features(x, context, block=4)
    late = model.semantic_features(x, context, torch.tensor([0, 500]))
    early = model.semantic_features(x, context)
    torch.testing.assert_close(late[0], early[0])
    assert (late[1] != early[1]).any()


def test_without_hint_the_pair_is_the_plain_unet(model: ControlledUNet, inputs) -> None:
    x, t, context, _ = inputs
    plain = model.unet(x, t, context).sample
    torch.testing.assert_close(model(x, t, context, None), plain, rtol=0, atol=0)


def test_an_untrained_control_branch_changes_nothing() -> None:
    model = randomised(ControlledUNet(SMALL, 4))
    steered = model(*small_inputs())
    model.initialise_control()
    x, t, context, hint = small_inputs()
    plain = model(x, t, context, None)
    assert (steered != plain).any()
    torch.testing.assert_close(model(x, t, context, hint), plain, rtol=0, atol=0)
    torch.testing.assert_close(plain, model.unet(x, t, context).sample, rtol=0, atol=0)
    assert (model.control.encoder.conv_in.weight[:, :4] == model.unet.conv_in.weight).all()
    assert (model.control.encoder.conv_in.weight[:, 4:] == model.unet.conv_in.weight).all()


@pytest.mark.parametrize("grid", [(8, 12), (7, 5), (1, 1)])
@pytest.mark.parametrize("widths", [(32,), (20, 40), (32, 48, 64)])
@pytest.mark.parametrize("channels", [4, 16])
def test_any_levels_widths_latents_and_grids(
    widths: tuple[int, ...], channels: int, grid: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    config = RestorerConfig(block_widths=widths, layers_per_block=1, context_channels=8)
    model = randomised(ControlledUNet(config, channels))
    x, hint = torch.randn(2, 2, channels, *grid)
    t, context = torch.tensor([3, 700]), torch.randn(2, 5, 8)
    assert model(x, t, context, hint).shape == x.shape
    torch.testing.assert_close(model(x, t, context, None), model.unet(x, t, context).sample)


def test_groups_are_those_of_stable_diffusion_at_its_widths(model: ControlledUNet) -> None:
    assert model.unet.config.norm_num_groups == 32
    assert ControlledUNet(SMALL, 4).unet.config.norm_num_groups == 8


def test_only_the_control_branch_learns() -> None:
    model = ControlledUNet(SMALL, 4)
    model.initialise_control()
    x, t, context, hint = small_inputs()
    hint.requires_grad_()
    # At the start the 1x1 convolutions alone have a gradient; a step later the branch has.
    optimiser = torch.optim.SGD(model.control.parameters(), 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(x, t, context, hint).square().mean().backward()
        optimiser.step()
    assert all(p.grad is None for p in model.unet.parameters())
    assert all(p.grad is not None for p in model.control.parameters())
    assert hint.grad is not None
    assert hint.grad.abs().max() > 0


def test_bfloat16_and_compilation_stay_near_and_keep_the_names() -> None:
    model = randomised(ControlledUNet(SMALL, 4))
    names = list(model.state_dict())
    inputs = small_inputs()
    exact = model(*inputs)
    apply_options(model, RestorerOptions(dtype=torch.bfloat16))
    rounded = model(*inputs)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
    assert list(model.state_dict()) == names


def test_the_forward_pass_is_one_graph() -> None:
    config = dataclasses.replace(SMALL, block_widths=(16,))
    model = randomised(ControlledUNet(config, 4))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*small_inputs()), model(*small_inputs()))
