"""What machines read off originals, machine views and latents: accuracy, images a second, bytes.

    python jobs/analysis_table.py work/ --labelled 'clothes/*.tar' --label label --nets nets/ \
        --boxes coco/images

Each collection is compressed into an archive under ``work/`` (all states up to ``--states``, originals
beside the streams), or the archive that is there is used. Then, each in one process on one thread:

* a head (``dicmh fit-head``) is fitted to latents, and the same head to 16 x 16 patches of the pixels of
  machine views and of originals: the same grid of cells, the same size, the same fit. Pictures are
  shared out to folds, each tested by a head that did not see it; all inputs have the same folds.
* the same head on the features of the classifier in ``--nets`` instead of pixels: what a net that was
  trained on a million other pictures adds.
* the detector in ``--nets`` on originals and machine views, against boxes (``labels_yolo`` beside
  the pictures).

Images a second are of reading, decoding and the net or head; bytes are those of the streams' first
states or of the originals. Intervals are of 95 %: of a share Wilson's, of AP50 by drawing pictures again.
Prints a table in Markdown; ``--json`` prints the figures.
"""

import argparse
import dataclasses
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dicmh_ray import EncodePolicy, SourceOptions, compress, load_pixels, open_archive
from dicmh_ray.analysis.heads import label_of
from dicmh_ray.analysis.net_tasks import EmbedPicture
from dicmh_ray.bench import describe_environment
from dicmh_ray.codec.latent_head import HeadOptions, LatentHead
from dicmh_ray.views import Archive
from dicmh_ray.vision import NetSpec, find_labels, find_nets, load_task, mean_average_precision

PATCH = 16
"""Pixels a side: the default codec's latents have a cell for each so many."""

DRAWS = 100
"""Of the pictures, for an interval."""

Values = npt.NDArray[Any]
Prepare = Callable[[Values], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is measured."""

    work: Path
    labelled: Sequence[str]
    label: str
    boxes: Path | None
    nets: Path
    features: str
    states: int
    folds: int
    epochs: int
    limit: int | None
    views: Sequence[str]
    as_json: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """What a machine is given of a picture."""

    view: str
    states: int | None = None

    @property
    def name(self) -> str:
        return self.view if self.states is None else f"{self.view}, {self.states} of the states"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of the table."""

    task: str
    reads: str
    pictures: int
    metric: str
    value: float
    low: float
    high: float
    images_per_s: float
    bytes_per_image: float

    def line(self) -> str:
        """Of the table in Markdown."""
        return (
            f"| {self.task} | {self.reads} | {self.pictures} | {self.metric} | {self.value:.3f} | "
            f"{self.low:.3f} to {self.high:.3f} | {self.images_per_s:.1f} | "
            f"{self.bytes_per_image:,.0f} |"
        )


def inputs_of(options: Options, *, latents: bool) -> list[Input]:
    """Originals, then views of all states that were written and of two."""
    found = [Input(view="original")]
    for view in ("machine", "latent") if latents else ("machine",):
        found += [Input(view=view, states=k) for k in dict.fromkeys((options.states, 2))]
    return [one for one in found if one.view in options.views]


def archive_of(options: Options, name: str, sources: Sequence[str]) -> Archive:
    """The archive of a collection, made unless it is there."""
    uri = str(options.work / name)
    policy = EncodePolicy(
        states=options.states, min_psnr=0, min_worst_tile_psnr=0, keep_original="always"
    )
    fields = SourceOptions(tag_fields=(options.label,) if name == "labelled" else ())
    compress(sources, uri, policy=policy, runtime="local", source_options=fields)
    return open_archive(uri, device="cpu")


def read(
    archive: Archive, given: Input, keys: set[str], prepares: Sequence[Prepare]
) -> list[tuple[dict[str, Any], float]]:
    """What each of ``prepares`` makes of the pictures, by key, and the seconds it would take alone."""
    started = time.perf_counter()
    found: list[dict[str, Any]] = [{} for _ in prepares]
    own = [0.0 for _ in prepares]
    for image in archive.iter(view=given.view, states=given.states):
        if image.key in keys:
            if given.view == "original":
                value: Values = load_pixels(image.original).image
            elif given.view == "latent":
                value = image.latent(given.states)
            else:
                value = image.pixels(given.view, given.states)
            for number, prepare in enumerate(prepares):
                before = time.perf_counter()
                found[number][image.key] = prepare(value)
                own[number] += time.perf_counter() - before
    reading = time.perf_counter() - started - sum(own)
    return [(values, reading + seconds) for values, seconds in zip(found, own, strict=True)]


def bytes_of(archive: Archive, given: Input, keys: set[str]) -> float:
    """Mean bytes of a picture that an input is made of."""
    total = 0
    for batch in archive.reader.scan(["key", "prefix_bytes", "original_bytes"]):
        for row in batch.to_pylist():
            if row["key"] in keys:
                ends = row["prefix_bytes"]
                total += row["original_bytes"] if given.states is None else ends[given.states - 1]
    return total / len(keys)


def patches(picture: Values) -> Values:
    """Pixels as a latent has its cells: float16 ``[3 * PATCH**2, h, w]``, -1..1; edges are cut."""
    height, width = (side // PATCH for side in picture.shape[:2])
    cut = picture[: height * PATCH, : width * PATCH].reshape(height, PATCH, width, PATCH, 3)
    cells = cut.transpose(1, 3, 4, 0, 2).reshape(-1, height, width)
    return np.asarray(cells.astype(np.float32) / 127.5 - 1, np.float16)


def folds_of(labels: dict[str, str], count: int) -> dict[str, int]:
    """Which fold tests each picture: every class is spread over all of them."""
    by_class: dict[str, list[str]] = defaultdict(list)
    for key in sorted(labels):
        by_class[labels[key]].append(key)
    chance = random.Random(0)
    folds: dict[str, int] = {}
    for members in by_class.values():
        chance.shuffle(members)
        folds |= {key: place % count for place, key in enumerate(members)}
    return folds


def tested(
    values: dict[str, Values], labels: dict[str, str], folds: dict[str, int], epochs: int
) -> tuple[list[bool], float]:
    """Whether each picture is named rightly by the head that did not see it, and the seconds."""
    names = sorted(set(labels.values()))
    right, seconds = [], 0.0
    for fold in sorted(set(folds.values())):
        train = [key for key in sorted(values) if folds[key] != fold]
        test = [key for key in sorted(values) if folds[key] == fold]
        head = LatentHead.fit(
            [values[key] for key in train],
            [names.index(labels[key]) for key in train],
            labels=names,
            codec_id="",
            states=None,
            options=HeadOptions(epochs=epochs, batch_size=8),
        )
        started = time.perf_counter()
        found = head.probabilities([values[key] for key in test]).argmax(axis=1)
        seconds += time.perf_counter() - started
        right += [names[one] == labels[key] for one, key in zip(found, test, strict=True)]
    return right, seconds


def wilson(right: Sequence[bool]) -> tuple[float, float]:
    """The interval of a share."""
    n, share, z = len(right), sum(right) / len(right), 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5)
    return middle - half, middle + half


def head_rows(options: Options, specs: Sequence[NetSpec]) -> list[Row]:
    """Classification by a head that is fitted here."""
    archive = archive_of(options, "labelled", options.labelled)
    found = {image.key: label_of(image, f"metadata.{options.label}") for image in archive}
    streams = {image.key for image in archive if image.num_states}
    labels = {key: label for key, label in found.items() if label is not None and key in streams}
    labels = dict(sorted(labels.items())[: options.limit])
    folds = folds_of(labels, options.folds)
    keys = set(labels)
    embed = next(
        EmbedPicture(spec, spec.file.read_bytes(), tap=options.features)
        for spec in specs
        if spec.task == "classification"
    )
    embed.setup()
    rows = []

    def add(task: str, given: Input, values: dict[str, Values], read_s: float) -> None:
        right, head_s = tested(values, labels, folds, options.epochs)
        low, high = wilson(right)
        rows.append(
            Row(
                task=task,
                reads=given.name,
                pictures=len(right),
                metric=f"accuracy, {len(set(labels.values()))} classes",
                value=sum(right) / len(right),
                low=low,
                high=high,
                images_per_s=len(right) / (read_s + head_s),
                bytes_per_image=bytes_of(archive, given, keys),
            )
        )
        tell(rows[-1].line())

    for given in inputs_of(options, latents=True):
        if given.view == "latent":
            add("head", given, *read(archive, given, keys, [lambda latent: latent])[0])
        else:
            ways: list[Prepare] = [patches, lambda p: embed.vector(p)[:, None, None]]
            pixels, features = read(archive, given, keys, ways)
            add("head", given, *pixels)
            add("head on a net's features", given, *features)
    return rows


def detection_rows(options: Options, specs: Sequence[NetSpec], boxes: Path) -> list[Row]:
    """AP50 of the detector, against boxes."""
    archive = archive_of(options, "boxes", [str(boxes)])
    net = next(load_task(spec) for spec in specs if spec.task == "detection")
    pictures = {path.stem: path for path in sorted(boxes.iterdir())}
    objects = {
        image.key: find_labels(pictures[image.key.rsplit("/", 1)[-1].partition(".")[0]]).objects
        for image in archive
        if image.num_states
    }
    there = {key: one for key, one in sorted(objects.items()) if one is not None}
    there = dict(list(there.items())[: options.limit])
    chance = np.random.default_rng(0)
    draws = [chance.integers(len(there), size=len(there)) for _ in range(DRAWS)]
    rows = []
    for given in inputs_of(options, latents=False):
        ((found, seconds),) = read(archive, given, set(there), [net.read])
        pairs = [(found[key], one) for key, one in there.items()]

        def ap50(chosen: Sequence[Any]) -> float:
            value = mean_average_precision(*zip(*chosen, strict=True), min_overlaps=[0.5])
            return 0.0 if value is None else value

        low, high = np.quantile([ap50([pairs[i] for i in draw]) for draw in draws], [0.025, 0.975])
        rows.append(
            Row(
                task=f"detection ({net.spec.name})",
                reads=given.name,
                pictures=len(pairs),
                metric="AP50",
                value=ap50(pairs),
                low=float(low),
                high=float(high),
                images_per_s=len(pairs) / seconds,
                bytes_per_image=bytes_of(archive, given, set(there)),
            )
        )
        tell(rows[-1].line())
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| task | reads | pictures | metric | value | 95 % | images/s | bytes a picture |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(row.line() for row in rows)])


def tell(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str]) -> Options:
    """The command line as options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path, metavar="WORK", help="folder for the archives")
    parser.add_argument("--labelled", nargs="*", default=[], metavar="SRC")
    parser.add_argument("--label", default="label", help="metadata field of the class")
    parser.add_argument("--boxes", type=Path, metavar="FOLDER", help="pictures with boxes")
    parser.add_argument("--nets", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--features", default="feat", help="tensor of the classifier")
    parser.add_argument("--states", type=int, default=4, help="that are written")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12, help="of each fit")
    parser.add_argument("--limit", type=int, help="pictures of each collection at most")
    known = ("original", "machine", "latent")
    parser.add_argument("--views", nargs="+", choices=known, default=known)
    parser.add_argument("--json", action="store_true", dest="as_json")
    return Options(**vars(parser.parse_args(arguments)))


def run(options: Options) -> list[Row]:
    """All rows."""
    torch.set_num_threads(1)
    specs = find_nets(options.nets)
    rows = [] if options.boxes is None else detection_rows(options, specs, options.boxes)
    return rows + (head_rows(options, specs) if options.labelled else [])


def main() -> None:
    options = parse(sys.argv[1:])
    rows = run(options)
    environment = describe_environment(" ".join(["python", *sys.argv]))
    if options.as_json:
        content = {
            "environment": dataclasses.asdict(environment),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        print(json.dumps(content))
        return
    print(markdown(rows), "", *environment.lines(), sep="\n")


if __name__ == "__main__":
    main()
