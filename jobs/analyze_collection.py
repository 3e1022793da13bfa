"""Let a machine read an archive, without a terminal: what a batch system starts.

    python jobs/analyze_collection.py s3://bucket/archive --task classify \
        --net s3://bucket/nets/classifier.onnx --ray-address auto

It is ``dicmh analyze`` with the same options, on Ray unless ``--runtime local`` says otherwise; it
tells each unit on standard error and prints the report as JSON at the end. Exit codes: 0 done, 1 an
error, 2 a wrong command line, 3 over the failure budget, 143 told to stop (SIGTERM). Restarting it
looks at the units that have no results yet. Addresses of nets, names and heads may be local files or
URLs.
"""

import sys
from collections.abc import Sequence
from types import SimpleNamespace

from dicmh_ray.cli import app
from dicmh_ray.cli.program import values_of


def parse(arguments: Sequence[str]) -> SimpleNamespace:
    """The values of a command line, checked and not run: for who writes one for a cluster."""
    return values_of("analyze", ["--runtime", "ray", *arguments])


def main() -> None:
    """Run the command; ends the process with its exit code."""
    app(["--verbose", "analyze", "--runtime", "ray", "--json", *sys.argv[1:]])


if __name__ == "__main__":
    main()
