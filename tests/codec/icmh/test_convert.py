"""Official weights become checkpoint directories and come back; whatever is wrong has a name."""

import hashlib
import itertools
import json
import math
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dicmh_ray.cli import app
from dicmh_ray.codec.checkpoint import read_checkpoint
from dicmh_ray.codec.icmh import convert, whole_files
from dicmh_ray.codec.icmh.config import (
    IcmhConfig,
    LatentCoderConfig,
    RestorerConfig,
    TextConfig,
    VaeConfig,
)
from dicmh_ray.codec.icmh.control import ControlledUNet
from dicmh_ray.codec.icmh.convert import convert_official, read_config, to_official
from dicmh_ray.codec.icmh.lfgcm import LatentCoder
from dicmh_ray.codec.icmh.official_parts import official_parts, old_bottleneck_name
from dicmh_ray.codec.icmh.parts import load_human_parts, load_machine_parts
from dicmh_ray.codec.icmh.text import TextEncoder, train_tokenizer
from dicmh_ray.codec.icmh.vae import Vae
from dicmh_ray.errors import WeightsError

SMALL = IcmhConfig(
    vae=VaeConfig(settings={"block_out_channels": [4, 4, 4, 8], "layers_per_block": 1}),
    latent_coder=LatentCoderConfig(
        encoder_widths=(4, 4, 6, 6),
        z_channels=8,
        y_channels=10,
        prior_channels=4,
        shared_channels=8,
        context_widths=(12, 8),
        slices=(2, 3, 5),
    ),
    restorer=RestorerConfig(
        block_widths=(8, 16, 16),
        layers_per_block=1,
        context_channels=16,
        head_width=4,
        control_head_width=2,
    ),
    text=TextConfig(width=16, layers=1, heads=2, feed_forward=32, vocabulary_size=600),
)
PARTS = {part.name: part for part in official_parts(SMALL)}
TEXT = "cond_stage_model.model."
CODEC, CONTROL = "preprocess_model.", "control_model."
BOTTLENECK = CODEC + "entropy_bottleneck."
UNREAD = {
    TEXT + "text_projection": (16, 16),
    TEXT + "logit_scale": (),
    TEXT + "transformer.resblocks.1.ln_1.weight": (16,),
}


def random(name, shape):
    """The values of a name: equal in every file that has it, unless ``name`` says whose."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    # Small enough that no activation overflows.
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state_of(*names, whose=""):
    """The official state dict of some parts, under the names of compressai 1.2.4."""
    return {
        part.prefix + old_bottleneck_name(name): random(whose + part.prefix + name, shape)
        for part in (PARTS[name] for name in names)
        for name, shape in part.shapes.items()
    }


def whole_state():
    state = state_of("latent_coder", "control", "unet", "vae", "text")
    for name in ("entropy_bottleneck._offset", "gaussian_conditional._cdf_length"):
        state[CODEC + name] = torch.zeros(0, dtype=torch.int32)
    return state


def lightning(state):
    """What Lightning saves, with all that the conversion leaves alone."""
    more = {
        "betas": torch.linspace(0, 1, 1000),
        "logvar": torch.zeros(1000),
        "preprocess_tag_model.model.visual_encoder.weight": torch.ones(7),
        "preprocess_tag_model.model.head.weight": torch.ones(3),
        **{key: torch.ones(shape) for key, shape in UNREAD.items()},
    }
    return {
        "epoch": 3,
        "global_step": 200_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": OrderedDict({**more, **state}),
        "callbacks": {"checkpoint": {"best_model_score": torch.tensor(0.5), "dirpath": "x"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": []}],
        "lr_schedulers": [],
    }


@pytest.fixture(autouse=True)
def _known_parts(monkeypatch):
    """Builds the small networks once: it takes longer than converting them."""
    monkeypatch.setattr(
        convert, "official_parts", lambda c: [*PARTS.values()] if c == SMALL else official_parts(c)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "model.ckpt"
    torch.save(lightning(whole_state()), path)
    return path


@pytest.fixture(scope="module")
def converted(model):
    folder = model.parent / "checkpoint"
    report = convert_official([model], folder, config=SMALL)
    return folder, report


def ckpt(path, state):
    torch.save({"state_dict": state}, path)
    return path


def refusal(path, state, **options):
    """The error that a state dict ends in; nothing is left on the disk."""
    source = path / "model.ckpt"
    save_file(state, source)  # is faster, and a file is what its bytes say
    with pytest.raises(WeightsError) as caught:
        convert_official([source], path / "out", config=SMALL, **options)
    assert os.listdir(path) == ["model.ckpt"]
    return str(caught.value)


def test_exactly_the_wanted_tensors_are_kept(converted):
    folder, report = converted
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "control.safetensors",
        "latent_coder.safetensors",
        "text.safetensors",
        "unet.safetensors",
        "vae.safetensors",
    ]
    assert report.renamed == 14
    assert report.overridden == 0
    assert report.dropped == {
        "betas": 1,
        "callbacks": 1,
        "epoch": 1,
        "global_step": 1,
        "logvar": 1,
        "lr_schedulers": 1,
        "optimizer_states": 1,
        "preprocess_tag_model.": 2,
        "pytorch-lightning_version": 1,
        **dict.fromkeys(UNREAD, 1),
    }
    assert report.missing == (
        "tables.safetensors",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "vocabulary.txt",
    )
    for name, part in report.parts.items():
        file = load_file(folder / f"{name}.safetensors")
        assert sum(tensor.numel() for tensor in file.values()) == part.num_parameters
        assert all(t.dtype in (torch.float32, torch.int32) for t in file.values())


def test_our_networks_load_what_was_written(converted, tmp_path):
    folder, _ = converted
    restorer = ControlledUNet(SMALL.restorer, 4)
    tokenizer = train_tokenizer(["cat", "dog"], tmp_path, size=600)
    for name, module in {
        "latent_coder": LatentCoder(SMALL.latent_coder),
        "control": restorer.control,
        "unet": restorer.unet,
        "vae": Vae(SMALL.vae).network,
        "text": TextEncoder(SMALL.text, tokenizer),
    }.items():
        module.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=True)


def test_all_fourteen_bottleneck_tensors_get_their_new_names_and_keep_their_values(converted):
    file = load_file(converted[0] / "latent_coder.safetensors")
    state = whole_state()
    old = {"matrices": "_matrix", "biases": "_bias", "factors": "_factor"}
    names = [
        f"{kind}.{n}" for kind, count in zip(old, (5, 5, 4), strict=True) for n in range(count)
    ]
    assert len(names) == 14
    for name in names:
        kind, _, number = name.partition(".")
        official = state[f"{BOTTLENECK}{old[kind]}{number}"]
        assert torch.equal(file[f"entropy_bottleneck.{name}"], official)


def test_new_names_of_the_bottleneck_are_as_welcome(tmp_path, converted):
    state = {
        part.prefix + name: random(part.prefix + name, shape)
        for part in PARTS.values()
        for name, shape in part.shapes.items()
    }
    report = convert_official([ckpt(tmp_path / "m", state)], tmp_path / "out", config=SMALL)
    assert report.renamed == 0
    for name in PARTS:
        found = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert found.keys() == load_file(converted[0] / f"{name}.safetensors").keys()
    name = "entropy_bottleneck.matrices.2"
    files = [folder / "latent_coder.safetensors" for folder in (tmp_path / "out", converted[0])]
    assert torch.equal(*(load_file(file)[name] for file in files))


@pytest.mark.parametrize("number", range(5))
def test_a_half_migrated_bottleneck_is_refused(tmp_path, number):
    state = whole_state()
    old = f"{BOTTLENECK}_matrix{number}"
    state[f"{BOTTLENECK}matrices.{number}"] = state.pop(old)
    message = refusal(tmp_path, state)
    assert "half migrated" in message
    assert f"{BOTTLENECK}matrices.{number}" in message


def test_a_bottleneck_with_both_names_of_a_tensor_is_refused(tmp_path):
    state = whole_state()
    state[f"{BOTTLENECK}factors.0"] = state[f"{BOTTLENECK}_factor0"].clone()
    assert "half migrated" in refusal(tmp_path, state)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("new_names", [False, True])
def test_there_and_back_is_equal_bit_for_bit(converted, tmp_path, suffix, new_names):
    output = tmp_path / f"back{suffix}"
    count = to_official(converted[0], output, new_names=new_names)
    if suffix == ".ckpt":
        found = torch.load(output, weights_only=True)["state_dict"]
    else:
        found = load_file(output)
    wanted = whole_state()
    assert count == len(wanted)
    if new_names:
        assert BOTTLENECK + "matrices.0" in found
        found = {old_bottleneck_name(key): tensor for key, tensor in found.items()}
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tensor.shape
        assert torch.equal(found[key].view(-1), tensor.view(-1)), key


def test_there_and_back_and_there_again_is_the_same_directory(converted, tmp_path):
    to_official(converted[0], tmp_path / "back.ckpt")
    convert_official([tmp_path / "back.ckpt"], tmp_path / "again", config=SMALL)
    for name in PARTS:
        first, second = (f / f"{name}.safetensors" for f in (converted[0], tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes()


def test_equal_weights_make_equal_directories_whatever_their_files_are_called(model, tmp_path):
    other = tmp_path / "renamed.bin"
    other.write_bytes(model.read_bytes())
    for source, name in [(model, "a"), (other, "b")]:
        convert_official([source], tmp_path / name, config=SMALL, fp16=True)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_half_precision_spares_the_latent_coder(model, tmp_path):
    convert_official([model], tmp_path / "half", config=SMALL, fp16=True)
    state = whole_state()
    unet = load_file(tmp_path / "half" / "unet.safetensors")
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(unet["conv_in.weight"], state[key].half())
    for name in ("control", "vae", "text"):
        file = load_file(tmp_path / "half" / f"{name}.safetensors")
        assert {tensor.dtype for tensor in file.values()} == {torch.float16}
    coder = load_file(tmp_path / "half" / "latent_coder.safetensors")
    assert torch.equal(coder["f_c.0.weight"], state[CODEC + "f_c.0.weight"])
    assert to_official(tmp_path / "half", tmp_path / "back.safetensors") == len(state)


def test_a_value_that_half_precision_has_not_is_refused(tmp_path):
    state = whole_state()
    state["first_stage_model.decoder.conv_out.bias"][1] = 70_000.0
    message = refusal(tmp_path, state, fp16=True)
    assert "decoder.conv_out.bias" in message
    assert "torch.float16" in message


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
    state = whole_state()
    state[CODEC + "f_c.2.weight"][0, 0, 0, 0] = bad
    assert "'f_c.2.weight'" in refusal(tmp_path, state)


def test_the_file_with_the_latent_coder_wins_over_stable_diffusion(tmp_path):
    base = ckpt(tmp_path / "sd.ckpt", state_of("unet", "vae", "text", whose="sd"))
    own = {**state_of("latent_coder", "control"), **state_of("vae")}
    save_file(own, tmp_path / "model.safetensors")
    for order, name in [((0, 1), "a"), ((1, 0), "b")]:
        sources = [[base, tmp_path / "model.safetensors"][n] for n in order]
        report = convert_official(sources, tmp_path / name, config=SMALL)
        assert report.overridden == len(PARTS["vae"].shapes)
        assert [path.name for path in report.sources] == ["sd.ckpt", "model.safetensors"]
    for name in ("a", "b"):
        vae = load_file(tmp_path / name / "vae.safetensors")
        unet = load_file(tmp_path / name / "unet.safetensors")
        key = "first_stage_model.encoder.conv_in.weight"
        assert torch.equal(vae["encoder.conv_in.weight"], own[key])
        expected = random("sdmodel.diffusion_model.out.2.bias", (4,))
        assert torch.equal(unet["conv_out.bias"], expected)


def test_of_two_files_without_a_latent_coder_the_later_wins(tmp_path):
    paths = [ckpt(tmp_path / whose, state_of("unet", "vae", "text", whose=whose)) for whose in "pq"]
    own = ckpt(tmp_path / "model.ckpt", state_of("latent_coder", "control"))
    convert_official([own, *paths], tmp_path / "out", config=SMALL)
    unet = load_file(tmp_path / "out" / "unet.safetensors")
    assert torch.equal(unet["conv_out.bias"], random("qmodel.diffusion_model.out.2.bias", (4,)))


def test_two_latent_coders_are_refused(tmp_path, model):
    other = ckpt(tmp_path / "other.ckpt", state_of("latent_coder"))
    with pytest.raises(WeightsError, match="both have a latent coder"):
        convert_official([model, other], tmp_path / "out", config=SMALL)


@pytest.mark.parametrize(
    "key",
    [
        CODEC + "decoder.g_s4.bias",
        CODEC + "gaussian_conditional.scale_table",
        CONTROL + "scale_list",
        CONTROL + "enc_zero_convs_out.2.0.weight",
        "model.diffusion_model.time_embed.2.bias",
        "first_stage_model.quant_conv.weight",
        TEXT + "transformer.resblocks.0.attn.in_proj_weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path, key):
    state = whole_state()
    del state[key]
    assert f"{key!r} is missing" in refusal(tmp_path, state)


def test_a_missing_bottleneck_tensor_is_named(tmp_path):
    state = whole_state()
    del state[f"{BOTTLENECK}_bias4"]
    assert f"'{BOTTLENECK}biases.4' is missing" in refusal(tmp_path, state)


@pytest.mark.parametrize(
    "key",
    [
        CODEC + "encoder.g_a7.weight",
        CONTROL + "input_hint_block.0.weight",
        "model.diffusion_model.input_blocks.12.0.weight",
        TEXT + "transformer.resblocks.2.ln_1.weight",
    ],
)
def test_an_unexpected_tensor_of_a_part_is_named(tmp_path, key):
    message = refusal(tmp_path, {**whole_state(), key: torch.ones(1)})
    assert f"{key!r} is unexpected" in message


def test_a_tensor_that_nobody_explained_is_refused_until_it_is(tmp_path):
    state = {**whole_state(), "aux_net.weight": torch.ones(1), "aux_net.bias": torch.ones(1)}
    message = refusal(tmp_path, state)
    assert "'aux_net.bias' is of no part of the codec" in message
    assert "1 more" in message
    source = tmp_path / "model.ckpt"
    report = convert_official(
        [source], tmp_path / "out", config=SMALL, drop=["aux_net."], dry_run=True
    )
    assert report.dropped["aux_net."] == 2


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (CODEC + "encoder.g_a6.weight", (12, 6, 3, 3)),
        ("model.diffusion_model.out.2.weight", (4, 9, 3, 3)),
        (TEXT + "positional_embedding", (76, 16)),
        (BOTTLENECK + "_matrix1", (9, 3, 3)),
        (CODEC + "entropy_bottleneck.quantiles", (8, 1, 2)),
    ],
)
def test_a_wrong_width_is_named_with_what_was_found_and_wanted(tmp_path, key, shape):
    state = whole_state()
    wanted = list(state[key].shape)
    state[key] = torch.zeros(shape)
    message = refusal(tmp_path, state)
    assert f"is {list(shape)}, wanted {wanted}" in message
    assert key.rpartition("._")[0] in message


def test_a_control_branch_of_another_ratio_is_recognised(tmp_path):
    state = whole_state()
    key = CONTROL + "control_model.input_blocks.0.0.weight"
    state[key] = torch.zeros(2, 8, 3, 3)
    message = refusal(tmp_path, state)
    assert f"{key!r} is [2, 8, 3, 3], wanted [8, 8, 3, 3]" in message
    assert "0.25 times as wide as the U-Net: control_model_ratio" in message


def test_the_public_configuration_s_ratio_is_recognised_at_full_width(reference, tmp_path):
    shapes = reference.parent / "spec" / "diff-icmh-shapes.json"
    if not shapes.is_file():
        pytest.skip("no list of the official shapes beside the reference tensors")
    state = {
        f"{prefix.removesuffix('_r0.2')}.{name}": torch.zeros(()).expand(shape)
        for prefix, part in json.loads(shapes.read_text()).items()
        if prefix != "control_model"
        for name, shape in part.items()
    }
    torch.save(state, tmp_path / "model.ckpt")
    with pytest.raises(WeightsError, match=r"is 0\.2 times as wide .* has 1\.0"):
        convert_official([tmp_path / "model.ckpt"], tmp_path / "out")


def test_the_official_shapes_are_accepted_at_full_width(reference, tmp_path):
    shapes = reference.parent / "spec" / "diff-icmh-shapes.json"
    if not shapes.is_file():
        pytest.skip("no list of the official shapes beside the reference tensors")
    state = {
        f"{prefix}.{old_bottleneck_name(name)}": torch.zeros(()).expand(shape)
        for prefix, part in json.loads(shapes.read_text()).items()
        if not prefix.endswith("_r0.2")
        for name, shape in part.items()
    }
    torch.save(state, tmp_path / "model.ckpt")
    report = convert_official([tmp_path / "model.ckpt"], tmp_path / "out", dry_run=True)
    assert report.renamed == 14
    assert {name: part.num_tensors for name, part in report.parts.items()} == {
        "latent_coder": 563,
        "control": 349,
        "unet": 686,
        "vae": 248,
        "text": 280,
    }
    assert report.parts["control"].num_parameters == 374_019_200 + 25  # and scale_list
    assert report.parts["unet"].num_parameters == 865_910_724
    assert report.parts["vae"].num_parameters == 83_653_863
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "advice"), [("control", "model.ckpt of Diff-ICMH"), ("text", "2.1-base")]
)
def test_a_missing_part_is_told_with_where_it_comes_from(tmp_path, part, advice):
    state = state_of(*(name for name in PARTS if name != part))
    message = refusal(tmp_path, state)
    assert f"no tensor begins with {PARTS[part].prefix!r}" in message
    assert advice in message


def test_weights_that_are_no_floats_are_refused(tmp_path):
    state = whole_state()
    state[CODEC + "f_c.0.bias"] = torch.zeros(4, dtype=torch.int64)
    assert "'preprocess_model.f_c.0.bias' is of type torch.int64" in refusal(tmp_path, state)


def test_tables_of_an_updated_model_are_left_out(tmp_path, converted):
    state = whole_state()
    state[CODEC + "entropy_bottleneck._quantized_cdf"] = torch.ones(8, 20, dtype=torch.int32)
    state[CODEC + "gaussian_conditional.scale_table"] = torch.ones(64)
    convert_official([ckpt(tmp_path / "m.ckpt", state)], tmp_path / "out", config=SMALL)
    file = load_file(tmp_path / "out" / "latent_coder.safetensors")
    assert file["entropy_bottleneck._quantized_cdf"].shape == (0,)
    assert file["gaussian_conditional.scale_table"].shape == (0,)


def test_tensors_that_repeat_or_skip_memory_are_written_out(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {
        "repeated": torch.ones(()).expand(3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "skipping": torch.arange(6.0)[::2],
        "single": torch.tensor(2.5),
        "repeated once": torch.ones(()).expand(1),
        "none": torch.zeros(0, dtype=torch.int32),
    }
    whole_files.write_safetensors(path, tensors, lambda *_: None)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


def test_half_precision_sources_are_widened(tmp_path):
    state = {
        key: tensor.half() if tensor.is_floating_point() else tensor
        for key, tensor in whole_state().items()
    }
    convert_official([ckpt(tmp_path / "m.ckpt", state)], tmp_path / "out", config=SMALL)
    unet = load_file(tmp_path / "out" / "unet.safetensors")
    expected = state["model.diffusion_model.out.2.bias"].float()
    assert torch.equal(unet["conv_out.bias"], expected)


def test_the_configuration_records_shapes_and_digests_and_nothing_of_the_place(converted, model):
    folder, report = converted
    content = json.loads((folder / "config.json").read_text())
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert report.source_sha256 == (digest,)
    assert content["codec"] == "diff-icmh"
    assert content["provenance"] == {
        "converted_from": [{"bytes": model.stat().st_size, "sha256": digest}],
        "precision": "float32",
    }
    assert read_config(folder) == SMALL
    assert read_config(folder / "config.json") == SMALL


def test_tokenizer_and_vocabulary_travel_along(model, tmp_path):
    train_tokenizer(["cat", "dog"], tmp_path / "tokenizer", size=600)
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    report = convert_official(
        [model],
        tmp_path / "out",
        config=SMALL,
        tokenizer=tmp_path / "tokenizer",
        vocabulary=tmp_path / "words.txt",
    )
    assert report.missing == ("tables.safetensors",)
    assert (tmp_path / "out" / "vocabulary.txt").read_text() == "cat\ndog\n"
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").is_file()


@pytest.fixture(scope="module")
def extras(tmp_path_factory):
    """A tokenizer, a list of words and photographs."""
    folder = tmp_path_factory.mktemp("extras")
    train_tokenizer(["cat", "dog"], folder / "tokenizer", size=600)
    (folder / "words.txt").write_text("cat\ndog\n")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for n in range(2):
        picture = rng.integers(0, 256, (70, 140, 3), np.uint8)
        Image.fromarray(picture).save(folder / "photos" / f"{n}.png")
    Image.fromarray(picture[:32]).save(folder / "photos" / "small.png")
    (folder / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def program(*arguments):
    result = CliRunner().invoke(app, ["convert", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_program_makes_a_checkpoint_that_loads_whole_and_goes_back(converted, model, extras):
    folder = extras / "checkpoint"
    result = program(
        model, "-o", folder, "--config", converted[0], "--fp16", "--json",
        "--tokenizer", extras / "tokenizer", "--vocabulary", extras / "words.txt",
        "--calibration", extras / "photos",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["missing"] == []
    assert facts["renamed"] == 14
    assert "left out of the calibration: broken" in result.stderr
    checkpoint = read_checkpoint(folder)
    parts = load_machine_parts(checkpoint)
    load_human_parts(checkpoint, parts)
    assert parts.config == SMALL
    wanted = whole_state()["first_stage_model.quant_conv.weight"].half().float()
    assert torch.equal(parts.vae.network.quant_conv.weight, wanted)
    result = program("--to-official", folder, "-o", extras / "back.ckpt")
    assert result.exit_code == 0, result.output
    assert result.stdout.split("\t")[1] == f"{len(whole_state())} tensors\n"


def test_tables_are_the_same_whenever_they_are_fitted(model, tmp_path, extras):
    picture = np.asarray(Image.open(extras / "photos" / "0.png"))
    for name in "ab":
        convert_official([model], tmp_path / name, config=SMALL, calibration=[picture])
    first, second = (tmp_path / name / "tables.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_the_program_tells_what_it_would_write(converted, model, tmp_path):
    result = program(model, "-o", tmp_path / "out", "--config", converted[0], "--dry-run")
    assert result.exit_code == 0, result.output
    assert "would write" in result.stdout
    assert "optimizer_states" in result.stdout
    assert "tables.safetensors" in result.stdout
    assert os.listdir(tmp_path) == []


def test_the_program_ends_in_one_line_when_weights_are_wrong(model, tmp_path):
    result = program(model, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: checkpoint {model}: ")
    assert result.stderr.count("\n") == 1
    assert program(tmp_path / "none.ckpt", "-o", tmp_path / "out").exit_code == 1


def test_the_program_refuses_both_directions_at_once_and_none(model, tmp_path):
    output = ("-o", tmp_path / "out")
    assert program(*output).exit_code == 2
    assert program(model, "--to-official", tmp_path, *output).exit_code == 2
    assert program("--to-official", tmp_path, "--fp16", *output).exit_code == 2


def test_a_dry_run_checks_and_writes_nothing(model, tmp_path):
    report = convert_official([model], tmp_path / "out", config=SMALL, dry_run=True)
    assert report.source_sha256 == ()
    assert report.parts["vae"].num_tensors == len(PARTS["vae"].shapes)
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_not_touched(model, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError, match="is there already"):
        convert_official([model], tmp_path / "out", config=SMALL)
    (tmp_path / "file.ckpt").write_text("mine")
    with pytest.raises(WeightsError, match="is there already"):
        to_official(tmp_path / "out", tmp_path / "file.ckpt")
    assert (tmp_path / "file.ckpt").read_text() == "mine"


@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_conversion_that_is_interrupted_leaves_nothing(model, tmp_path, after, monkeypatch):
    original, calls = whole_files.flush, []

    def flush(file):
        calls.append(file)
        if len(calls) == after:
            raise KeyboardInterrupt
        original(file)

    for module in (whole_files, convert):
        monkeypatch.setattr(module, "flush", flush)
    with pytest.raises(KeyboardInterrupt):
        convert_official([model], tmp_path / "out", config=SMALL)
    assert os.listdir(tmp_path) == []


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path):
    source = ckpt(tmp_path / "model.ckpt", whole_state())

    def touch(doing, done, total):
        os.utime(source, ns=(1, 1))

    with pytest.raises(WeightsError, match="changed during the conversion"):
        convert_official([source], tmp_path / "out", config=SMALL, report=touch)
    assert os.listdir(tmp_path) == ["model.ckpt"]


def test_a_disk_without_room_is_told_before_anything_is_read(model, tmp_path, monkeypatch):
    class Usage:
        free = 100

    monkeypatch.setattr(whole_files.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(WeightsError, match=r"needs 0\.0 GiB, 0\.0 GiB are free"):
        convert_official([model], tmp_path / "out", config=SMALL)
    assert os.listdir(tmp_path) == []


def test_progress_ends_at_the_total(model, tmp_path):
    seen = []
    convert_official([model], tmp_path / "out", config=SMALL, report=lambda *x: seen.append(x))
    assert {doing for doing, _, _ in seen} == {"reading", "writing"}
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(seen))
    assert seen[-1][1] == seen[-1][2]


def test_an_autoencoder_without_an_official_form_is_refused(model, tmp_path):
    tiny = IcmhConfig(vae=VaeConfig(kind="tiny", settings={}))
    with pytest.raises(WeightsError, match="'kl'"):
        convert_official([model], tmp_path / "out", config=tiny)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"codec": "layered"}', '{"network": {"vae": 1}}']
)
def test_a_configuration_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(WeightsError):
        read_config(path)


def test_a_damaged_directory_does_not_go_back(converted, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in converted[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    unet = load_file(folder / "unet.safetensors")
    del unet["conv_out.bias"]
    save_file(unet, folder / "unet.safetensors")
    with pytest.raises(WeightsError, match=r"'out\.2\.bias' is missing"):
        to_official(folder, tmp_path / "back.ckpt")
    with pytest.raises(WeightsError, match="wanted a name that ends in"):
        to_official(converted[0], tmp_path / "back.bin")
    assert Path(tmp_path / "back.ckpt").exists() is False
