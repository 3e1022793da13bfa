"""Histograms as SVG in HTML figures. Colours are classes, which the page's style knows."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from dicmh_ray.pipeline.histogram import Histogram

WIDTH, HEIGHT = 460, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 14, 38
"""Of a chart and the margins around its columns, in user units."""

FLOOR = HEIGHT - BOTTOM
LABELS = 7
"""On the horizontal axis, at most."""

COLUMNS_LEAST = 8
"""Bins of an axis: fewer would make bars that look like areas."""

Columns = list[tuple[float, float, int]]
"""Lower edge, upper edge, count; each begins where the one before ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """The columns of one histogram."""

    look: str
    """Class of its columns."""

    name: str
    columns: Columns


def aligned(**histograms: Histogram) -> list[Series]:
    """Several histograms of one scale on one axis; a look names each of them."""
    shown = bins_shown(*histograms.values())
    names = {"ok": "stream"}
    return [
        Series(look=look, name=names.get(look, look), columns=one.columns(shown))
        for look, one in histograms.items()
    ]


def bins_shown(*histograms: Histogram) -> range:
    """The numbers of all bins that hold something, and of some around them when they are few."""
    numbers = [number for one in histograms for number in one.bins]
    if not numbers:
        return range(0)
    first, last = min(numbers), max(numbers)
    missing = max(0, COLUMNS_LEAST - (last + 1 - first))
    return range(first - missing // 2, last + 1 + missing - missing // 2)


def clipped(columns: Columns, limit: float) -> Columns:
    """The same with everything from a limit on in one last column."""
    shown = [column for column in columns if column[0] < limit]
    above = sum(count for low, _, count in columns if low >= limit)
    return [*shown, (limit, limit + 1, above)] if above else shown


def histogram_figure(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    label: Callable[[float], str],
    median: float | None = None,
    is_discrete: bool = False,
) -> str:
    """A figure with columns over their bins, the later series in front.

    Args:
        title: above it.
        unit: below its axis.
        series: over the same bins.
        label: an edge as text.
        median: is marked.
        is_discrete: bins are whole numbers, and their labels stand below them.
    """
    columns = series[0].columns
    if not columns:
        return f"<figure><figcaption>{title}</figcaption><p class=none>nothing was counted</p></figure>"
    step = (WIDTH - LEFT - RIGHT) / len(columns)
    top = _nice(max(count for one in series for _, _, count in one.columns))
    scale = (FLOOR - TOP) / top
    parts = []
    for share in (0.5, 1.0):
        y = FLOOR - share * top * scale
        parts.append(
            f'<line class=grid x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text class=y x="{LEFT - 6}" y="{y + 4:.1f}">{_count(share * top)}</text>')
    for one in series:
        for i, (low, high, count) in enumerate(one.columns):
            what = label(low) if is_discrete else f"{label(low)} to {label(high)}"
            if count:
                tall = max(1.0, count * scale)
                wide = step * 0.7 if is_discrete else max(0.5, step - 1)
                parts.append(
                    f'<rect class={one.look} x="{LEFT + (i + 0.5) * step - wide / 2:.2f}" '
                    f'y="{FLOOR - tall:.2f}" width="{wide:.2f}" height="{tall:.2f}" '
                    f'rx="{min(2.0, step / 4):.1f}">'
                    f"<title>{escape(what)} {unit}, {one.name}: {count:,}</title></rect>"
                )
    edges = [low for low, _, _ in columns]
    if not is_discrete:
        edges.append(columns[-1][1])
    for i in range(0, len(edges), max(1, math.ceil(len(columns) / LABELS))):
        x = LEFT + (i + 0.5 * is_discrete) * step
        parts.append(f'<text class=x x="{x:.1f}" y="{FLOOR + 15}">{escape(label(edges[i]))}</text>')
    parts.append(f'<line class=axis x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{FLOOR}" y2="{FLOOR}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class=unit x="{middle:.0f}" y="{HEIGHT - 5}">{escape(unit)}</text>')
    note = ""
    if len(series) > 1:
        keys = " ".join(f"<i class={one.look}></i>{one.name}" for one in series)
        note = f" <small>{keys}</small>"
    if median is not None:
        note = f" <small>median {median:.3g}</small>"
        x = LEFT + _position(edges, median) * step
        parts.append(f'<line class=median x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{FLOOR}"/>')
    return (
        f"<figure><figcaption>{title}{note}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
        "</figure>"
    )


def _position(edges: Sequence[float], value: float) -> float:
    """Where a value is between the edges, in columns."""
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        if value <= high:
            return i + max(0.0, (value - low) / (high - low))
    return len(edges) - 1.0


def _nice(value: float) -> float:
    """The smallest of 1, 2, 4, 6, 8, 10 times a power of ten that is not below a value, >= 2."""
    value = max(2.0, value)
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 4, 6, 8, 10) if factor * power >= value)


def _count(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
