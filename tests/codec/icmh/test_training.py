"""Training of Diff-ICMH on a few synthetic photographs: what moves, what stays, what is kept."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dicmh_ray.codec import load_codec, read_checkpoint
from dicmh_ray.codec.icmh import presets
from dicmh_ray.codec.icmh.parts import Parts
from dicmh_ray.codec.icmh.presets import ICMH_PRESETS, train_icmh
from dicmh_ray.codec.icmh.text import train_tokenizer
from dicmh_ray.codec.icmh.training import CodecStage, IcmhOptions, PriorStage
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.codec.stage import Losses, Stage
from dicmh_ray.errors import SourceFormatError, WeightsError
from tests.codec.icmh.tiny_codec import (
    TINY,
    WORDS,
    photograph,
    tiny_parts,
    write_pack,
    write_tiny_checkpoint,
)

CPU = torch.device("cpu")

QUICK = IcmhOptions(
    steps=3, batch=2, crop=64, learning_rate=1e-3, weight_decay=0.0, ema=0.9, report_steps=1
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> PackedPhotographs:
    return write_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(WORDS, folder, size=TINY.text.vocabulary_size)
    return folder


@pytest.fixture
def parts(tokenizer: Path) -> Parts:
    return tiny_parts(tokenizer)


def weights(parts: Parts) -> dict[str, dict[str, Tensor]]:
    return {
        name: {k: v.clone() for k, v in module.state_dict().items()}
        for name, module in parts.modules().items()
    }


def changed(before: dict[str, dict[str, Tensor]], parts: Parts) -> set[str]:
    """Names of the modules of which a weight is another."""
    return {
        name
        for name, state in weights(parts).items()
        if any(not torch.equal(value, before[name][key]) for key, value in state.items())
    }


def lines(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def step_losses(stage: Stage) -> Losses:
    losses: Losses = stage.forward_module()(*stage.draw(0, np.random.default_rng(3)))
    return losses


@pytest.mark.parametrize(
    ("kind", "trained", "log", "terms"),
    [
        (PriorStage, {"unet", "text"}, "prior.jsonl", {"diffusion"}),
        (
            CodecStage,
            {"latent_coder", "control"},
            "codec.jsonl",
            {"bpp", "rounded_bpp", "distortion", "quantiles", "diffusion", "semantic"},
        ),
    ],
)
def test_a_stage_trains_its_own_parts_and_leaves_averages(
    photographs: PackedPhotographs,
    parts: Parts,
    tmp_path: Path,
    kind: type[PriorStage] | type[CodecStage],
    trained: set[str],
    log: str,
    terms: set[str],
) -> None:
    before = weights(parts)
    told: list[dict[str, float]] = []
    stage = kind(parts, photographs, tmp_path, QUICK, CPU)
    stage.run(told.append)
    assert not any(module.training for module in stage.trained.values())
    assert changed(before, parts) == trained
    for name in trained:
        saved = load_file(tmp_path / log.replace("jsonl", "safetensors"))
        for key, value in parts.modules()[name].state_dict().items():
            if value.numel():
                assert torch.equal(value, saved[f"average/{name}/{key}"])
        raw = [key for key in saved if key.startswith(f"module/{name}/")]
        assert any(not torch.equal(saved[k], saved[k.replace("module", "average")]) for k in raw)
    assert [line["step"] for line in told] == [1, 2, 3]
    assert lines(tmp_path, log) == told
    assert set(told[0]) == {"step", "seconds", "learning_rate"} | terms
    assert all(np.isfinite(list(line.values())).all() for line in told)


@pytest.mark.parametrize("kind", [PriorStage, CodecStage])
def test_a_stopped_stage_goes_on_exactly_where_it_was_saved(
    photographs: PackedPhotographs,
    tokenizer: Path,
    tmp_path: Path,
    kind: type[PriorStage] | type[CodecStage],
) -> None:
    first = kind(tiny_parts(tokenizer), photographs, tmp_path, QUICK, CPU)
    first.run()
    (state,) = tmp_path.glob("*.safetensors")
    saved = load_file(state)
    longer = dataclasses.replace(QUICK, steps=5)
    second = kind(tiny_parts(tokenizer, seed=1), photographs, tmp_path, longer, CPU)
    assert second.step == 3
    for name, module in second.trained.items():
        for key, value in module.state_dict().items():
            if value.numel():
                assert torch.equal(value, saved[f"module/{name}/{key}"])
                assert torch.equal(
                    second.averages[name].tensors[key], saved[f"average/{name}/{key}"]
                )
    for one, other in zip(first.optimisers, second.optimisers, strict=True):
        one_state, other_state = one.state_dict()["state"], other.state_dict()["state"]
        assert one_state.keys() == other_state.keys()
        for index, moments in one_state.items():
            assert moments.keys() == other_state[index].keys()
            assert all(torch.equal(v, other_state[index][k]) for k, v in moments.items())
    second.run()
    assert second.step == 5


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_semantic_term_is_reported_whether_it_is_minimised_or_not(
    photographs: PackedPhotographs, parts: Parts, tmp_path: Path, weight: float
) -> None:
    options = dataclasses.replace(QUICK, semantic=weight)
    stage = CodecStage(parts, photographs, tmp_path, options, CPU)
    given, value = step_losses(stage)["semantic"]
    assert given == weight
    assert float(value.detach()) > 0
    assert value.requires_grad == bool(weight)
    if weight:
        value.backward()
        assert any(p.grad is not None and p.grad.any() for p in parts.latent_coder.parameters())
    assert parts.restorer is not None
    assert all(p.grad is None for p in parts.restorer.unet.parameters())


@pytest.mark.parametrize("time", ["zero", "random"])
def test_equal_latents_are_semantically_equal(
    photographs: PackedPhotographs,
    parts: Parts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    time: str,
) -> None:
    options = dataclasses.replace(QUICK, semantic_time=time, semantic_block=1)
    stage = CodecStage(parts, photographs, tmp_path, options, CPU)
    code = parts.latent_coder.forward

    def perfect(x: Tensor, z0: Tensor) -> object:
        return dataclasses.replace(code(x, z0), estimate=z0)

    monkeypatch.setattr(parts.latent_coder, "forward", perfect)
    losses = step_losses(stage)
    assert float(losses["semantic"][1]) == 0
    assert float(losses["distortion"][1]) == 0


def test_without_diffusion_the_control_branch_is_not_evaluated(
    photographs: PackedPhotographs, parts: Parts, tmp_path: Path
) -> None:
    assert parts.restorer is not None
    parts.restorer.initialise_control()
    before = weights(parts)
    options = dataclasses.replace(QUICK, diffusion=0.0)
    CodecStage(parts, photographs, tmp_path, options, CPU).run()
    assert changed(before, parts) == {"latent_coder"}
    assert "diffusion" not in lines(tmp_path, "codec.jsonl")[0]


def test_tags_are_dropped_for_guidance_as_often_as_wanted(
    photographs: PackedPhotographs, parts: Parts, tmp_path: Path
) -> None:
    assert parts.text is not None
    empty = parts.text.tokenize([""])[0]
    shares = {}
    for dropout in (0.0, 0.5, 1.0):
        options = dataclasses.replace(QUICK, tag_dropout=dropout)
        stage = CodecStage(parts, photographs, tmp_path, options, CPU)
        rng = np.random.default_rng(0)
        batches = [stage.draw(step, rng)[1] for step in range(40)]
        shares[dropout] = np.mean([bool((ids == empty).all()) for ids in batches])
    # A third of the photographs has no tags: a ninth of the batches of two has none anyway.
    assert shares[0.0] < 0.3
    assert 0.3 < shares[0.5] < 0.85
    assert shares[1.0] == 1


@pytest.mark.parametrize(
    ("learning_rate", "auxiliary_rate", "moves"),
    [(0.0, 1e-2, {"entropy_bottleneck.quantiles"}), (0.0, 0.0, set())],
)
def test_the_quantiles_have_an_optimiser_of_their_own(
    photographs: PackedPhotographs,
    parts: Parts,
    tmp_path: Path,
    learning_rate: float,
    auxiliary_rate: float,
    moves: set[str],
) -> None:
    options = dataclasses.replace(QUICK, learning_rate=learning_rate, auxiliary_rate=auxiliary_rate)
    stage = CodecStage(parts, photographs, tmp_path, options, CPU)
    quantiles = parts.latent_coder.entropy_bottleneck.quantiles
    groups = [
        [p for group in optimiser.param_groups for p in group["params"]]
        for optimiser in stage.optimisers
    ]
    assert not any(p is quantiles for p in groups[0])
    assert len(groups[1]) == 1
    assert groups[1][0] is quantiles
    before = {k: v.clone() for k, v in parts.latent_coder.state_dict().items()}
    stage.run()
    after = parts.latent_coder.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == moves


def test_a_preset_trains_to_a_checkpoint_that_codes(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack")
    found = train_icmh(
        pack, tmp_path, preset="diff-icmh-tiny", options=QUICK, prior=QUICK, device="cpu"
    )
    assert found.config["provenance"]["preset"] == "diff-icmh-tiny"
    assert b"Infinity" not in found.files["config.json"], "which is no JSON"
    assert found.teachers == read_checkpoint().teachers, "of the autoencoder that it has"
    codec = load_codec(tmp_path / "checkpoint", device="cpu")
    assert codec.codec_id == found.codec_id
    assert codec.views == ("machine", "human")
    image = photograph(70, 50)
    (data,) = codec.encode([image], tags=[("dog",)], exif_orientations=[1])
    for view in codec.views:
        assert codec.decode([data], view=view)[0].shape == image.shape
    again = train_icmh(
        pack, tmp_path, preset="diff-icmh-tiny", options=QUICK, prior=QUICK, device="cpu"
    )
    assert again.codec_id == found.codec_id, "a finished run is not trained on"
    longer = dataclasses.replace(QUICK, steps=4)
    more = train_icmh(
        pack, tmp_path, preset="diff-icmh-tiny", options=longer, prior=QUICK, device="cpu"
    )
    assert more.codec_id != found.codec_id
    assert [line["step"] for line in lines(tmp_path, "prior.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in lines(tmp_path, "codec.jsonl")] == [1, 2, 3, 4]


@pytest.fixture
def frozen_prior(monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset that is to ``diff-icmh`` what the tiny codec is to its checkpoint."""
    given = dataclasses.replace(
        ICMH_PRESETS["diff-icmh"], network=TINY, codec=QUICK, calibration_crops=1
    )
    monkeypatch.setattr(presets, "ICMH_PRESETS", {"frozen": given})
    return "frozen"


def test_a_run_can_begin_with_the_parts_of_a_checkpoint(
    photographs: PackedPhotographs, tiny_checkpoint: Path, tmp_path: Path, frozen_prior: str
) -> None:
    options = dataclasses.replace(QUICK, learning_rate=0.0, auxiliary_rate=0.0)
    train_icmh(
        photographs,
        tmp_path / "still",
        preset=frozen_prior,
        options=options,
        device="cpu",
        start_from=tiny_checkpoint,
    )
    train_icmh(
        photographs,
        tmp_path / "moved",
        preset=frozen_prior,
        device="cpu",
        start_from=tiny_checkpoint,
    )
    for part in ("unet", "text", "vae", "control", "latent_coder"):
        given, still, moved = (
            load_file(folder / f"{part}.safetensors")
            for folder in (
                tiny_checkpoint,
                tmp_path / "still/checkpoint",
                tmp_path / "moved/checkpoint",
            )
        )
        assert all(torch.equal(value, given[key]) for key, value in still.items()), part
        is_moved = any(not torch.equal(value, given[key]) for key, value in moved.items())
        assert is_moved == (part in ("control", "latent_coder")), part
    for name in ("vocab.json", "merges.txt"):
        path = Path("tokenizer", name)
        assert (tmp_path / "moved/checkpoint" / path).read_bytes() == (
            tiny_checkpoint / path
        ).read_bytes()


def test_a_preset_without_a_prior_needs_a_checkpoint_with_one(
    photographs: PackedPhotographs, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match="give one"):
        train_icmh(photographs, tmp_path, preset="diff-icmh", options=QUICK, device="cpu")
    write_tiny_checkpoint(tmp_path / "machine", has_human_view=False)
    for start_from in (tmp_path / "machine", "default"):
        with pytest.raises(WeightsError):
            train_icmh(
                photographs,
                tmp_path / "run",
                preset="diff-icmh",
                options=QUICK,
                device="cpu",
                start_from=start_from,
            )


@pytest.mark.parametrize("too_large", ["options", "prior"])
def test_photographs_below_a_crop_are_refused(
    photographs: PackedPhotographs, tmp_path: Path, too_large: str
) -> None:
    schedules = {"options": QUICK, "prior": QUICK}
    schedules[too_large] = dataclasses.replace(QUICK, crop=256)
    with pytest.raises(SourceFormatError, match="256 or more"):
        train_icmh(photographs, tmp_path, preset="diff-icmh-tiny", device="cpu", **schedules)


def test_a_run_of_another_shape_is_refused(
    photographs: PackedPhotographs, tokenizer: Path, tmp_path: Path
) -> None:
    CodecStage(tiny_parts(tokenizer), photographs, tmp_path, QUICK, CPU).run()
    coder = dataclasses.replace(TINY.latent_coder, z_channels=8)
    wider = tiny_parts(tokenizer, dataclasses.replace(TINY, latent_coder=coder))
    with pytest.raises(WeightsError, match="another shape"):
        CodecStage(wider, photographs, tmp_path, QUICK, CPU)


def train_as_one_of_two(rank: int, folder: str) -> None:
    """The body of a process; without the diffusion term the control branch has no gradient."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        for name, diffusion in (("whole", 1.0), ("without", 0.0)):
            checkpoint = train_icmh(
                PackedPhotographs(Path(folder, "pack")),
                Path(folder, name),
                preset="diff-icmh-tiny",
                options=dataclasses.replace(QUICK, diffusion=diffusion),
                prior=QUICK,
                device="cpu",
            )
            Path(folder, f"{name}-{rank}.txt").write_text(checkpoint.codec_id)
        # Gloo's threads abort a process that leaves while the other one still talks to it.
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_train_one_checkpoint(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack")
    torch.multiprocessing.spawn(train_as_one_of_two, args=(str(tmp_path),), nprocs=2)
    for name in ("whole", "without"):
        first, second = ((tmp_path / f"{name}-{rank}.txt").read_text() for rank in range(2))
        assert first == second
        assert [line["step"] for line in lines(tmp_path / name, "codec.jsonl")] == [1, 2, 3]
        assert load_codec(tmp_path / name / "checkpoint", device="cpu").codec_id == first
