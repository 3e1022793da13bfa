"""Parameter names of the official program <-> ours, for the U-Net, the control branch and the VAE.

The official code numbers the blocks of its U-Net in one row, ``input_blocks.0`` to
``output_blocks.11``; diffusers nests them by level. The values are the same but for the attention of
the VAE, whose 1x1 convolutions are linear layers here. Both directions are bijections: a key that no
rule explains is an error that names it, and nothing is dropped.

    part      prefix in the official checkpoint    keys at full width
    unet      model.diffusion_model.               686
    control   control_model.                       349
    vae       first_stage_model.                   248

The functions take keys without that prefix.
"""

import re
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from dicmh_ray.errors import WeightsError

Part = Literal["unet", "control", "vae"]

OFFICIAL_PREFIXES: dict[Part, str] = {
    "unet": "model.diffusion_model.",
    "control": "control_model.",
    "vae": "first_stage_model.",
}
"""What the keys of each part begin with in the official checkpoint."""

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_VAE_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {ours: official for official, ours in names.items()}


_RESNET_INVERSE = _inverse(_RESNET)
_UNET_ENDS_INVERSE = _inverse(_UNET_ENDS)
_MIDDLE_INVERSE = _inverse(_MIDDLE)
_VAE_RESNET_INVERSE = _inverse(_VAE_RESNET)
_VAE_ATTENTION_INVERSE = _inverse(_VAE_ATTENTION)
_VAE_MIDDLE_INVERSE = _inverse(_VAE_MIDDLE)


def unet_key(name: str, *, layers_per_block: int = 2) -> str:
    """Official U-Net key -> diffusers' key, both without prefix.

    Raises:
        KeyError: no rule explains the name.
    """
    module, _, leaf = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    row = layers_per_block + 1
    if match := re.fullmatch(r"input_blocks\.(\d+)\.([01])\.(.+)", name):
        level, number = divmod(int(match[1]) - 1, row)
        block = f"down_blocks.{level}"
        if number == layers_per_block:
            if match[2] == "0" and match[3].startswith("op."):
                return f"{block}.downsamplers.0.conv.{match[3].removeprefix('op.')}"
            raise KeyError(name)
        return _unet_block(name, block, match[2], str(number), match[3])
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        kind, _, index = _MIDDLE[match[1]].partition(".")
        place = "1" if kind == "attentions" else "0"
        return _unet_block(name, "mid_block", place, index, match[2])
    if match := re.fullmatch(r"output_blocks\.(\d+)\.([012])\.(.+)", name):
        level, number = divmod(int(match[1]), row)
        block = f"up_blocks.{level}"
        # The coarsest level has no attention, so its upsampler is second in its block, else third.
        if match[3].startswith("conv.") and match[2] == _upsampler_place(level):
            if number == layers_per_block:
                return f"{block}.upsamplers.0.{match[3]}"
            raise KeyError(name)
        return _unet_block(name, block, match[2], str(number), match[3])
    raise KeyError(name)


def unet_key_official(name: str, *, layers_per_block: int = 2) -> str:
    """The inverse of :func:`unet_key`."""
    module, _, leaf = name.rpartition(".")
    if module in _UNET_ENDS_INVERSE:
        return f"{_UNET_ENDS_INVERSE[module]}.{leaf}"
    row = layers_per_block + 1
    if match := re.fullmatch(r"mid_block\.((?:resnets|attentions)\.\d)\.(.+)", name):
        return f"middle_block.{_MIDDLE_INVERSE[match[1]]}.{_official_inner(match[1], match[2])}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.([a-z]+)\.(\d+)\.(.+)", name):
        direction, level, kind, number, inner = match[1], int(match[2]), *match.group(3, 4, 5)
        if kind == "downsamplers" and direction == "down" and inner.startswith("conv."):
            return f"input_blocks.{(level + 1) * row}.0.op.{inner.removeprefix('conv.')}"
        if kind == "upsamplers" and direction == "up":
            return f"output_blocks.{level * row + row - 1}.{_upsampler_place(level)}.{inner}"
        if kind in ("resnets", "attentions"):
            block, first = ("input", 1) if direction == "down" else ("output", 0)
            index = first + level * row + int(number)
            place = int(kind == "attentions")
            return f"{block}_blocks.{index}.{place}.{_official_inner(kind, inner)}"
    raise KeyError(name)


def _upsampler_place(level: int) -> str:
    return "1" if level == 0 else "2"


def _unet_block(name: str, block: str, place: str, number: str, inner: str) -> str:
    if place == "1":
        return f"{block}.attentions.{number}.{inner}"
    module, _, leaf = inner.rpartition(".")
    if place == "0" and module in _RESNET:
        return f"{block}.resnets.{number}.{_RESNET[module]}.{leaf}"
    raise KeyError(name)


def _official_inner(kind: str, inner: str) -> str:
    if kind.startswith("attentions"):
        return inner
    module, _, leaf = inner.rpartition(".")
    return f"{_RESNET_INVERSE[module]}.{leaf}"


def control_key(name: str, *, layers_per_block: int = 2) -> str:
    """Official control key -> key of :class:`.control.ControlBranch`.

    Raises:
        KeyError: no rule explains the name.
    """
    if name == "scale_list":
        return name
    if name.startswith("control_model."):
        inner = name.removeprefix("control_model.")
        return "encoder." + unet_key(inner, layers_per_block=layers_per_block)
    if match := re.fullmatch(r"(enc|dec)_zero_convs_out\.(\d+)\.0\.(weight|bias)", name):
        return f"zero_{'down' if match[1] == 'enc' else 'up'}.{match[2]}.{match[3]}"
    if match := re.fullmatch(r"middle_block_out\.0\.(weight|bias)", name):
        return f"zero_middle.{match[1]}"
    raise KeyError(name)


def control_key_official(name: str, *, layers_per_block: int = 2) -> str:
    """The inverse of :func:`control_key`."""
    if name == "scale_list":
        return name
    if name.startswith("encoder."):
        inner = name.removeprefix("encoder.")
        return "control_model." + unet_key_official(inner, layers_per_block=layers_per_block)
    if match := re.fullmatch(r"zero_(down|up)\.(\d+)\.(weight|bias)", name):
        return f"{'enc' if match[1] == 'down' else 'dec'}_zero_convs_out.{match[2]}.0.{match[3]}"
    if match := re.fullmatch(r"zero_middle\.(weight|bias)", name):
        return f"middle_block_out.0.{match[1]}"
    raise KeyError(name)


def vae_key(name: str, *, levels: int = 4) -> str:
    """Official VAE key -> key of diffusers' ``AutoencoderKL``; the decoder's levels are reversed.

    Raises:
        KeyError: no rule explains the name.
    """
    if re.fullmatch(r"(post_)?quant_conv\.(weight|bias)", name):
        return name
    if match := re.fullmatch(r"(encoder|decoder)\.(.+)", name):
        side, inner = match[1], match[2]
        if re.fullmatch(r"conv_(in|out)\.(weight|bias)", inner):
            return name
        if inner.startswith("norm_out."):
            return f"{side}.conv_{inner}"
        if match := re.fullmatch(r"mid\.(block_1|attn_1|block_2)\.(\w+)\.(weight|bias)", inner):
            names = _VAE_ATTENTION if match[1] == "attn_1" else _VAE_RESNET
            return f"{side}.mid_block.{_VAE_MIDDLE[match[1]]}.{names[match[2]]}.{match[3]}"
        way, blocks = ("down", "down_blocks") if side == "encoder" else ("up", "up_blocks")
        if match := re.fullmatch(way + r"\.(\d+)\.(.+)", inner):
            level = int(match[1]) if way == "down" else levels - 1 - int(match[1])
            block, rest = f"{side}.{blocks}.{level}", match[2]
            if match := re.fullmatch(way + r"sample\.conv\.(weight|bias)", rest):
                return f"{block}.{way}samplers.0.conv.{match[1]}"
            if match := re.fullmatch(r"block\.(\d+)\.(\w+)\.(weight|bias)", rest):
                return f"{block}.resnets.{match[1]}.{_VAE_RESNET[match[2]]}.{match[3]}"
    raise KeyError(name)


def vae_key_official(name: str, *, levels: int = 4) -> str:
    """The inverse of :func:`vae_key`."""
    if re.fullmatch(r"(post_)?quant_conv\.(weight|bias)", name):
        return name
    if match := re.fullmatch(r"(encoder|decoder)\.(.+)", name):
        side, inner = match[1], match[2]
        if re.fullmatch(r"conv_(in|out)\.(weight|bias)", inner):
            return name
        if inner.startswith("conv_norm_out."):
            return f"{side}.{inner.removeprefix('conv_')}"
        if match := re.fullmatch(
            r"mid_block\.((?:resnets|attentions)\.\d)\.(.+)\.(weight|bias)", inner
        ):
            attention = match[1].startswith("attentions")
            names = _VAE_ATTENTION_INVERSE if attention else _VAE_RESNET_INVERSE
            return f"{side}.mid.{_VAE_MIDDLE_INVERSE[match[1]]}.{names[match[2]]}.{match[3]}"
        way = "down" if side == "encoder" else "up"
        if match := re.fullmatch(way + r"_blocks\.(\d+)\.(.+)", inner):
            level = int(match[1]) if way == "down" else levels - 1 - int(match[1])
            block, rest = f"{side}.{way}.{level}", match[2]
            if match := re.fullmatch(way + r"samplers\.0\.conv\.(weight|bias)", rest):
                return f"{block}.{way}sample.conv.{match[1]}"
            if match := re.fullmatch(r"resnets\.(\d+)\.(\w+)\.(weight|bias)", rest):
                return f"{block}.block.{match[1]}.{_VAE_RESNET_INVERSE[match[2]]}.{match[3]}"
    raise KeyError(name)


def to_ours(part: Part, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's official state (keys without prefix) -> the state of our module.

    The tensors are the given ones or views of them; numbers of levels and of layers are read from
    the keys.

    Raises:
        WeightsError: a key that belongs to no such part, or two that mean the same.
    """
    rename = _renaming(part, official, to_official=False)
    state = _renamed(part, official, rename)
    if part == "vae":
        for key in filter(_is_vae_projection, state):
            if state[key].ndim == 4:
                state[key] = state[key][:, :, 0, 0]
    return state


def to_official(part: Part, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`to_ours`, shapes included.

    Raises:
        WeightsError: as there.
    """
    rename = _renaming(part, ours, to_official=True)
    reshaped = dict(ours)
    if part == "vae":
        for key in filter(_is_vae_projection, reshaped):
            if reshaped[key].ndim == 2:
                reshaped[key] = reshaped[key][:, :, None, None]
    return _renamed(part, reshaped, rename)


def _is_vae_projection(key: str) -> bool:
    return re.search(r"attentions\.0\.to_(q|k|v|out\.0)\.weight$", key) is not None


def _renamed(
    part: Part, state: Mapping[str, Tensor], rename: Callable[[str], str]
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        try:
            target = rename(key)
        except KeyError:
            raise WeightsError(part, f"{key!r} is no key of this part") from None
        if target in renamed:
            raise WeightsError(part, f"{key!r} and another key both mean {target!r}")
        renamed[target] = value
    return renamed


def _renaming(
    part: Part, state: Mapping[str, Tensor], *, to_official: bool
) -> Callable[[str], str]:
    """The key map of a part with as many levels and layers as ``state`` shows."""
    if part == "vae":
        pattern = r"decoder\.up(?:_blocks)?\.(\d+)\."
        levels = 1 + max(_numbers(pattern, state), default=3)
        vae_map = vae_key_official if to_official else vae_key
        return lambda key: vae_map(key, levels=levels)
    if to_official:
        layers = 1 + max(
            _numbers(r"(?:encoder\.)?down_blocks\.0\.resnets\.(\d+)\.", state), default=1
        )
    else:
        blocks = _numbers(r"(?:control_model\.)?input_blocks\.(\d+)\.0\.in_layers\.", state)
        samplers = _numbers(r"(?:control_model\.)?input_blocks\.(\d+)\.0\.op\.", state)
        # A first level of n blocks, 1 to n, ends in its downsampler; a single level has none.
        layers = min(samplers) - 1 if samplers else max(blocks, default=2)
    if part == "control":
        control_map = control_key_official if to_official else control_key
        return lambda key: control_map(key, layers_per_block=layers)
    unet_map = unet_key_official if to_official else unet_key
    return lambda key: unet_map(key, layers_per_block=layers)


def _numbers(pattern: str, state: Mapping[str, Tensor]) -> set[int]:
    """What the group of ``pattern`` matches at the beginning of the keys."""
    return {int(match[1]) for match in (re.match(pattern, key) for key in state) if match}
