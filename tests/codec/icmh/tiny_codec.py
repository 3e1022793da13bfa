"""A whole Diff-ICMH codec of random networks, small enough to be made for a test."""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from dicmh_ray.codec.checkpoint import Checkpoint
from dicmh_ray.codec.icmh.config import (
    IcmhConfig,
    LatentCoderConfig,
    RestorerConfig,
    SamplerConfig,
    TextConfig,
    VaeConfig,
)
from dicmh_ray.codec.icmh.exact import ExactEntropyModel
from dicmh_ray.codec.icmh.parts import Parts, build_parts, write_icmh_checkpoint
from dicmh_ray.codec.icmh.patch_vae import take_autoencoder
from dicmh_ray.codec.icmh.text import train_tokenizer
from dicmh_ray.codec.photographs import PackedPhotographs
from dicmh_ray.tags import Vocabulary
from tests.codec.icmh.small_latent_coder import lively_coder, pictures

WORDS = ("cat", "dog", "tree")

TINY = IcmhConfig(
    vae=VaeConfig(
        kind="patch",
        settings={"num_luma": 12, "num_chroma": 3, "blocks": 1, "hidden": 16, "emphasis": 0.5},
        scaling=1.0,
    ),
    latent_coder=LatentCoderConfig(
        latent_channels=18,
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
        width=16, layers=1, heads=2, feed_forward=32, vocabulary_size=530, max_tokens=12
    ),
    sampler=SamplerConfig(kind="dpm-solver++", steps=3, guidance=4.0),
)

GOLDEN = Path(__file__).parents[2] / "golden" / "checkpoint"
"""A layered codec; its autoencoder is the VAE."""


def tiny_parts(tokenizer: Path | None, config: IcmhConfig = TINY, seed: int = 0) -> Parts:
    """Networks under which latents, tags and the decoded latent all show."""
    torch.manual_seed(seed)
    parts = build_parts(config, tokenizer)
    take_autoencoder(parts.vae.network, safetensors.torch.load_file(GOLDEN / "weights.safetensors"))
    parts.vae.eval().requires_grad_(requires_grad=False)
    parts.latent_coder = lively_coder(config.latent_coder, seed)
    if parts.restorer is not None and parts.text is not None:
        control = parts.restorer.control
        parts.restorer.initialise_control()
        with torch.no_grad():
            for conv in (*control.zero_down, control.zero_middle, *control.zero_up):
                conv.weight.normal_(0, 0.3)
            for name, parameter in parts.text.named_parameters():
                if "embedding" in name:
                    parameter.normal_()
    return parts


def write_tiny_checkpoint(
    folder: Path,
    *,
    config: IcmhConfig = TINY,
    seed: int = 0,
    has_human_view: bool = True,
    words: tuple[str, ...] = WORDS,
) -> Checkpoint:
    """The same as a checkpoint directory."""
    tokenizer = folder / "tokenizer"
    if has_human_view:
        train_tokenizer(WORDS, tokenizer, size=config.text.vocabulary_size)
    parts = tiny_parts(tokenizer if has_human_view else None, config, seed)
    with torch.no_grad():
        calibration = []
        for n in range(2):
            x, _ = pictures(1, 128, 128, n)
            calibration.append((x, parts.vae.encode(2 * x - 1)))
    return write_icmh_checkpoint(
        parts,
        ExactEntropyModel.fit(parts.latent_coder, calibration).to_arrays(),
        folder,
        provenance={"test": True},
        vocabulary=Vocabulary(words) if words else None,
    )


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth colour field with edges and some noise, uint8 ``[H, W, 3]``."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 1.7 + 40 * seed, y * 1.3, 90 + 60 * np.sin((x + y) / 17)], -1) % 256
    base[(x // 23 + y // 19) % 5 == 0] *= 0.4
    return (base + rng.normal(0, 4, base.shape)).clip(0, 255).astype(np.uint8)


def write_pack(folder: Path, *, sides: int = 200, count: int = 3) -> PackedPhotographs:
    """Square photographs as training wants them, the first tagged ``dog``, the second ``cat``."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [photograph(sides, sides, seed) for seed in range(count)]
    tags = [["dog"], ["cat"], []]
    index = [
        (n * sides * sides * 3, sides, sides, tags[min(n, len(tags) - 1)]) for n in range(count)
    ]
    (folder / "photographs.bin").write_bytes(b"".join(image.tobytes() for image in images))
    (folder / "photographs.json").write_text(json.dumps(index))
    return PackedPhotographs(folder)
