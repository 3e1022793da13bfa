"""A running job on the screen: a bar on a terminal, lines in a log."""

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from dicmh_ray.cli.output import bytes_text, number_text
from dicmh_ray.pipeline import JobReport

SECONDS_BETWEEN_LINES = 10.0


class JobDisplay:
    """Shows a :class:`JobReport` each time it is called with one. A context manager.

    A quiet one shows nothing, where standard error is somebody else's; it knows the last report all
    the same.
    """

    def __init__(self, console: Console, *, is_quiet: bool = False) -> None:
        self.last: JobReport | None = None
        """What was shown last: all that is known when a job ends in an error."""

        self._console = console
        self._bar: Progress | None = None
        self._next_line = 0.0
        self._is_quiet = is_quiet
        if console.is_terminal and not is_quiet:
            self._bar = Progress(
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.description}", markup=False),
                console=console,
            )
            self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, report: JobReport) -> None:
        """Show the report, as a line at most every ten seconds and at the end."""
        self.last = report
        if self._is_quiet:
            return
        if self._bar is not None:
            total, done = report.source_bytes_total, report.source_bytes_done
            self._bar.update(
                self._task, total=total or 1, completed=done, description=line_of(report)
            )
            return
        is_last = report.manifest is not None
        if (is_last and self._next_line < math.inf) or time.monotonic() >= self._next_line:
            # The last one is said once.
            self._next_line = math.inf if is_last else time.monotonic() + SECONDS_BETWEEN_LINES
            self._console.print(line_of(report), soft_wrap=True)


def line_of(report: JobReport) -> str:
    """Units, images and bytes a second, rate so far, bytes saved, time to go, and what went wrong."""
    tally = report.tally
    units = report.units_done + report.units_resumed
    images = tally.images + report.images_in_flight
    speed = images / report.seconds if report.seconds else 0.0
    words = [
        f"{units}/{report.units_total} units",
        f"{images} images",
        f"{speed:.1f}/s",
        f"{report.bytes_in_per_s / 1e6:.1f} MB/s",
        f"{bytes_text(tally.bytes_in)} in, {bytes_text(tally.bytes_out)} out",
        f"saved {bytes_text(tally.bytes_saved)}",
        f"{number_text(report.mean_bpp, '.3f')} bpp",
    ]
    if report.eta_s is not None and report.manifest is None:
        words.append(f"{time_text(report.eta_s)} to go")
    words += [f"{cause} {count}" for cause, count in sorted(tally.causes.items())]
    if report.units_retried:
        words.append(f"retries {report.units_retried}")
    if report.workers_died:
        words.append(f"workers died {report.workers_died}")
    if report.units_failed:
        words.append(f"units given up {len(report.units_failed)}")
    return " · ".join(words)


def time_text(seconds: float) -> str:
    """``2 d 3 h``, ``3 h 20 min``, ``4 min 5 s``, ``12 s``"""
    whole = round(seconds)
    for unit, size, lesser, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {lesser}"
    return f"{whole} s"
