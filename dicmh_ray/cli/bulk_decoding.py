"""Body of ``dicmh decode --into``."""

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from dicmh_ray.cli.output import (
    EXIT_ERROR,
    bytes_text,
    say,
    storage_options,
    tell,
    told_in_one_line,
    usage_checked,
)
from dicmh_ray.cli.reading import fault_text
from dicmh_ray.reader import ReadFault
from dicmh_ray.views.bulk import PREFIX, BulkOptions, ShardRecord, plan_bulk_decode
from dicmh_ray.views.bulk_local import decode_here


def run_bulk_decode(
    archive: str,
    storage: Sequence[str],
    *,
    version: int | None,
    output: str,
    options: Mapping[str, Any],
    on_ray: bool,
    workers: int | None,
    device: str,
) -> None:
    """Begin a bulk decode or go on with one; exit 1 when rows were left out."""
    with usage_checked():
        wanted = BulkOptions(**options)
    with told_in_one_line():
        job = plan_bulk_decode(
            archive,
            output,
            wanted,
            version=version,
            storage_options=storage_options(storage, archive),
            output_options=storage_options(storage, output),
        )
        tell(f"{len(job.shards_left())} of {job.num_shards} shards to do")
        if on_ray:
            from dicmh_ray.ray_plugin.decoding import decode_on_ray

            decode_on_ray(job, workers=workers, on_shard=_tell_shard)
        else:
            decode_here(job, workers=workers, device=device, on_shard=_tell_shard)
        sums = job.finish()
    say(
        f"{sums['rows']} images in {sums['shards']} shards, {bytes_text(sums['num_bytes'])}, "
        f"{sums['faults']} left out"
    )
    if sums["faults"]:
        tell(f"what was left out, and why: {output.rstrip('/')}/{PREFIX}*.json")
        raise typer.Exit(EXIT_ERROR)


def _tell_shard(record: ShardRecord) -> None:
    tell(f"shard {record.shard}: {record.rows} images, {bytes_text(record.num_bytes)}")
    for fault in record.faults:
        tell(f"left out: {fault_text(ReadFault(**fault))}")
