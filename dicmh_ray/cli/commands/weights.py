"""Commands that exchange weights and streams with the original Diff-ICMH."""

from pathlib import Path
from typing import Annotated

import typer

from dicmh_ray.cli.options import (
    ArchiveArgument,
    DeviceOption,
    JsonOption,
    StorageOption,
    on_this_machine,
)
from dicmh_ray.cli.program import app


@app.command()
def convert(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            callback=on_this_machine,
            help="Directory to make; with --to-official a file.",
        ),
    ],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="Official .ckpt or .safetensors, in any order."),
    ] = None,
    to_official: Annotated[
        Path | None,
        typer.Option("--to-official", metavar="DIR", help="Back: this checkpoint directory."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Shapes, where not the official ones: a config.json or its directory."),
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Halve all weights but the latent coder's.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Photographs to fit the integer entropy tables on."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with vocab.json and merges.txt.")
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Words that streams name by number."),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="Further tensors to leave out. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check names and shapes; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn official Diff-ICMH weights into a checkpoint directory, or back. Runs nothing in them.

    Examples:

        dicmh convert model.ckpt -o diff-icmh/ --tokenizer sd21/tokenizer --calibration photos/

        dicmh convert --to-official diff-icmh/ -o model.ckpt
    """
    from dicmh_ray.cli.converting import ConvertArguments, run_convert

    run_convert(
        ConvertArguments(
            sources=sources or [],
            to_official=to_official,
            output=output,
            config=config,
            fp16=fp16,
            calibration=calibration,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            drop=drop or [],
            dry_run=dry_run,
            as_json=as_json,
        )
    )


@app.command("import-official")
def import_official(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Files of the official program, folders of them."),
    ],
    archive: ArchiveArgument,
    checkpoint: Annotated[
        str, typer.Option(metavar="DIR", help="The weights they were written with, converted.")
    ],
    sizes: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", exists=True, dir_okay=False, help="Columns `file`, `width`, `height`."
        ),
    ] = None,
    padded: Annotated[
        bool, typer.Option("--padded", help="Take the padded size for the picture's.")
    ] = False,
    keep_original: Annotated[
        bool, typer.Option("--keep-original", help="Keep the bytes of the files, too.")
    ] = False,
    device: DeviceOption = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    failure_budget: Annotated[
        str,
        typer.Option(metavar="N|SHARE", help="Failed files tolerated: 100, or 0.05 for 5 %."),
    ] = "0.1",
    storage_option: StorageOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look at the files alone; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make an archive of files of the official Diff-ICMH program; the same command goes on.

    The files hold no picture size. A file that cannot be read becomes a row that says why.

    Examples:

        dicmh import-official bitstreams/ archive/ --checkpoint diff-icmh/ --sizes sizes.csv

        dicmh import-official bitstreams/ archive/ --checkpoint diff-icmh/ --padded --dry-run
    """
    from dicmh_ray.cli.official import ImportArguments, run_import_official

    run_import_official(
        ImportArguments(
            sources=sources,
            archive=archive,
            checkpoint=checkpoint,
            sizes=sizes,
            padded=padded,
            keep_original=keep_original,
            device=device,
            threads=threads,
            failure_budget=failure_budget,
            storage_options=storage_option or [],
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command("export-official")
def export_official(
    archive: ArchiveArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", callback=on_this_machine, help="Folder for the files; is created."
        ),
    ],
    where: Annotated[str | None, typer.Option(help="Only the images a filter selects.")] = None,
    sizes: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Write the sizes there: the files do not hold them."),
    ] = None,
    device: DeviceOption = "auto",
    storage_option: StorageOption = None,
) -> None:
    """Write streams as files of the official Diff-ICMH program; a line for each: key, tab, file.

    Example:

        dicmh export-official archive/ -o bitstreams/ --where "'dog' in tags" --sizes sizes.csv
    """
    from dicmh_ray.cli.official import run_export_official

    run_export_official(
        archive,
        storage_option or [],
        where=where,
        output=output,
        sizes=sizes,
        device=device,
    )
