"""Body of ``dicmh train``: the only command that needs torch to start."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from dicmh_ray.cli.output import say, tell, told_in_one_line
from dicmh_ray.errors import MissingExtraError
from dicmh_ray.recipe import PRESETS, read_labels, train_checkpoint


def run_train(
    sources: Sequence[str],
    output: Path,
    *,
    preset: str,
    steps: int | None,
    minutes: float | None,
    human_minutes: float | None,
    teacher: Path | None,
    labels: Sequence[Path],
    device: str,
    start_from: str | None,
    prior_minutes: float | None,
    rate: float | None,
    semantic: float | None,
    workers: int | None,
    use_gpu: bool,
) -> None:
    """Train and export; lines of progress go to standard error."""
    if use_gpu and workers is None:
        raise typer.BadParameter("--gpu is for --workers; a single process has --device")
    if workers is not None and device != "auto":
        raise typer.BadParameter("--device does nothing with --workers; there is --gpu")
    if preset not in PRESETS:
        # What its presets need takes long to import; all others start without.
        from dicmh_ray.cli.icmh_training import IcmhArguments, run_icmh_train

        refuse({"--human-minutes": human_minutes, "--teacher": teacher}, preset)
        run_icmh_train(
            sources,
            output,
            IcmhArguments(
                preset=preset,
                steps=steps,
                minutes=minutes,
                rate=rate,
                semantic=semantic,
                prior_minutes=prior_minutes,
                labels=labels,
                device=device,
                start_from=start_from,
                workers=workers,
                use_gpu=use_gpu,
            ),
            others=list(PRESETS),
        )
        return
    of_icmh = {
        "--prior-minutes": prior_minutes,
        "--rate": rate,
        "--semantic": semantic,
    }
    refuse(of_icmh, preset)
    if human_minutes is not None and teacher is None:
        raise typer.BadParameter("--human-minutes does nothing without --teacher")
    chosen = PRESETS[preset]
    given: dict[str, Any] = {"steps": steps, "minutes": minutes}
    changes = {name: value for name, value in given.items() if value is not None}
    human = chosen.human
    if human_minutes is not None:
        human = dataclasses.replace(human, minutes=human_minutes)
    with told_in_one_line():
        common: dict[str, Any] = {
            "preset": preset,
            "options": dataclasses.replace(chosen.options, **changes),
            "human": human,
            "teacher": teacher,
            "labels": read_labels(labels),
            "start_from": start_from,
            "report": tell,
            "report_step": lambda facts: tell(step_line(facts)),
        }
        if workers is None:
            checkpoint = train_checkpoint(sources, output, device=device, **common)
        else:
            with needs_ray():
                from dicmh_ray.ray_plugin.training import Workers, train_on_ray
            team = Workers(count=workers, use_gpu=use_gpu)
            checkpoint = train_on_ray(sources, output, workers=team, **common)
    say(f"{output / 'checkpoint'}\t{checkpoint.codec_id}")


@contextmanager
def needs_ray() -> Iterator[None]:
    """Around an import. Raises MissingExtraError where there is no Ray."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name != "ray":
            raise
        raise MissingExtraError("ray", "ray") from exc


def refuse(options: Mapping[str, Any], preset: str) -> None:
    """Options that another kind of preset has."""
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(f"{name} does nothing with --preset {preset}")


def step_line(facts: Mapping[str, Any]) -> str:
    """A line of a log, as people read it."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in facts.items()
    )
