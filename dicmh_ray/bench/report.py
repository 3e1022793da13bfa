"""Reports as tables, Markdown and files."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicmh_ray.bench.bd_rate import BdRate
from dicmh_ray.bench.equal_bytes import EqualPoint, EqualReport
from dicmh_ray.bench.metrics import NetRecord, label, text
from dicmh_ray.bench.plots import plot_curves, plot_equal_bytes
from dicmh_ray.bench.rd import Point, RdReport

SECONDS = ("encode s", "decode s", "encode img/s", "decode img/s")
TIMES_NOTE = (
    "Seconds are wall time per image on one of several busy threads; a state's encode time is that",
    "of the full stream, a JPEG's that of two files, baseline and progressive, of which the smaller",
    "counts.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Text in rows and columns, for a terminal or a page."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A Markdown table under its title; the first two columns left, the others right."""
        rule = tuple("---" if i < 2 else "---:" for i in range(len(self.columns)))
        lines = [" | ".join(row) for row in (self.columns, rule, *self.rows)]
        return f"### {self.title}\n\n" + "".join(f"| {line} |\n" for line in lines)


def tables(report: RdReport) -> tuple[Table, ...]:
    """The BD-rates, then every curve point."""
    low, high = report.headline_bpp
    metrics = tuple(dict.fromkeys(name for point in report.points for name in point.metrics))
    return (
        Table(
            title="BD-rate (percent of bits at equal quality; negative is smaller)",
            columns=(
                "method",
                "against",
                "metric",
                f"{low:g}-{high:g} bpp",
                "over dB",
                "whole overlap",
                "over dB",
            ),
            rows=tuple(_bd_row(one, report.judges) for one in report.bd_rates),
        ),
        Table(
            title=f"Means over {report.num_images} images",
            columns=("method", "setting", "bpp", *map(label, metrics), *SECONDS),
            rows=tuple(_point_row(point, metrics) for point in report.points),
        ),
    )


def equal_tables(report: EqualReport) -> tuple[Table, ...]:
    """What machines read, then how it looks, at equal bytes."""
    scores = tuple(
        name
        for name in dict.fromkeys(name for point in report.points for name in point.scores)
        if any(point.scores.get(name) is not None for point in report.points)
    )
    metrics = tuple(dict.fromkeys(name for point in report.points for name in point.metrics))
    start = ("method", "at the bytes of", "bpp", "larger than ours")
    decoded = [point for point in report.points if point.state is not None]
    task_table = Table(
        title=f"Machine tasks at equal bytes, {report.num_images} images",
        columns=(*start, *(_marked(name, report.tasks) for name in scores)),
        rows=tuple(
            (*_equal_start(point), *(_number(point.scores.get(name), ".3f") for name in scores))
            for point in report.points
        ),
    )
    look_table = Table(
        title=f"Looks at equal bytes, {report.num_images} images",
        columns=(*start, *(_marked(label(name), report.judges) for name in metrics)),
        rows=tuple(
            (*_equal_start(point), *(text(name, point.metrics.get(name)) for name in metrics))
            for point in decoded
        ),
    )
    return (task_table, look_table) if scores else (look_table,)


def markdown(report: RdReport | EqualReport) -> str:
    """The report as a page, with what it was measured on."""
    if isinstance(report, RdReport):
        title, body, nets = "Rate and distortion", tables(report), report.judges
        notes: Sequence[str] = TIMES_NOTE
    else:
        title, body = "Equal bytes", equal_tables(report)
        nets = tuple(dict.fromkeys((*report.tasks, *report.judges)))
        notes = (
            "Each peer is at its best quality that costs no more than ours does, picture by picture;",
            "where its smallest file is larger than ours, that one is taken, and counted.",
        )
    facts = (
        f"Codec: {report.codec}, checkpoint {report.codec_id[:16]}",
        *report.environment.lines(),
        *notes,
        *(f"Net {net.name}: SHA-256 {net.sha256[:16]} {net.note}".strip() for net in nets),
    )
    parts = [
        f"# {title} on {report.pictures}\n",
        "".join(f"{line}  \n" for line in facts),
        *(table.markdown() for table in body),
    ]
    if report.skipped:
        listed = "".join(f"- {name}: {reason}\n" for name, reason in report.skipped)
        parts.append(f"### Left out for all methods\n\n{listed}")
    return "\n".join(parts)


def write_report(report: RdReport | EqualReport, folder: str | Path) -> list[Path]:
    """Write a report's JSON, its page and its plots; returns their paths.

    An :class:`RdReport` becomes ``rd.json``, ``rd.md`` and ``rd-*.png``/``svg``; an
    :class:`EqualReport` ``equal-bytes.*`` and ``tasks.*``.

    Raises:
        MissingExtraError: matplotlib is not installed. JSON and Markdown are written all the same.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = "rd" if isinstance(report, RdReport) else "equal-bytes"
    data, page = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_text(json.dumps(_rounded(dataclasses.asdict(report))) + "\n", encoding="utf-8")
    page.write_text(markdown(report), encoding="utf-8")
    if isinstance(report, RdReport):
        return [data, page, *plot_curves(report, folder)]
    return [data, page, *plot_equal_bytes(report, folder)]


def _rounded(value: Any) -> Any:
    """JSON-able data with floats of six significant digits: more says nothing and fills disks."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value


def _marked(name: str, nets: Sequence[NetRecord]) -> str:
    """A column's name, with a mark where its net was the codec's teacher."""
    notes = [net.note for net in nets if net.note and name.startswith(net.name)]
    return f"{name} ({notes[0]})" if notes else name


def _bd_row(one: BdRate, judges: Sequence[NetRecord]) -> tuple[str, ...]:
    return (
        one.test,
        one.anchor,
        _marked(label(one.metric), judges),
        _number(one.headline_percent, "+.1f", " %"),
        _interval(one.headline_range),
        _number(one.percent, "+.1f", " %"),
        _interval(one.quality_range),
    )


def _point_row(point: Point, metrics: Sequence[str]) -> tuple[str, ...]:
    return (
        point.method,
        point.setting,
        f"{point.bpp:.4f}",
        *(text(name, point.metrics.get(name)) for name in metrics),
        f"{point.encode_s:.4f}",
        f"{point.decode_s:.4f}",
        f"{1 / max(point.encode_s, 1e-9):.1f}",
        f"{1 / max(point.decode_s, 1e-9):.1f}",
    )


def _equal_start(point: EqualPoint) -> tuple[str, ...]:
    at = "-" if point.state is None else f"state {point.state}"
    return point.method, at, f"{point.bpp:.4f}", str(point.num_over) if point.num_over else "-"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.1f}-{bounds[1]:.1f}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
