"""The official sampler to the last digit; the faster ones against diffusers and a known answer."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from dicmh_ray.codec.icmh.config import SamplerConfig
from dicmh_ray.codec.icmh.sampling import (
    Sampler,
    fast_timesteps,
    guided,
    noise_schedule,
    spaced_timesteps,
)

KINDS = ("ddpm", "ddim", "dpm-solver++", "euler")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def context(*values: float) -> Tensor:
    """The tests' models read one number from the text."""
    return torch.tensor(values)[:, None, None]


def seeded(step: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, 4, rows[1] - rows[0], columns[1] - columns[0], generator=generator)


def toy(x: Tensor, t: Tensor, text: Tensor, hint: Tensor | None) -> Tensor:
    """The rule of the reference trajectory, and a little of the hint."""
    eps = 0.4 * x + 0.05 * text[:, :, :, None] + 0.0001 * t[:, None, None, None]
    return eps if hint is None else eps + 0.1 * hint


def exact(x: Tensor, t: Tensor, text: Tensor, hint: Tensor | None) -> Tensor:
    """The true noise when every clean latent is the hint."""
    assert hint is not None
    kept = torch.from_numpy(noise_schedule().alphas_cumprod)[t][:, None, None, None]
    return ((x - kept.sqrt() * hint) / (1 - kept).sqrt()).float()


def draw(kind: str, model, *, steps: int, guidance: float = 1.0, start: int | None = None, **given):
    sampler = Sampler(SamplerConfig(kind=kind, steps=steps, guidance=guidance), start=start)
    hint = torch.linspace(-2, 2, 2 * 4 * 3 * 5).reshape(2, 4, 3, 5)
    arguments = {
        "shape": (2, 4, 3, 5),
        "context_BTD": context(1, 1),
        "empty_context_BTD": context(-1),
        "hint_BChw": hint,
        "noise": seeded,
    }
    return sampler.draw(model, **{**arguments, **given}), hint


@pytest.mark.parametrize("steps", [50, 20, 10, 4])
def test_the_official_schedule_is_met_to_the_last_digit(reference: Path, steps: int) -> None:
    facts = json.loads((reference / "sampler.json").read_text())
    tensors = safetensors.torch.load_file(reference / "sampler.safetensors")
    assert list(spaced_timesteps(steps)) == facts[f"timesteps_{steps}"]
    schedule = noise_schedule(spaced_timesteps(steps))
    for name in (
        "betas",
        "alphas_cumprod",
        "posterior_variance",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ):
        found: npt.NDArray[np.float64] = getattr(schedule, name)
        np.testing.assert_allclose(found, tensors[f"{name}_{steps}"], rtol=0, atol=1e-12)


def test_the_official_trajectory_is_met(reference: Path) -> None:
    tensors = safetensors.torch.load_file(reference / "sampler.safetensors")
    states = [tensors["traj_xT"], *tensors["traj_noise"]]
    sampler = Sampler(SamplerConfig(kind="ddpm", steps=10, guidance=5.0))
    found = sampler.draw(
        toy,
        shape=(1, 4, 8, 8),
        context_BTD=context(1),
        empty_context_BTD=context(-1),
        hint_BChw=None,
        noise=lambda step, rows, columns: states[step],
    )
    torch.testing.assert_close(found, tensors["traj_x0"], rtol=0, atol=1e-5)


def test_the_whole_schedule_is_that_of_stable_diffusion() -> None:
    schedule = noise_schedule()
    assert schedule.timesteps == tuple(range(1000))
    assert schedule.betas[[0, -1]] == pytest.approx([0.00085, 0.012], abs=1e-12)
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.0047, abs=1e-4)


def test_timesteps_of_both_rules_end_where_they_are_told() -> None:
    assert spaced_timesteps(1) == (999,)
    assert spaced_timesteps(4, 300) == (0, 100, 200, 300)
    assert fast_timesteps(4) == (250, 500, 749, 999)
    assert fast_timesteps(3, 300) == (100, 200, 300)
    assert spaced_timesteps(1000) == tuple(range(1000))
    for steps, last in ((0, 999), (1001, 999), (5, 3), (4, 1000), (1, 0)):
        with pytest.raises(ValueError, match="steps up to timestep"):
            spaced_timesteps(steps, last)


@pytest.mark.parametrize("timesteps", [(), (3, 3), (5, 2), (-1, 4), (7, 1000)])
def test_timesteps_that_are_no_schedule_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        noise_schedule(timesteps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 4, 20])
def test_every_sampler_finds_the_one_clean_latent_there_is(kind: str, steps: int) -> None:
    found, hint = draw(kind, exact, steps=steps)
    # The official sampler's last step is at t = 0, and one step of it stops at the posterior mean.
    torch.testing.assert_close(found, hint, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("dpm-solver++", DPMSolverMultistepScheduler(**SD)),
        ("euler", EulerDiscreteScheduler(**SD)),
    ],
)
@pytest.mark.parametrize("steps", [4, 20])
def test_faster_samplers_are_those_of_diffusers(kind: str, scheduler, steps: int) -> None:
    found, hint = draw(kind, toy, steps=steps)
    scheduler.set_timesteps(timesteps=list(reversed(fast_timesteps(steps))))
    x = seeded(0, (0, 3), (0, 5))
    if kind == "euler":
        x = x * (scheduler.sigmas[0] ** 2 + 1).sqrt()
    for t in scheduler.timesteps:
        t_B = torch.full((2,), int(t))
        eps = toy(scheduler.scale_model_input(x, t), t_B, context(1, 1), hint)
        x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_ddim_keeps_the_predicted_noise_from_one_timestep_to_the_next() -> None:
    found, hint = draw("ddim", toy, steps=10)
    kept = {-1: 1.0, **dict(enumerate(noise_schedule().alphas_cumprod))}
    x = seeded(0, (0, 3), (0, 5))
    for t, following in itertools.pairwise([*reversed(fast_timesteps(10)), -1]):
        eps = toy(x, torch.full((2,), t), context(1, 1), hint)
        clean = (x - math.sqrt(1 - kept[t]) * eps) / math.sqrt(kept[t])
        x = math.sqrt(kept[following]) * clean + math.sqrt(1 - kept[following]) * eps
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_begins_with_the_noised_hint(kind: str) -> None:
    seen: list[tuple[int, Tensor]] = []

    def watch(x: Tensor, t: Tensor, text: Tensor, hint: Tensor | None) -> Tensor:
        seen.append((int(t[0]), x))
        return exact(x, t, text, hint)

    found, hint = draw(kind, watch, steps=3, start=300)
    kept = noise_schedule().alphas_cumprod[300]
    expected = np.sqrt(kept) * hint + np.sqrt(1 - kept) * seeded(0, (0, 3), (0, 5))
    assert seen[0][0] == 300
    assert [t for t, _ in seen] == ([300, 150, 0] if kind == "ddpm" else [300, 200, 100])
    torch.testing.assert_close(seen[0][1], expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, hint, rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="needs one"):
        draw(kind, watch, steps=3, start=300, hint_BChw=None)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_of_1_is_conditional_only_and_of_0_unconditional_only(kind: str) -> None:
    texts: list[list[float]] = []

    def watch(x: Tensor, t: Tensor, text: Tensor, hint: Tensor | None) -> Tensor:
        texts.append(text.flatten().tolist())
        return toy(x, t, text, hint)

    conditional, _ = draw(kind, watch, steps=2, guidance=1.0)
    assert texts == [[1, 1]] * 2
    texts.clear()
    unconditional, _ = draw(kind, watch, steps=2, guidance=0.0)
    assert texts == [[-1, -1]] * 2
    texts.clear()
    strong, _ = draw(kind, watch, steps=2, guidance=3.0)
    assert texts == [[1, 1, -1, -1]] * 2
    # The toy is linear in the text, and so is what it draws.
    torch.testing.assert_close(strong, unconditional + 3 * (conditional - unconditional))


def test_guidance_in_one_call_is_that_in_two() -> None:
    x, hint = torch.randn(2, 2, 4, 3, 5)
    t, tags, empty = torch.tensor([7, 800]), context(1, 0.5), context(-1, -1)
    a, b = toy(x, t, tags, hint), toy(x, t, empty, hint)
    torch.testing.assert_close(guided(toy, x, t, tags, empty, hint, 5.0), b + 5 * (a - b))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_drawn_alone_as_in_a_batch(kind: str) -> None:
    together, hint = draw(kind, toy, steps=4, guidance=5.0)
    alone, _ = draw(
        kind,
        toy,
        steps=4,
        guidance=5.0,
        shape=(1, 4, 3, 5),
        context_BTD=context(1),
        hint_BChw=hint[1:],
        noise=lambda *place: seeded(*place)[1:],
    )
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_progress_and_noise_are_counted_by_step(kind: str) -> None:
    done: list[tuple[int, int]] = []
    asked: list[int] = []

    def noise(step: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        assert (rows, columns) == ((0, 3), (0, 5))
        asked.append(step)
        return seeded(step, rows, columns)

    draw(kind, toy, steps=3, progress=lambda *at: done.append(at), noise=noise)
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert asked == ([0, 1, 2] if kind == "ddpm" else [0])


def test_more_steps_than_timesteps_are_refused() -> None:
    config = SamplerConfig(kind="euler", steps=40)
    with pytest.raises(ValueError, match="40 steps up to timestep 30"):
        Sampler(config, start=30)
    assert Sampler(dataclasses.replace(config, steps=30), start=30).schedule.timesteps[0] == 1
