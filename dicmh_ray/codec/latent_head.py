"""LatentHead: what a picture shows, read off its latent by a small network that is fitted to labels.

    latent [C, h, w] ── / scale ──> signed log ── 1x1 conv ── residual 3x3 conv ── 2x2 and whole means
                                                                                      └─> linear: classes

The cells of a latent are features already: a head has some 50,000 weights and is fitted in a minute on
a CPU to a few hundred pictures. It belongs to one checkpoint, whose latents it knows; the file says
which. Fitting is seeded, and the same for the same machine and number of threads.

Shape suffixes: B pictures, C channels, h w the latent's grid, N classes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicmh_ray.errors import WeightsError

FORMAT = "dicmh-latent-head/1"

SCALE_FLOOR = 1e-3
"""Of a channel that is zero on all pictures."""

MAX_CROP = 32
"""Cells a side of the pieces that a head is fitted to."""

Latent = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadOptions:
    """How a head is made and fitted."""

    width: int = 64
    """Channels inside."""

    epochs: int = 60
    """Passes over the pictures."""

    batch_size: int = 16

    learning_rate: float = 2e-3

    weight_decay: float = 0.05

    dropout: float = 0.3
    """Share of the pooled features that each step does without."""

    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")


class _Net(nn.Module):
    scale_C: Tensor

    def __init__(self, channels: int, classes: int, options: HeadOptions) -> None:
        super().__init__()
        self.register_buffer("scale_C", torch.ones(channels))
        self.reduce = nn.Conv2d(2 * channels, options.width, 1)
        self.mix = nn.Conv2d(options.width, options.width, 3, padding=1)
        self.norm = nn.LayerNorm(5 * options.width)
        self.dropout = nn.Dropout(options.dropout)
        self.classify = nn.Linear(5 * options.width, classes)

    def levelled(self, latent: Latent) -> Tensor:
        """What :meth:`forward` takes of a latent: float32 ``[C, h, w]``.

        Sizes of numbers matter by their order of magnitude.
        """
        scaled = torch.from_numpy(latent.astype(np.float32)) / self.scale_C[:, None, None]
        return torch.sign(scaled) * torch.log1p(scaled.abs())

    def forward(self, levelled_BChw: Tensor) -> Tensor:
        # What is rough shows in |x| alone.
        x = F.gelu(self.reduce(torch.cat([levelled_BChw, levelled_BChw.abs()], dim=1)))
        x = x + F.gelu(self.mix(x))
        quarters = F.adaptive_avg_pool2d(x, 2).flatten(1)
        pooled = torch.cat([quarters, x.mean(dim=(2, 3))], dim=1)
        return self.classify(self.dropout(self.norm(pooled)))


class LatentHead:
    """Fitted to labelled latents; gives the probability of each class."""

    def __init__(
        self,
        net: _Net,
        *,
        labels: Sequence[str],
        codec_id: str,
        states: int | None,
        options: HeadOptions,
        channels: int,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.labels = tuple(labels)
        """Names of the classes, in their order."""
        self.codec_id = codec_id
        """Of the checkpoint whose latents it reads."""
        self.states = states
        """States of the latents that it was fitted to."""
        self.provenance = provenance or {}
        """How it was fitted and how well it does, JSON-able."""
        self._net, self._options, self._channels = net, options, channels
        net.eval()

    @classmethod
    def fit(
        cls,
        latents: Sequence[Latent],
        classes: Sequence[int],
        *,
        labels: Sequence[str],
        codec_id: str,
        states: int | None,
        options: HeadOptions | None = None,
    ) -> Self:
        """Fit a head.

        Args:
            latents: of each picture, ``[C, h, w]`` of any h and w, all of one C.
            classes: of each picture, below ``len(labels)``.
            labels: names of the classes.
            codec_id: of the checkpoint that the latents are of.
            states: of the latents.
            options: size and fitting.

        Raises:
            ValueError: there are no pictures, fewer than two classes, or a class out of range.
        """
        options = options or HeadOptions()
        if not latents or len(latents) != len(classes) or len(labels) < 2:
            raise ValueError(f"{len(latents)} latents, {len(classes)} classes, {len(labels)} names")
        if min(classes) < 0 or max(classes) >= len(labels):
            raise ValueError(f"classes go from {min(classes)} to {max(classes)}")
        channels = len(latents[0])
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(options.seed)
            net = _Net(channels, len(labels), options)
            net.scale_C.copy_(_channel_scale(latents))
            _fit(net, latents, classes, options)
        return cls(
            net,
            labels=labels,
            codec_id=codec_id,
            states=states,
            options=options,
            channels=channels,
        )

    def probabilities(self, latents: Sequence[Latent]) -> npt.NDArray[np.float32]:
        """Of each class for each picture, float32 ``[B, N]``.

        Raises:
            ValueError: the latents have other channels than those it was fitted to.
        """
        rows = []
        with torch.inference_mode():
            for latent in latents:
                if len(latent) != self._channels:
                    raise ValueError(f"latent has {len(latent)} channels, wanted {self._channels}")
                logits: Tensor = self._net(self._net.levelled(latent)[None])
                rows.append(torch.softmax(logits, dim=1)[0].numpy())
        return np.stack(rows) if rows else np.zeros((0, len(self.labels)), np.float32)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        facts = {
            "format": FORMAT,
            "labels": self.labels,
            "codec_id": self.codec_id,
            "states": self.states,
            "channels": self._channels,
            "width": self._options.width,
            "provenance": self.provenance,
        }
        tensors = {k: v.contiguous() for k, v in self._net.state_dict().items()}
        return safetensors.torch.save(tensors, {"head": json.dumps(facts, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "head") -> Self:
        """From :meth:`to_bytes`.

        Raises:
            WeightsError: the bytes are no head.
        """
        try:
            length = int.from_bytes(data[:8], "little")
            facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["head"])
            if facts["format"] != FORMAT:
                raise WeightsError(name, f"is a {facts['format']!r}, wanted {FORMAT!r}")
            options = HeadOptions(width=facts["width"])
            net = _Net(facts["channels"], len(facts["labels"]), options)
            net.load_state_dict(safetensors.torch.load(data))
        except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as exc:
            raise WeightsError(name, f"is no head: {exc}") from exc
        return cls(
            net,
            labels=facts["labels"],
            codec_id=facts["codec_id"],
            states=facts["states"],
            options=options,
            channels=facts["channels"],
            provenance=facts["provenance"],
        )


def _channel_scale(latents: Sequence[Latent]) -> Tensor:
    """Root mean square of each channel, float32 ``[C]``."""
    sums = np.zeros(len(latents[0]))
    count = 0
    for latent in latents:
        sums += np.square(latent.astype(np.float64)).sum(axis=(1, 2))
        count += latent.shape[1] * latent.shape[2]
    return torch.from_numpy(np.maximum(np.sqrt(sums / count), SCALE_FLOOR).astype(np.float32))


def _fit(
    net: _Net, latents: Sequence[Latent], classes: Sequence[int], options: HeadOptions
) -> None:
    net.train()
    levelled = [net.levelled(latent).half() for latent in latents]  # half: they are all in memory
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    steps = math.ceil(len(latents) / options.batch_size) * options.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=steps
    )
    for _ in range(options.epochs):
        order = torch.randperm(len(latents)).tolist()
        for start in range(0, len(order), options.batch_size):
            chosen = order[start : start + options.batch_size]
            optimizer.zero_grad()
            logits = net(_crops([levelled[i] for i in chosen]))
            target = torch.tensor([classes[i] for i in chosen])
            loss = F.cross_entropy(logits, target, label_smoothing=0.1)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    net.eval()


def _crops(latents: Sequence[Tensor]) -> Tensor:
    """A piece of each at a place by chance, as large as all of them have, float32 ``[B, C, h, w]``.

    Pictures are of many sizes; pieces make one batch of them, and each pass sees others.
    """
    sides = [min(MAX_CROP, *(latent.shape[axis] for latent in latents)) for axis in (1, 2)]
    pieces = []
    for latent in latents:
        top, left = (
            int(torch.randint(latent.shape[axis] - side + 1, ()))
            for axis, side in zip((1, 2), sides, strict=True)
        )
        piece = latent[:, top : top + sides[0], left : left + sides[1]]
        pieces.append(piece.float())
    return torch.stack(pieces)
