"""Check an archive without a terminal: every object and every row, the verdict as one JSON line.

    python jobs/verify_archive.py s3://bucket/archive
    python jobs/verify_archive.py s3://bucket/archive --subset 1/8

Exit codes are those of ``dicmh verify``: 0 sound, 1 damaged, 2 could not be checked. The subsets 1/t
to t/t together are a full check, so t of these jobs share the work.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dicmh_ray.archive import VerifyReport, verify_archive
from dicmh_ray.errors import DicmhError

_log = logging.getLogger("verify_archive")

NOT_CHECKED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The job."""

    archive: str
    subset: str | None


def parse(arguments: Sequence[str]) -> Options:
    """The command line as options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument("--subset", metavar="N/T", help="check every T-th unit from the N-th")
    return Options(**vars(parser.parse_args(arguments)))


def run(options: Options) -> VerifyReport:
    """Check to the end."""
    return verify_archive(options.archive, subset=options.subset)


def main() -> int:
    """Check, print the report, return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        report = run(parse(sys.argv[1:]))
    except (DicmhError, OSError, ValueError) as exc:
        _log.error("%s", exc)
        return NOT_CHECKED
    print(json.dumps(report.to_dict()))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
