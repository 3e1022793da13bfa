"""What every training run keeps: its whole state in a folder, a log, and averaged weights.

A run's folder holds one safetensors file (weights, averages, optimiser moments) and one JSON file
(steps, options). Both are replaced whole, so that a run which is killed goes on from its last save.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dicmh_ray.errors import WeightsError

CHECKPOINT_NAME = "checkpoint"
"""What a run has made, in its folder."""

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
"""Told the facts of a line of the log."""


class WeightAverage:
    """Running average of a module's weights; what is exported after training."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's weights; faster in the first steps, when they are far."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.tensors[name].lerp_(value, 1 - decay)
            else:
                self.tensors[name].copy_(value)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a saved average, on the device of the module."""
        for name, value in self.tensors.items():
            value.copy_(tensors[name])


class RunFolder:
    """The files of one stage of a training run."""

    def __init__(self, folder: Path, *, state: str, progress: str, log: str) -> None:
        self.folder = folder
        self._state, self._progress, self._log = folder / state, folder / progress, folder / log

    def progress(self) -> dict[str, Any] | None:
        """Steps and options of the run that is there, if one is. Raises WeightsError."""
        if not self._progress.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(self._progress.read_text())
        except ValueError as exc:
            raise WeightsError(str(self._progress), f"a damaged save: {exc}") from exc
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the last save wrote. Raises WeightsError."""
        try:
            return load_file(self._state)
        except SafetensorError as exc:
            raise WeightsError(str(self._state), f"a damaged save: {exc}") from exc

    def save(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Replace both files; what was there stays valid until the new ones are complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        contiguous = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        partial = self._state.with_name(self._state.name + ".part")
        save_file(contiguous, partial)
        partial.replace(self._state)
        partial = self._progress.with_name(self._progress.name + ".part")
        partial.write_text(json.dumps(progress, indent=1))
        partial.replace(self._progress)

    def log(self, line: dict[str, Any], report: Report | None) -> None:
        """Append a line to the log and tell whoever listens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        logger.info("%s", line)
        if report is not None:
            report(line)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names with a prefix, for a file that holds several modules."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`prefixed`: what has the prefix, without it."""
    start = f"{prefix}/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def moments_of(optimiser: torch.optim.Optimizer, prefix: str = "adam") -> dict[str, Tensor]:
    """An optimiser's moments as named tensors."""
    return {
        f"{prefix}/{index}/{key}": torch.as_tensor(value)
        for index, moments in optimiser.state_dict()["state"].items()
        for key, value in moments.items()
    }


def restore_moments(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str = "adam"
) -> None:
    """Give an optimiser back what :func:`moments_of` made of it.

    But for weights without elements, such as the words of a human view that knows none: files hold
    the number of their steps alone, from which no optimiser goes on.
    """
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in under(prefix, tensors).items():
        index, key = name.split("/")
        if weights[int(index)].numel():
            moments.setdefault(int(index), {})[key] = value
    state = optimiser.state_dict()
    state["state"] = moments
    optimiser.load_state_dict(state)


def cosine_fall(done: float) -> float:
    """Factor on the learning rate: 1, then down to 2 % along a cosine over the last 60 % of a run."""
    fall = min(1.0, max(0.0, (done - 0.4) / 0.6))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall))
