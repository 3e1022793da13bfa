"""The recipe of Diff-ICMH codecs: packed photographs in, checkpoint directory out.

    photographs.bin ──train──> prior ──train──> lfgcm + control ──fit──> checkpoint/

``diff-icmh`` is the paper's, around the frozen parts of a converted Stable Diffusion checkpoint;
``diff-icmh-small`` needs nothing but photographs and trains on a CPU: its VAE is the autoencoder
of the default checkpoint, its prior and text encoder are trained here. ``diff-icmh-tiny`` is the
same for trials, in seconds. Each stage leaves its result in the run's folder, and a run that was stopped goes on.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from dicmh_ray.codec.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, read_checkpoint
from dicmh_ray.codec.device import find_device
from dicmh_ray.codec.icmh.config import (
    IcmhConfig,
    LatentCoderConfig,
    RestorerConfig,
    SamplerConfig,
    TextConfig,
    VaeConfig,
)
from dicmh_ray.codec.icmh.exact import ExactEntropyModel
from dicmh_ray.codec.icmh.lfgcm import ALIGNMENT
from dicmh_ray.codec.icmh.parts import (
    Parts,
    build_parts,
    has_human_view,
    load_human_parts,
    load_machine_parts,
    write_icmh_checkpoint,
)
from dicmh_ray.codec.icmh.patch_vae import PatchVae, take_autoencoder
from dicmh_ray.codec.icmh.text import TOKENIZER_FILES, train_tokenizer
from dicmh_ray.codec.icmh.training import CodecStage, IcmhOptions, PriorStage
from dicmh_ray.codec.network import NetworkConfig
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.codec.run_state import CHECKPOINT_NAME, Report
from dicmh_ray.errors import WeightsError
from dicmh_ray.tags import Vocabulary

CALIBRATION_PX = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class IcmhPreset:
    """A named combination of shapes and schedules."""

    network: IcmhConfig

    codec: IcmhOptions
    """Schedule of the latent coder and the control branch."""

    prior: IcmhOptions | None
    """Schedule of the U-Net and the text encoder; None: they come with the checkpoint given."""

    calibration_crops: int = 64
    """Crops of 256x256, or smaller where the photographs are, that the integer entropy model is calibrated on."""


_DEFAULT = NetworkConfig()

_PATCH_VAE = VaeConfig(
    kind="patch",
    settings={
        "num_luma": _DEFAULT.num_luma,
        "num_chroma": _DEFAULT.num_chroma,
        "blocks": _DEFAULT.encoder_blocks,
        "hidden": _DEFAULT.hidden,
        "emphasis": 0.5,
    },
    scaling=1.0,
)
"""The autoencoder of the default checkpoint."""

_TINY_SCHEDULE = IcmhOptions(
    steps=20, batch=2, crop=64, learning_rate=1e-3, weight_decay=0.0, clip=1.0, ema=0.9
)

ICMH_PRESETS: Mapping[str, IcmhPreset] = {
    "diff-icmh": IcmhPreset(network=IcmhConfig(), codec=IcmhOptions(), prior=None),
    "diff-icmh-small": IcmhPreset(
        network=IcmhConfig(
            vae=_PATCH_VAE,
            latent_coder=LatentCoderConfig(
                latent_channels=96,
                encoder_widths=(16, 32, 64, 96),
                z_channels=48,
                y_channels=96,
                prior_channels=32,
                shared_channels=32,
                context_widths=(48, 32),
                slices=(4, 4, 8, 8, 24, 48),
            ),
            restorer=RestorerConfig(
                block_widths=(64, 96, 128),
                layers_per_block=1,
                context_channels=64,
                head_width=32,
                control_head_width=16,
            ),
            text=TextConfig(
                width=64, layers=2, heads=4, feed_forward=128, vocabulary_size=640, max_tokens=24
            ),
            sampler=SamplerConfig(kind="dpm-solver++", steps=10, guidance=1.5),
        ),
        codec=IcmhOptions(
            batch=6,
            crop=128,
            learning_rate=6e-4,
            weight_decay=0.0,
            clip=1.0,
            ema=0.995,
            distortion=4.0,
            rate=2.0,
            auxiliary_rate=2e-2,
        ),
        prior=IcmhOptions(
            batch=8, crop=128, learning_rate=8e-4, weight_decay=0.0, clip=1.0, ema=0.995
        ),
    ),
    "diff-icmh-tiny": IcmhPreset(
        network=IcmhConfig(
            vae=_PATCH_VAE,
            latent_coder=LatentCoderConfig(
                latent_channels=96,
                encoder_widths=(4, 4, 6, 6),
                z_channels=6,
                y_channels=12,
                prior_channels=4,
                shared_channels=8,
                context_widths=(12, 8),
                slices=(2, 4, 6),
            ),
            restorer=RestorerConfig(
                block_widths=(16, 24),
                layers_per_block=1,
                context_channels=16,
                head_width=8,
                control_head_width=4,
            ),
            text=TextConfig(
                width=16, layers=1, heads=2, feed_forward=32, vocabulary_size=640, max_tokens=12
            ),
            sampler=SamplerConfig(kind="dpm-solver++", steps=3, guidance=1.5),
        ),
        codec=_TINY_SCHEDULE,
        prior=_TINY_SCHEDULE,
        calibration_crops=2,
    ),
}
"""``diff-icmh`` needs ``start_from``; ``diff-icmh-small`` is for a CPU, ``diff-icmh-tiny`` for trials."""


def train_icmh(
    photographs: PackedPhotographs,
    folder: Path,
    *,
    preset: str,
    options: IcmhOptions | None = None,
    prior: IcmhOptions | None = None,
    device: str = "auto",
    start_from: str | Path | None = None,
    report: Report | None = None,
) -> Checkpoint:
    """Train, or go on training, and export to ``folder/checkpoint``.

    Args:
        photographs: what to train on; their tags guide the human view.
        folder: the run: state of each stage, logs and checkpoint.
        preset: a name in :data:`ICMH_PRESETS`.
        options: replaces the preset's schedule of the codec.
        prior: replaces its schedule of the prior.
        device: a torch device, or ``"auto"`` for CUDA where there is one.
        start_from: a Diff-ICMH checkpoint whose parts a new run begins with; where the preset
            trains no prior, one is needed.
        report: called every 50 steps with the step and the losses.

    Raises:
        SourceFormatError: no photograph is large enough for a crop.
        WeightsError: ``folder`` holds a run of another shape, or ``start_from`` does not fit.
        DeviceError: there is no such device.
    """
    chosen = ICMH_PRESETS[preset]
    target = find_device(device)
    photographs.require(largest_crop(chosen, options, prior))
    output = folder / CHECKPOINT_NAME
    words = sorted({word for tags in photographs.tags for word in tags})
    with _first_process_first():  # it writes the tokenizer
        found = read_checkpoint(start_from or DEFAULT_CHECKPOINT)
        if start_from is not None:
            parts = _given_parts(found, output)
        else:
            parts = _new_parts(chosen, words, output)
    for module in parts.modules().values():
        module.to(target)
    if chosen.prior is not None:
        stage = PriorStage(parts, photographs, folder, prior or chosen.prior, target)
        stage.run(report)
    CodecStage(
        parts,
        photographs,
        folder,
        options or chosen.codec,
        target,
        is_control_new=start_from is None,
    ).run(report)
    for module in parts.modules().values():
        module.cpu().eval()
    with _first_process_first() as is_first:
        if not is_first:
            return read_checkpoint(output)
        provenance = {
            "preset": preset,
            "photographs": len(photographs.entries),
            "options": {
                # JSON has no number for what has no bound.
                name: None if value == math.inf else value
                for name, value in dataclasses.asdict(options or chosen.codec).items()
            },
        }
        if found.teachers:
            provenance["teacher"] = found.teachers
        return write_icmh_checkpoint(
            parts,
            calibrate(parts, photographs, chosen.calibration_crops).to_arrays(),
            output,
            provenance=provenance,
            vocabulary=Vocabulary(words) if words else None,
        )


def largest_crop(
    preset: IcmhPreset, options: IcmhOptions | None = None, prior: IcmhOptions | None = None
) -> int:
    """Pixels per side of the largest crop that a run needs; arguments as of :func:`train_icmh`."""
    schedules = [options or preset.codec, *([prior or preset.prior] if preset.prior else [])]
    return max(schedule.crop for schedule in schedules if schedule is not None)


@contextmanager
def _first_process_first() -> Iterator[bool]:
    """Of several processes that train together, let the others in after the first has left."""
    is_alone = not torch.distributed.is_initialized()
    is_first = is_alone or torch.distributed.get_rank() == 0
    if not is_first:
        torch.distributed.barrier()
    try:
        yield is_first
    finally:
        if is_first and not is_alone:
            torch.distributed.barrier()


def calibrate(parts: Parts, photographs: PackedPhotographs, crops: int) -> ExactEntropyModel:
    """The integer entropy model of a latent coder, its ranges taken from crops of photographs."""
    rng = np.random.default_rng(7)
    largest = max(min(height, width) for _, height, width in photographs.entries)
    size = min(CALIBRATION_PX, largest // ALIGNMENT * ALIGNMENT)
    pictures = []
    with torch.inference_mode():
        for _ in range(crops):
            x = photographs.crops(1, size, rng).float() / 255
            pictures.append((x, parts.vae.encode(2 * x - 1)))
    return ExactEntropyModel.fit(parts.latent_coder, pictures)


def _new_parts(preset: IcmhPreset, words: Sequence[str], output: Path) -> Parts:
    """Random networks around the autoencoder of the default checkpoint, and a tokenizer."""
    if preset.prior is None:
        raise WeightsError(
            "Diff-ICMH", "this preset begins with the parts of a checkpoint: give one"
        )
    tokenizer = output / "tokenizer"
    if not all((tokenizer / name).is_file() for name in TOKENIZER_FILES):
        train_tokenizer(words, tokenizer, size=preset.network.text.vocabulary_size)
    torch.manual_seed(preset.codec.seed)
    parts = build_parts(preset.network, tokenizer)
    weights = safetensors.torch.load(read_checkpoint().files["weights.safetensors"])
    if isinstance(parts.vae.network, PatchVae):
        take_autoencoder(parts.vae.network, weights)
    parts.vae.eval().requires_grad_(requires_grad=False)
    return parts


def _given_parts(checkpoint: Checkpoint, output: Path) -> Parts:
    """The parts of a checkpoint, and its tokenizer beside where the new one will lie."""
    if not has_human_view(checkpoint):
        raise WeightsError(checkpoint.name, "it has no human view, whose parts training needs")
    parts = load_machine_parts(checkpoint)
    load_human_parts(checkpoint, parts)
    for name in TOKENIZER_FILES:
        path = output / "tokenizer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(checkpoint.files[f"tokenizer/{name}"])
    return parts
