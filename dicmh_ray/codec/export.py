"""From a training run to a checkpoint directory: round the weights, fit the tables, write."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from dicmh_ray.codec.checkpoint import (
    FORMAT,
    LATENT_UNIT,
    LAYERED_CODER,
    Checkpoint,
    begin_checkpoint,
    read_checkpoint,
)
from dicmh_ray.codec.contexts import Symbols
from dicmh_ray.codec.fitting import fit_tables, recount
from dicmh_ray.codec.network import ALIGNMENT, CodecNetwork, NetworkConfig
from dicmh_ray.codec.photographs import JPEG_SHARE, PackedPhotographs
from dicmh_ray.codec.symbols import (
    REACH_UNIT,
    RoundedLatent,
    SymbolCoder,
    parent_symbols,
    round_latent,
)
from dicmh_ray.codec.tables import RATIO, ContextTables

GROUP_SHARES = (0.04, 0.16, 0.375, 0.625)
"""Where the channel groups end, as shares of the channels; few channels matter, so they come first."""

SMALL_REACH = 0.6
"""Reach, in finest steps, below which few refinements are worth their bits."""


def channel_groups(channels: int) -> tuple[int, ...]:
    """First channel of each coding group, and the number of channels."""
    inner = {max(1, round(share * channels)) for share in GROUP_SHARES}
    return (0, *sorted(inner - {channels}), channels)


def round_weights(network: CodecNetwork) -> None:
    """Round every weight to float16, as the checkpoint will hold it."""
    network.load_state_dict({k: v.half().float() for k, v in network.state_dict().items()})


def training_latents(
    network: CodecNetwork,
    photographs: PackedPhotographs,
    *,
    crops: int,
    size: int = 256,
    seed: int = 5,
) -> list[RoundedLatent]:
    """Latents of random crops, each of ``[size / 16, size / 16, C]``; smaller where all photographs are."""
    rng = np.random.default_rng(seed)
    largest = max(min(height, width) for _, height, width in photographs.entries)
    size = min(size, largest // ALIGNMENT * ALIGNMENT)
    tiles: list[RoundedLatent] = []
    with torch.inference_mode():
        while len(tiles) < crops:
            y = network.encode(photographs.crops(8, size, rng, jpegs=JPEG_SHARE).float())
            latents = np.ascontiguousarray(y.permute(0, 2, 3, 1).numpy())
            tiles.extend(round_latent(latent, network.config.steps[-1]) for latent in latents)
    return tiles[:crops]


def fit_entropy_model(
    latents: Sequence[RoundedLatent],
    config: NetworkConfig,
    *,
    steps: int,
    report: Callable[[str], None] | None = None,
) -> ContextTables:
    """Tables for what an encoder leaves of training latents.

    Which refinements it gives up depends on the tables: they are fitted to what is left by a
    threshold, and counted again with what is left by them.
    """
    tables = fit_tables(
        [_without_small_refinements(latent) for latent in latents],
        num_states=config.num_states,
        groups=channel_groups(config.y_channels),
        steps=steps,
        report=report,
    )
    coder = SymbolCoder(tables)
    left = [coder.encode(latent)[-1].symbols for latent in latents]
    return recount(tables, left, config.num_states - 1, report=report)


def _without_small_refinements(latent: RoundedLatent) -> Symbols:
    parents = parent_symbols(latent.symbols)
    is_small = latent.reaches < SMALL_REACH * REACH_UNIT
    return np.where(is_small, parents * np.int16(RATIO), latent.symbols)


def write_checkpoint(
    network: CodecNetwork, tables: ContextTables, folder: Path, *, provenance: dict[str, Any]
) -> Checkpoint:
    """Write ``config.json``, ``weights.safetensors`` and ``tables.safetensors``.

    Args:
        network: weights already rounded by :func:`round_weights`.
        tables: fitted to that network's symbols.
        folder: created if needed; files in it are replaced.
        provenance: how the checkpoint came to be; goes into ``config.json``.
    """
    begin_checkpoint(folder)
    weights = {k: v.half().contiguous() for k, v in network.state_dict().items()}
    # Numbers, not an exponential that another machine's library may round otherwise: latents are exact.
    weights[LATENT_UNIT] = network.latent.unit().detach().float().contiguous()
    config = {
        "format": FORMAT,
        "coder": LAYERED_CODER,
        "network": network.config.to_dict(),
        "provenance": provenance,
    }
    (folder / "weights.safetensors").write_bytes(safetensors.torch.save(weights))
    (folder / "tables.safetensors").write_bytes(safetensors.numpy.save(tables.to_arrays()))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return read_checkpoint(folder)


def export(
    network: CodecNetwork,
    photographs: PackedPhotographs,
    folder: Path,
    *,
    provenance: dict[str, Any],
    crops: int = 800,
    steps: int = 600,
    report: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Turn a trained network into a checkpoint directory.

    Args:
        network: in evaluation mode; its weights are rounded in place.
        photographs: training photographs, for the tables.
        folder: where the checkpoint goes.
        provenance: see :func:`write_checkpoint`.
        crops: 256x256 crops that the tables are fitted to.
        steps: optimiser steps of the fit, for each state.
        report: called with lines of text.
    """
    round_weights(network)
    latents = training_latents(network, photographs, crops=crops)
    tables = fit_entropy_model(latents, network.config, steps=steps, report=report)
    return write_checkpoint(network, tables, folder, provenance=provenance)
