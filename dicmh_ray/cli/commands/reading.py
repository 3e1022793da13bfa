"""The commands that read images of an archive."""

from enum import StrEnum
from typing import Annotated

import typer

from dicmh_ray.cli.options import (
    ArchiveArgument,
    DeviceOption,
    Runtime,
    StorageOption,
    VersionOption,
)
from dicmh_ray.cli.program import app


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


OnErrorOption = Annotated[
    OnError, typer.Option(help="Damaged rows: stop at the first, or name them and go on (exit 1).")
]


@app.command()
def decode(
    archive: ArchiveArgument,
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY", help="Images.")] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="Folder for the files; is created. A URL only with --into."
        ),
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
