"""Let a machine read an archive, without a terminal: what a batch system starts.

    python jobs/analyze_collection.py s3://bucket/archive --task classify \
        --net s3://bucket/nets/classifier.onnx --ray-address auto

The same line without ``--ray-address`` starts a Ray of this machine; with ``--local`` it runs in this
process. Logs a line for each unit and prints the report as one JSON line at the end. Exit codes are
those of ``dicmh analyze``: 0 done, 1 an error, 3 over the failure budget, 143 told to stop (SIGTERM).
Restarting it looks at the units that have no results yet. Addresses of nets, names and heads may be local files or URLs.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dicmh_ray.analysis import AnalysisOptions, AnalysisReport, TaskOptions, load_task
from dicmh_ray.errors import DicmhError, FailureBudgetError, JobStoppedError
from dicmh_ray.ray_plugin import RayOptions
from dicmh_ray.ray_plugin.analysis import analyze

_log = logging.getLogger("analyze_collection")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The job. What is not here has the defaults of :func:`analyze`."""

    archive: str
    task: str
    net: str | None
    names: str | None
    head: str | None
    where: str | None
    states: int | None
    view: str | None
    threshold: float | None
    failure_budget: float
    local: bool
    ray_address: str | None
    workers: int | None


def parse(arguments: Sequence[str]) -> Options:
    """The command line as options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument("--task", required=True, help="as for `dicmh analyze`")
    parser.add_argument("--net", metavar="FILE[:TENSOR]")
    parser.add_argument("--names", metavar="FILE")
    parser.add_argument("--head", metavar="FILE")
    parser.add_argument("--where")
    parser.add_argument("--states", type=int)
    parser.add_argument("--view", choices=("machine", "thumbnail"))
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--failure-budget", type=float, default=0.1, help="share of a unit's rows")
    parser.add_argument("--local", action="store_true", help="in this process, without Ray")
    parser.add_argument("--ray-address", help="auto, ray://host:10001; default: a local Ray")
    parser.add_argument("--workers", type=int, help="default: one a GPU, else one a CPU")
    return Options(**vars(parser.parse_args(arguments)))


def run(options: Options) -> dict[str, Any]:
    """Run the job to its end."""
    task = load_task(
        options.task,
        TaskOptions(
            net=options.net,
            names=options.names,
            head=options.head,
            states=options.states,
            view=options.view,
            threshold=options.threshold,
        ),
    )
    done = analyze(
        options.archive,
        task,
        where=options.where,
        runtime="local" if options.local else "ray",
        options=AnalysisOptions(failure_budget=options.failure_budget),
        ray_options=RayOptions(address=options.ray_address, workers=options.workers),
        progress=_log_unit,
    )
    report = None if done.report is None else done.report.to_dict()
    return {"results": done.results, "report": report}


def _log_unit(report: AnalysisReport) -> None:
    done = report.units_done + report.units_resumed
    _log.info(
        "%d of %d units, %d rows, %d errors", done, report.units_total, report.rows, report.errors
    )


def main() -> int:
    """Run, print the report, return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        report = run(parse(sys.argv[1:]))
    except (DicmhError, OSError, ValueError) as exc:
        _log.error("%s", exc)
        if isinstance(exc, JobStoppedError):
            return 143
        return 3 if isinstance(exc, FailureBudgetError) else 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
