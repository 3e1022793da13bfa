"""Train the human view's restorer around a codec that no longer changes.

    photographs ──frozen codec, one state──> machine estimate ──restorer(noise, state, tags)──> picture

The loss joins the diffusion objective (squared error of the predicted residual at a random time) with
what people look at: distances of a teacher's features, and of their local means and deviations, which
reward texture of the right kind wherever it lies (after DISTS, Ding et al. 2020, arXiv:2004.07728).
Averages over 8x8 pixels are held to the original, so that the sampler invents texture, not colour.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicmh_ray.codec.checkpoint import read_checkpoint
from dicmh_ray.codec.device import find_device
from dicmh_ray.codec.human import DiffusionRestorer
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.objectives import FeatureTeacher
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.codec.run_state import Report, RunFolder
from dicmh_ray.codec.stage import Losses, Stage, StageOptions
from dicmh_ray.codec.transform import native_precision
from dicmh_ray.errors import WeightsError

FILES = {"state": "human.safetensors", "progress": "human.json", "log": "human.jsonl"}
"""Of this stage, in a run's folder."""

STATE_SHARES = (0.2, 0.3, 0.3, 0.15, 0.05)
"""How often each state is trained, coarsest first: what the coarse ones lack is what is generated."""

SPREAD_CROPS = 24
"""Crops that the residual's deviation at each state is measured on, before training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HumanOptions(StageOptions):
    """One run of the second stage."""

    minutes: float = 60.0
    batch: int = 8

    crop: int = 128
    """Pixels per side, a multiple of 16."""

    learning_rate: float = 8e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.995
    seed: int = 517

    denoising: float = 0.15
    """Weight of the squared error of the residual, in units of its variance."""

    perceptual: float = 1.5
    """Weight of the distance of the teacher's features."""

    semantic: float = 2.0
    """The same at half size, as analysis networks see photographs."""

    texture: float = 0.5
    """Weight of the distance of their local means and deviations."""

    colour: float = 0.005
    """Weight of the squared error of 8x8 averages, 8-bit units."""

    tag_dropout: float = 0.2
    """Share of images that are trained without their tags."""

    start_share: float = 0.5
    """Share of images at pure noise, where the sampler starts; the others are at a random time."""


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
        start_from: a checkpoint whose human view a new run begins with, if it has the same shape; a
            run that goes on ignores it.
        report: called every 50 steps with the losses.

    Returns:
        The whole network with averaged weights, in evaluation mode.

    Raises:
        WeightsError: the run in ``folder`` has another shape, or the teacher is none.
        DeviceError: there is no such device.
    """
    words = tuple(sorted({word for tags in photographs.tags for word in tags}))
    network = CodecNetwork(dataclasses.replace(config, human_words=words))
    weights = {name: value.cpu() for name, value in codec.state_dict().items()}
    if start_from is not None and RunFolder(folder, **FILES).progress() is None:
        found = read_checkpoint(start_from)
        stored = safetensors.torch.load(found.files["weights.safetensors"])
        human = {k: v.float() for k, v in stored.items() if k.startswith("human.")}
        shapes = {k: v.shape for k, v in network.state_dict().items() if k.startswith("human.")}
        if shapes == {k: v.shape for k, v in human.items()}:
            weights |= human
    network.load_state_dict(weights, strict=False)
    stage = HumanStage(
        network, photographs, folder, options, teacher=teacher, device=find_device(device)
    )
    stage.run(report)
    return network.eval()


class HumanStage(Stage):
    """Trains ``network.human`` and leaves the rest of the network as it is.

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

    options: HumanOptions

    def __init__(
        self,
        network: CodecNetwork,
        photographs: PackedPhotographs,
        folder: Path,
        options: HumanOptions,
        *,
        teacher: Path,
        device: torch.device,
    ) -> None:
        if network.human is None:
            raise WeightsError("network", "its configuration has no human restorer")
        network.requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        network.compute_in(native_precision(device))
        self._restorer = network.human.requires_grad_(True)
        self._photographs = photographs
        self._module = _HumanLosses(network, self._restorer, FeatureTeacher(teacher), options)
        self._module.to(device)
        run = RunFolder(folder, **FILES)
        if run.progress() is None:
            rng = np.random.default_rng(options.seed)
            crops = photographs.crops(SPREAD_CROPS, options.crop, rng)
            self._module.measure_spread(crops.to(device, torch.float32))
        super().__init__({"restorer": self._restorer}, run, options, device)

    def make_optimisers(self) -> Sequence[torch.optim.Optimizer]:
        options = self.options
        return [
            torch.optim.AdamW(
                self._restorer.parameters(),
                lr=options.learning_rate,
                betas=(0.9, 0.99),
                weight_decay=options.weight_decay,
            )
        ]

    def draw(self, step: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
        options = self.options
        crops, words = self._photographs.labelled_crops(
            options.batch, options.crop, rng, self._restorer.words
        )
        x = crops.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        words[rng.random(len(x)) < options.tag_dropout] = 0.0
        time_B = torch.from_numpy(rng.random(len(x), np.float32))
        time_B[rng.random(len(x)) < options.start_share] = 1.0
        count = len(self._restorer.spread)
        shares = np.array([*STATE_SHARES, *([STATE_SHARES[-1]] * count)][:count])
        states = torch.from_numpy(rng.choice(count, len(x), p=shares / shares.sum()))
        return x, states.to(self.device), time_B.to(self.device), words.to(self.device)

    def forward_module(self) -> nn.Module:
        self._restorer.train()
        return self._module

    def progress_facts(self) -> dict[str, Any]:
        return {"options": asdict(self.options)}


class _HumanLosses(nn.Module):
    """One step: crops, their states, times and words -> the terms of the loss."""

    def __init__(
        self,
        network: CodecNetwork,
        restorer: DiffusionRestorer,
        teacher: FeatureTeacher,
        options: HumanOptions,
    ) -> None:
        super().__init__()
        self.network = network.eval()
        self.restorer, self.teacher, self.options = restorer, teacher, options

    def forward(self, x_B3HW: Tensor, state_B: Tensor, time_B: Tensor, words_BN: Tensor) -> Losses:
        options = self.options
        with torch.no_grad():
            z, base, residual = self._residual(x_B3HW, state_B)
        t = time_B[:, None, None, None]
        noisy = (1 - t) * residual + t.sqrt() * torch.randn_like(residual)
        found = self.restorer(noisy, z, time_B, state_B, words_BN)
        spread = self.restorer.spread[state_B][:, :, None, None]
        picture = base + self.network.autoencoder.residual(found * spread)
        wanted, made = self.teacher.activations(x_B3HW), self.teacher.activations(picture)
        halved = [self.teacher.activations(F.avg_pool2d(pixels, 2)) for pixels in (x_B3HW, picture)]
        colour = F.avg_pool2d(picture, 8) - F.avg_pool2d(x_B3HW, 8)
        return {
            "denoising": (options.denoising, (found - residual).square().mean()),
            "perceptual": (options.perceptual, feature_distance(wanted, made)),
            "semantic": (options.semantic, feature_distance(*halved)),
            "texture": (options.texture, texture_distance(wanted, made)),
            "colour": (options.colour, colour.square().mean()),
        }

    @torch.no_grad()
    def measure_spread(self, x_B3HW: Tensor) -> None:
        """Set the restorer's units: the deviation of what each state lacks."""
        self.restorer.spread.fill_(1.0)
        for state in range(len(self.restorer.spread)):
            states = torch.full((len(x_B3HW),), state, device=x_B3HW.device)
            missing = self._residual(x_B3HW, states)[2]
            self.restorer.spread[state] = missing.square().mean((0, 2, 3)).sqrt().clamp_min(1e-3)

    def _residual(self, x_B3HW: Tensor, state_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Machine estimate of z, its picture, and what it lacks in units of the spread."""
        steps = torch.tensor(self.network.config.steps, device=x_B3HW.device)[state_B]
        step = steps[:, None, None, None]
        y = (self.network.encode(x_B3HW) / step).round() * step
        z = self.network.estimate(y, state_B)
        base = self.network.autoencoder.decode(z)
        missing = self.network.autoencoder.project(x_B3HW - base)
        return z, base, missing / self.restorer.spread[state_B][:, :, None, None]


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
