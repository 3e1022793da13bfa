"""Evaluation: this codec beside JPEG, WebP and AVIF on a folder of images.

    report = evaluate_folder("photos", load_codec())
    write_report(report, "out")         # rd.json, rd.md, curves as PNG and SVG

Rates are real file bytes over the unpadded area; quality comes from one definition for all
(``codec.measure``). BD-rates and plots need the ``bench`` extra.
"""

from dicmh_ray.bench.bd_rate import BdRate, bd_rate, ms_ssim_db
from dicmh_ray.bench.environment import Environment, describe_environment
from dicmh_ray.bench.peers import PEERS, Peer, available_peers
from dicmh_ray.bench.plots import plot_curves
from dicmh_ray.bench.rd import (
    Measurement,
    Point,
    RdOptions,
    RdReport,
    evaluate_folder,
    find_images,
)
from dicmh_ray.bench.report import Table, markdown, tables, write_report
from dicmh_ray.bench.sheet import Cell, comparison_sheet, draw_sheet

__all__ = [
    "PEERS",
    "BdRate",
    "Cell",
    "Environment",
    "Measurement",
    "Peer",
    "Point",
    "RdOptions",
    "RdReport",
    "Table",
    "available_peers",
    "bd_rate",
    "comparison_sheet",
    "describe_environment",
    "draw_sheet",
    "evaluate_folder",
    "find_images",
    "markdown",
    "ms_ssim_db",
    "plot_curves",
    "tables",
    "write_report",
]
