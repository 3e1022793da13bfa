"""The command that writes archives."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dicmh_ray.cli.options import (
    AGAIN,
    DRY,
    RATE,
    RAY,
    SOURCE,
    TAGS,
    WATCH,
    WHERE,
    ArchiveArgument,
    CheckpointOption,
    DeviceOption,
    JsonOption,
    PromptOption,
    Runtime,
    StorageOption,
    ThresholdOption,
    TopKOption,
    VocabularyOption,
    on_this_machine,
)
from dicmh_ray.cli.program import app
from dicmh_ray.cli.sections import SectionedCommand


class Readers(StrEnum):
    """Whether there are actors that read for those that encode."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class KeepOriginal(StrEnum):
    """Which source bytes stay in the archive."""

    NEVER = "never"
    BELOW_FLOOR = "below-floor"
    ALWAYS = "always"


@app.command(cls=SectionedCommand)
def compress(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC",
            help="Tars, Parquet files, folders, globs, {000..099}; any fsspec URL.",
        ),
    ],
    archive: ArchiveArgument,
    states: Annotated[
        int | None,
        typer.Option(
            min=1, help="Write exactly so many states of each image.", rich_help_panel=RATE
        ),
    ] = None,
    target_bpp: Annotated[
        float | None,
        typer.Option(
            help="Write the most states within so many bits per pixel.", rich_help_panel=RATE
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="No stream gets a state that makes it longer; each has one.",
            rich_help_panel=RATE,
        ),
    ] = None,
    min_psnr: Annotated[
        float, typer.Option(help="Floor in dB, whole picture.", rich_help_panel=RATE)
    ] = 30.0,
    min_tile_psnr: Annotated[
        float, typer.Option(help="Floor in dB, worst 64x64 tile.", rich_help_panel=RATE)
    ] = 24.0,
    keep_original: Annotated[
        KeepOriginal,
        typer.Option(
            help="Source bytes that stay: of no image, of those without a stream, of all.",
            rich_help_panel=RATE,
        ),
    ] = KeepOriginal.BELOW_FLOOR,
    base_states: Annotated[
        int,
        typer.Option(min=1, help="States in the column that previews read.", rich_help_panel=RATE),
    ] = 2,
    checkpoint: CheckpointOption = "default",
    image_column: Annotated[
        str | None, typer.Option(help="Parquet: column of images.", rich_help_panel=SOURCE)
    ] = None,
    key_column: Annotated[
        str | None, typer.Option(help="Parquet: column of keys.", rich_help_panel=SOURCE)
    ] = None,
    tag_field: Annotated[
        list[str] | None,
        typer.Option(
            help="Metadata field whose values become tags: cls, json.labels. Repeatable.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    storage_option: StorageOption = None,
    suggest_tags: Annotated[
        bool,
        typer.Option(
            "--suggest-tags",
            help="Add tags that the checkpoint's tagger is sure of.",
            rich_help_panel=TAGS,
        ),
    ] = False,
    tagger: Annotated[
        str | None,
        typer.Option(
            metavar="TAGGER",
            help="Add tags: clip:DIR, siglip:DIR, package.module:name or head.",
            rich_help_panel=TAGS,
        ),
    ] = None,
    vocabulary: VocabularyOption = None,
    threshold: ThresholdOption = None,
    top_k: TopKOption = None,
    prompt: PromptOption = None,
    runtime: Annotated[
        Runtime, typer.Option(help="Ray actors, or a loop here.", rich_help_panel=WHERE)
    ] = Runtime.RAY,
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of torch in each process.", rich_help_panel=WHERE),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="A running cluster: `auto`, ray://host:10001. Default: RAY_ADDRESS, or a Ray of "
            "this machine, started for the job.",
            rich_help_panel=RAY,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The most at once; a cluster that can grow is asked to. Default: what fits, one a "
            "GPU, else one a CPU.",
            rich_help_panel=RAY,
        ),
    ] = None,
    min_workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="So many at the start, more while units wait. Default: what fits.",
            rich_help_panel=RAY,
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float,
        typer.Option(help="A share lets several have one GPU: 0.5.", rich_help_panel=RAY),
    ] = 1.0,
    readers: Annotated[
        Readers,
        typer.Option(
            help="Whether machines without GPU read and decode for those with one; auto: where "
            "there are both.",
            rich_help_panel=RAY,
        ),
    ] = Readers.AUTO,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Units in flight at once, over the whole job: what the stores must bear.",
            rich_help_panel=RAY,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on with an archive that has commits, or refuse it.", rich_help_panel=AGAIN
        ),
    ] = True,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add to a finished archive what it does not have yet.",
            rich_help_panel=AGAIN,
        ),
    ] = False,
    failure_budget: Annotated[
        str,
        typer.Option(
            metavar="N|SHARE",
            help="Failed images tolerated: 100, or 0.05 for 5 %. Exit code 3 beyond.",
            rich_help_panel=AGAIN,
        ),
    ] = "0.1",
    log_json: Annotated[
        str | None,
        typer.Option(
            callback=on_this_machine,
            metavar="FILE",
            help="Append events as JSON lines; `-` is standard error.",
            rich_help_panel=WATCH,
        ),
    ] = None,
    metrics_file: Annotated[
        Path | None,
        typer.Option(
            callback=on_this_machine,
            metavar="FILE.prom",
            help="Keep metrics there, in Prometheus' text format.",
            rich_help_panel=WATCH,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            callback=on_this_machine,
            metavar="FILE",
            help="Write a summary at the end: a page, or *.json.",
            rich_help_panel=WATCH,
        ),
    ] = None,
    as_json: JsonOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List units, predict size, time and price; write nothing.",
            rich_help_panel=DRY,
        ),
    ] = False,
    sample: Annotated[
        int,
        typer.Option(min=0, help="Images to encode; 0 only lists the units.", rich_help_panel=DRY),
    ] = 40,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of one worker.", rich_help_panel=DRY)
    ] = None,
    price_per_gb_month: Annotated[
        float | None, typer.Option(min=0, help="Of stored 10^9 bytes.", rich_help_panel=DRY)
    ] = None,
) -> None:
    """Compress a collection into an archive; the same command again goes on where it stopped.

    By default each image gets the fewest states whose decode meets the quality floor. What cannot
    be encoded, misses the floor or would grow keeps its original bytes: nothing is lost.

    Examples:

        dicmh compress photos/ archive/

        dicmh compress 'shards/{000..099}.tar' s3://bucket/archive --tag-field cls

        dicmh compress data.parquet out/ --image-column image --target-bpp 0.5 --runtime local

        dicmh compress photos/ archive/ --tagger siglip:models/siglip --vocabulary words.txt

        dicmh compress 'shards/*.tar' s3://bucket/archive --append

        dicmh compress 'shards/*.tar' s3://bucket/archive --dry-run --price-per-hour 0.9
    """
    from dicmh_ray.cli.compress_arguments import CompressArguments
    from dicmh_ray.cli.tagger_options import HEAD, TaggerArguments
    from dicmh_ray.cli.writing import run_compress

    options = {"vocabulary": vocabulary, "threshold": threshold, "top_k": top_k}
    if tagger in (None, HEAD) and (prompt or any(value is not None for value in options.values())):
        raise typer.BadParameter(
            "--vocabulary, --threshold, --top-k and --prompt go with --tagger clip:, siglip: or code"
        )

    run_compress(
        CompressArguments(
            sources=sources,
            archive=archive,
            runtime=runtime.value,
            policy={
                "states": states,
                "target_bpp": target_bpp,
                "max_bytes": max_bytes,
                "min_psnr": min_psnr,
                "min_worst_tile_psnr": min_tile_psnr,
                "keep_original": keep_original.value,
                "base_states": base_states,
                "suggest_tags": suggest_tags or tagger == HEAD,
            },
            source={
                "tag_fields": tag_field or (),
                "image_column": image_column,
                "key_column": key_column,
            },
            checkpoint=checkpoint,
            device=device,
            threads=threads,
            ray={
                "address": ray_address,
                "workers": workers,
                "min_workers": min_workers,
                "gpus_per_worker": gpus_per_worker,
                "readers": readers.value,
                "max_concurrency": max_concurrency,
            },
            resume=resume,
            append=append,
            log_json=log_json,
            metrics_file=metrics_file,
            report=report,
            sample=sample,
            price_per_hour=price_per_hour,
            price_per_gb_month=price_per_gb_month,
            failure_budget=failure_budget,
            storage_options=storage_option or [],
            tagger=None
            if tagger is None
            else TaggerArguments(
                tagger=tagger,
                vocabulary=vocabulary,
                threshold=threshold,
                top_k=top_k,
                prompts=prompt or (),
            ),
        ),
        dry_run=dry_run,
        as_json=as_json,
    )
