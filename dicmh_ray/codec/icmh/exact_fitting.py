"""Rounds a trained latent coder to the integers of :mod:`.exact_model`.

Done once, by whoever writes a checkpoint. Everything here may run in floating point: what it makes is
shipped, and never made again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dicmh_ray.codec.icmh.compressai_parts import get_scale_table
from dicmh_ray.codec.icmh.entropy_tables import MAX_SYMBOL, FrozenTables, TableDraft
from dicmh_ray.codec.icmh.exact_model import (
    HYPER,
    MAX_LATENT_FRACTION,
    SCALE_FRACTION,
    ExactModel,
    channel_net,
    local_net,
    net_sizes,
    parameters_net,
)
from dicmh_ray.codec.icmh.integer_nets import IntegerLayer, fraction_for, gelu_table
from dicmh_ray.codec.icmh.lfgcm import LatentCoder
from dicmh_ray.errors import WeightsError

_Z_ROOM = 1.5


@torch.no_grad()
def fit_exact_model(coder: LatentCoder, calibration: Iterable[tuple[Tensor, Tensor]]) -> ExactModel:
    """Ranges and counts from the float coder, then integers from its weights.

    Raises:
        WeightsError: the coder's latents of the calibration are not finite.
    """
    slices = coder.config.slices
    sequences = {name: _convolutions(coder.get_submodule(name)) for name, _ in net_sizes(slices)}
    layers = [layer for sequence in sequences.values() for layer in sequence]
    peaks = dict.fromkeys(layers, 0.0)

    def watch(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        peaks[layer] = max(peaks[layer], float(output.abs().max()))

    scale_table = get_scale_table().double().numpy()
    y_drafts = [TableDraft.gaussian(scale) for scale in scale_table.tolist()]
    z_steps: list[npt.NDArray[np.float32]] = []
    z_peak = y_peak = 0.0
    hooks = [layer.register_forward_hook(watch) for layer in layers]
    try:
        for x, ref in calibration:
            y, z = coder.analyse(x, ref)
            if not (torch.isfinite(y).all() and torch.isfinite(z).all()):
                raise WeightsError("latent coder", "gives latents that are not finite numbers")
            z_hat = coder.round_z(z)
            (scales, means), y_hat = coder.round_y(y, z_hat)
            y_peak = max(y_peak, float(y_hat.abs().max()))
            z_peak = max(z_peak, float(z_hat.abs().max()))
            tables = np.searchsorted(scale_table[:-1], scales.double().cpu().numpy())
            symbols = torch.round(y - means).cpu().numpy()
            for table in np.unique(tables).tolist():
                y_drafts[table].count(symbols[tables == table])
            steps = torch.round(z - coder.medians()[:, None, None]).cpu().numpy()
            z_steps.append(steps.transpose(1, 0, 2, 3).reshape(steps.shape[1], -1))
    finally:
        for hook in hooks:
            hook.remove()
    y_fraction = fraction_for(y_peak, MAX_LATENT_FRACTION)
    z_fraction = fraction_for(z_peak, MAX_LATENT_FRACTION)
    nets = _round_nets(sequences, peaks, slices, y_fraction, z_fraction)
    fractions = {layer.gelu for net in nets.values() for layer in net if layer.gelu is not None}
    medians = coder.medians().double().cpu().numpy()
    return ExactModel(
        slices=tuple(slices),
        y_fraction=y_fraction,
        z_fraction=z_fraction,
        z_medians=np.rint(np.ldexp(medians, z_fraction)).astype(np.int64),
        scale_thresholds=np.floor(np.ldexp(scale_table[:-1], SCALE_FRACTION)).astype(np.int64),
        nets=nets,
        gelu_tables={f: gelu_table(f) for f in sorted(fractions)},
        y_tables=FrozenTables.freeze(y_drafts),
        z_tables=FrozenTables.freeze(_z_drafts(coder, np.concatenate(z_steps, axis=1))),
    )


def _round_nets(
    sequences: Mapping[str, Sequence[nn.Module]],
    peaks: Mapping[nn.Module, float],
    slices: Sequence[int],
    y_fraction: int,
    z_fraction: int,
) -> dict[str, tuple[IntegerLayer, ...]]:
    """Integer layers of all networks; each output's fraction from its largest value."""
    nets: dict[str, tuple[IntegerLayer, ...]] = {}

    def outputs(name: str) -> list[int]:
        """Fraction of each channel that a network gives."""
        last = sequences[name][-1]
        return [fraction_for(peaks[last])] * last.get_parameter("bias").numel()

    def round_net(name: str, fraction: list[int], final: list[int]) -> None:
        layers, rounded = sequences[name], []
        for layer in layers:
            is_last = layer is layers[-1]
            count = layer.get_parameter("bias").numel()
            out = final if is_last else [fraction_for(peaks[layer])] * count
            rounded.append(IntegerLayer.fit(layer, fraction, out, has_gelu=not is_last))
            fraction = out
        nets[name] = tuple(rounded)

    hyper = outputs(HYPER)
    z_channels = sequences[HYPER][0].get_parameter("weight").shape[0]
    round_net(HYPER, [z_fraction] * z_channels, hyper)
    for index, count in enumerate(slices):
        contexts = hyper
        if index:
            name = channel_net(index)
            round_net(name, [y_fraction] * sum(slices[:index]), outputs(name))
            contexts = outputs(name) + contexts
        final = [SCALE_FRACTION] * count + [y_fraction] * count
        round_net(parameters_net(index, True), contexts, final)
        name = local_net(index)
        round_net(name, [y_fraction] * count, outputs(name))
        round_net(parameters_net(index, False), outputs(name) + contexts, final)
    return nets


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def _z_drafts(coder: LatentCoder, met: npt.NDArray[np.float32]) -> list[TableDraft]:
    """For each channel of z, what its entropy bottleneck says, and what was met: ``[N, n]``.

    A table reaches from quantile to quantile of the bottleneck and to half as far again as anything
    met: a short training leaves the quantiles far inside of what the channel takes.
    """
    bottleneck = coder.entropy_bottleneck
    quantiles = bottleneck.quantiles.detach()[:, 0]
    medians = coder.medians()
    low, _, high = (quantiles - medians[:, None]).double().cpu().numpy().T
    low = np.minimum(low, met.min(axis=1) * _Z_ROOM)
    high = np.maximum(high, met.max(axis=1) * _Z_ROOM)
    lowest = np.clip(np.floor(low), -MAX_SYMBOL, 0).astype(int)
    highest = np.clip(np.ceil(high), 0, MAX_SYMBOL).astype(int)
    start = int(lowest.min())
    steps = torch.arange(start, int(highest.max()) + 1, device=medians.device)
    values = (steps + medians[:, None])[None, :, :, None]
    likelihood = bottleneck(values, training=False)[1][0, :, :, 0].double().cpu().numpy()
    drafts = [
        TableDraft(row[first - start : last + 1 - start], first, max(1.0, (last - first) / 8))
        for row, first, last in zip(likelihood, lowest.tolist(), highest.tolist(), strict=True)
    ]
    for draft, symbols in zip(drafts, met, strict=True):
        draft.count(symbols)
    return drafts
