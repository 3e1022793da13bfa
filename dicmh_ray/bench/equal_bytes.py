"""Machine tasks and looks at equal bytes: ours at some states, each peer at no more bytes.

For every picture and state, each peer is encoded at the best quality that costs no more than our
prefix does (:mod:`dicmh_ray.bench.matching`). What every net reads off the decoded pictures is then
scored over the set, beside what it reads off the originals.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicmh_ray.bench.environment import Environment, describe_environment
from dicmh_ray.bench.metrics import Gauge, NetRecord, Yardstick, means, record_of
from dicmh_ray.bench.rd import BenchOptions
from dicmh_ray.bench.subject import (
    Decoded,
    Progress,
    Subject,
    find_images,
    for_each_picture,
    none_coded,
    set_name,
)
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import EncodeError, SourceImageError
from dicmh_ray.source import load_pixels
from dicmh_ray.vision.labels import find_labels
from dicmh_ray.vision.tasks import NetTask

ORIGINAL = "original"
NUM_PROBES = 6
"""Pictures, spread over the set, whose rates choose the states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One method at the bytes of one state, for one picture."""

    method: str
    setting: str
    state: int
    """Whose bytes are not exceeded."""

    is_over: bool
    """A peer's smallest file, larger than ours."""

    decoded: Decoded


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One picture as one method shows it at one state's bytes."""

    method: str
    state: int | None
    """None for the original."""

    bpp: float
    is_over: bool
    """A peer's smallest file, larger than ours."""

    metrics: Mapping[str, float]
    evidence: tuple[Any, ...]
    """Of each task, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualPoint:
    """One method at one state's bytes, over the set."""

    method: str
    state: int | None
    num_images: int
    bpp: float
    """Mean; of the original's own files for the original."""

    num_over: int
    """Pictures of which the peer's smallest file is larger than ours."""

    metrics: Mapping[str, float]
    scores: Mapping[str, float | None]
    """``"NET: score"``; see :mod:`dicmh_ray.vision.tasks`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualReport:
    """All that was found. ``dataclasses.asdict`` of it is the JSON report."""

    codec: str
    codec_id: str
    pictures: str
    num_images: int
    skipped: tuple[tuple[str, str], ...]
    judges: tuple[NetRecord, ...]
    tasks: tuple[NetRecord, ...]
    points: tuple[EqualPoint, ...]
    environment: Environment


def evaluate_tasks(
    sources: Sequence[str | Path],
    codec: ImageCodec,
    tasks: Sequence[NetTask],
    *,
    options: BenchOptions | None = None,
    gauge: Gauge | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> EqualReport:
    """Score machine tasks, and measure looks, at equal bytes.

    Args:
        sources: image files, and folders that hold some at any depth; labels are found beside them.
        codec: compared with its peers.
        tasks: nets at their tasks; may be none.
        options: see :class:`BenchOptions`.
        gauge: what is measured beside PSNR and MS-SSIM.
        command: what the user typed, for the report.
        progress: called after each image.

    Raises:
        SourceNotFoundError: a source is no image and holds none.
        SourceFormatError: no image can be coded, or a label file is not in its format.
        NetError: a net does not fit its description.
    """
    options, gauge = options or BenchOptions(), gauge or Gauge(codec)
    images = find_images(sources)[: options.max_images]
    states = choose_states(images, codec, options.near_bpp)
    found, skipped = for_each_picture(
        images,
        codec,
        lambda subject: try_out(subject, gauge.look_at(subject), tasks, states, options),
        peers=options.peers,
        threads=options.threads,
        progress=progress,
    )
    return equal_report(
        found, skipped, codec, tasks, options, gauge, pictures=set_name(sources), command=command
    )


def choose_states(
    images: Sequence[tuple[str, Path]], codec: ImageCodec, near_bpp: Sequence[float]
) -> tuple[int, ...]:
    """The states whose mean rates, over a few pictures of a set, are nearest to those wanted.

    Raises:
        SourceFormatError: none of the pictures can be coded.
    """
    rates: list[npt.NDArray[np.float64]] = []
    skipped: list[tuple[str, str]] = []
    stride = max(1, len(images) // NUM_PROBES)
    for first in range(stride):
        for name, path in images[first::stride]:
            try:
                image = load_pixels(path.read_bytes()).image
                (stream,) = codec.encode([image], tags=[()], exif_orientations=[1])
            except (SourceImageError, EncodeError) as exc:
                skipped.append((name, str(exc)))  # the evaluation itself will report it
                continue
            rates.append(np.log(np.array(prefix_bytes(stream)) * 8 / image[..., 0].size))
        if rates:
            break
    else:
        raise none_coded(skipped)
    centres = np.mean(rates, axis=0)
    return tuple(sorted({int(np.abs(centres - np.log(bpp)).argmin()) + 1 for bpp in near_bpp}))


def contenders(
    subject: Subject, states: Sequence[int], options: BenchOptions
) -> Iterator[Contender]:
    """Ours in every view, then each peer, at the bytes of each state."""
    for state in states:
        for view in options.views:
            yield Contender(
                method=options.method(view),
                setting=f"state {state}",
                state=state,
                is_over=False,
                decoded=subject.ours(state, view),
            )
        num_bytes = subject.prefix_bytes[state - 1]
        for peer in options.peers:
            quality, is_over = subject.peer_match(peer.name, num_bytes)
            yield Contender(
                method=peer.name,
                setting=f"q {quality}",
                state=state,
                is_over=is_over,
                decoded=subject.peer(peer.name, quality),
            )


def try_out(
    subject: Subject,
    yardstick: Yardstick,
    tasks: Sequence[NetTask],
    states: Sequence[int],
    options: BenchOptions,
) -> tuple[Trial, ...]:
    """One picture as it is, and as every method shows it at the bytes of every state."""
    labels = find_labels(subject.path)
    originals = [task.read(subject.image) for task in tasks]

    def evidence(readings: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(
            task.compare(reading, original, labels)
            for task, reading, original in zip(tasks, readings, originals, strict=True)
        )

    original = Trial(
        method=ORIGINAL,
        state=None,
        bpp=subject.bpp(subject.num_file_bytes),
        is_over=False,
        metrics={},
        evidence=evidence(originals),
    )
    return (
        original,
        *(
            Trial(
                method=one.method,
                state=one.state,
                bpp=subject.bpp(one.decoded.num_bytes),
                is_over=one.is_over,
                metrics=yardstick.measure(one.method, one.setting, one.decoded),
                evidence=evidence(task.read(one.decoded.image) for task in tasks),
            )
            for one in contenders(subject, states, options)
        ),
    )


def equal_report(
    found: Sequence[Sequence[Trial]],
    skipped: tuple[tuple[str, str], ...],
    codec: ImageCodec,
    tasks: Sequence[NetTask],
    options: BenchOptions,
    gauge: Gauge,
    *,
    pictures: str,
    command: str,
) -> EqualReport:
    """Score the trials of all pictures. Raises SourceFormatError if there are none."""
    if not found:
        raise none_coded(skipped)
    groups: dict[tuple[str, int | None], list[Trial]] = {}
    for trials in found:
        for trial in trials:
            groups.setdefault((trial.method, trial.state), []).append(trial)
    return EqualReport(
        codec=options.name,
        codec_id=codec.codec_id,
        pictures=pictures,
        num_images=len(found),
        skipped=skipped,
        judges=gauge.records(options.teachers),
        tasks=tuple(record_of(task.spec, task.net.sha256, options.teachers) for task in tasks),
        points=tuple(
            EqualPoint(
                method=method,
                state=state,
                num_images=len(group),
                bpp=float(np.mean([one.bpp for one in group])),
                num_over=sum(one.is_over for one in group),
                metrics=means([one.metrics for one in group]),
                scores=_scores(group, tasks),
            )
            for (method, state), group in groups.items()
        ),
        environment=describe_environment(command),
    )


def _scores(group: Sequence[Trial], tasks: Sequence[NetTask]) -> dict[str, float | None]:
    return {
        f"{task.spec.name}: {name}": value
        for i, task in enumerate(tasks)
        for name, value in task.score([one.evidence[i] for one in group]).items()
    }
