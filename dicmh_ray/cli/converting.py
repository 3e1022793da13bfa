"""Body of ``dicmh convert``: official weights and checkpoint directories."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from dicmh_ray.cli.output import bytes_text, print_facts, print_json, say, tell, told_in_one_line
from dicmh_ray.codec.icmh.convert import (
    ConversionReport,
    convert_official,
    read_config,
    to_official,
)
from dicmh_ray.codec.icmh.whole_files import ReportProgress
from dicmh_ray.errors import SourceFormatError, SourceImageError
from dicmh_ray.source import SourceOptions, load_pixels, plan_units, read_unit

CALIBRATION_PHOTOGRAPHS = 32
"""So many of a folder are read, the first in its order."""

MIN_SIDE_PX = 64
"""Smaller pictures hold no whole cell of the hyper latent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertArguments:
    """What the command line says. Exactly one of ``sources`` and ``to_official`` is given."""

    sources: Sequence[Path]
    to_official: Path | None
    output: Path
    config: Path | None
    fp16: bool
    calibration: str | None
    tokenizer: Path | None
    vocabulary: Path | None
    drop: Sequence[str]
    dry_run: bool
    as_json: bool


def run_convert(arguments: ConvertArguments) -> None:
    """Convert in the direction that the arguments say, and print what was done."""
    if bool(arguments.sources) == (arguments.to_official is not None):
        raise typer.BadParameter("give official files, or --to-official with a directory")
    if arguments.to_official is not None:
        _convert_back(arguments, arguments.to_official)
        return
    with told_in_one_line(), _shown_progress() as progress:
        report = convert_official(
            arguments.sources,
            arguments.output,
            fp16=arguments.fp16,
            config=None if arguments.config is None else read_config(arguments.config),
            tokenizer=arguments.tokenizer,
            vocabulary=arguments.vocabulary,
            calibration=_photographs(arguments.calibration),
            drop=arguments.drop,
            dry_run=arguments.dry_run,
            report=progress,
        )
    if arguments.as_json:
        print_json(_json_able(report))
        return
    title = "would write" if arguments.dry_run else "wrote"
    print_facts(f"{title} {arguments.output}", _facts(report))


def _convert_back(arguments: ConvertArguments, checkpoint: Path) -> None:
    only_there = {
        "--config": arguments.config,
        "--fp16": arguments.fp16,
        "--calibration": arguments.calibration,
        "--tokenizer": arguments.tokenizer,
        "--vocabulary": arguments.vocabulary,
        "--drop": arguments.drop,
        "--dry-run": arguments.dry_run,
    }
    if given := [name for name, value in only_there.items() if value]:
        raise typer.BadParameter(f"{given[0]} has no meaning with --to-official")
    with told_in_one_line(), _shown_progress() as progress:
        count = to_official(checkpoint, arguments.output, report=progress)
    if arguments.as_json:
        print_json({"output": str(arguments.output), "tensors": count})
    else:
        say(f"{arguments.output}\t{count} tensors")


def _photographs(source: str | None) -> list[npt.NDArray[np.uint8]]:
    """The first pictures that can be read, as for ``dicmh compress``.

    Raises:
        SourceError: there is no such source, or none of its pictures can be read.
    """
    if source is None:
        return []
    found: list[npt.NDArray[np.uint8]] = []
    options = SourceOptions()
    for unit in plan_units([source], options=options):
        for image in read_unit(unit, options=options):
            if len(found) == CALIBRATION_PHOTOGRAPHS:
                return found
            try:
                pixels = load_pixels(image.data).image
            except SourceImageError as exc:
                tell(f"left out of the calibration: {image.key}: {exc}")
                continue
            if min(pixels.shape[:2]) >= MIN_SIDE_PX:
                found.append(pixels)
    if not found:
        raise SourceFormatError(source, f"no picture of {MIN_SIDE_PX} pixels or more to a side")
    return found


def _facts(report: ConversionReport) -> list[tuple[str, str]]:
    facts = [(path.name, "source, wins over those above") for path in report.sources]
    if facts:
        facts[0] = (facts[0][0], "source")
    facts += [
        (path.name, f"SHA-256 {digest}")
        for path, digest in zip(report.sources, report.source_sha256, strict=False)
    ]
    for name, part in report.parts.items():
        counts = f"{part.num_tensors} tensors, {part.num_parameters:,} values"
        facts.append((f"{name}.safetensors", f"{counts}, {bytes_text(part.num_bytes)}"))
    facts.append(("renamed", f"{report.renamed} tensors of the entropy bottleneck"))
    facts.append(("overridden", f"{report.overridden} tensors that a later source has, too"))
    facts += [(name, f"not kept: {count}") for name, count in report.dropped.items()]
    facts += [(name, "missing: see docs/official-weights.md") for name in report.missing]
    return facts


def _json_able(report: ConversionReport) -> dict[str, Any]:
    content = dataclasses.asdict(report)
    content["sources"] = [str(path) for path in report.sources]
    return content


@contextmanager
def _shown_progress() -> Iterator[ReportProgress]:
    """A bar of bytes on a terminal's standard error; elsewhere a line at each tenth."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("opening", total=None)
        yield lambda doing, done, total: bar.update(
            task, description=doing, completed=done, total=total
        )


class _Lines:
    """Progress for a log."""

    def __init__(self) -> None:
        self._said = ("", -1)

    def __call__(self, doing: str, done: int, total: int) -> None:
        now = (doing, 10 * done // total if total else 10)
        if now != self._said:
            self._said = now
            tell(f"{doing}: {bytes_text(done)} of {bytes_text(total)}")
