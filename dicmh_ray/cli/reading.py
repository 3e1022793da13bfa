"""Bodies of ``dicmh info``, ``verify``, ``ls`` and ``decode``."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer

from dicmh_ray.archive import BLOBS, open_snapshot, verify_archive
from dicmh_ray.cli.output import (
    EXIT_ERROR,
    EXIT_USAGE,
    bytes_text,
    number_text,
    print_facts,
    print_json,
    print_table,
    say,
    storage_options,
    tell,
    told_in_one_line,
    usage_checked,
)
from dicmh_ray.errors import (
    BitstreamError,
    CorruptObjectError,
    CorruptRowError,
    DicmhError,
    RowNotFoundError,
    SourceImageError,
    UnsupportedImageError,
)
from dicmh_ray.reader import ArchiveReader, OnError, ReadFault
from dicmh_ray.views import Archive, ImageView, open_archive, save_picture
from dicmh_ray.views.names import FileNames


def run_info(
    archive: str, storage: Sequence[str], *, version: int | None = None, as_json: bool
) -> None:
    """Print what the commits say."""
    with told_in_one_line():
        options = storage_options(storage, archive)
        snapshot = open_snapshot(archive, version=version, storage_options=options)
    statistics = snapshot.statistics
    causes: Counter[str] = Counter()
    psnr_sum = 0.0
    for commit in snapshot.commits:
        causes.update(commit.info.get("causes", {}))
        psnr_sum += commit.info.get("psnr_sum", 0.0)
    mean_psnr = psnr_sum / statistics.ok if statistics.ok and psnr_sum else None
    if as_json:
        print_json(
            {
                "uri": snapshot.uri,
                "complete": snapshot.is_complete,
                **statistics.to_dict(),
                "mean_psnr": mean_psnr,
                "causes": dict(sorted(causes.items())),
            }
        )
        return
    ratio = statistics.bytes_in / statistics.bytes_out if statistics.bytes_out else None
    facts = [
        ("units", f"{statistics.committed} of {statistics.units} committed"),
        ("rows", str(statistics.rows)),
        ("ok", str(statistics.ok)),
        ("kept original", str(statistics.kept_original)),
        ("failed", str(statistics.failed)),
        ("bytes in", bytes_text(statistics.bytes_in)),
        ("bytes out", f"{bytes_text(statistics.bytes_out)} ({number_text(ratio, '.2f')} : 1)"),
        ("rate", number_text(statistics.mean_bpp, ".3f", " bpp")),
        ("PSNR", number_text(mean_psnr, ".2f", " dB")),
        *((cause, str(count)) for cause, count in sorted(causes.items())),
        ("codec", statistics.codec_id),
        ("plan", statistics.plan_id),
        ("archive version", number_text(statistics.archive_version, "d")),
        ("written by", statistics.created_by),
    ]
    state = "complete" if snapshot.is_complete else "unfinished"
    print_facts(f"{snapshot.uri} ({state})", facts)


def run_verify(
    archive: str,
    storage: Sequence[str],
    *,
    subset: str | None,
    decode: bool,
    device: str,
    as_json: bool,
) -> None:
    """Check, print what was found, and exit with the report's code."""
    options = storage_options(storage, archive)
    with told_in_one_line(error_code=2):
        decoder = None
        if decode:
            decoder = open_archive(archive, device=device, storage_options=options).codec.decode
        with usage_checked():
            report = verify_archive(archive, subset=subset, decode=decoder, storage_options=options)
    if as_json:
        print_json(report.to_dict())
    else:
        for problem in report.problems:
            say(f"damaged: {problem}")
        for note in report.notes:
            say(f"note: {note}")
        if report.unchecked is not None:
            say(f"not checked: {report.unchecked}")
        verdict = {0: "sound", 1: "damaged", 2: "could not be checked"}[report.exit_code]
        say(
            f"{verdict}: {report.objects} objects, {report.rows} rows, "
            f"{bytes_text(report.bytes_read)} read, {len(report.problems)} problems"
        )
    raise typer.Exit(report.exit_code)


def run_ls(
    archive: str,
    storage: Sequence[str],
    *,
    version: int | None = None,
    where: str | None,
    columns: Sequence[str],
    limit: int,
    on_error: OnError,
    as_json: bool,
) -> None:
    """Print rows; what is damaged and was left out is named, and the exit code is 1 then."""
    with told_in_one_line():
        options = storage_options(storage, archive)
        reader = ArchiveReader.open(archive, version=version, storage_options=options)
        blobs = sorted(set(columns) & set(BLOBS))
        if blobs:
            raise typer.BadParameter(f"{', '.join(blobs)}: use `dicmh decode` for blobs")
        with usage_checked():
            rows = _rows(reader, columns, where, on_error)
            shown, has_more = _first(rows, limit)
    if as_json:
        for row in shown:
            say(json.dumps(row, default=_json_bytes))
    else:
        print_table(columns, [[_cell(row[name]) for name in columns] for row in shown])
    if has_more:
        tell(f"the first {limit}; there are more (--limit 0 is all)")
    for fault in reader.faults:
        tell(f"error: {fault_text(fault)}")
    if reader.faults:
        raise typer.Exit(EXIT_ERROR)


def _rows(
    reader: ArchiveReader, columns: Sequence[str], where: str | None, on_error: OnError
) -> Iterator[dict[str, Any]]:
    for batch in reader.scan(list(dict.fromkeys(columns)), where, on_error=on_error):
        yield from batch.to_pylist()


def _first(rows: Iterable[dict[str, Any]], limit: int) -> tuple[list[dict[str, Any]], bool]:
    shown: list[dict[str, Any]] = []
    for row in rows:
        if limit and len(shown) == limit:
            return shown, True
        shown.append(row)
    return shown, False


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.4g}"
        case bytes():
            return f"{len(value)} bytes"
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)


def _json_bytes(value: object) -> object:
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def run_decode(
    archive: str,
    storage: Sequence[str],
    *,
    version: int | None = None,
    keys: Sequence[str],
    where: str | None,
    sample: int | None,
    seed: int,
    output: str,
    states: int | None,
    view: str,
    format: str,
    device: str,
    on_error: OnError,
) -> None:
    """Write files; an image that cannot be written is named, and the exit code is 1 then.

    ``on_error`` is about damage: a picture that never was is named in any case.
    """
    if not keys and where is None and sample is None:
        tell("error: name keys, or select images with --where or --sample")
        raise typer.Exit(EXIT_USAGE)
    if "://" in output:
        tell(f"error: -o {output} is no folder here; --into folder writes to any fsspec URL")
        raise typer.Exit(EXIT_USAGE)
    failures: list[str] = []
    with told_in_one_line():
        options = storage_options(storage, archive)
        opened = open_archive(archive, version=version, device=device, storage_options=options)
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        names = FileNames()
        borne: tuple[type[DicmhError], ...] = (SourceImageError, BitstreamError)
        if on_error == "skip":
            borne += (CorruptRowError, CorruptObjectError)
        for image in _selected(opened, keys, where, sample, seed, on_error, failures):
            try:
                suffix, data = _content(image, states=states, view=view, format=format)
                path = folder / names.claim(image.key, suffix)
                _save(path, data, image, view)
            except borne as exc:
                failures.append(str(exc))
                continue
            say(f"{image.key}\t{path}")
    failures += [fault_text(fault) for fault in opened.faults]
    for failure in failures:
        tell(f"error: {failure}")
    if failures:
        raise typer.Exit(EXIT_ERROR)


def fault_text(fault: ReadFault) -> str:
    """What is gone and why, in a line."""
    if not fault.part:
        return fault.reason  # of a picture; it names the key
    if fault.key is not None:
        return f"row {fault.key!r}: {fault.reason}"
    where = "" if fault.row_group is None else f", row group {fault.row_group}"
    return f"{fault.part}{where}: {fault.reason}"


def _selected(
    archive: Archive,
    keys: Sequence[str],
    where: str | None,
    sample: int | None,
    seed: int,
    on_error: OnError,
    failures: list[str],
) -> Iterator[ImageView]:
    """The named images, then the filter's others. Names that are not there go to ``failures``."""
    named: set[int] = set()
    for key in dict.fromkeys(keys):
        try:
            rows = archive.reader.find([key], on_error=on_error)
        except RowNotFoundError as exc:
            failures.append(str(exc))
            continue
        named.update(rows.tolist())
        yield from archive.view_rows(rows, on_error=on_error)
    if where is None and sample is None:
        return
    if sample is not None:
        chosen = archive.reader.sample_rows(sample, seed=seed, where=where, on_error=on_error)
        yield from archive.view_rows(chosen[~np.isin(chosen, list(named))], on_error=on_error)
        return
    for image in archive.iter(where, on_error=on_error):
        if image.number not in named:
            yield image


def _content(
    image: ImageView,
    *,
    states: int | None,
    view: str,
    format: str,
) -> tuple[str, Any]:
    """Suffix, and what goes into the file: bytes or an array."""
    if states is not None and image.num_states:
        states = min(states, image.num_states)
    if view == "original":
        if not image.original:
            raise UnsupportedImageError(f"{image.key!r}: its original bytes were not kept")
        return f".{(image.row.original_format or 'bin').lower()}", image.original
    if view == "latent":
        return ".npy", image.latent(states)
    if view == "thumbnail":
        return f".{format}", image.thumbnail(states=states)
    return f".{format}", image.pixels(view, states)


def _save(path: Path, data: Any, image: ImageView, view: str) -> None:
    """Write one file. A decoded picture says in its own metadata that it is one."""
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif path.suffix == ".npy":
        np.save(path, data, allow_pickle=False)
    else:
        save_picture(path, data, image.mark(view))
