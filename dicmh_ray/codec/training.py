"""Train the default codec: rate and distortion of all its states at once.

Each image of a batch is decoded from one state, drawn so that a batch holds all of them; its loss
is ``bpp + lambda_k * MSE`` of that state, divided by the running mean of its own size, so that
every state counts by relative, not absolute, improvement. Training is resumable: the run's folder
holds its whole state, and a run that is killed goes on where its last save was.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dicmh_ray.codec.checkpoint import read_checkpoint
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.rate import ContextRate
from dicmh_ray.errors import WeightsError

logger = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"
PROGRESS_FILE = "progress.json"
LOG_FILE = "log.jsonl"

WARM_START_STEPS = 300
"""Steps in which a run that starts from a checkpoint trains its rate model alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """One training run. The network's shape is in :class:`NetworkConfig`."""

    steps: int = 12_000
    """Optimiser steps of the whole run; the learning rate falls to zero over them."""

    minutes: float = math.inf
    """Wall-clock budget; the schedule is stretched or cut to end with it."""

    batch: int = 12
    """Crops a step."""

    crop: int = 192
    """Pixels per side of a crop, a multiple of 16."""

    learning_rate: float = 6e-4
    """Adam's peak rate for the networks."""

    context_rate: float = 8.0
    """Factor on the learning rate for the rate model, which must follow the latent quickly."""

    finest_lambda: float = 0.036
    """Weight of the mean squared error (8-bit units) of the last state against bits per pixel."""

    lambda_ratio: float = 5.3
    """Ratio of the weights of consecutive states."""

    ema: float = 0.998
    """Decay of the running average of the weights that is exported."""

    seed: int = 231
    """Seed of crops and of initialisation."""

    save_seconds: float = 120.0
    """Time between saves."""

    def lambdas(self, num_states: int) -> list[float]:
        """Distortion weight of each state, coarsest first."""
        return [
            self.finest_lambda / self.lambda_ratio ** (num_states - 1 - k)
            for k in range(num_states)
        ]


class PackedPhotographs:
    """Training photographs, decoded once, in one memory-mapped file beside its index.

    ``photographs.bin`` holds the uint8 RGB samples one picture after the other;
    ``photographs.json`` the list of ``[offset, height, width]``.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "photographs.json").read_text())
        self.samples: npt.NDArray[np.uint8] = np.memmap(
            folder / "photographs.bin", dtype=np.uint8, mode="r"
        )
        self.entries = [(int(o), int(h), int(w)) for o, h, w in index]

    def picture(self, i: int) -> npt.NDArray[np.uint8]:
        """Picture i, uint8 ``[H, W, 3]``."""
        offset, height, width = self.entries[i]
        return self.samples[offset : offset + height * width * 3].reshape(height, width, 3)

    def crops(self, count: int, size: int, rng: np.random.Generator) -> Tensor:
        """Random crops, flipped and turned, uint8 ``[count, 3, size, size]``.

        A picture is drawn in proportion to its area; every third crop is a larger region halved,
        so that the network also sees the sharper detail of smaller pictures.
        """
        areas = np.array([h * w for _, h, w in self.entries], np.float64)
        areas *= [min(h, w) >= size for _, h, w in self.entries]
        out = np.empty((count, size, size, 3), np.uint8)
        for n in range(count):
            picture = self.picture(int(rng.choice(len(areas), p=areas / areas.sum())))
            factor = 2 if n % 3 == 2 and min(picture.shape[:2]) >= 2 * size else 1
            span = size * factor
            top = int(rng.integers(picture.shape[0] - span + 1))
            left = int(rng.integers(picture.shape[1] - span + 1))
            crop = picture[top : top + span, left : left + span]
            if factor == 2:
                wide = crop.astype(np.uint16).reshape(size, 2, size, 2, 3)
                crop = ((wide.sum((1, 3)) + 2) >> 2).astype(np.uint8)
            crop = crop[:, :: 1 if rng.random() < 0.5 else -1]
            out[n] = np.rot90(crop) if rng.random() < 0.25 else crop
        return torch.from_numpy(out).permute(0, 3, 1, 2)


def train(
    photographs: PackedPhotographs,
    folder: Path,
    *,
    options: TrainOptions,
    network: NetworkConfig,
    device: str = "cpu",
    start_from: str | Path | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> CodecNetwork:
    """Train, or go on training, the run in ``folder``.

    Args:
        photographs: what to train on.
        folder: holds the run; created if it does not exist.
        options: the schedule. May differ from the run's earlier part.
        network: shape of a new run; a run that goes on must have the same.
        device: a torch device, or ``"auto"`` for CUDA where there is one.
        start_from: a checkpoint whose weights a new run begins with, instead of the DCT; a run
            that goes on ignores it. The rate model, which no checkpoint holds, is fitted alone
            for the first steps.
        report: called about every 50 steps with step, seconds, and bpp and PSNR of each state.

    Returns:
        The network with averaged weights, in evaluation mode.

    Raises:
        WeightsError: ``folder`` holds a run of another shape, or ``start_from`` has one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = _Trainer(photographs, folder, options, network, device)
    if start_from is not None and trainer.step == 0:
        trainer.start_from(start_from)
    trainer.run(report)
    return trainer.averaged().eval()


class _Trainer:
    def __init__(
        self,
        photographs: PackedPhotographs,
        folder: Path,
        options: TrainOptions,
        config: NetworkConfig,
        device: str,
    ) -> None:
        self.photographs, self.folder, self.options = photographs, folder, options
        self.config, self.device = config, torch.device(device)
        self.network = CodecNetwork(config)
        self.rate = ContextRate(config.y_channels, config.num_states)
        self.step = 0
        self.frozen_steps = 0
        self.loss_size = torch.ones(config.num_states)
        progress = folder / PROGRESS_FILE
        self.network.to(self.device).to(memory_format=torch.channels_last)
        self.rate.to(self.device)
        if not progress.exists():
            rng = np.random.default_rng(options.seed)
            crops = photographs.crops(64, options.crop, rng)
            self.network.initialise_units(crops.to(self.device, torch.float32))
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.optimiser = torch.optim.Adam(
            [
                {"params": self.network.parameters(), "factor": 1.0},
                {"params": self.rate.parameters(), "factor": options.context_rate},
            ],
            lr=options.learning_rate,
            betas=(0.9, 0.99),
        )
        if progress.exists():
            self._load(json.loads(progress.read_text()))

    def start_from(self, checkpoint: str | Path) -> None:
        """Begin with the weights of a checkpoint, and give the rate model time to fit them."""
        found = read_checkpoint(checkpoint)
        if found.config["network"] != self.config.to_dict():
            raise WeightsError(str(checkpoint), "the checkpoint has another network shape")
        weights = safetensors.torch.load(found.files["weights.safetensors"])
        self.network.load_state_dict({name: value.float() for name, value in weights.items()})
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.frozen_steps = WARM_START_STEPS

    def run(self, report: Callable[[dict[str, Any]], None] | None) -> None:
        options, config = self.options, self.config
        lambdas = torch.tensor(options.lambdas(config.num_states), device=self.device)
        steps = torch.tensor(config.steps, device=self.device)
        rng = np.random.default_rng([options.seed, self.step])
        started, last_save, first = time.monotonic(), time.monotonic(), self.step
        sums = torch.zeros(3, config.num_states)
        self.network.train()
        self.rate.train()
        while self.step < options.steps:
            spent = (time.monotonic() - started) / 60
            if spent >= options.minutes:
                break
            done = max((self.step - first) / max(options.steps - first, 1), spent / options.minutes)
            learning_rate = _schedule(done, self.step) * options.learning_rate
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate * group["factor"]
            if self.step < self.frozen_steps:
                self.optimiser.param_groups[0]["lr"] = 0.0
            crops = self.photographs.crops(options.batch, options.crop, rng)
            x = crops.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
            states = torch.from_numpy(
                np.concatenate(
                    [
                        rng.permutation(config.num_states)
                        for _ in range(-(-len(x) // config.num_states))
                    ]
                )[: len(x)]
            ).to(self.device)
            y, bits = self.rate(self.network.encode(x), steps[states], states)
            error = (self.network.decode(y, states) - x).square().mean((1, 2, 3))
            bpp = bits / options.crop**2
            losses = bpp + lambdas[states] * error
            self._remember(losses.detach().cpu(), states.cpu())
            loss = (losses / self.loss_size.to(self.device)[states]).mean()
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            if torch.isfinite(norm):
                self.optimiser.step()
                self._average()
            self.step += 1
            sums.index_add_(
                1, states.cpu(), torch.stack([bpp, error, torch.ones_like(bpp)]).detach().cpu()
            )
            if self.step % 50 == 0:
                self._report(sums, learning_rate, time.monotonic() - started, report)
                sums.zero_()
            if time.monotonic() - last_save > options.save_seconds:
                self.save()
                last_save = time.monotonic()
        self.save()

    def _remember(self, losses: Tensor, states: Tensor) -> None:
        for loss, state in zip(losses.tolist(), states.tolist(), strict=True):
            if math.isfinite(loss):
                weight = 0.1 if self.step < 50 else 0.01
                self.loss_size[state] += weight * (loss - float(self.loss_size[state]))

    def _average(self) -> None:
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)

    def _report(
        self,
        sums: Tensor,
        learning_rate: float,
        seconds: float,
        report: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        bpp, error = (sums[:2] / sums[2].clamp_min(1)).tolist()
        line = {
            "step": self.step,
            "seconds": round(seconds, 1),
            "learning_rate": learning_rate,
            "bpp": [round(value, 4) for value in bpp],
            "psnr": [round(10 * math.log10(255**2 / max(value, 1e-9)), 2) for value in error],
        }
        with (self.folder / LOG_FILE).open("a") as log:
            log.write(json.dumps(line) + "\n")
        logger.info("%s", line)
        if report is not None:
            report(line)

    def averaged(self) -> CodecNetwork:
        """The network with its averaged weights."""
        network = CodecNetwork(self.config)
        network.load_state_dict(self.average)
        return network

    def save(self) -> None:
        """Write the run's whole state; the previous save stays valid until this one is complete."""
        tensors = {f"network/{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        tensors |= {f"rate/{k}": v for k, v in self.rate.state_dict().items()}
        for i, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam/{i}/{k}": torch.as_tensor(v) for k, v in moments.items()}
        tensors["loss_size"] = self.loss_size
        contiguous = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        partial = self.folder / (STATE_FILE + ".part")
        save_file(contiguous, partial)
        partial.replace(self.folder / STATE_FILE)
        progress = {
            "step": self.step,
            "frozen_steps": self.frozen_steps,
            "network": self.config.to_dict(),
            "options": asdict(self.options),
        }
        partial = self.folder / (PROGRESS_FILE + ".part")
        partial.write_text(json.dumps(progress, indent=1))
        partial.replace(self.folder / PROGRESS_FILE)

    def _load(self, progress: dict[str, Any]) -> None:
        if progress["network"] != self.config.to_dict():
            raise WeightsError(str(self.folder), "the run was started with another network shape")
        tensors = load_file(self.folder / STATE_FILE)
        self.step = int(progress["step"])
        self.frozen_steps = int(progress["frozen_steps"])
        self.loss_size = tensors["loss_size"]
        for prefix, module in (("network/", self.network), ("rate/", self.rate)):
            module.load_state_dict(_under(tensors, prefix))
        self.average = {k: v.to(self.device) for k, v in _under(tensors, "average/").items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, "adam/").items():
            index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
        state = self.optimiser.state_dict()
        state["state"] = moments
        self.optimiser.load_state_dict(state)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _schedule(done: float, step: int) -> float:
    """Warm up over 200 steps, stay, and fall to 2 % along a cosine over the last 60 %."""
    fall = min(1.0, max(0.0, (done - 0.4) / 0.6))
    return min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall)))
