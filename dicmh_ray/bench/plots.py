"""Rate-distortion curves as pictures. Needs matplotlib, from the ``bench`` extra."""

from pathlib import Path
from typing import Any

from dicmh_ray.bench.rd import RdReport
from dicmh_ray.errors import MissingExtraError

AXES = {"psnr": "PSNR (dB)", "ms_ssim": "MS-SSIM (dB, $-10\\log_{10}(1-x)$)"}


def plot_curves(report: RdReport, folder: str | Path) -> list[Path]:
    """Write ``rd-<metric>.png`` and ``.svg`` for each metric that was measured.

    The same report gives the same bytes: nothing of the time or a random seed goes into the files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise MissingExtraError("matplotlib", "bench") from exc
    written = []
    for metric, label in AXES.items():
        if all(point.quality(metric) is None for point in report.points):
            continue
        with matplotlib.rc_context({"svg.hashsalt": "dicmh", "svg.fonttype": "none"}):
            figure = Figure(figsize=(7, 4.5), layout="constrained")
            _draw(figure.subplots(), report, metric, label)
            for suffix, metadata in [("png", {"Software": None}), ("svg", {"Date": None})]:
                path = Path(folder) / f"rd-{metric.replace('_', '-')}.{suffix}"
                figure.savefig(path, dpi=150, metadata=metadata)
                written.append(path)
    return written


def _draw(axes: Any, report: RdReport, metric: str, label: str) -> None:
    for method in dict.fromkeys(point.method for point in report.points):
        curve = sorted(
            (point.bpp, quality)
            for point in report.points
            if point.method == method and (quality := point.quality(metric)) is not None
        )
        is_ours = method == report.codec
        axes.plot(
            [bpp for bpp, _ in curve],
            [quality for _, quality in curve],
            marker="o" if is_ours else ".",
            linewidth=2.4 if is_ours else 1.2,
            zorder=3 if is_ours else 2,
            label=method,
        )
    axes.axvspan(*report.headline_bpp, color="0.95", zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("bits per pixel (whole file, unpadded area)")
    axes.set_ylabel(label)
    axes.set_title(f"{Path(report.folder).name}: mean of {report.num_images} images")
    axes.grid(visible=True, which="both", linewidth=0.4, alpha=0.5)
    axes.legend()
