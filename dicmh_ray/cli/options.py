"""Arguments and options that several commands take."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

RATE, SOURCE, TAGS = "Rate, quality, originals", "Source and store", "Tags"
WHERE, RAY, AGAIN = "Where it runs", "On Ray", "Resume, append, give up"
WATCH, DRY = "Watch and report", "Dry run"
"""Headings of options, in the help of commands that have so many that they need some."""


def on_this_machine(path: Path | str | None) -> Path | str | None:
    """Refuse a URL where a file or folder is written: it would become a folder named ``s3:``.

    Raises:
        typer.BadParameter: it is one.
    """
    # A path has lost the second slash of a URL by now; one letter is a drive of Windows.
    if path is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise typer.BadParameter(f"{path} is a URL, wanted a path on this machine")
    return path


class Runtime(StrEnum):
    """Where units run."""

    RAY = "ray"
    LOCAL = "local"


ArchiveArgument = Annotated[str, typer.Argument(metavar="ARCHIVE", help="Its folder or URL.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=WATCH)]
StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="NAME=VALUE",
        help="For the fsspec file system of remote addresses, e.g. `anon=true`. Repeatable.",
        rich_help_panel=SOURCE,
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="Where the codec runs: cpu, cuda, cuda:1, auto.", rich_help_panel=WHERE)
]
CheckpointOption = Annotated[
    str, typer.Option(help="Checkpoint: `default` or a directory.", rich_help_panel=RATE)
]
VocabularyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Words to look for, one a line. Default: the checkpoint's, where it has some.",
        rich_help_panel=TAGS,
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Score from which a word is a tag.", rich_help_panel=TAGS),
]
TopKOption = Annotated[
    int | None, typer.Option(min=1, help="Tags of a picture at most.", rich_help_panel=TAGS)
]
PromptOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Sentence with {} for the word. Repeatable: averaged.",
        rich_help_panel=TAGS,
    ),
]

VersionOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="An older version; `dicmh history` lists them."),
]
