"""Bodies of ``dicmh train-tagger`` and ``dicmh tag``."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dicmh_ray.cli.output import EXIT_ERROR, say, tell, told_in_one_line
from dicmh_ray.codec import TagSuggester, load_codec
from dicmh_ray.errors import SourceImageError, WeightsError
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


def run_tag(pictures: Sequence[Path], *, checkpoint: str, device: str, every: bool) -> None:
    """Print tags; a picture that cannot be read is named, and the exit code is 1 then."""
    failures = []
    with told_in_one_line():
        codec = load_codec(checkpoint, device=device)
        if not isinstance(codec, TagSuggester):
            raise WeightsError(checkpoint, "this codec suggests no tags")
        for path in pictures:
            try:
                image = load_pixels(path.read_bytes()).image
            except SourceImageError as exc:
                failures.append(f"{path}: {exc}")
                continue
            streams = codec.encode([image], tags=[()], exif_orientations=[1])
            found = codec.tag_probabilities(streams) if every else codec.suggest_tags(streams)
            for tag in found[0]:
                say(f"{path}\t{tag.tag}\t{tag.score:.3f}")
    for failure in failures:
        tell(f"error: {failure}")
    if failures:
        raise typer.Exit(EXIT_ERROR)
