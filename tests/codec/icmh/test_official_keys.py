"""Every official name has one of ours, and back; at full width the shapes agree too."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from dicmh_ray.codec.icmh.config import RestorerConfig, VaeConfig
from dicmh_ray.codec.icmh.control import ControlBranch, build_unet
from dicmh_ray.codec.icmh.official_keys import (
    OFFICIAL_PREFIXES,
    Part,
    control_key,
    control_key_official,
    to_official,
    to_ours,
    unet_key,
    unet_key_official,
    vae_key,
    vae_key_official,
)
from dicmh_ray.errors import WeightsError

COUNTS: dict[Part, int] = {"unet": 686, "control": 349, "vae": 248}


def build(part: Part, config: RestorerConfig) -> nn.Module:
    with torch.device("meta"):
        if part == "vae":
            return AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                **VaeConfig().settings,
            )
        if part == "control":
            return ControlBranch(config, 4)
        return build_unet(config, in_channels=4, out_channels=4, head_width=config.head_width)


@pytest.fixture(scope="module")
def official_shapes(dicmh_data: Path) -> dict[str, dict[str, list[int]]]:
    path = dicmh_data.parent / "spec" / "diff-icmh-shapes.json"
    if not path.is_file():
        pytest.skip("there is no list of official shapes beside DICMH_DATA")
    return json.loads(path.read_text())


@pytest.mark.parametrize("part", COUNTS)
def test_official_keys_at_full_width_are_the_keys_of_our_modules(
    part: Part, official_shapes: dict[str, dict[str, list[int]]]
) -> None:
    shapes = official_shapes[OFFICIAL_PREFIXES[part].removesuffix(".")]
    assert len(shapes) == COUNTS[part]
    official = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    ours = to_ours(part, official)
    state = build(part, RestorerConfig()).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in state.items()}
    assert {k: list(v.shape) for k, v in to_official(part, ours).items()} == shapes


@pytest.mark.parametrize("part", ["unet", "control"])
@pytest.mark.parametrize(
    ("widths", "layers"), [((32,), 1), ((32, 48), 1), ((32, 64, 64), 3), ((32, 32, 32, 32, 32), 2)]
)
def test_any_number_of_levels_and_layers_goes_out_and_comes_back(
    part: Part, widths: tuple[int, ...], layers: int
) -> None:
    config = RestorerConfig(block_widths=widths, layers_per_block=layers, context_channels=16)
    state = build(part, config).state_dict()
    official = to_official(part, state)
    assert len(official) == len(state)
    back = to_ours(part, official)
    assert list(back) == list(state)
    assert all(back[key].shape == value.shape for key, value in state.items())


def test_values_travel_unchanged() -> None:
    vae = AutoencoderKL(block_out_channels=(32,), layers_per_block=1)
    state = vae.state_dict()
    official = to_official("vae", state)
    assert official["decoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    assert official["decoder.mid.attn_1.q.bias"].shape == (32,)
    for key, value in to_ours("vae", official).items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_names_of_the_specification_table() -> None:
    for official, ours in {
        "time_embed.2.bias": "time_embedding.linear_2.bias",
        "input_blocks.0.0.weight": "conv_in.weight",
        "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
        "input_blocks.8.1.norm.bias": "down_blocks.2.attentions.1.norm.bias",
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "middle_block.2.emb_layers.1.weight": "mid_block.resnets.1.time_emb_proj.weight",
        "output_blocks.2.1.conv.bias": "up_blocks.0.upsamplers.0.conv.bias",
        "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
        "output_blocks.11.1.proj_in.weight": "up_blocks.3.attentions.2.proj_in.weight",
        "out.2.weight": "conv_out.weight",
    }.items():
        assert unet_key(official) == ours
        assert unet_key_official(ours) == official
    assert control_key("dec_zero_convs_out.11.0.bias") == "zero_up.11.bias"
    assert control_key("control_model.out.0.bias") == "encoder.conv_norm_out.bias"
    assert vae_key("decoder.up.3.block.0.nin_shortcut.bias") == (
        "decoder.up_blocks.0.resnets.0.conv_shortcut.bias"
    )


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("unet", "label_emb.0.weight"),
        ("unet", "input_blocks.3.1.op.weight"),
        ("unet", "input_blocks.1.0.new_layers.0.weight"),
        ("unet", "output_blocks.1.2.conv.weight"),
        ("unet", ""),
        ("control", "time_embed.0.weight"),
        ("control", "enc_zero_convs_out.0.1.weight"),
        ("vae", "loss.logvar"),
        ("vae", "encoder.up.0.upsample.conv.weight"),
        ("vae", "encoder.mid.attn_2.q.weight"),
    ],
)
def test_a_key_that_no_rule_explains_is_named(part: Part, key: str) -> None:
    value = torch.zeros(1)
    with pytest.raises(WeightsError, match="is no key of this part") as raised:
        to_ours(part, {key: value})
    assert repr(key) in str(raised.value)
    with pytest.raises(WeightsError, match="is no key of this part"):
        to_official(part, {key or "nothing": value})


@pytest.mark.parametrize(
    "inverse", [unet_key_official, control_key_official, vae_key_official], ids=lambda f: f.__name__
)
def test_names_of_neither_side_are_key_errors(inverse) -> None:
    for key in (
        "a",
        "down_blocks.0.resnets.0.conv9.weight",
        "encoder.mid_block.resnets.7.x.weight",
    ):
        with pytest.raises(KeyError):
            inverse(key)
