"""Bodies of ``dicmh bench rd`` and ``dicmh version``."""

import dataclasses
import platform
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from dicmh_ray import __version__
from dicmh_ray.bench import RdOptions, evaluate_folder, tables, write_report
from dicmh_ray.cli.output import (
    print_facts,
    print_json,
    print_table,
    say,
    tell,
    told_in_one_line,
)
from dicmh_ray.codec import load_codec, read_checkpoint
from dicmh_ray.errors import WeightsError

LIBRARIES = (
    "numpy",
    "pyarrow",
    "pillow",
    "fsspec",
    "s3fs",
    "torch",
    "constriction",
    "safetensors",
    "diffusers",
    "compressai",
    "ray",
)


def run_bench_rd(
    folder: Path,
    *,
    output: Path | None,
    checkpoint: str,
    device: str,
    max_images: int | None,
    as_json: bool,
) -> None:
    """Measure, print the tables, write the report."""
    with told_in_one_line():
        report = evaluate_folder(
            folder,
            load_codec(checkpoint, device=device),
            options=RdOptions(max_images=max_images),
            command=" ".join(["dicmh", *sys.argv[1:]]),
            progress=lambda done, total, name: tell(f"{done}/{total} {name}"),
        )
        if as_json:
            print_json(dataclasses.asdict(report))
        else:
            for table in tables(report):
                say(table.title)
                print_table(table.columns, table.rows)
        if output is not None:
            for path in write_report(report, output):
                tell(f"wrote {path}")


def run_version(*, as_json: bool) -> None:
    """Print versions without loading the libraries."""
    try:
        codec_id: str | None = read_checkpoint().codec_id
    except WeightsError:
        codec_id = None
    versions = {"dicmh_ray": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = installed_version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    if as_json:
        print_json({"default_codec_id": codec_id, **versions})
        return
    facts = [*versions.items(), ("default checkpoint", codec_id or "none in this installation")]
    print_facts("dicmh", facts)
