"""Compress a collection on a cluster, without a terminal: what a batch system starts.

    python jobs/compress_collection.py 's3://bucket/shards/{000..099}.tar' s3://bucket/archive \
        --tag-field cls --ray-address auto

It is ``dicmh compress`` with the same options, which logs a line for each unit and prints the
report as JSON at the end. Exit codes: 0 done, 1 an error, 2 a wrong command line, 3 over the failure
budget, 143 told to stop (SIGTERM). Restarting it resumes the job, so a restart policy is all the
fault handling it needs from outside.
"""

import sys
from collections.abc import Sequence
from types import SimpleNamespace

from dicmh_ray.cli import app
from dicmh_ray.cli.program import values_of


def parse(arguments: Sequence[str]) -> SimpleNamespace:
    """The values of a command line, checked and not run: for who writes one for a cluster."""
    return values_of("compress", arguments)


def main() -> None:
    """Run the command; ends the process with its exit code."""
    app(["--verbose", "compress", "--json", *sys.argv[1:]])


if __name__ == "__main__":
    main()
