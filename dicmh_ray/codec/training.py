"""Train the default codec: rate and distortion of all its states at once.

Each image of a batch is decoded from one state, drawn so that a batch holds all of them; its loss
is ``bpp + lambda_k * D`` of that state, divided by the running mean of its own size, so that
every state counts by relative, not absolute, improvement. The distortion D mixes squared error,
structure (MS-SSIM) and, where a teacher is given, its features (the SC loss of Diff-ICMH). Training is resumable: the run's folder
holds its whole state, and a run that is killed goes on where its last save was.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicmh_ray.codec.checkpoint import LAYERED, read_checkpoint
from dicmh_ray.codec.device import find_device
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.objectives import FeatureTeacher, StructuralDistance
from dicmh_ray.codec.photographs import JPEG_SHARE, PATTERN_SHARE, PackedPhotographs
from dicmh_ray.codec.rate import ContextRate
from dicmh_ray.codec.run_state import Report, RunFolder
from dicmh_ray.codec.stage import Losses, Stage, StageOptions
from dicmh_ray.codec.transform import native_precision
from dicmh_ray.errors import WeightsError

FILES = {"state": "state.safetensors", "progress": "progress.json", "log": "log.jsonl"}
"""Of a run, in its folder."""

WARM_START_STEPS = 300
"""Steps in which a run that starts from a checkpoint trains its rate model alone."""

UNIT_CROPS = 64
"""Crops that a new run measures the units of its channels on."""

STRUCTURE_UNIT = 1600.0
"""``1 - MS-SSIM`` times this is about the mean squared error of the same picture, at every state."""

SEMANTICS_UNIT = 600.0
"""The same for the distance of a teacher's features."""

TONE_CELL = 16
"""Pixels per side of the cells whose means MS-SSIM hardly compares, and squared error still does."""

FREE_FIELDS = {"finest_step"}
"""What a network may have otherwise than the checkpoint it starts from: no weight depends on it."""

GROWING_FIELDS = {"encoder_blocks", "analysis_blocks", "synthesis_blocks", "restorer_blocks"}
"""Depths in which a network may exceed the checkpoint it starts from: new blocks begin as identity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(StageOptions):
    """One training run. The network's shape is in :class:`NetworkConfig`."""

    steps: int = 12_000
    batch: int = 12

    crop: int = 192
    """Pixels per side, a multiple of 16."""

    learning_rate: float = 6e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.998

    jpegs: float = JPEG_SHARE
    """Share of the crops that were JPEGs first."""

    patterns: float = PATTERN_SHARE
    """Share of the crops with a drawn pattern."""

    context_rate: float = 8.0
    """Factor on the learning rate for the rate model, which must follow the latent quickly."""

    finest_lambda: float = 0.0354
    """Weight of the mean squared error (8-bit units) of the last state against bits per pixel."""

    structure: float = 0.65
    """Share of the distortion that is ``1 - MS-SSIM``, with tone (:data:`TONE_CELL`); 0 with crops
    below 176 pixels."""

    semantics: float = 0.3
    """Share that is the distance of a teacher's features; without a teacher it is squared error."""

    semantic_states: int = 4
    """First states, which alone have semantics: where bytes are few, machines lose most."""

    faithful_states: int = 1
    """Last states, by whose PSNR archives keep pictures: less structure."""

    faithful_structure: float = 0.5
    """Share of structure there."""

    lambda_ratio: float = 5.3
    """Ratio of the weights of consecutive states."""

    frequent_states: int = 3
    """Last states, drawn twice as often: archives keep and read pictures by them."""

    def lambdas(self, num_states: int) -> list[float]:
        """Distortion weight of each state, coarsest first."""
        return [
            self.finest_lambda / self.lambda_ratio ** (num_states - 1 - k)
            for k in range(num_states)
        ]


def train(
    photographs: PackedPhotographs,
    folder: Path,
    *,
    options: TrainOptions,
    network: NetworkConfig,
    device: str = "cpu",
    start_from: str | Path | None = None,
    teacher: Path | None = None,
    report: Report | None = None,
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
            for the first steps. The network may be deeper than the checkpoint's.
        teacher: weights of a classifier whose features shall survive (:class:`FeatureTeacher`).
        report: called every 50 steps with step, seconds, loss, and bpp and PSNR of each state.

    Returns:
        The network with averaged weights, in evaluation mode.

    Raises:
        WeightsError: ``folder`` holds a run of another shape, or ``start_from`` has one or is of
            another codec.
        DeviceError: there is no such device.
    """
    torch.manual_seed(options.seed)
    stage = CodecStage(
        photographs,
        folder,
        options,
        network,
        find_device(device),
        start_from=start_from,
        teacher=teacher,
    )
    stage.run(report)
    return stage.network.eval()


class CodecStage(Stage):
    """Trains the networks, and the rate model that stands for the tables meanwhile.

    Arguments are those of :func:`train`.
    """

    options: TrainOptions

    def __init__(
        self,
        photographs: PackedPhotographs,
        folder: Path,
        options: TrainOptions,
        config: NetworkConfig,
        device: torch.device,
        *,
        start_from: str | Path | None,
        teacher: Path | None,
    ) -> None:
        self._photographs, self._config = photographs, config
        self.network = CodecNetwork(config)
        self.network.to(device).to(memory_format=torch.channels_last)
        self.network.compute_in(native_precision(device))
        self.frozen_steps = 0
        self.teachers: list[dict[str, Any]] = []
        """Whose features trained these weights, also before this call: no judge of them."""

        run = RunFolder(folder, **FILES)
        if run.progress() is None and start_from is None:
            crops = photographs.crops(UNIT_CROPS, options.crop, np.random.default_rng(options.seed))
            self.network.initialise_units(crops.to(device, torch.float32))
        elif run.progress() is None:
            found = read_checkpoint(str(start_from))
            if found.codec != LAYERED:
                raise WeightsError(str(start_from), f"codec is {found.codec!r}, wanted {LAYERED!r}")
            weights = safetensors.torch.load(found.files["weights.safetensors"])
            grown = NetworkConfig.from_dict(found.config["network"])
            grow_from(self.network, grown, weights, name=str(start_from))
            self.frozen_steps = WARM_START_STEPS
            self.teachers = found.teachers
        distortion = Distortion(options, config.num_states, device, teacher)
        self._module = _CodecLosses(self.network, distortion, options)
        self._module.to(device)
        trained = {
            "network": self.network,
            "rate": self._module.rate,
            "sizes": self._module.sizes,
        }
        super().__init__(trained, run, options, device)
        if distortion.teacher is not None and distortion.teacher.identity not in self.teachers:
            self.teachers = [*self.teachers, distortion.teacher.identity]
        # While the rate model is fitted alone, the networks have no part in the loss.
        self.has_idle_weights = self.step < self.frozen_steps

    def make_optimisers(self) -> Sequence[torch.optim.Optimizer]:
        options = self.options
        groups: list[dict[str, Any]] = [
            {"params": list(self.network.parameters())},
            {
                "params": list(self._module.rate.parameters()),
                "lr": options.context_rate * options.learning_rate,
            },
        ]
        return [
            torch.optim.AdamW(
                groups,
                lr=options.learning_rate,
                betas=(0.9, 0.99),
                weight_decay=options.weight_decay,
            )
        ]

    def clipped(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def warmed_up(self) -> float:
        steps = self.step if self.step < self.frozen_steps else self.step - self.frozen_steps
        return min(1.0, (steps + 1) / 200)

    def draw(self, step: int, rng: np.random.Generator) -> tuple[Any, ...]:
        options, num_states = self.options, self._config.num_states
        crops = self._photographs.crops(
            options.batch, options.crop, rng, patterns=options.patterns, jpegs=options.jpegs
        )
        x = crops.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        frequent = range(max(num_states - options.frequent_states, 0), num_states)
        deck = [*range(num_states), *frequent]
        rounds = [rng.permutation(deck) for _ in range(-(-len(x) // len(deck)))]
        states = torch.from_numpy(np.concatenate(rounds)[: len(x)])
        return x, states.to(self.device), step < self.frozen_steps

    def forward_module(self) -> nn.Module:
        return self._module.train()

    def log_facts(self) -> dict[str, Any]:
        return self._module.take_rate_and_quality()

    def progress_facts(self) -> dict[str, Any]:
        return {
            "frozen_steps": self.frozen_steps,
            "teachers": self.teachers,
            "network": self._config.to_dict(),
            "options": asdict(self.options),
        }

    def _load(self, progress: dict[str, Any]) -> None:
        if NetworkConfig.from_dict(progress["network"]) != self._config:
            raise WeightsError(
                str(self.folder.folder), "the run was started with another network shape"
            )
        self.frozen_steps = int(progress["frozen_steps"])
        self.teachers = progress.get("teachers", [])
        super()._load(progress)


class _LossSizes(nn.Module):
    """Running mean of each state's loss, which all states are made to count alike by."""

    def __init__(self, num_states: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.ones(num_states))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(num_states))

    def update(self, losses_B: Tensor, state_B: Tensor) -> None:
        """Move towards the losses: at first to their mean, later by a hundredth each."""
        for loss, state in zip(losses_B.tolist(), state_B.tolist(), strict=True):
            if math.isfinite(loss):
                self.seen[state] += 1
                self.mean[state] += (loss - self.mean[state]) / self.seen[state].clamp_max(100)


class _CodecLosses(nn.Module):
    """One step: crops and their states -> the loss; sums of rate and error for the log."""

    def __init__(
        self, network: CodecNetwork, distortion: "Distortion", options: TrainOptions
    ) -> None:
        super().__init__()
        config = network.config
        self.network = network
        self.rate = ContextRate(config.y_channels, config.num_states)
        self.sizes = _LossSizes(config.num_states)
        self._distortion = distortion
        self._lambdas = torch.tensor(options.lambdas(config.num_states))
        self._steps = torch.tensor(config.steps)
        self._sums = torch.zeros(3, config.num_states)

    def forward(self, x_B3HW: Tensor, state_B: Tensor, is_frozen: bool) -> Losses:
        step = self._steps.to(x_B3HW.device)[state_B]
        if is_frozen:
            with torch.no_grad():
                latent = self.network.encode(x_B3HW)
            _, bits = self.rate(latent, step, state_B)
            # The logarithm, so that every state and picture counts alike.
            return {"log_bits": (1.0, bits.log().mean())}
        y, bits = self.rate(self.network.encode(x_B3HW), step, state_B)
        decoded = self.network.decode(y, state_B)
        error, distortion = self._distortion(x_B3HW, decoded, state_B)
        bpp = bits / (x_B3HW.shape[2] * x_B3HW.shape[3])
        losses = bpp + self._lambdas.to(x_B3HW.device)[state_B] * distortion
        self.sizes.update(losses.detach(), state_B)
        facts = torch.stack([bpp, error, torch.ones_like(bpp)]).detach()
        self._sums.index_add_(1, state_B.cpu(), facts.cpu())
        return {"loss": (1.0, (losses / self.sizes.mean[state_B]).mean())}

    def take_rate_and_quality(self) -> dict[str, list[float]]:
        """Bits per pixel and PSNR of each state since the last call; nothing if none was decoded."""
        bpp, error = (self._sums[:2] / self._sums[2].clamp_min(1)).tolist()
        was_decoded = bool(self._sums[2].any())
        self._sums.zero_()
        if not was_decoded:
            return {}
        return {
            "bpp": [round(value, 4) for value in bpp],
            "psnr": [round(10 * math.log10(255**2 / max(value, 1e-9)), 2) for value in error],
        }


class Distortion:
    """Squared error, structure and features of a batch, in the proportions of the options."""

    def __init__(
        self, options: TrainOptions, num_states: int, device: torch.device, teacher: Path | None
    ) -> None:
        states = torch.arange(num_states, device=device)
        is_faithful = states >= num_states - options.faithful_states
        is_semantic = states < options.semantic_states
        self._structure = torch.where(is_faithful, options.faithful_structure, options.structure)
        self._semantics = torch.where(is_semantic, options.semantics, 0.0)
        self.teacher = FeatureTeacher(teacher).to(device) if teacher is not None else None
        self._distance = StructuralDistance(options.crop, device) if options.structure else None

    def __call__(
        self, x_B3HW: Tensor, decoded_B3HW: Tensor, state_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error and distortion of each image, both ``[B]``.

        ``state_B`` is the state that each was decoded from, int64.
        """
        error = (decoded_B3HW - x_B3HW).square().mean((1, 2, 3))
        mixed = error
        if self._distance is not None:
            distance = STRUCTURE_UNIT * self._distance(x_B3HW, decoded_B3HW)
            # Structure stands for the error inside cells: pale walls turn patchy without their tone.
            tone = F.avg_pool2d(decoded_B3HW - x_B3HW, TONE_CELL).square().mean((1, 2, 3))
            mixed = mixed + self._structure[state_B] * (distance + tone - error)
        share = self._semantics[state_B]
        read = share.nonzero()[:, 0]
        if self.teacher is not None and len(read):
            # At half size, as analysis networks see photographs.
            pair = (F.avg_pool2d(images[read], 2) for images in (x_B3HW, decoded_B3HW))
            distance = SEMANTICS_UNIT * self.teacher.distance(*pair)
            mixed = mixed.index_add(0, read, share[read] * (distance - error[read]))
        return error, mixed


def grow_from(
    network: CodecNetwork, config: NetworkConfig, weights: dict[str, Tensor], *, name: str
) -> None:
    """Give a network the weights of one that is as deep or less deep, which it then equals.

    The human view, which is trained after everything else, is left out.

    Raises:
        WeightsError: the shapes differ in more than depth, or a tensor is missing.
    """
    wanted, found = network.config.to_dict(), config.to_dict()
    for field, value in found.items():
        grown = field in GROWING_FIELDS and wanted[field] > value
        added = field == "gain_hidden" and value == 0
        free = field in FREE_FIELDS or field.startswith("human_")
        if wanted[field] != value and not (grown or added or free):
            raise WeightsError(name, f"its {field} is {value}, wanted {wanted[field]}")
    core = CodecNetwork(dataclasses.replace(config, human_width=0)).state_dict().keys()
    if missing := core - weights.keys():
        raise WeightsError(name, f"{', '.join(sorted(missing))} missing")
    network.load_state_dict({key: weights[key].float() for key in core}, strict=False)
