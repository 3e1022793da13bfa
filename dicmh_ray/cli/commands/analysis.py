"""Commands that let machines read archives."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dicmh_ray.cli.options import (
    ArchiveArgument,
    DeviceOption,
    JsonOption,
    Runtime,
    StorageOption,
    on_this_machine,
)
from dicmh_ray.cli.program import app


class PictureView(StrEnum):
    """Pictures that are data: a human view is none."""

    MACHINE = "machine"
    THUMBNAIL = "thumbnail"


WhereOption = Annotated[
    str | None, typer.Option(help="Only rows of a filter: \"'dog' in tags and width >= 512\".")
]
StatesOption = Annotated[
    int | None, typer.Option(min=1, help="Read the first states only, where there are more.")
]


@app.command()
def analyze(
    archive: ArchiveArgument,
    task: Annotated[
        str,
        typer.Option(
            help="classify, detect, segment, faces, landmarks, embed, embed-latent, latent-head, "
            "near-duplicates, tags; or package.module:Class."
        ),
    ],
    net: Annotated[
        str | None,
        typer.Option(metavar="FILE[:TENSOR]", help="ONNX file; of embed, with a tensor."),
    ] = None,
    names: Annotated[
        str | None, typer.Option(metavar="FILE", help="Names of the net's classes, one a line.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="FILE", help="Of latent-head: from `dicmh fit-head`.")
    ] = None,
    where: WhereOption = None,
    states: StatesOption = None,
    view: Annotated[PictureView | None, typer.Option(help="What a net looks at.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes of a picture.")] = None,
    min_score: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of what is detected.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least cosine of near duplicates.")
    ] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="Actors on a Ray cluster, or this process.")
    ] = Runtime.LOCAL,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray: a running cluster, e.g. `auto`.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Ray: actors at most.")] = None,
    device: DeviceOption = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the codec on a CPU.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that a task is given at once.")] = 16,
    failure_budget: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a unit's rows that may fail.")
    ] = 0.1,
    version: Annotated[int | None, typer.Option(min=1, help="Of the archive.")] = None,
    storage_option: StorageOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be read; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a task over the rows of an archive; its results lie beside it, as Parquet with keys.

    What has results already is skipped: the same command goes on after a crash, and on an archive
    that has grown it looks at what is new.

    Examples:

        dicmh analyze archive/ --task classify --net nets/classifier.onnx --names labels.txt

        dicmh analyze s3://bucket/archive --task near-duplicates --runtime ray

        dicmh analyze archive/ --task my_package.tasks:Sharpness --where "'dog' in tags" --dry-run
    """
    from dicmh_ray.cli.analyzing import AnalyzeArguments, run_analyze

    run_analyze(
        AnalyzeArguments(
            archive=archive,
            task=task,
            task_options={
                "net": net,
                "names": names,
                "head": head,
                "states": states,
                "view": None if view is None else view.value,
                "top_k": top_k,
                "min_score": min_score,
                "threshold": threshold,
            },
            where=where,
            runtime=runtime.value,
            ray_address=ray_address,
            workers=workers,
            options={
                "device": device,
                "threads": threads,
                "batch_size": batch_size,
                "failure_budget": failure_budget,
            },
            version=version,
            storage_options=storage_option or [],
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command("fit-head")
def fit_head(
    archive: ArchiveArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=on_this_machine, help="File for the head.")
    ],
    label: Annotated[str, typer.Option(help="`tag`: the main tag; or `metadata.FIELD`.")] = "tag",
    states: StatesOption = None,
    where: WhereOption = None,
    left_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the pictures it is tested on.")
    ] = 0.2,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pictures.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the fit.")] = 0,
    version: Annotated[int | None, typer.Option(min=1, help="Of the archive.")] = None,
    device: DeviceOption = "auto",
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a small classifier to the latents of labelled pictures; no picture is drawn.

    Examples:

        dicmh fit-head archive/ --label metadata.cls --states 2 -o head.safetensors

        dicmh analyze archive/ --task latent-head --head head.safetensors
    """
    from dicmh_ray.cli.analyzing import FitArguments, run_fit_head

    run_fit_head(
        FitArguments(
            archive=archive,
            output=output,
            label=label,
            states=states,
            where=where,
            left_out=left_out,
            epochs=epochs,
            seed=seed,
            version=version,
            device=device,
            storage_options=storage_option or [],
        ),
        as_json=as_json,
    )
