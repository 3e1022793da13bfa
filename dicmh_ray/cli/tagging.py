"""Bodies of ``dicmh train-tagger`` and ``dicmh tag``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dicmh_ray.cli.output import EXIT_ERROR, say, tell, told_in_one_line
from dicmh_ray.cli.tagger_options import TaggerArguments
from dicmh_ray.codec import TagScore, TagSuggester, load_codec
from dicmh_ray.codec.image_taggers import best_tags, load_image_tagger
from dicmh_ray.errors import DicmhError, SourceImageError, WeightsError
from dicmh_ray.source import load_pixels
from dicmh_ray.tag_recipe import report_lines, train_tagger


def run_train_tagger(
    photographs: Sequence[str],
    *,
    labels: Sequence[Path],
    output: Path,
    report: Path | None,
    checkpoint: str,
    device: str,
) -> None:
    """Fit, write the file, print the figures; a bar on a terminal."""
    with told_in_one_line():
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as bar:
            tasks = {name: bar.add_task(name, total=None) for name in ("features", "folds")}
            run = train_tagger(
                photographs,
                labels,
                checkpoint=checkpoint,
                device=device,
                progress=lambda name, done, total: bar.update(
                    tasks[name], completed=done, total=total
                ),
            )
        lines = report_lines(run)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(run.head.to_bytes())
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text("\n".join(lines) + "\n")
    for line in lines:
        say(line)
    tell(f"wrote {output}")


def run_tag(
    pictures: Sequence[Path],
    arguments: TaggerArguments,
    *,
    checkpoint: str,
    device: str,
    every: bool,
    as_json: bool,
) -> None:
    """Print tags; a picture that cannot be read or tagged is named, and the exit code is 1 then."""
    failures = []
    with told_in_one_line():
        spec = arguments.spec(checkpoint, every=every)
        if spec is None:
            tags_of = _head(arguments, checkpoint, device, every=every)
        else:
            tagger = load_image_tagger(spec, device=device)
            tags_of = lambda image: tagger.tag([image])[0]
        for path in pictures:
            try:
                image = load_pixels(path.read_bytes()).image
            except OSError as exc:
                failures.append(f"{path}: {exc.strerror or exc}")
                continue
            except SourceImageError as exc:
                failures.append(f"{path}: {exc}")
                continue
            try:
                tags = tags_of(image)
            except (DicmhError, OSError):
                raise
            except Exception as exc:  # noqa: BLE001  the user's code: other pictures may do
                failures.append(f"{path}: {type(exc).__name__}: {exc}")
                continue
            if as_json:
                found = [{"tag": tag.tag, "score": tag.score} for tag in tags]
                say(json.dumps({"file": str(path), "tags": found}))
                continue
            for tag in tags:
                say(f"{path}\t{tag.tag}\t{tag.score:.3f}")
    for failure in failures:
        tell(f"error: {failure}")
    if failures:
        raise typer.Exit(EXIT_ERROR)


def _head(
    arguments: TaggerArguments, checkpoint: str, device: str, *, every: bool
) -> Callable[[npt.NDArray[np.uint8]], Sequence[TagScore]]:
    """The checkpoint's own tagger, which reads the stream of a picture.

    Each of its words has a threshold, or is never suggested; a threshold of the user's stands for
    all of them.
    """
    codec = load_codec(checkpoint, device=device)
    if not isinstance(codec, TagSuggester):
        raise WeightsError(checkpoint, "this codec suggests no tags")

    def tags_of(image: npt.NDArray[np.uint8]) -> Sequence[TagScore]:
        streams = codec.encode([image], tags=[()], exif_orientations=[1])
        if every:
            return codec.tag_probabilities(streams)[0]
        if arguments.threshold is None:
            return codec.suggest_tags(streams)[0][: arguments.top_k]
        found = codec.tag_probabilities(streams)[0]
        return best_tags(found, arguments.threshold, arguments.top_k or len(found))

    return tags_of
