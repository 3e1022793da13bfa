"""A report as tables, Markdown and files."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dicmh_ray.bench.bd_rate import BdRate
from dicmh_ray.bench.plots import plot_curves
from dicmh_ray.bench.rd import Point, RdReport

METRICS = {"psnr": "PSNR", "ms_ssim": "MS-SSIM"}
POINT_COLUMNS = (
    "method",
    "setting",
    "bpp",
    "PSNR dB",
    "MS-SSIM",
    "encode s",
    "decode s",
    "encode img/s",
    "decode img/s",
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
            rows=tuple(_bd_row(one) for one in report.bd_rates),
        ),
        Table(
            title=f"Means over {report.num_images} images",
            columns=POINT_COLUMNS,
            rows=tuple(_point_row(point) for point in report.points),
        ),
    )


def markdown(report: RdReport) -> str:
    """The report as a page, with what it was measured on."""
    parts = [
        f"# Rate and distortion on {Path(report.folder).name}\n",
        "".join(f"{line}  \n" for line in _facts(report)),
        *(table.markdown() for table in tables(report)),
    ]
    if report.skipped:
        listed = "".join(f"- {name}: {reason}\n" for name, reason in report.skipped)
        parts.append(f"### Left out for all methods\n\n{listed}")
    return "\n".join(parts)


def write_report(report: RdReport, folder: str | Path) -> list[Path]:
    """Write ``rd.json``, ``rd.md`` and the curves (:func:`plot_curves`); returns their paths.

    Raises:
        MissingExtraError: matplotlib is not installed. JSON and Markdown are written all the same.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "rd.json", folder / "rd.md"
    data.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", encoding="utf-8")
    page.write_text(markdown(report), encoding="utf-8")
    return [data, page, *plot_curves(report, folder)]


def _facts(report: RdReport) -> Iterable[str]:
    yield f"Codec: {report.codec}, checkpoint {report.codec_id[:16]}"
    yield from report.environment.lines()
    yield "Seconds are wall time per image; a state's encode time is that of the full stream,"
    yield "a JPEG's that of two files, baseline and progressive, of which the smaller counts."


def _bd_row(one: BdRate) -> tuple[str, ...]:
    return (
        one.test,
        one.anchor,
        METRICS[one.metric],
        _number(one.headline_percent, "+.1f", " %"),
        _interval(one.headline_range),
        _number(one.percent, "+.1f", " %"),
        _interval(one.quality_range),
    )


def _point_row(point: Point) -> tuple[str, ...]:
    return (
        point.method,
        point.setting,
        f"{point.bpp:.4f}",
        f"{point.psnr:.2f}",
        _number(point.ms_ssim, ".4f"),
        f"{point.encode_s:.4f}",
        f"{point.decode_s:.4f}",
        f"{1 / max(point.encode_s, 1e-9):.1f}",
        f"{1 / max(point.decode_s, 1e-9):.1f}",
    )


def _interval(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.1f}-{bounds[1]:.1f}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
