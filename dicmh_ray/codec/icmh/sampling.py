"""Samplers: from noise to a latent through the controlled U-Net's predictions of the noise.

``ddpm`` is the official sampler: ancestral, with betas recomputed between the timesteps
that are kept. The others are diffusers' schedulers, deterministic given the noise they begin with;
they run over the same recomputed betas, so that every sampler may take any timesteps. All begin with
the same state and all noise comes from the caller (:mod:`.noise`): a picture depends on its stream,
the checkpoint and the sampler's configuration, and on nothing that was drawn before.

Shape suffixes: B images, C latent channels, h w the latent grid, T text tokens, D text width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from dicmh_ray.codec.icmh.config import SamplerConfig
from dicmh_ray.codec.icmh.noise import NoiseSource

TRAIN_TIMESTEPS = 1000
"""Timesteps of the forward process that the U-Net was trained on."""

_BETA_FIRST, _BETA_LAST = 0.00085, 0.012

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseSchedule:
    """Forward process over the kept timesteps, and the posterior of the step back. Float64 ``[n]``."""

    timesteps: tuple[int, ...]
    """What the network is told, ascending."""

    betas: Floats
    alphas_cumprod: Floats
    posterior_variance: Floats
    """Of ``x_{t-1}`` given ``x_t`` and ``x_0``; 0 at the first timestep."""

    posterior_mean_coef1: Floats
    """Weight of ``x_0`` in the mean of that posterior."""

    posterior_mean_coef2: Floats
    """Weight of ``x_t``."""


def noise_schedule(timesteps: Sequence[int] | None = None) -> NoiseSchedule:
    """Stable Diffusion's schedule, or what remains of it at ``timesteps`` (ascending, distinct).

    Raises:
        ValueError: the timesteps are none such in 0..999.
    """
    kept = tuple(range(TRAIN_TIMESTEPS)) if timesteps is None else tuple(timesteps)
    if not kept or kept[0] < 0 or kept[-1] >= TRAIN_TIMESTEPS or list(kept) != sorted(set(kept)):
        raise ValueError(f"timesteps are {kept}, wanted ascending ones in 0..{TRAIN_TIMESTEPS - 1}")
    roots = np.linspace(math.sqrt(_BETA_FIRST), math.sqrt(_BETA_LAST), TRAIN_TIMESTEPS)
    full = np.cumprod(1 - roots**2)[list(kept)]
    betas = 1 - full / np.concatenate([[1.0], full[:-1]])
    alphas_cumprod = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], alphas_cumprod[:-1]])
    return NoiseSchedule(
        timesteps=kept,
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        posterior_variance=betas * (1 - before) / (1 - alphas_cumprod),
        posterior_mean_coef1=betas * np.sqrt(before) / (1 - alphas_cumprod),
        posterior_mean_coef2=(1 - before) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
    )


def spaced_timesteps(steps: int, last: int = TRAIN_TIMESTEPS - 1) -> tuple[int, ...]:
    """The official choice of ``steps`` timesteps from 0 to ``last``, both of them kept.

    A single step is ``last`` alone.

    Raises:
        ValueError: there are not so many timesteps.
    """
    _check_steps(steps, last, last + 1)
    if steps == 1:
        return (last,)
    return tuple(round(i * last / (steps - 1)) for i in range(steps))


def fast_timesteps(steps: int, last: int = TRAIN_TIMESTEPS - 1) -> tuple[int, ...]:
    """``steps`` timesteps up to ``last`` without 0, where a deterministic step ends anyway.

    Raises:
        ValueError: there are not so many timesteps.
    """
    _check_steps(steps, last, last)
    return tuple(round(i * last / steps) for i in range(1, steps + 1))


def _check_steps(steps: int, last: int, most: int) -> None:
    if not 0 < last < TRAIN_TIMESTEPS or not 0 < steps <= most:
        raise ValueError(f"{steps} steps up to timestep {last}: wanted 1..{most} up to 1..999")


class NoisePredictor(Protocol):
    """What a sampler drives: :class:`.control.ControlledUNet`, tiled or not."""

    def __call__(
        self, x_BChw: Tensor, t_B: Tensor, context_BTD: Tensor, hint_BChw: Tensor | None
    ) -> Tensor: ...


def guided(
    model: NoisePredictor,
    x_BChw: Tensor,
    t_B: Tensor,
    context_BTD: Tensor,
    empty_context_BTD: Tensor,
    hint_BChw: Tensor | None,
    guidance: float,
) -> Tensor:
    """Classifier-free guidance: ``eps("") + s (eps(tags) - eps(""))``.

    Both predictions come from one call of the model, over a batch of twice the size; where s is 1
    or 0 one of them has no weight and is not made.
    """
    if guidance == 1:
        return model(x_BChw, t_B, context_BTD, hint_BChw)
    if guidance == 0:
        return model(x_BChw, t_B, empty_context_BTD, hint_BChw)
    both = model(
        torch.cat([x_BChw, x_BChw]),
        torch.cat([t_B, t_B]),
        torch.cat([context_BTD, empty_context_BTD]),
        None if hint_BChw is None else torch.cat([hint_BChw, hint_BChw]),
    )
    conditional, unconditional = both.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


class Sampler:
    """Draws latents as a :class:`SamplerConfig` says."""

    def __init__(self, config: SamplerConfig, *, start: int | None = None) -> None:
        """Args:
        config: kind, steps and guidance.
        start: None begins with pure noise, as the official sampler does. Else a timestep in
            1..999: begins with the hint, noised to that timestep, which leaves few steps to go.

        Raises:
            ValueError: more steps than timesteps, or a kind that there is not.
        """
        if config.kind != "ddpm" and config.kind not in _SCHEDULERS:
            kinds = ", ".join(["ddpm", *_SCHEDULERS])
            raise ValueError(f"sampler kind is {config.kind!r}, wanted one of {kinds}")
        self.config = config
        self.start = start
        last = TRAIN_TIMESTEPS - 1 if start is None else start
        choose = spaced_timesteps if config.kind == "ddpm" else fast_timesteps
        self.schedule = noise_schedule(choose(config.steps, last))

    def draw(
        self,
        model: NoisePredictor,
        *,
        shape: Sequence[int],
        context_BTD: Tensor,
        empty_context_BTD: Tensor,
        hint_BChw: Tensor | None,
        noise: NoiseSource,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """A latent of each image, float32 ``[B, C, h, w]``, on the noise's device.

        Args:
            model: predicts noise.
            shape: B, C, h, w.
            context_BTD: text embedding of each image's tags.
            empty_context_BTD: that of the empty text, ``[B, T, D]`` or ``[1, T, D]``.
            hint_BChw: decoded latent ``c``. None for the prior alone.
            noise: asked for step 0, and by ``ddpm`` for one more step before each further
                evaluation.
            progress: called after each step with the number of steps done and of all.

        Raises:
            ValueError: the sampler starts from the hint, and there is none.
        """
        batch, _, height, width = shape
        empty_context_BTD = empty_context_BTD.expand(batch, -1, -1)

        def normal(step: int) -> Tensor:
            return noise(step, (0, height), (0, width)).float()

        def predict(x_BChw: Tensor, index: int) -> Tensor:
            t_B = torch.full((batch,), self.schedule.timesteps[index], device=x_BChw.device)
            return guided(
                model, x_BChw, t_B, context_BTD, empty_context_BTD, hint_BChw, self.config.guidance
            ).float()

        def report(done: int) -> None:
            if progress is not None:
                progress(done, self.config.steps)

        with torch.no_grad():
            x_BChw = normal(0)
            if self.start is not None:
                if hint_BChw is None:
                    raise ValueError("a sampler that starts from the hint needs one")
                kept = float(self.schedule.alphas_cumprod[-1])
                x_BChw = math.sqrt(kept) * hint_BChw.float() + math.sqrt(1 - kept) * x_BChw
            if self.config.kind == "ddpm":
                return self._ancestral(x_BChw, predict, normal, report)
            return self._scheduled(x_BChw, predict, report)

    def _ancestral(
        self,
        x_BChw: Tensor,
        predict: Callable[[Tensor, int], Tensor],
        normal: Callable[[int], Tensor],
        report: Callable[[int], None],
    ) -> Tensor:
        schedule, steps = self.schedule, self.config.steps
        for done, index in enumerate(reversed(range(steps)), start=1):
            kept = float(schedule.alphas_cumprod[index])
            eps = predict(x_BChw, index)
            clean = x_BChw * math.sqrt(1 / kept) - eps * math.sqrt(1 / kept - 1)
            x_BChw = (
                float(schedule.posterior_mean_coef1[index]) * clean
                + float(schedule.posterior_mean_coef2[index]) * x_BChw
            )
            if index > 0:
                spread = math.sqrt(float(schedule.posterior_variance[index]))
                x_BChw = x_BChw + spread * normal(done)
            report(done)
        return x_BChw

    def _scheduled(
        self,
        x_BChw: Tensor,
        predict: Callable[[Tensor, int], Tensor],
        report: Callable[[int], None],
    ) -> Tensor:
        # A scheduler whose whole training schedule is the kept timesteps: their indices are its own.
        steps = self.config.steps
        scheduler: Any = _SCHEDULERS[self.config.kind](
            num_train_timesteps=steps,
            trained_betas=self.schedule.betas.tolist(),
            prediction_type="epsilon",
            **_SETTINGS[self.config.kind],
        )
        if self.config.kind == "ddim":
            scheduler.set_timesteps(steps)
        else:
            scheduler.set_timesteps(timesteps=list(reversed(range(steps))))
        if self.config.kind == "euler":
            # Its state is the latent with noise on top, not a mixture that keeps the variance.
            x_BChw = x_BChw / math.sqrt(float(self.schedule.alphas_cumprod[-1]))
        for done, timestep in enumerate(scheduler.timesteps, start=1):
            eps = predict(scheduler.scale_model_input(x_BChw, timestep), int(timestep))
            x_BChw = scheduler.step(eps, timestep, x_BChw, return_dict=False)[0]
            report(done)
        return x_BChw


_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "ddim": {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading"},
    "dpm-solver++": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "euler": {},
}
