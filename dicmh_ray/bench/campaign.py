"""Everything about one set of pictures in one pass: curves, tasks at equal bytes, sheets.

Each picture is encoded once by us and once by a peer at each quality that any part asks for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dicmh_ray.bench.bd_rate import load_bjontegaard
from dicmh_ray.bench.contact import FAILURE_BPP, Exhibit, exhibit, write_sheets
from dicmh_ray.bench.equal_bytes import (
    EqualReport,
    Trial,
    choose_states,
    equal_report,
    try_out,
)
from dicmh_ray.bench.metrics import Gauge
from dicmh_ray.bench.rd import BenchOptions, Measurement, RdReport, rd_report, sweep
from dicmh_ray.bench.report import write_report
from dicmh_ray.bench.subject import (
    Progress,
    Subject,
    can_be_read,
    find_images,
    for_each_picture,
    set_name,
)
from dicmh_ray.codec import ImageCodec
from dicmh_ray.vision.tasks import NetTask


@dataclass(frozen=True, kw_only=True, slots=True)
class Campaign:
    """What came out."""

    rd: RdReport
    equal: EqualReport
    exhibits: tuple[Exhibit, ...]

    def write(self, folder: str | Path, *, pages: int) -> list[Path]:
        """Write both reports and, if ``pages`` is above 0, the sheets; returns the paths."""
        written = [*write_report(self.rd, folder), *write_report(self.equal, folder)]
        if pages and self.exhibits:
            written += write_sheets(self.exhibits, folder, pages=pages)
        return written


def evaluate_all(
    sources: Sequence[str | Path],
    codec: ImageCodec,
    tasks: Sequence[NetTask],
    *,
    gauge: Gauge,
    options: BenchOptions | None = None,
    rd_images: int | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Campaign:
    """Measure a set of pictures in every way.

    Args:
        sources: image files, and folders that hold some at any depth; labels are found beside them.
        codec: all its states are measured.
        tasks: nets at their tasks.
        gauge: what is measured beside PSNR and MS-SSIM.
        options: see :class:`BenchOptions`.
        rd_images: curves come from so many pictures, evenly chosen; None takes all.
        command: what the user typed, for the report.
        progress: called after each image.

    Raises:
        SourceNotFoundError: a source is no image and holds none.
        SourceFormatError: there is no image that every method can code.
        NetError: a net does not fit its description.
        MissingExtraError: the ``bench`` extra is not installed.
    """
    options = options or BenchOptions()
    load_bjontegaard()  # now, not after an hour of measuring
    images = find_images(sources)[: options.max_images]
    states = choose_states(images, codec, options.near_bpp)
    (failure_state,) = choose_states(images, codec, (FAILURE_BPP,))
    shown_states = tuple(sorted({*states, failure_state}))
    swept = {name for name, _ in images}
    if rd_images is not None and rd_images < len(images):
        # Of those that can be read: without any curve nothing would come of the whole pass.
        names = [name for name, path in images if can_be_read(path)]
        chosen = np.linspace(0, len(names) - 1, min(rd_images, len(names))).round().astype(int)
        swept = {names[i] for i in chosen}

    def work(
        subject: Subject,
    ) -> tuple[tuple[Measurement, ...], tuple[Trial, ...], Exhibit]:
        yardstick = gauge.look_at(subject)
        curves = sweep(subject, yardstick, options) if subject.name in swept else ()
        trials = try_out(subject, yardstick, tasks, states, options)
        return curves, trials, exhibit(subject, yardstick, shown_states, failure_state, options)

    found, skipped = for_each_picture(
        images, codec, work, peers=options.peers, threads=options.threads, progress=progress
    )
    name = set_name(sources)
    return Campaign(
        rd=rd_report(
            [curves for curves, _, _ in found if curves],
            skipped,
            codec,
            options,
            gauge,
            pictures=name,
            command=command,
        ),
        equal=equal_report(
            [trials for _, trials, _ in found],
            skipped,
            codec,
            tasks,
            options,
            gauge,
            pictures=name,
            command=command,
        ),
        exhibits=tuple(shown for _, _, shown in found),
    )
