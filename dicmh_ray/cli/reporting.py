"""Body of ``dicmh report``, and the page that ``dicmh compress --report`` writes."""

import base64
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dicmh_ray.archive import Snapshot, open_snapshot
from dicmh_ray.cli.output import say, storage_options, told_in_one_line
from dicmh_ray.errors import DicmhError
from dicmh_ray.pipeline import JobReport, Tally
from dicmh_ray.pipeline.archive_facts import tally_of
from dicmh_ray.pipeline.page import PageFacts, Thumbnail, render_page
from dicmh_ray.pipeline.summary import WorstImage
from dicmh_ray.views import ImageView, open_archive

_log = logging.getLogger(__name__)

THUMBNAILS, THUMBNAIL_SIDE = 12, 160
MAX_DECODED_PIXELS = 16_000_000
"""Larger pictures get no thumbnail: a page is not worth the memory."""


def run_report(
    archive: str,
    storage: Sequence[str],
    *,
    output: Path,
    thumbnails: bool,
    version: int | None,
    device: str,
) -> None:
    """Write the summary of an archive."""
    with told_in_one_line():
        options = storage_options(storage, archive)
        snapshot = open_snapshot(archive, version=version, storage_options=options)
        tally = tally_of(snapshot)
        if output.suffix == ".json":
            output.write_text(json.dumps(archive_dict(snapshot, tally), indent=2) + "\n")
        else:
            pictures: dict[str, list[Thumbnail]] = {}
            if thumbnails:
                worst = tally.summary.worst[:THUMBNAILS]
                pictures = thumbnails_of(
                    archive, worst, device=device, version=version, options=options
                )
            output.write_text(render_page(page_facts(snapshot, tally, pictures)), encoding="utf-8")
    say(f"{output}: {tally.images} images of {len(snapshot.commits)} units")


def archive_dict(snapshot: Snapshot, tally: Tally) -> dict[str, Any]:
    """The summary as JSON."""
    return {
        "archive": snapshot.uri,
        "complete": snapshot.is_complete,
        **snapshot.statistics.to_dict(),
        "bytes_saved": tally.bytes_saved,
        "failures": tally.failures,
        "mean_psnr": tally.mean_psnr,
        "causes": dict(sorted(tally.causes.items())),
        **tally.summary.to_dict(),
    }


def page_facts(
    snapshot: Snapshot, tally: Tally, pictures: Mapping[str, Sequence[Thumbnail]]
) -> PageFacts:
    """What the page of a snapshot shows."""
    statistics = snapshot.statistics
    return PageFacts(
        archive=snapshot.uri,
        is_complete=snapshot.is_complete,
        codec_id=snapshot.codec_id,
        tally=tally,
        version=statistics.archive_version,
        units=(statistics.committed, statistics.units),
        parameters=statistics.parameters,
        thumbnails=pictures,
        created_by=statistics.created_by,
    )


def write_job_page(
    path: Path, report: JobReport, options: Mapping[str, Any], *, error: BaseException | None
) -> None:
    """Write the page of a run that ended: its own sums, and its worst images as they are stored."""
    worst = report.tally.summary.worst[:THUMBNAILS]
    pictures = thumbnails_of(report.archive, worst, device="auto", version=None, options=options)
    facts = PageFacts(
        archive=report.archive,
        is_complete=report.manifest is not None,
        codec_id=report.codec_id,
        tally=report.tally,
        version=report.manifest,
        units=(report.units_done + report.units_resumed, report.units_total),
        job=report,
        error=None if error is None else f"{type(error).__name__}: {error}",
        thumbnails=pictures,
        parameters=open_snapshot(report.archive, storage_options=options).plan.parameters,
    )
    path.write_text(render_page(facts), encoding="utf-8")


def thumbnails_of(
    archive: str,
    worst: Sequence[WorstImage],
    *,
    device: str,
    version: int | None,
    options: Mapping[str, Any],
) -> dict[str, list[Thumbnail]]:
    """Small pictures by key: the machine view of what is stored, and the original where it is kept.

    A picture that cannot be shown is left out: a report of damage must not fail on it.
    """
    found: dict[str, list[Thumbnail]] = {}
    if not worst:
        return found
    try:
        opened = open_archive(archive, version=version, device=device, storage_options=options)
        for image in worst:
            view = opened[image.key]
            if (view.width or 0) * (view.height or 0) <= MAX_DECODED_PIXELS:
                found[image.key] = _pictures(view)
    except (DicmhError, OSError, ImportError) as exc:
        _log.warning("no more thumbnails: %s", exc)
    return found


def _pictures(view: ImageView) -> list[Thumbnail]:
    pictures = [Thumbnail("stored", _address(view.pixels()))]
    if view.original:
        with Image.open(io.BytesIO(view.original)) as original:
            pictures.append(Thumbnail("original", _address(np.asarray(original.convert("RGB")))))
    return pictures


def _address(pixels: npt.NDArray[np.uint8]) -> str:
    """A picture [H, W, 3] as a small JPEG in a ``data:`` address."""
    small = Image.fromarray(pixels)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
