"""One stage of training as a loop: losses, optimisers, averaged weights, saves, log.

What a stage trains and what it minimises is said by its subclass. The loop is the same for one
process and for several: where ``torch.distributed`` has been set up (``torchrun``, Ray Train), every
process draws other crops, gradients are averaged, and the first one writes the files.
"""

import itertools
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
from dicmh_ray.errors import WeightsError

DRAWING_THREADS = 6
"""Threads that draw crops ahead of a GPU, which takes less time for a step than one thread for its crops."""

Losses = Mapping[str, tuple[float, Tensor]]
"""Name -> weight and mean over a batch. A weight of 0 is reported and not minimised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOptions:
    """Schedule of a stage; what is minimised is in the options of each."""

    steps: int = 10**9
    """Optimiser steps of the whole stage; with ``minutes``, whichever ends first."""

    minutes: float = math.inf
    """Wall-clock budget of this call. The learning rate falls to 2 % towards the end."""

    batch: int = 16
    """Crops a step and process."""

    crop: int = 512
    """Pixels per side."""

    learning_rate: float = 5e-5
    """Peak rate."""

    weight_decay: float = 0.01

    clip: float = math.inf
    """Largest norm of a gradient."""

    ema: float = 0.999
    """Decay of the running average of the weights that is exported."""

    is_constant: bool = False
    """Keep the learning rate, as the official recipe does, instead of letting it fall."""

    seed: int = 231
    save_seconds: float = 120.0
    report_steps: int = 50


class Stage(ABC):
    """Trains modules that share one forward pass."""

    has_idle_weights = False
    """Whether some trained weights have no part in the losses: several processes must then search
    for them in each step."""

    def __init__(
        self,
        trained: Mapping[str, nn.Module],
        folder: RunFolder,
        options: StageOptions,
        device: torch.device,
    ) -> None:
        self.trained = dict(trained)
        self.folder, self.options, self.device = folder, options, device
        self.step = 0
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if is_distributed else 0
        self.processes = torch.distributed.get_world_size() if is_distributed else 1
        self.drawing_threads = DRAWING_THREADS if device.type == "cuda" else 0
        self.averages = {
            name: WeightAverage(module, options.ema) for name, module in self.trained.items()
        }
        self.optimisers = self.make_optimisers()
        self._peak_rates = [group["lr"] for group in self.optimisers[0].param_groups]
        progress = folder.progress()
        if progress is not None:
            self._load(progress)

    @abstractmethod
    def draw(self, step: int, rng: np.random.Generator) -> tuple[Any, ...]:
        """Arguments of the forward pass of a step; several steps may be drawn at the same time."""

    @abstractmethod
    def forward_module(self) -> nn.Module:
        """The module whose call, with what :meth:`draw` gave, returns :data:`Losses`."""

    def make_optimisers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimisers; the first one, made with its peak rates, follows the schedule."""
        parameters = [p for module in self.trained.values() for p in module.parameters()]
        return [
            torch.optim.AdamW(
                parameters,
                lr=self.options.learning_rate,
                weight_decay=self.options.weight_decay,
            )
        ]

    def clipped(self) -> list[nn.Parameter]:
        """Parameters whose gradient's norm is bounded.

        Those of the first optimiser: others have gradients of their own size, such as those of quantiles.
        """
        return [p for group in self.optimisers[0].param_groups for p in group["params"]]

    def warmed_up(self) -> float:
        """Share of the learning rate, 0..1: it rises when training starts."""
        return min(1.0, (self.step + 1) / 200)

    def log_facts(self) -> dict[str, Any]:
        """What a line of the log says beside the means of the losses; called once a line."""
        return {}

    def run(self, report: Report | None = None) -> None:
        """Train until the steps or the minutes are over; the modules end with averaged weights."""
        options = self.options
        torch.manual_seed(options.seed + self.step + 7919 * self.rank)
        forward = self.forward_module()
        if self.processes > 1:
            forward = DistributedDataParallel(forward, find_unused_parameters=self.has_idle_weights)
        clipped = self.clipped()
        started = last_save = time.monotonic()
        first = self.step
        since: dict[str, list[float]] = {}
        for drawn in self._draws():
            spent = self._agreed((time.monotonic() - started) / 60)
            if spent >= options.minutes:
                break
            done = max((self.step - first) / max(options.steps - first, 1), spent / options.minutes)
            share = self.warmed_up() * (1.0 if options.is_constant else cosine_fall(done))
            for group, peak in zip(self.optimisers[0].param_groups, self._peak_rates, strict=True):
                group["lr"] = share * peak
            losses: Losses = forward(*drawn)
            loss = torch.stack([weight * value for weight, value in losses.values() if weight])
            for optimiser in self.optimisers:
                optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss.sum())
            norm = torch.nn.utils.clip_grad_norm_(clipped, options.clip)
            if torch.isfinite(norm):
                for optimiser in self.optimisers:
                    optimiser.step()
                for name, module in self.trained.items():
                    self.averages[name].update(module, self.step)
            self.step += 1
            for name, (_, value) in losses.items():
                since.setdefault(name, []).append(float(value.detach()))
            if self.step % options.report_steps == 0:
                self._report(since, time.monotonic() - started, report)
                since = {}
            if time.monotonic() - last_save > options.save_seconds:
                self.save()
                last_save = time.monotonic()
        self.save()
        for name, module in self.trained.items():
            module.load_state_dict(self.averages[name].tensors)
            module.eval()

    def _draws(self) -> Iterator[tuple[Any, ...]]:
        """What each step sees, which depends on its number alone: a run that goes on sees what it would have."""

        def drawn(step: int) -> tuple[Any, ...]:
            seed = [self.options.seed, step, self.rank]
            return self.draw(step, np.random.default_rng(seed))

        steps = range(self.step, self.options.steps)
        if not self.drawing_threads:
            yield from map(drawn, steps)
            return
        pool = ThreadPoolExecutor(self.drawing_threads)
        try:
            ahead: deque[Future[tuple[Any, ...]]] = deque()
            left = iter(steps)
            while True:
                wanted = 2 * self.drawing_threads - len(ahead)
                ahead.extend(pool.submit(drawn, step) for step in itertools.islice(left, wanted))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def save(self) -> None:
        """Write the stage's whole state; the previous save stays valid until it is complete."""
        if self.rank:
            return
        tensors: dict[str, Tensor] = {}
        for name, module in self.trained.items():
            tensors |= prefixed(f"module/{name}", module.state_dict())
            tensors |= prefixed(f"average/{name}", self.averages[name].tensors)
        for number, optimiser in enumerate(self.optimisers):
            tensors |= moments_of(optimiser, f"adam{number}")
        # safetensors has no room for tensors without elements of their own shape: tables to come.
        self.folder.save(
            {k: v for k, v in tensors.items() if v.numel()},
            {"step": self.step, **self.progress_facts()},
        )

    def progress_facts(self) -> dict[str, Any]:
        """What the progress file says beside the step."""
        return {}

    def _load(self, progress: dict[str, Any]) -> None:
        tensors = self.folder.tensors()
        self.step = int(progress["step"])
        try:
            for name, module in self.trained.items():
                empty = {k: v for k, v in module.state_dict().items() if not v.numel()}
                module.load_state_dict(under(f"module/{name}", tensors) | empty)
                self.averages[name].load(under(f"average/{name}", tensors) | empty)
        except (RuntimeError, KeyError) as exc:
            raise WeightsError(
                str(self.folder.folder), f"the run was started with another shape: {exc}"
            ) from exc
        for number, optimiser in enumerate(self.optimisers):
            restore_moments(optimiser, tensors, f"adam{number}")

    def _report(self, since: dict[str, list[float]], seconds: float, report: Report | None) -> None:
        if self.rank:
            return
        line: dict[str, Any] = {"step": self.step, "seconds": round(seconds, 1)}
        line["learning_rate"] = float(f"{self.optimisers[0].param_groups[0]['lr']:.3g}")
        line |= {name: round(statistics.fmean(values), 5) for name, values in since.items()}
        line |= self.log_facts()
        self.folder.log(line, report)

    def _agreed(self, minutes: float) -> float:
        """The first process's clock: clocks differ, learning rates and step counts must not."""
        if self.processes == 1 or math.isinf(self.options.minutes):
            return minutes
        clock = torch.tensor(minutes, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(clock, 0)
        return float(clock)
