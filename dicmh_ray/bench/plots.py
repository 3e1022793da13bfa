"""Curves as pictures. Needs matplotlib, from the ``bench`` extra.

The same report gives the same bytes: nothing of the time or a random seed goes into the files.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dicmh_ray.bench.equal_bytes import ORIGINAL, EqualReport
from dicmh_ray.bench.metrics import label
from dicmh_ray.bench.rd import RdReport, curve_of
from dicmh_ray.errors import MissingExtraError

RATE_LABEL = "bits per pixel (whole file, unpadded area)"


def plot_curves(report: RdReport, folder: str | Path) -> list[Path]:
    """Write ``rd-<metric>.png`` and ``.svg`` for each metric that has curves.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    written = []
    for metric in report.metrics:
        net = next((one for one in report.judges if metric.endswith(f":{one.name}")), None)
        note = f" ({net.note})" if net is not None and net.note else ""

        def draw(axes: Any, metric: str = metric, note: str = note) -> None:
            for method in dict.fromkeys(point.method for point in report.points):
                line = sorted(curve_of(report.points, method, metric))
                _line(axes, line, method, is_ours=method.startswith(report.codec))
            axes.axvspan(*report.headline_bpp, color="0.95", zorder=0)
            axes.set_title(f"{report.pictures}: mean of {report.num_images} images")
            _finish(axes, f"{_axis_label(metric)}{note}")

        written += _write(Path(folder), f"rd-{_file_name(metric)}", draw)
    return written


def plot_equal_bytes(report: EqualReport, folder: str | Path) -> list[Path]:
    """Write ``tasks-<score>.png`` and ``.svg`` for each score that the set has.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    written = []
    for score in dict.fromkeys(name for point in report.points for name in point.scores):
        if all(point.scores[score] is None for point in report.points):
            continue
        net = next(one for one in report.tasks if score.startswith(f"{one.name}:"))
        note = f" ({net.note})" if net.note else ""

        def draw(axes: Any, score: str = score, note: str = note) -> None:
            for method in dict.fromkeys(point.method for point in report.points):
                curve = [
                    (point.bpp, value)
                    for point in report.points
                    if point.method == method and (value := point.scores[score]) is not None
                ]
                if method == ORIGINAL:
                    for _, value in curve:
                        axes.axhline(value, color="0.4", linestyle="--", label="original")
                else:
                    _line(axes, sorted(curve), method, is_ours=method.startswith(report.codec))
            axes.set_title(f"{report.pictures}: {report.num_images} images, at equal bytes")
            _finish(axes, f"{score}{note}")

        written += _write(Path(folder), f"tasks-{_file_name(score)}", draw)
    return written


def _write(folder: Path, stem: str, draw: Callable[[Any], None]) -> list[Path]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise MissingExtraError("matplotlib", "bench") from exc
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "dicmh", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        draw(figure.subplots())
        for suffix, metadata in [("png", {"Software": None}), ("svg", {"Date": None})]:
            path = folder / f"{stem}.{suffix}"
            figure.savefig(path, dpi=130, metadata=metadata)
            written.append(path)
    return written


def _line(axes: Any, curve: Sequence[tuple[float, float]], name: str, *, is_ours: bool) -> None:
    axes.plot(
        [bpp for bpp, _ in curve],
        [value for _, value in curve],
        marker="o" if is_ours else ".",
        linewidth=2.4 if is_ours else 1.2,
        zorder=3 if is_ours else 2,
        label=name,
    )


def _finish(axes: Any, label_y: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(RATE_LABEL)
    axes.set_ylabel(label_y)
    axes.grid(visible=True, which="both", linewidth=0.4, alpha=0.5)
    axes.legend()


def _axis_label(metric: str) -> str:
    if "psnr" in metric:
        return f"{label(metric)} (dB)"
    inner = "1-x" if metric.startswith("ms_ssim") else "x"
    return f"{label(metric)} (dB, $-10\\log_{{10}}({inner})$; up is better)"


def _file_name(name: str) -> str:
    """A metric's or score's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
