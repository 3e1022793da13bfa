"""Train the human view's restorer around a codec that no longer changes.

    photographs ──frozen codec, one state──> machine estimate ──restorer(noise, state, tags)──> picture

The loss joins the diffusion objective (squared error of the predicted residual at a random time) with
what people look at: distances of a teacher's features, and of their local means and deviations, which
reward texture of the right kind wherever it lies (after DISTS, Ding et al. 2020, arXiv:2004.07728).
Averages over 8x8 pixels are held to the original, so that the sampler invents texture, not colour.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from dicmh_ray.codec.checkpoint import read_checkpoint
from dicmh_ray.codec.human import DiffusionRestorer
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.objectives import FeatureTeacher
from dicmh_ray.codec.run_state import (
    Report,
    RunFolder,
    WeightAverage,
    cosine_fall,
    moments_of,
    prefixed,
    restore_moments,
    under,
)
from dicmh_ray.codec.training import PackedPhotographs
from dicmh_ray.errors import WeightsError

FILES = {"state": "human.safetensors", "progress": "human.json", "log": "human.jsonl"}
"""Of this stage, in a run's folder."""

STATE_SHARES = (0.2, 0.3, 0.3, 0.15, 0.05)
"""How often each state is trained, coarsest first: what the coarse ones lack is what is generated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HumanOptions:
    """One run of the second stage."""

    minutes: float = 60.0
    """Wall-clock budget; the learning rate falls to zero over it."""

    batch: int = 8
    """Crops a step."""

    crop: int = 128
    """Pixels per side of a crop, a multiple of 16."""

    learning_rate: float = 8e-4
    """Adam's peak rate."""

    denoising: float = 0.15
    """Weight of the squared error of the residual, in units of its variance."""

    perceptual: float = 1.5
    """Weight of the distance of the teacher's features."""

    semantic: float = 1.5
    """The same at half size, as analysis networks see photographs."""

    texture: float = 0.5
    """Weight of the distance of their local means and deviations."""

    colour: float = 0.005
    """Weight of the squared error of 8x8 averages, 8-bit units."""

    tag_dropout: float = 0.2
    """Share of images that are trained without their tags."""

    start_share: float = 0.5
    """Share of images at pure noise, where the sampler starts; the others are at a random time."""

    ema: float = 0.995
    """Decay of the running average of the weights that is exported."""

    seed: int = 517
    """Seed of crops and noise."""

    save_seconds: float = 120.0
    """Time between saves."""


def train_human(
    codec: CodecNetwork,
    config: NetworkConfig,
    photographs: PackedPhotographs,
    folder: Path,
    *,
    options: HumanOptions,
    teacher: Path,
    device: str = "auto",
    start_from: str | Path | None = None,
    report: Report | None = None,
) -> CodecNetwork:
    """Give a trained codec a human view, and train it.

    Args:
        codec: without a human view.
        config: the shape to reach; its words are replaced by the tags of the photographs.
        photographs: what to train on.
        folder: holds the run; one that is there goes on.
        options: the schedule.
        teacher: weights for :class:`FeatureTeacher`.
        device: a torch device, or ``"auto"`` for CUDA where there is one.
        start_from: a checkpoint whose human view a new run begins with, if it has the same shape.
        report: called every 50 steps with the losses.

    Returns:
        The whole network with averaged weights, in evaluation mode.

    Raises:
        WeightsError: the run in ``folder`` has another shape, or the teacher is none.
    """
    words = tuple(sorted({word for tags in photographs.tags for word in tags}))
    network = CodecNetwork(dataclasses.replace(config, human_words=words))
    weights = {name: value.cpu() for name, value in codec.state_dict().items()}
    if start_from is not None:
        found = read_checkpoint(start_from)
        stored = safetensors.torch.load(found.files["weights.safetensors"])
        human = {k: v.float() for k, v in stored.items() if k.startswith("human.")}
        shapes = {k: v.shape for k, v in network.state_dict().items() if k.startswith("human.")}
        if shapes == {k: v.shape for k, v in human.items()}:
            weights |= human
    network.load_state_dict(weights, strict=False)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = HumanTrainer(
        network, photographs, folder, options=options, teacher=teacher, device=device
    )
    trainer.run(report)
    return network.eval()


class HumanTrainer:
    """Trains ``network.human`` and leaves the rest of the network as it is."""

    def __init__(
        self,
        network: CodecNetwork,
        photographs: PackedPhotographs,
        folder: Path,
        *,
        options: HumanOptions,
        teacher: Path,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            network: a trained codec whose configuration has a human restorer.
            photographs: what to train on.
            folder: holds the run; one that is there goes on.
            options: the schedule.
            teacher: weights for :class:`FeatureTeacher`.
            device: a torch device.

        Raises:
            WeightsError: the network has no human restorer, or the teacher cannot be read.
        """
        if network.human is None:
            raise WeightsError("network", "its configuration has no human restorer")
        self.restorer: DiffusionRestorer = network.human
        self.device = torch.device(device)
        self.network = network.eval().to(self.device).to(memory_format=torch.channels_last)
        self.photographs, self.options = photographs, options
        self.folder = RunFolder(folder, **FILES)
        self.teacher = FeatureTeacher(teacher).to(self.device)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        for parameter in self.restorer.parameters():
            parameter.requires_grad_(True)
        self.step = 0
        self.optimiser = torch.optim.Adam(
            self.restorer.parameters(), lr=options.learning_rate, betas=(0.9, 0.99)
        )
        progress = self.folder.progress()
        if progress is None:
            self._measure_spread()
        self.average = WeightAverage(self.restorer, options.ema)
        if progress is not None:
            self._load(progress)

    def run(self, report: Report | None = None) -> None:
        """Train for the minutes of the options; the restorer ends with its averaged weights."""
        options = self.options
        rng = np.random.default_rng([options.seed, self.step])
        torch.manual_seed(options.seed + self.step)
        started = last_save = time.monotonic()
        since_report: dict[str, list[float]] = {}
        self.restorer.train()
        while (done := (time.monotonic() - started) / 60 / options.minutes) < 1:
            rise = min(1.0, (self.step + 1) / 100)
            for group in self.optimiser.param_groups:
                group["lr"] = options.learning_rate * rise * cosine_fall(done)
            terms = self._losses(rng)
            loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
            self.optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(self.restorer.parameters(), 1.0)
            if torch.isfinite(norm):
                self.optimiser.step()
                self.average.update(self.restorer, self.step)
            self.step += 1
            for name, (_, value) in terms.items():
                since_report.setdefault(name, []).append(float(value.detach()))
            if self.step % 50 == 0:
                self._report(since_report, time.monotonic() - started, report)
                since_report = {}
            if time.monotonic() - last_save > options.save_seconds:
                self.save()
                last_save = time.monotonic()
        self.save()
        self.restorer.load_state_dict(self.average.tensors)
        self.restorer.eval()

    def _losses(self, rng: np.random.Generator) -> dict[str, tuple[float, Tensor]]:
        """Name -> weight and mean over a fresh batch."""
        options = self.options
        crops, words = self.photographs.labelled_crops(
            options.batch, options.crop, rng, self.restorer.words
        )
        x = crops.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        words = words.to(self.device)
        states = self._draw_states(rng)
        with torch.no_grad():
            z, base, residual = self._residual(x, states)
        time_B = torch.from_numpy(rng.random(len(x), np.float32)).to(self.device)
        time_B[rng.random(len(x)) < options.start_share] = 1.0
        words[rng.random(len(x)) < options.tag_dropout] = 0.0
        t = time_B[:, None, None, None]
        noisy = (1 - t) * residual + t.sqrt() * torch.randn_like(residual)
        found = self.restorer(noisy, z, time_B, states, words)
        spread = self.restorer.spread[states][:, :, None, None]
        picture = base + self.network.autoencoder.residual(found * spread)
        wanted, made = self.teacher.activations(x), self.teacher.activations(picture)
        halved = [self.teacher.activations(F.avg_pool2d(pixels, 2)) for pixels in (x, picture)]
        colour = F.avg_pool2d(picture, 8) - F.avg_pool2d(x, 8)
        return {
            "denoising": (options.denoising, (found - residual).square().mean()),
            "perceptual": (options.perceptual, feature_distance(wanted, made)),
            "semantic": (options.semantic, feature_distance(*halved)),
            "texture": (options.texture, texture_distance(wanted, made)),
            "colour": (options.colour, colour.square().mean()),
        }

    def _draw_states(self, rng: np.random.Generator) -> Tensor:
        count = self.network.config.num_states
        shares = np.array([*STATE_SHARES, *([STATE_SHARES[-1]] * count)][:count])
        drawn = rng.choice(count, self.options.batch, p=shares / shares.sum())
        return torch.from_numpy(drawn).to(self.device)

    def _residual(self, x: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Machine estimate of z, its picture, and what it lacks in units of the spread."""
        steps = torch.tensor(self.network.config.steps, device=self.device)[states]
        step = steps[:, None, None, None]
        y = (self.network.encode(x) / step).round() * step
        z = self.network.estimate(y, states)
        base = self.network.autoencoder.decode(z)
        missing = self.network.autoencoder.project(x - base)
        return z, base, missing / self.restorer.spread[states][:, :, None, None]

    @torch.no_grad()
    def _measure_spread(self) -> None:
        rng = np.random.default_rng(self.options.seed)
        for state in range(self.network.config.num_states):
            crops = self.photographs.crops(24, self.options.crop, rng)
            states = torch.full((len(crops),), state, device=self.device)
            missing = self._residual(crops.to(self.device, torch.float32), states)[2]
            self.restorer.spread[state] = missing.square().mean((0, 2, 3)).sqrt().clamp_min(1e-3)

    def _report(
        self,
        values: dict[str, list[float]],
        seconds: float,
        report: Report | None,
    ) -> None:
        line = {"step": self.step, "seconds": round(seconds, 1)}
        line |= {name: round(fmean(found), 4) for name, found in values.items()}
        self.folder.log(line, report)

    def save(self) -> None:
        """Write the stage's whole state; the previous save stays valid until it is complete."""
        tensors = prefixed("restorer", self.restorer.state_dict())
        tensors |= prefixed("average", self.average.tensors)
        tensors |= moments_of(self.optimiser)
        self.folder.save(tensors, {"step": self.step, "options": asdict(self.options)})

    def _load(self, progress: dict[str, Any]) -> None:
        tensors = self.folder.tensors()
        self.step = int(progress["step"])
        try:
            self.restorer.load_state_dict(under("restorer", tensors))
        except RuntimeError as exc:
            raise WeightsError(
                str(self.folder.folder), f"its human view has another shape: {exc}"
            ) from exc
        self.average.load(under("average", tensors))
        restore_moments(self.optimiser, tensors)


def feature_distance(wanted: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean of ``1 - cosine`` of the channel vectors at equal places."""
    return torch.stack(
        [
            1 - F.cosine_similarity(a, b, dim=1, eps=1e-4).mean()
            for a, b in zip(wanted, made, strict=True)
        ]
    ).sum()


def texture_distance(wanted: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the differences of local means and deviations of each channel.

    Windows of 8x8 activations: blur lowers their deviations wherever the detail should have been.
    """
    terms = []
    for a, b in zip(wanted, made, strict=True):
        (mean_a, deviation_a), (mean_b, deviation_b) = _local_moments(a), _local_moments(b)
        difference = (mean_a - mean_b).abs().mean() + (deviation_a - deviation_b).abs().mean()
        terms.append(difference / deviation_a.mean().clamp_min(1e-3))
    return torch.stack(terms).mean()


def _local_moments(x_BChw: Tensor) -> tuple[Tensor, Tensor]:
    window = min(8, x_BChw.shape[2])
    mean = F.avg_pool2d(x_BChw, window)
    variance = F.avg_pool2d(x_BChw.square(), window) - mean.square()
    return mean, (variance.clamp_min(0) + 1e-4).sqrt()
