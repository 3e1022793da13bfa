"""Compress a collection on a cluster, without a terminal: what a batch system starts.

    python jobs/compress_collection.py 's3://bucket/shards/{000..099}.tar' s3://bucket/archive \
        --tag-field cls --ray-address auto

Logs a line for each unit and prints the report as one JSON line at the end. Exit codes are those of
``dicmh compress``: 0 done, 1 an error, 3 over the failure budget, 143 told to stop (SIGTERM).
Restarting it resumes the job, so a restart policy is all the fault handling it needs from outside.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dicmh_ray import EncodePolicy, JobReport, SourceOptions, compress
from dicmh_ray.errors import DicmhError, FailureBudgetError, JobStoppedError
from dicmh_ray.ray_plugin import RayOptions
from dicmh_ray.ray_plugin.options import Readers

_log = logging.getLogger("compress_collection")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The job. What is not here has the defaults of :func:`dicmh_ray.compress`."""

    sources: Sequence[str]
    archive: str
    checkpoint: str
    tag_field: Sequence[str]
    failure_budget: float
    ray_address: str | None
    workers: int | None
    min_workers: int | None
    max_concurrency: int | None
    gpus_per_worker: float
    readers: Readers


def parse(arguments: Sequence[str]) -> Options:
    """The command line as options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sources", nargs="+", metavar="SRC")
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--tag-field", action="append", default=[])
    parser.add_argument("--failure-budget", type=float, default=0.1, help="share of the images")
    parser.add_argument("--ray-address", help="auto, ray://host:10001; default: a local Ray")
    parser.add_argument("--workers", type=int, help="default: one a GPU, else one a CPU")
    parser.add_argument("--min-workers", type=int, help="at the start; default: what fits")
    parser.add_argument("--max-concurrency", type=int, help="units at once, over the whole job")
    parser.add_argument("--gpus-per-worker", type=float, default=1.0, help="0.5: two share one")
    parser.add_argument("--readers", choices=("auto", "always", "never"), default="auto")
    return Options(**vars(parser.parse_args(arguments)))


def run(options: Options) -> JobReport:
    """Run the job to its end."""
    return compress(
        options.sources,
        options.archive,
        codec=options.checkpoint,
        policy=EncodePolicy(),
        failure_budget=options.failure_budget,
        source_options=SourceOptions(tag_fields=tuple(options.tag_field)),
        ray_options=RayOptions(
            address=options.ray_address,
            workers=options.workers,
            min_workers=options.min_workers,
            max_concurrency=options.max_concurrency,
            gpus_per_worker=options.gpus_per_worker,
            readers=options.readers,
        ),
    )


def main() -> int:
    """Run, print the report, return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        report = run(parse(sys.argv[1:]))
    except (DicmhError, OSError) as exc:
        _log.error("%s", exc)
        if isinstance(exc, JobStoppedError):
            return 143
        return 3 if isinstance(exc, FailureBudgetError) else 1
    print(json.dumps(report.to_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
