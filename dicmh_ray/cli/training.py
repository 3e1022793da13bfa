"""Body of ``dicmh train``: the only command that needs torch to start."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from dicmh_ray.cli.output import say, tell, told_in_one_line
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
) -> None:
    """Train and export; lines of progress go to standard error."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"--preset {preset!r}: there are {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    given: dict[str, Any] = {"steps": steps, "minutes": minutes}
    changes = {name: value for name, value in given.items() if value is not None}
    human = chosen.human
    if human_minutes is not None:
        human = dataclasses.replace(human, minutes=human_minutes)
    with told_in_one_line():
        checkpoint = train_checkpoint(
            sources,
            output,
            preset=preset,
            options=dataclasses.replace(chosen.options, **changes),
            human=human,
            teacher=teacher,
            labels=read_labels(labels),
            device=device,
            start_from=start_from,
            report=tell,
            report_step=lambda facts: tell(_step_line(facts)),
        )
    say(f"{output / 'checkpoint'}\t{checkpoint.codec_id}")


def _step_line(facts: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in facts.items()
    )
