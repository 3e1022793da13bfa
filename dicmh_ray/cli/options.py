"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

ArchiveArgument = Annotated[str, typer.Argument(metavar="ARCHIVE", help="Its folder or URL.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="NAME=VALUE",
        help="For the fsspec file system of remote addresses, e.g. `anon=true`. Repeatable.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="Where the codec runs: cpu, cuda, cuda:1, auto.")]
CheckpointOption = Annotated[str, typer.Option(help="Checkpoint: `default` or a directory.")]
VocabularyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Words to look for, one a line. Default: the checkpoint's, where it has some.",
    ),
]
ThresholdOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Score from which a word is a tag.")
]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Tags of a picture at most.")]
PromptOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Sentence with {} for the word. Repeatable: averaged."),
]
