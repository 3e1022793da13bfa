"""Bodies of ``dicmh import-official`` and ``dicmh export-official``: files of the original program."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from dicmh_ray.cli.output import (
    EXIT_ERROR,
    print_json,
    print_table,
    say,
    storage_options,
    tell,
    told_in_one_line,
    usage_checked,
)
from dicmh_ray.cli.progress import JobDisplay
from dicmh_ray.cli.writing import failure_budget, print_report
from dicmh_ray.codec.icmh.official import OfficialTranscoder
from dicmh_ray.errors import (
    BitstreamError,
    EncodeError,
    SourceImageError,
    TagsError,
    WeightsError,
)
from dicmh_ray.pipeline import EncodeOptions, JobMonitor, compress_local
from dicmh_ray.pipeline.official import (
    SIZE_COLUMNS,
    FoundFile,
    ImportOptions,
    look_through,
    plan_import,
    read_sizes,
)
from dicmh_ray.views import ImageView, open_archive
from dicmh_ray.views.names import FileNames


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportArguments:
    """The command line of ``import-official``, not yet checked."""

    sources: Sequence[str]
    archive: str
    checkpoint: str
    sizes: Path | None
    padded: bool
    keep_original: bool
    device: str
    threads: int | None
    failure_budget: str
    storage_options: Sequence[str]


def run_import_official(arguments: ImportArguments, *, dry_run: bool, as_json: bool) -> None:
    """Run the job, or say what a look at the files shows."""
    if (arguments.sizes is None) != arguments.padded:
        raise typer.BadParameter("give --sizes with a CSV file, or --padded")
    with usage_checked():
        budget = failure_budget(arguments.failure_budget)
    with told_in_one_line():
        options = ImportOptions(
            sizes=None if arguments.sizes is None else read_sizes(arguments.sizes),
            keep_original=arguments.keep_original,
        )
        if dry_run:
            found = look_through(
                arguments.sources, checkpoint=arguments.checkpoint, options=options
            )
            _print_found(list(found), as_json=as_json)
            return
        display = JobDisplay(Console(stderr=True, markup=False, highlight=False))
        try:
            with display:
                job, todo, report = plan_import(
                    arguments.sources,
                    arguments.archive,
                    checkpoint=arguments.checkpoint,
                    options=options,
                    encode_options=EncodeOptions(
                        device=arguments.device, threads=arguments.threads
                    ),
                    storage_options=storage_options(arguments.storage_options, arguments.archive),
                )
                report.runtime = "local"
                with JobMonitor(report, failure_budget=budget, progress=display) as monitor:
                    compress_local(job, todo, monitor)
        except BaseException:
            if display.last is not None:
                print_report(display.last, as_json=as_json)
            raise
    print_report(report, as_json=as_json)


def _print_found(found: Sequence[FoundFile], *, as_json: bool) -> None:
    rows = []
    for one in found:
        stream, size = one.stream, one.size
        rows.append(
            {
                "file": one.key,
                "width": size.width if size else None,
                "height": size.height if size else None,
                "padded": list(stream.padded_size) if stream else None,
                "tags": None if stream is None or stream.tag_ids is None else len(stream.tag_ids),
                "error": one.error,
            }
        )
    if as_json:
        print_json(rows)
        return
    columns = ("file", "width", "height", "padded", "tags", "error")
    print_table(columns, [[_cell(row[name]) for name in columns] for row in rows])
    say(f"{len(rows)} files, {sum(one.error is not None for one in found)} of them of no use")


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return "-" if value is None else str(value)


def run_export_official(
    archive: str,
    storage: Sequence[str],
    *,
    where: str | None,
    output: Path,
    sizes: Path | None,
    device: str,
) -> None:
    """Write one file a row; a row that cannot be written is named, and the exit code is 1 then."""
    failures: list[str] = []
    listed: list[tuple[str, int, int]] = []
    with told_in_one_line():
        opened = open_archive(
            archive, device=device, storage_options=storage_options(storage, archive)
        )
        codec = opened.codec
        if not isinstance(codec, OfficialTranscoder):
            raise WeightsError(codec.codec_id[:16], "it has no official streams")
        output.mkdir(parents=True, exist_ok=True)
        names = FileNames()
        for image in opened.views(where):
            try:
                data = codec.export_official(image.bitstream())
            except (BitstreamError, EncodeError, SourceImageError, TagsError) as exc:
                failures.append(_failure(image, exc))
                continue
            path = output / names.claim(image.key, "")
            path.write_bytes(data)
            listed.append((path.name, image.width or 0, image.height or 0))
            say(f"{image.key}\t{path}")
        if sizes is not None:
            _write_sizes(sizes, listed)
    for failure in failures:
        tell(f"error: {failure}")
    if failures:
        raise typer.Exit(EXIT_ERROR)


def _failure(image: ImageView, exc: Exception) -> str:
    text = str(exc)
    return text if repr(image.key) in text else f"{image.key!r}: {text}"


def _write_sizes(path: Path, listed: Sequence[tuple[str, int, int]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(SIZE_COLUMNS)
        table.writerows(listed)
