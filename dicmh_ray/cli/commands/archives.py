"""The commands that describe and maintain archives."""

from pathlib import Path
from typing import Annotated

import typer

from dicmh_ray.cli.options import (
    ArchiveArgument,
    DeviceOption,
    JsonOption,
    StorageOption,
    VersionOption,
    on_this_machine,
)
from dicmh_ray.cli.program import app


@app.command()
def report(
    archive: ArchiveArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", callback=on_this_machine, metavar="FILE", help="A page, or *.json."
        ),
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
