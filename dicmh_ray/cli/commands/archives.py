"""Commands that write, read and maintain archives.

Each imports its body when it is called: the help must not wait for it.
"""

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
    StorageOption,
    ThresholdOption,
    TopKOption,
    VocabularyOption,
)
from dicmh_ray.cli.program import app
from dicmh_ray.cli.sections import SectionedCommand


class Runtime(StrEnum):
    """Where units run."""

    RAY = "ray"
    LOCAL = "local"


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


class View(StrEnum):
    """What is written of an image."""

    MACHINE = "machine"
    HUMAN = "human"
    THUMBNAIL = "thumbnail"
    LATENT = "latent"
    ORIGINAL = "original"


class Format(StrEnum):
    """Of decoded pictures."""

    PNG = "png"
    JPG = "jpg"
    WEBP = "webp"
    NPY = "npy"


class Container(StrEnum):
    """Of a bulk decode."""

    WEBDATASET = "webdataset"
    PARQUET = "parquet"
    FOLDER = "folder"


class OnError(StrEnum):
    """What becomes of rows that are damaged."""

    RAISE = "raise"
    SKIP = "skip"


VersionOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="An older version; `dicmh history` lists them."),
]


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
            metavar="FILE",
            help="Append events as JSON lines; `-` is standard error.",
            rich_help_panel=WATCH,
        ),
    ] = None,
    metrics_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.prom",
            help="Keep metrics there, in Prometheus' text format.",
            rich_help_panel=WATCH,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
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


@app.command()
def report(
    archive: ArchiveArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A page, or *.json.")
    ],
    thumbnails: Annotated[
        bool, typer.Option(help="Decode the worst images for the page; loads the codec.")
    ] = True,
    version: VersionOption = None,
    device: DeviceOption = "auto",
    storage_option: StorageOption = None,
) -> None:
    """Write a summary of an archive: rates, quality, sizes, failures, the worst images.

    The page is one file that needs no other. Numbers come from the commits; rows are read only where
    commits have none.

    Examples:

        dicmh report archive/ -o report.html

        dicmh report s3://bucket/archive -o report.json
    """
    from dicmh_ray.cli.reporting import run_report

    run_report(
        archive,
        storage_option or [],
        output=output,
        thumbnails=thumbnails,
        version=version,
        device=device,
    )


@app.command()
def info(
    archive: ArchiveArgument,
    version: VersionOption = None,
    as_json: JsonOption = False,
    storage_option: StorageOption = None,
) -> None:
    """Say what an archive holds, from its commits alone.

    Example:

        dicmh info archive/ --json
    """
    from dicmh_ray.cli.reading import run_info

    run_info(archive, storage_option or [], version=version, as_json=as_json)


@app.command()
def history(
    archive: ArchiveArgument, as_json: JsonOption = False, storage_option: StorageOption = None
) -> None:
    """List the versions of an archive, and the jobs that may become the next one.

    Example:

        dicmh history archive/
    """
    from dicmh_ray.cli.maintaining import run_history

    run_history(archive, storage_option or [], as_json=as_json)


@app.command()
def compact(
    archive: ArchiveArgument,
    target_mb: Annotated[
        float, typer.Option(min=0.001, help="Size of a part to aim for, MiB.")
    ] = 256,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    as_json: JsonOption = False,
    storage_option: StorageOption = None,
) -> None:
    """Rewrite many small parts into few large ones, as a new version; no image is encoded again.

    The old parts stay for the older versions until `dicmh gc`.

    Example:

        dicmh compact archive/ --dry-run
    """
    from dicmh_ray.cli.maintaining import run_compact

    run_compact(
        archive,
        storage_option or [],
        target_bytes=round(target_mb * 2**20),
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command()
def gc(
    archive: ArchiveArgument,
    keep_versions: Annotated[
        int, typer.Option(min=1, help="Keep so many of the newest versions,")
    ] = 10,
    keep_days: Annotated[
        float, typer.Option(min=0, help="and those that are younger than this.")
    ] = 7,
    grace_hours: Annotated[
        float,
        typer.Option(
            min=0,
            help="Spare strays so long: a running job may need them. Below 12 only when idle.",
        ),
    ] = 24,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be deleted; delete nothing.")
    ] = False,
    as_json: JsonOption = False,
    storage_option: StorageOption = None,
) -> None:
    """Give up old versions, and delete what no version and no running job needs.

    Examples:

        dicmh gc archive/ --dry-run

        dicmh gc archive/ --keep-versions 1 --keep-days 0
    """
    from dicmh_ray.cli.maintaining import run_gc

    run_gc(
        archive,
        storage_option or [],
        keep_versions=keep_versions,
        keep_s=keep_days * 86_400,
        grace_s=grace_hours * 3600,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command()
def verify(
    archive: ArchiveArgument,
    subset: Annotated[
        str | None, typer.Option(metavar="N/T", help="Check every T-th unit from the N-th.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every stream, too (slow).")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    storage_option: StorageOption = None,
) -> None:
    """Check every object and every row. Exit 0: sound, 1: damaged, 2: could not be checked.

    Examples:

        dicmh verify archive/

        dicmh verify s3://bucket/archive --subset 1/30
    """
    from dicmh_ray.cli.reading import run_verify

    run_verify(
        archive,
        storage_option or [],
        subset=subset,
        decode=decode,
        device=device,
        as_json=as_json,
    )


OnErrorOption = Annotated[
    OnError, typer.Option(help="Damaged rows: stop at the first, or name them and go on (exit 1).")
]


@app.command()
def decode(
    archive: ArchiveArgument,
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY", help="Images.")] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the files; is created.")
    ] = ".",
    where: Annotated[
        str | None, typer.Option(help="Also the images a filter selects; `True` is all.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only N of these, chosen at random.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    states: Annotated[
        int | None, typer.Option(min=1, help="Decode from the first states only, where there are.")
    ] = None,
    view: Annotated[
        View, typer.Option(help="Faithful or generated picture, latent (npy), or source bytes.")
    ] = (View.MACHINE),
    format: Annotated[Format, typer.Option(help="Of pictures.")] = Format.PNG,
    into: Annotated[
        Container | None,
        typer.Option(help="In bulk: shards of this kind in OUTPUT, any fsspec URL. Resumable."),
    ] = None,
    shard_rows: Annotated[int, typer.Option(min=1, help="Images of a shard.")] = 1000,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of a bulk decode; default: one a CPU.")
    ] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="Of a bulk decode: processes here, or Ray actors.")
    ] = Runtime.LOCAL,
    on_error: OnErrorOption = OnError.RAISE,
    version: VersionOption = None,
    device: DeviceOption = "auto",
    storage_option: StorageOption = None,
) -> None:
    """Decode images to files and print a line for each: key, tab, file.

    Keys are data, never paths: file names are made safe and unique. With `--into` many images
    become tars, Parquet files or folders, each image once however often the job dies: the same
    command goes on where it stopped.

    Examples:

        dicmh decode archive/ 000-0004 000-0017 -o out/

        dicmh decode archive/ --where "'dog' in tags" --states 2 --format jpg -o dogs/

        dicmh decode archive/ --where "'dog' in tags" --into webdataset -o s3://bucket/dogs
    """
    if into is not None:
        if keys:
            raise typer.BadParameter("--into takes a filter or a sample, not keys")
        if runtime is Runtime.RAY and device != "auto":
            raise typer.BadParameter("on Ray each worker has a CPU; GPUs: jobs/decode_views.py")
        from dicmh_ray.cli.bulk_decoding import run_bulk_decode

        run_bulk_decode(
            archive,
            storage_option or [],
            version=version,
            output=output,
            options={
                "view": view.value,
                "states": states,
                "where": where,
                "sample": sample,
                "seed": seed,
                "container": into.value,
                "format": format.value,
                "shard_rows": shard_rows,
                "on_error": on_error.value,
            },
            on_ray=runtime is Runtime.RAY,
            workers=workers,
            device=device,
        )
        return
    from dicmh_ray.cli.reading import run_decode

    run_decode(
        archive,
        storage_option or [],
        version=version,
        keys=keys or [],
        where=where,
        sample=sample,
        seed=seed,
        output=output,
        states=states,
        view=view.value,
        format=format.value,
        device=device,
        on_error=on_error.value,
    )


@app.command()
def ls(
    archive: ArchiveArgument,
    where: Annotated[
        str | None, typer.Option(help="Filter: \"'dog' in tags and width >= 512\".")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "key,status,tier,tags,width,height,bpp,psnr,num_states,error",
    limit: Annotated[int, typer.Option(min=0, help="Rows at most; 0 is all.")] = 50,
    on_error: OnErrorOption = OnError.RAISE,
    version: VersionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    storage_option: StorageOption = None,
) -> None:
    """List rows. Reads no blob.

    Examples:

        dicmh ls archive/ --where "status != 'ok'" --columns key,error

        dicmh ls archive/ --where "metadata.cls == 3 and bpp < 0.5" --limit 0 --json
    """
    from dicmh_ray.cli.reading import run_ls

    names = [name.strip() for name in columns.split(",") if name.strip()]
    run_ls(
        archive,
        storage_option or [],
        version=version,
        where=where,
        columns=names,
        limit=limit,
        on_error=on_error.value,
        as_json=as_json,
    )
