"""Evaluation: this codec beside JPEG, WebP, AVIF and JPEG XL on a set of pictures.

    report = evaluate_rd(["photos"], load_codec())
    write_report(report, "out")         # rd.json, rd.md, curves as PNG and SVG

Rates are real file bytes over the unpadded area; every measure has one definition for all methods.
``evaluate_tasks`` scores what nets read off the pictures at equal bytes, ``evaluate_all`` does
everything in one pass; docs/evaluation.md says how. BD-rates, plots, nets and JPEG XL need the
``bench`` extra.
"""

from dicmh_ray.bench.bd_rate import BdRate, bd_rate
from dicmh_ray.bench.campaign import Campaign, evaluate_all
from dicmh_ray.bench.contact import Exhibit, write_sheets
from dicmh_ray.bench.environment import Environment, describe_environment
from dicmh_ray.bench.equal_bytes import EqualPoint, EqualReport, evaluate_tasks
from dicmh_ray.bench.judges import FeatureJudge, Likeness, Lpips
from dicmh_ray.bench.matching import Match, PeerFiles
from dicmh_ray.bench.metrics import Gauge, NetRecord
from dicmh_ray.bench.peers import PEERS, Peer, available_peers
from dicmh_ray.bench.plots import plot_curves, plot_equal_bytes
from dicmh_ray.bench.rd import BenchOptions, Measurement, Point, RdReport, evaluate_rd
from dicmh_ray.bench.report import Table, equal_tables, markdown, tables, write_report
from dicmh_ray.bench.sheet import Cell, comparison_sheet, draw_sheet
from dicmh_ray.bench.subject import Subject, find_images
from dicmh_ray.vision.nets import NetSpec, find_nets, net_from_argument
from dicmh_ray.vision.tasks import NetTask, load_task

__all__ = [
    "PEERS",
    "BdRate",
    "BenchOptions",
    "Campaign",
    "Cell",
    "Environment",
    "EqualPoint",
    "EqualReport",
    "Exhibit",
    "FeatureJudge",
    "Gauge",
    "Likeness",
    "Lpips",
    "Match",
    "Measurement",
    "NetRecord",
    "NetSpec",
    "NetTask",
    "Peer",
    "PeerFiles",
    "Point",
    "RdReport",
    "Subject",
    "Table",
    "available_peers",
    "bd_rate",
    "comparison_sheet",
    "describe_environment",
    "draw_sheet",
    "equal_tables",
    "evaluate_all",
    "evaluate_rd",
    "evaluate_tasks",
    "find_images",
    "find_nets",
    "load_task",
    "markdown",
    "net_from_argument",
    "plot_curves",
    "plot_equal_bytes",
    "tables",
    "write_report",
    "write_sheets",
]
