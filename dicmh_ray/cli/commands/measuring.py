"""Commands that measure the codec, and the one that tells versions."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dicmh_ray.cli.options import CheckpointOption, DeviceOption, JsonOption, on_this_machine
from dicmh_ray.cli.program import app, bench_app


class BenchView(StrEnum):
    """What is measured of ours."""

    MACHINE = "machine"
    HUMAN = "human"


PicturesArgument = Annotated[
    list[Path], typer.Argument(metavar="PICTURES", help="Image files, folders of them.")
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", callback=on_this_machine, help="Folder for JSON, Markdown and plots."
    ),
]
BenchViewOption = Annotated[
    list[BenchView] | None, typer.Option("--view", help="Of ours. Repeatable.")
]
NetsOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of ONNX nets that judge; docs/evaluation.md."),
]
FeaturesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE:TAP,TAP", help="ONNX net and tensors for feature distances. Repeatable."
    ),
]
LpipsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="LPIPS as ONNX: two RGB inputs in -1..1.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first pictures.")]
BenchThreadsOption = Annotated[int, typer.Option(min=1, help="Pictures at once.")]


@bench_app.command("rd")
def bench_rd(
    pictures: PicturesArgument,
    output: ReportOption = None,
    checkpoint: CheckpointOption = "default",
    device: DeviceOption = "auto",
    view: BenchViewOption = None,
    nets: NetsOption = None,
    features: FeaturesOption = None,
    lpips: LpipsOption = None,
    limit: LimitOption = None,
    threads: BenchThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Measure rate and distortion of every state against JPEG, WebP, AVIF, JPEG XL; BD-rates.

    Examples:

        dicmh bench rd kodak/ -o report/

        dicmh bench rd kodak/ --view machine --view human --nets nets/
    """
    from dicmh_ray.cli.measuring import BenchArguments, run_bench_rd

    run_bench_rd(
        BenchArguments(
            pictures=pictures,
            output=output,
            checkpoint=checkpoint,
            device=device,
            views=[one.value for one in view or ()],
            nets=nets,
            features=features or [],
            lpips=lpips,
            limit=limit,
            threads=threads,
            as_json=as_json,
        )
    )


@bench_app.command("tasks")
def bench_tasks(
    pictures: PicturesArgument,
    nets: NetsOption,
    output: ReportOption = None,
    checkpoint: CheckpointOption = "default",
    device: DeviceOption = "auto",
    view: BenchViewOption = None,
    features: FeaturesOption = None,
    lpips: LpipsOption = None,
    limit: LimitOption = None,
    threads: BenchThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Score machine tasks at equal bytes: classes, boxes, segments, faces. Labels lie beside.

    Example:

        dicmh bench tasks coco/images --nets nets/ -o report/
    """
    from dicmh_ray.cli.measuring import BenchArguments, run_bench_tasks

    run_bench_tasks(
        BenchArguments(
            pictures=pictures,
            output=output,
            checkpoint=checkpoint,
            device=device,
            views=[one.value for one in view or ()],
            nets=nets,
            features=features or [],
            lpips=lpips,
            limit=limit,
            threads=threads,
            as_json=as_json,
        )
    )


@bench_app.command("all")
def bench_all(
    pictures: PicturesArgument,
    nets: NetsOption,
    output: ReportOption = None,
    checkpoint: CheckpointOption = "default",
    device: DeviceOption = "auto",
    view: BenchViewOption = None,
    features: FeaturesOption = None,
    lpips: LpipsOption = None,
    limit: LimitOption = None,
    rd_limit: Annotated[
        int | None, typer.Option(min=1, help="Curves from so many pictures, evenly chosen.")
    ] = None,
    sheets: Annotated[int, typer.Option(min=0, help="Contact sheets, and those of failures.")] = 2,
    threads: BenchThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Do `rd` and `tasks` in one pass, with plots, tables and contact sheets.

    Example:

        dicmh bench all kodak/ --nets nets/ -o docs/results/kodak
    """
    from dicmh_ray.cli.measuring import BenchArguments, run_bench_all

    run_bench_all(
        BenchArguments(
            pictures=pictures,
            output=output,
            checkpoint=checkpoint,
            device=device,
            views=[one.value for one in view or ()],
            nets=nets,
            features=features or [],
            lpips=lpips,
            limit=limit,
            threads=threads,
            as_json=as_json,
        ),
        rd_limit=rd_limit,
        pages=sheets,
    )


@app.command()
def version(as_json: JsonOption = False) -> None:
    """Print the versions of package, default checkpoint and libraries."""
    from dicmh_ray.cli.measuring import run_version

    run_version(as_json=as_json)
