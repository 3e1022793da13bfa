"""Decode an archive into tars, Parquet or a folder: each row once, resumable, on Ray or here.

    python jobs/decode_views.py s3://bucket/archive s3://bucket/pictures --format jpg
    python jobs/decode_views.py archive/ out/ --container folder --where "'dog' in tags" --runtime local

The same command again goes on where it stopped; two at once share the work and leave each shard once.
Prints one JSON line at the end. Exit 0: done. 1: done, and rows were left out (``--on-error skip``;
each shard's record under ``_decode/`` names them). 2: not done.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from dicmh_ray.cli.output import storage_options
from dicmh_ray.errors import DicmhError
from dicmh_ray.views.bulk import (
    CONTAINERS,
    BulkDecode,
    BulkOptions,
    ShardRecord,
    plan_bulk_decode,
)
from dicmh_ray.views.bulk_local import decode_here
from dicmh_ray.views.saving import FORMATS

_log = logging.getLogger("decode_views")

ROWS_LEFT_OUT = 1
NOT_DONE = 2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument("output", metavar="OUTPUT", help="folder or prefix on any fsspec store")
    parser.add_argument(
        "--view", default="machine", choices=("machine", "human", "thumbnail", "latent", "original")
    )
    parser.add_argument("--states", type=int, help="decode from the first ones only")
    parser.add_argument("--where", help="filter: \"'dog' in tags and width >= 512\"")
    parser.add_argument("--sample", type=int, help="only so many of them, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--container", default="webdataset", choices=CONTAINERS)
    parser.add_argument("--format", default="png", choices=tuple(FORMATS))
    parser.add_argument("--max-side", type=int, default=256, help="of thumbnails, pixels")
    parser.add_argument("--shard-rows", type=int, default=1000)
    parser.add_argument("--on-error", default="raise", choices=("raise", "skip"))
    parser.add_argument("--runtime", default="ray", choices=("ray", "local"))
    parser.add_argument("--workers", type=int, help="processes; default: one a CPU, or a GPU")
    parser.add_argument("--num-gpus", type=float, default=0, help="claimed by each Ray actor")
    parser.add_argument("--ray-address", help="a running cluster, e.g. `auto`")
    parser.add_argument("--version", type=int, help="of the archive; default: the newest")
    parser.add_argument(
        "--storage-option", action="append", default=[], metavar="K=V", help="of both stores"
    )
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> BulkDecode:
    """Begin the job, or find the one that was begun."""
    storage = storage_options(options.storage_option, options.archive, options.output)
    return plan_bulk_decode(
        options.archive,
        options.output,
        BulkOptions(
            view=options.view,
            states=options.states,
            where=options.where,
            sample=options.sample,
            seed=options.seed,
            container=options.container,
            format=options.format,
            max_side=options.max_side,
            shard_rows=options.shard_rows,
            on_error=options.on_error,
        ),
        version=options.version,
        storage_options=storage,
        output_options=storage,
    )


def report(record: ShardRecord) -> None:
    """One line a shard."""
    _log.info(
        "shard %d: %d rows, %d bytes, %d left out",
        record.shard,
        record.rows,
        record.num_bytes,
        len(record.faults),
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The job to its end; the sums."""
    started = time.perf_counter()
    job = plan(options)
    left = len(job.shards_left())
    _log.info("%d of %d shards to do", left, job.num_shards)
    if options.runtime == "local":
        decode_here(job, workers=options.workers, on_shard=report)
    else:
        from dicmh_ray.ray_plugin.decoding import decode_on_ray

        decode_on_ray(
            job,
            workers=options.workers,
            num_gpus=options.num_gpus,
            address=options.ray_address,
            on_shard=report,
        )
    return {**job.finish(), "seconds": round(time.perf_counter() - started, 3)}


def main() -> int:
    """Decode, print the sums, return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        sums = run(parse(sys.argv[1:]))
    except (DicmhError, OSError, ValueError) as exc:
        _log.error("%s", exc)
        return NOT_DONE
    print(json.dumps(sums))
    return ROWS_LEFT_OUT if sums["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
