"""Bjontegaard delta rate: the average difference of bits at equal quality, in percent."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from dicmh_ray.errors import MissingExtraError


@dataclass(frozen=True, kw_only=True, slots=True)
class BdRate:
    """How many more bits ``test`` spends than ``anchor``; negative is fewer."""

    test: str
    anchor: str

    metric: str
    """One of :mod:`dicmh_ray.bench.metrics`, in dB."""

    percent: float | None
    """Over all qualities both reach; None where the curves share none."""

    quality_range: tuple[float, float] | None
    """dB: the interval ``percent`` averages over."""

    headline_percent: float | None
    """As ``percent``, over the qualities that both reach within the headline's bit rates."""

    headline_range: tuple[float, float] | None
    """dB: the interval ``headline_percent`` averages over."""


def load_bjontegaard() -> ModuleType:
    """The library, or a sentence on how to get it.

    Raises:
        MissingExtraError: the ``bench`` extra is not installed.
    """
    try:
        import bjontegaard
    except ImportError as exc:
        raise MissingExtraError("bjontegaard", "bench") from exc
    return bjontegaard  # type: ignore[no-any-return]


def bd_rate(
    anchor: Sequence[tuple[float, float]],
    test: Sequence[tuple[float, float]],
    *,
    bpp_range: tuple[float, float] | None = None,
    method: str = "pchip",
) -> tuple[float, tuple[float, float]] | None:
    """Average rate difference of two curves at equal quality.

    The log-rate curves are the library's; the average is taken over our own interval, because
    clipping points to ``bpp_range`` would cut a curve at its nearest point, not at the bound.

    Args:
        anchor: points ``(bpp, quality in dB)``, in any order. Points that cost more without being
            better are left out.
        test: likewise.
        bpp_range: count only qualities that both curves reach within these rates.
        method: ``"pchip"`` or ``"akima"``.

    Returns:
        Percent and the interval of quality in dB; None where there is no such interval.

    Raises:
        MissingExtraError: the ``bench`` extra is not installed.
    """
    library = load_bjontegaard()
    curves = [_rising(anchor), _rising(test)]
    if any(len(curve) < 2 for curve in curves):
        return None
    low = max(curve[0][1] for curve in curves)
    high = min(curve[-1][1] for curve in curves)
    if high <= low:
        return None
    (rate_a, quality_a), (rate_t, quality_t) = (np.array(curve).T for curve in curves)
    _, *log_rates = library.bd_rate(
        rate_a,
        quality_a,
        rate_t,
        quality_t,
        method=method,
        require_matching_points=False,
        interpolators=True,
        min_overlap=0,
    )
    if bpp_range is not None:
        start, stop = math.log10(bpp_range[0]), math.log10(bpp_range[1])
        bounds = low, high
        low = max(_quality_at(log_rate, start, bounds) for log_rate in log_rates)
        high = min(_quality_at(log_rate, stop, bounds) for log_rate in log_rates)
        if high <= low:
            return None
    area_a, area_t = (float(log_rate.integrate(low, high)) for log_rate in log_rates)
    percent = (10 ** ((area_t - area_a) / (high - low)) - 1) * 100
    return percent, (low, high)


def _rising(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points in order of rate, without those that a cheaper one equals or beats."""
    kept: list[tuple[float, float]] = []
    for bpp, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if math.isfinite(quality) and (not kept or quality > kept[-1][1]):
            kept.append((bpp, quality))
    return kept


def _quality_at(
    log_rate: Callable[[float], Any], wanted: float, bounds: tuple[float, float]
) -> float:
    """Where in the bounds a rising curve passes a value; the nearer bound if it does not."""
    low, high = bounds
    for _ in range(60):
        middle = (low + high) / 2
        if float(log_rate(middle)) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
