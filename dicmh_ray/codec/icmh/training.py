"""Train Diff-ICMH: first a prior where there is none, then the coder and its control branch.

    photographs ──VAE──> z0 ──noise──> U-Net(text) ──> noise             the prior: once, then frozen
    photographs ──VAE──> z0 ──lfgcm──> bits, c ──> U-Net + control(c, text) ──> noise    the codec

The codec minimises ``diffusion * |eps - eps'|^2 + distortion * |c - z0|^2 + rate * bpp + semantic * SC``.
SC, the semantic-consistency loss, compares what the frozen U-Net's encoder makes of z0 and of c, taken
as its input without noise: ``1 - cos`` over the features, averaged over positions.

Around Stable Diffusion the prior, the VAE and the text encoder are given and stay as they are. A small
codec of our own trains the first and the last here, on the photographs and their tags.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dicmh_ray.codec.icmh.control import ControlledUNet, semantic_distance
from dicmh_ray.codec.icmh.lfgcm import LatentCoder
from dicmh_ray.codec.icmh.parts import Parts
from dicmh_ray.codec.icmh.sampling import noise_schedule
from dicmh_ray.codec.icmh.text import tags_text
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.codec.run_state import RunFolder
from dicmh_ray.codec.stage import Losses, Stage, StageOptions

PRIOR_FILES = {"state": "prior.safetensors", "progress": "prior.json", "log": "prior.jsonl"}
"""Of the first stage, in a run's folder."""

CODEC_FILES = {"state": "codec.safetensors", "progress": "codec.json", "log": "codec.jsonl"}
"""Of the second."""

TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class IcmhOptions(StageOptions):
    """The codec's stage. Weights are those of the paper; ``rate`` chooses the model.

    Crops are multiples of 64 pixels per side."""

    diffusion: float = 1.0
    distortion: float = 1.0

    rate: float = 8.0
    """Weight of bits per pixel: 2, 4, 8, 16 or 32 in the paper, one model each."""

    semantic: float = 2.0

    semantic_time: Literal["zero", "random"] = "zero"
    """Timestep and noise of the features: none, or the same random ones for both."""

    semantic_block: int | None = None
    """Encoder block of the U-Net whose features count, from 0; None: the middle."""

    tag_dropout: float = 0.1
    """Probability that a whole batch is trained without its tags, for guidance."""

    auxiliary_rate: float = 1e-3
    """Learning rate of the quantiles of z."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """With ``bf16``, autocast around everything but the latent coder."""


class PriorStage(Stage):
    """Trains the U-Net, and the text encoder with it, to predict noise in z0."""

    options: IcmhOptions

    def __init__(
        self,
        parts: Parts,
        photographs: PackedPhotographs,
        folder: Path,
        options: IcmhOptions,
        device: torch.device,
    ) -> None:
        self._photographs = photographs
        self._module = _PriorLosses(parts, options).to(device)
        restorer, text = parts.generative()
        restorer.control.requires_grad_(False)
        trained = {"unet": restorer.unet.requires_grad_(True), "text": text.requires_grad_(True)}
        super().__init__(trained, RunFolder(folder, **PRIOR_FILES), options, device)

    def draw(self, step: int, rng: np.random.Generator) -> tuple[Any, ...]:
        return _draw(self._photographs, self.options, self._module.text, rng, self.device)

    def forward_module(self) -> nn.Module:
        return self._module.train()

    def run(self, report: Any = None) -> None:
        super().run(report)
        for module in self.trained.values():
            module.requires_grad_(False)


class CodecStage(Stage):
    """Trains the latent coder and the control branch around a frozen prior.

    Args:
        is_control_new: whether a run begins with the control branch as a copy of the U-Net, instead
            of as it is.
    """

    options: IcmhOptions

    def __init__(
        self,
        parts: Parts,
        photographs: PackedPhotographs,
        folder: Path,
        options: IcmhOptions,
        device: torch.device,
        *,
        is_control_new: bool = True,
    ) -> None:
        self._photographs = photographs
        restorer, text = parts.generative()
        run = RunFolder(folder, **CODEC_FILES)
        if is_control_new and run.progress() is None:
            restorer.initialise_control()
        restorer.unet.requires_grad_(False)
        text.requires_grad_(False)
        self._module = _CodecLosses(parts, options).to(device)
        trained = {"latent_coder": parts.latent_coder, "control": restorer.control}
        for module in trained.values():
            module.requires_grad_(True)
        self.has_idle_weights = not options.diffusion
        super().__init__(trained, run, options, device)

    def make_optimisers(self) -> Sequence[torch.optim.Optimizer]:
        options = self.options
        quantiles = self._module.latent_coder.entropy_bottleneck.quantiles
        others = [
            parameter
            for module in self.trained.values()
            for parameter in module.parameters()
            if parameter is not quantiles
        ]
        return [
            torch.optim.AdamW(others, lr=options.learning_rate, weight_decay=options.weight_decay),
            torch.optim.AdamW([quantiles], lr=options.auxiliary_rate),
        ]

    def draw(self, step: int, rng: np.random.Generator) -> tuple[Any, ...]:
        return _draw(self._photographs, self.options, self._module.text, rng, self.device)

    def forward_module(self) -> nn.Module:
        return self._module.train()

    def progress_facts(self) -> dict[str, Any]:
        return {"options": asdict(self.options)}


class _PriorLosses(nn.Module):
    """One step of the prior: crops and token ids -> the diffusion loss."""

    def __init__(self, parts: Parts, options: IcmhOptions) -> None:
        super().__init__()
        self.restorer, self.text = parts.generative()
        self.vae = parts.vae
        self.noise = _NoiseLevels()
        self.options = options

    def forward(self, crops_B3HW: Tensor, ids_BT: Tensor) -> Losses:
        with torch.no_grad():
            z0 = self.vae.sample(crops_B3HW / 127.5 - 1)
        t, noise, noisy = self.noise(z0)
        with _autocast(self.options, z0.device):
            found = self.restorer(noisy, t, self.text(ids_BT), None)
        return {"diffusion": (1.0, (found.float() - noise).square().mean())}


class _CodecLosses(nn.Module):
    """One step of the codec: crops and token ids -> the four terms, and the quantiles' own."""

    def __init__(self, parts: Parts, options: IcmhOptions) -> None:
        super().__init__()
        self.restorer: ControlledUNet
        self.restorer, self.text = parts.generative()
        self.vae = parts.vae
        self.latent_coder: LatentCoder = parts.latent_coder
        self.noise = _NoiseLevels()
        self.options = options

    def forward(self, crops_B3HW: Tensor, ids_BT: Tensor) -> Losses:
        options = self.options
        with torch.no_grad():
            x = crops_B3HW / 255
            z0 = self.vae.sample(2 * x - 1)
            context = self.text(ids_BT)
        coded = self.latent_coder(x, z0)
        estimate = coded.estimate
        pixels = crops_B3HW.shape[2] * crops_B3HW.shape[3]
        losses: dict[str, tuple[float, Tensor]] = {
            "bpp": (options.rate, coded.bits.mean() / pixels),
            "rounded_bpp": (0.0, coded.rounded_bits.mean() / pixels),
            "distortion": (options.distortion, (estimate - z0).square().mean()),
            "quantiles": (1.0, self.latent_coder.aux_loss()),
        }
        with _autocast(options, z0.device):
            if options.diffusion:
                t, noise, noisy = self.noise(z0)
                found = self.restorer(noisy, t, context, estimate)
                error = (found.float() - noise).square().mean()
                losses["diffusion"] = (options.diffusion, error)
            losses["semantic"] = (options.semantic, self._semantic(z0, estimate, context))
        return losses

    def _semantic(self, z0: Tensor, estimate: Tensor, context: Tensor) -> Tensor:
        t = torch.zeros(len(z0), dtype=torch.int64, device=z0.device)
        if self.options.semantic_time == "random":
            t, noise, z0 = self.noise(z0)
            estimate = self.noise.add(estimate, t, noise)
        block = self.options.semantic_block
        with torch.no_grad():
            wanted = self.restorer.semantic_features(z0, context, t, block=block)
        with torch.set_grad_enabled(bool(self.options.semantic)):
            found = self.restorer.semantic_features(estimate, context, t, block=block)
        return semantic_distance(wanted, found).mean()


class _NoiseLevels(nn.Module):
    """The forward process of the prior: random timesteps and noise."""

    def __init__(self) -> None:
        super().__init__()
        alphas = torch.from_numpy(noise_schedule().alphas_cumprod).float()
        self.signal: Tensor
        self.spread: Tensor
        self.register_buffer("signal", alphas.sqrt())
        self.register_buffer("spread", (1 - alphas).sqrt())

    def forward(self, z0_BChw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps int64 ``[B]``, noise, and the noisy latent."""
        t_B = torch.randint(TIMESTEPS, (len(z0_BChw),), device=z0_BChw.device)
        noise = torch.randn_like(z0_BChw)
        return t_B, noise, self.add(z0_BChw, t_B, noise)

    def add(self, z_BChw: Tensor, t_B: Tensor, noise_BChw: Tensor) -> Tensor:
        signal, spread = (level[t_B][:, None, None, None] for level in (self.signal, self.spread))
        return signal * z_BChw + spread * noise_BChw


def _draw(
    photographs: PackedPhotographs,
    options: IcmhOptions,
    text: Any,
    rng: np.random.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Crops, float 0..255, and the token ids of their tags; now and then of none."""
    crops, tags = photographs.tagged_crops(options.batch, options.crop, rng)
    if rng.random() < options.tag_dropout:
        tags = [()] * len(tags)
    ids = text.tokenize([tags_text(words) for words in tags])
    # Not channels_last: oneDNN's backward pass of the encoder then writes out of bounds (torch 2.15).
    return crops.to(device, torch.float32).contiguous(), ids.to(device)


def _autocast(options: IcmhOptions, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")
