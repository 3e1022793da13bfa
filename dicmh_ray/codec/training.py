"""Train the default codec: rate and distortion of all its states at once.

Each image of a batch is decoded from one state, drawn so that a batch holds all of them; its loss
is ``bpp + lambda_k * D`` of that state, divided by the running mean of its own size, so that
every state counts by relative, not absolute, improvement. The distortion D mixes squared error,
structure (MS-SSIM) and, where a teacher is given, its features (the SC loss, spec C). Training is resumable: the run's folder
holds its whole state, and a run that is killed goes on where its last save was.
"""

import dataclasses
import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dicmh_ray.codec.checkpoint import read_checkpoint
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.objectives import FeatureTeacher, StructuralDistance
from dicmh_ray.codec.rate import ContextRate
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
from dicmh_ray.errors import SourceFormatError, WeightsError

FILES = {"state": "state.safetensors", "progress": "progress.json", "log": "log.jsonl"}
"""Of a run, in its folder."""

WARM_START_STEPS = 300
"""Steps in which a run that starts from a checkpoint trains its rate model alone."""

STRUCTURE_UNIT = 1600.0
"""``1 - MS-SSIM`` times this is about the mean squared error of the same picture, at every state."""

SEMANTICS_UNIT = 600.0
"""The same for the distance of a teacher's features."""

TONE_CELL = 16
"""Pixels per side of the cells whose means MS-SSIM hardly compares, and squared error still does."""

JPEG_SHARE = 0.2
"""Share of the codec's crops that were JPEGs first, with chroma at half size, as most pictures of an
archive were."""

JPEG_QUALITIES = (75, 95)
"""Least and greatest quality of those."""

FREE_FIELDS = {"finest_step"}
"""What a network may have otherwise than the checkpoint it starts from: no weight depends on it."""

GROWING_FIELDS = {"encoder_blocks", "analysis_blocks", "synthesis_blocks", "restorer_blocks"}
"""Depths in which a network may exceed the checkpoint it starts from: new blocks begin as identity."""


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

    jpegs: float = JPEG_SHARE
    """Share of them that were JPEGs first."""

    learning_rate: float = 6e-4
    """Adam's peak rate for the networks."""

    context_rate: float = 8.0
    """Factor on the learning rate for the rate model, which must follow the latent quickly."""

    finest_lambda: float = 0.036
    """Weight of the mean squared error (8-bit units) of the last state against bits per pixel."""

    structure: float = 0.6
    """Share of the distortion that is ``1 - MS-SSIM``, with tone (:data:`TONE_CELL`); 0 with crops
    below 176 pixels."""

    semantics: float = 0.3
    """Share that is the distance of a teacher's features; without a teacher it is squared error."""

    faithful_states: int = 1
    """Last states, by whose PSNR archives keep pictures: less structure, no semantics."""

    faithful_structure: float = 0.3
    """Share of structure there."""

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
    ``photographs.json`` the list of ``[offset, height, width, tags]``.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "photographs.json").read_text())
        self.samples: npt.NDArray[np.uint8] = np.memmap(
            folder / "photographs.bin", dtype=np.uint8, mode="r"
        )
        self.entries = [(int(o), int(h), int(w)) for o, h, w, *_ in index]
        self.tags: list[tuple[str, ...]] = [
            tuple(tags[0]) if tags else () for _, _, _, *tags in index
        ]

    def picture(self, i: int) -> npt.NDArray[np.uint8]:
        """Picture i, uint8 ``[H, W, 3]``."""
        offset, height, width = self.entries[i]
        return self.samples[offset : offset + height * width * 3].reshape(height, width, 3)

    def crops(
        self, count: int, size: int, rng: np.random.Generator, *, jpegs: float = 0.0
    ) -> Tensor:
        """Random crops, flipped and turned, uint8 ``[count, 3, size, size]``.

        A picture is drawn in proportion to its area; every third crop is a larger region halved,
        so that the network also sees the sharper detail of smaller pictures; and a share of
        ``jpegs`` is what a JPEG leaves of the crop (:data:`JPEG_QUALITIES`).
        """
        return self._cut(self._draw(count, size, rng), size, rng, jpegs)

    def labelled_crops(
        self, count: int, size: int, rng: np.random.Generator, words: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`crops`, and which of the words each picture is tagged with, ``[count, words]``."""
        drawn = self._draw(count, size, rng)
        present = [[float(word in self.tags[i]) for word in words] for i in drawn]
        return self._cut(drawn, size, rng), torch.tensor(present).reshape(count, len(words))

    def tagged_crops(
        self, count: int, size: int, rng: np.random.Generator
    ) -> tuple[Tensor, list[tuple[str, ...]]]:
        """As :meth:`crops`, and the tags of the picture that each is from."""
        drawn = self._draw(count, size, rng)
        return self._cut(drawn, size, rng), [self.tags[i] for i in drawn]

    def require(self, size: int) -> None:
        """Raises SourceFormatError when no picture is large enough for crops of ``size`` pixels."""
        largest = max((min(h, w) for _, h, w in self.entries), default=0)
        if largest < size:
            raise SourceFormatError(
                "photographs", f"the largest short side is {largest} pixels, wanted {size} or more"
            )

    def _draw(self, count: int, size: int, rng: np.random.Generator) -> list[int]:
        areas = np.array([h * w for _, h, w in self.entries], np.float64)
        areas *= [min(h, w) >= size for _, h, w in self.entries]
        return [int(i) for i in rng.choice(len(areas), size=count, p=areas / areas.sum())]

    def _cut(
        self, drawn: Sequence[int], size: int, rng: np.random.Generator, jpegs: float = 0.0
    ) -> Tensor:
        out = np.empty((len(drawn), size, size, 3), np.uint8)
        for n, i in enumerate(drawn):
            picture = self.picture(i)
            factor = 2 if n % 3 == 2 and min(picture.shape[:2]) >= 2 * size else 1
            span = size * factor
            top = int(rng.integers(picture.shape[0] - span + 1))
            left = int(rng.integers(picture.shape[1] - span + 1))
            crop = picture[top : top + span, left : left + span]
            if factor == 2:
                wide = crop.astype(np.uint16).reshape(size, 2, size, 2, 3)
                crop = ((wide.sum((1, 3)) + 2) >> 2).astype(np.uint8)
            if rng.random() < jpegs:
                crop = _through_jpeg(crop, quality=int(rng.integers(*JPEG_QUALITIES)))
            crop = crop[:, :: 1 if rng.random() < 0.5 else -1]
            out[n] = np.rot90(crop) if rng.random() < 0.25 else crop
        return torch.from_numpy(out).permute(0, 3, 1, 2)


def _through_jpeg(crop: npt.NDArray[np.uint8], *, quality: int) -> npt.NDArray[np.uint8]:
    """A crop as a JPEG with chroma at half size gives it back."""
    coded = io.BytesIO()
    Image.fromarray(crop).save(coded, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(coded))


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
    trainer = _Trainer(photographs, folder, options, network, device, teacher)
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
        teacher: Path | None,
    ) -> None:
        self.photographs, self.options = photographs, options
        self.folder = RunFolder(folder, **FILES)
        self.config, self.device = config, torch.device(device)
        self.network = CodecNetwork(config)
        self.rate = ContextRate(config.y_channels, config.num_states)
        self.step = 0
        self.frozen_steps = 0
        self.loss_size = torch.ones(config.num_states)
        progress = self.folder.progress()
        self.network.to(self.device).to(memory_format=torch.channels_last)
        self.rate.to(self.device)
        self.distortion = Distortion(options, self.device, teacher)
        if progress is None:
            rng = np.random.default_rng(options.seed)
            crops = photographs.crops(64, options.crop, rng)
            self.network.initialise_units(crops.to(self.device, torch.float32))
        self.average = WeightAverage(self.network, options.ema)
        self.optimiser = torch.optim.Adam(
            [
                {"params": self.network.parameters(), "factor": 1.0},
                {"params": self.rate.parameters(), "factor": options.context_rate},
            ],
            lr=options.learning_rate,
            betas=(0.9, 0.99),
        )
        if progress is not None:
            self._load(progress)

    def start_from(self, checkpoint: str | Path) -> None:
        """Begin with the weights of a checkpoint, and give the rate model time to fit them."""
        found = read_checkpoint(checkpoint)
        weights = safetensors.torch.load(found.files["weights.safetensors"])
        config = NetworkConfig.from_dict(found.config["network"])
        grow_from(self.network, config, weights, name=str(checkpoint))
        self.average = WeightAverage(self.network, self.options.ema)
        self.frozen_steps = WARM_START_STEPS

    def run(self, report: Report | None) -> None:
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
            learning_rate = self._warmed_up() * cosine_fall(done) * options.learning_rate
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate * group["factor"]
            crops = self.photographs.crops(options.batch, options.crop, rng, jpegs=options.jpegs)
            x = crops.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
            states = torch.from_numpy(
                np.concatenate(
                    [
                        rng.permutation(config.num_states)
                        for _ in range(-(-len(x) // config.num_states))
                    ]
                )[: len(x)]
            ).to(self.device)
            if self.step < self.frozen_steps:
                self._fit_rate(x, steps[states], states)
                continue
            y, bits = self.rate(self.network.encode(x), steps[states], states)
            faithful = states >= config.num_states - options.faithful_states
            error, distortion = self.distortion(x, self.network.decode(y, states), faithful)
            bpp = bits / options.crop**2
            losses = bpp + lambdas[states] * distortion
            self._remember(losses.detach().cpu(), states.cpu())
            loss = (losses / self.loss_size.to(self.device)[states]).mean()
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            if torch.isfinite(norm):
                self.optimiser.step()
                self.average.update(self.network, self.step)
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

    def _warmed_up(self) -> float:
        """Share of the learning rate, 0..1: it rises when training starts and after a warm start."""
        steps = self.step if self.step < self.frozen_steps else self.step - self.frozen_steps
        return min(1.0, (steps + 1) / 200)

    def _fit_rate(self, x_B3HW: Tensor, step_B: Tensor, state_B: Tensor) -> None:
        """One step of the rate model alone, while the weights of a checkpoint wait for it."""
        with torch.no_grad():
            latent = self.network.encode(x_B3HW)
        _, bits = self.rate(latent, step_B, state_B)
        self.optimiser.zero_grad(set_to_none=True)
        (bits / bits.detach()).mean().backward()
        self.optimiser.step()
        self.step += 1

    def _remember(self, losses: Tensor, states: Tensor) -> None:
        for loss, state in zip(losses.tolist(), states.tolist(), strict=True):
            if math.isfinite(loss):
                weight = 0.1 if self.step < 50 else 0.01
                self.loss_size[state] += weight * (loss - float(self.loss_size[state]))

    def _report(
        self,
        sums: Tensor,
        learning_rate: float,
        seconds: float,
        report: Report | None,
    ) -> None:
        bpp, error = (sums[:2] / sums[2].clamp_min(1)).tolist()
        line = {
            "step": self.step,
            "seconds": round(seconds, 1),
            "learning_rate": learning_rate,
            "bpp": [round(value, 4) for value in bpp],
            "psnr": [round(10 * math.log10(255**2 / max(value, 1e-9)), 2) for value in error],
        }
        self.folder.log(line, report)

    def averaged(self) -> CodecNetwork:
        """The network with its averaged weights."""
        network = CodecNetwork(self.config)
        network.load_state_dict(self.average.tensors)
        return network

    def save(self) -> None:
        """Write the run's whole state; the previous save stays valid until this one is complete."""
        tensors = prefixed("network", self.network.state_dict())
        tensors |= prefixed("average", self.average.tensors)
        tensors |= prefixed("rate", self.rate.state_dict())
        tensors |= moments_of(self.optimiser)
        tensors["loss_size"] = self.loss_size
        progress = {
            "step": self.step,
            "frozen_steps": self.frozen_steps,
            "network": self.config.to_dict(),
            "options": asdict(self.options),
        }
        self.folder.save(tensors, progress)

    def _load(self, progress: dict[str, Any]) -> None:
        if NetworkConfig.from_dict(progress["network"]) != self.config:
            raise WeightsError(
                str(self.folder.folder), "the run was started with another network shape"
            )
        tensors = self.folder.tensors()
        self.step = int(progress["step"])
        self.frozen_steps = int(progress["frozen_steps"])
        self.loss_size = tensors["loss_size"]
        self.network.load_state_dict(under("network", tensors))
        self.rate.load_state_dict(under("rate", tensors))
        self.average.load(under("average", tensors))
        restore_moments(self.optimiser, tensors)


class Distortion:
    """Squared error, structure and features of a batch, in the proportions of the options."""

    def __init__(self, options: TrainOptions, device: torch.device, teacher: Path | None) -> None:
        self._options = options
        self._teacher = FeatureTeacher(teacher).to(device) if teacher is not None else None
        self._distance = StructuralDistance(options.crop, device) if options.structure else None

    def __call__(
        self, x_B3HW: Tensor, decoded_B3HW: Tensor, faithful_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error and distortion of each image, both ``[B]``.

        ``faithful_B`` is True for images that are decoded from one of the faithful states.
        """
        options = self._options
        error = (decoded_B3HW - x_B3HW).square().mean((1, 2, 3))
        mixed = error
        if self._distance is not None:
            distance = STRUCTURE_UNIT * self._distance(x_B3HW, decoded_B3HW)
            # Structure stands for the error inside cells: pale walls turn patchy without their tone.
            tone = F.avg_pool2d(decoded_B3HW - x_B3HW, TONE_CELL).square().mean((1, 2, 3))
            share = torch.where(faithful_B, options.faithful_structure, options.structure)
            mixed = mixed + share * (distance + tone - error)
        if self._teacher is not None and options.semantics:
            # At half size, as analysis networks see photographs; every other image, for its cost.
            pair = (F.avg_pool2d(images[::2], 2) for images in (x_B3HW, decoded_B3HW))
            every_other = torch.zeros_like(mixed)
            every_other[::2] = 2 * SEMANTICS_UNIT * self._teacher.distance(*pair)
            mixed = mixed + torch.where(faithful_B, 0.0, options.semantics) * (every_other - error)
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
