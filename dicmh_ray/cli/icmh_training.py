"""Body of ``dicmh train`` for the presets of Diff-ICMH, in this process or on Ray."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from dicmh_ray.cli.output import say, tell, told_in_one_line
from dicmh_ray.cli.training import needs_ray, step_line
from dicmh_ray.icmh_recipe import ICMH_PRESETS, train_icmh_checkpoint
from dicmh_ray.recipe import read_labels


@dataclass(frozen=True, kw_only=True, slots=True)
class IcmhArguments:
    """Options as they were given; None: the preset's."""

    preset: str
    steps: int | None
    minutes: float | None
    rate: float | None
    semantic: float | None
    prior_minutes: float | None
    labels: Sequence[Path]
    device: str
    start_from: str | None
    workers: int | None
    use_gpu: bool


def run_icmh_train(
    sources: Sequence[str], output: Path, given: IcmhArguments, *, others: Sequence[str]
) -> None:
    """Train and export; lines of progress go to standard error. ``others`` are the other presets."""
    chosen = ICMH_PRESETS.get(given.preset)
    if chosen is None:
        names = ", ".join([*others, *ICMH_PRESETS])
        raise typer.BadParameter(f"--preset {given.preset!r}: there are {names}")
    wanted: dict[str, Any] = {
        "steps": given.steps,
        "minutes": given.minutes,
        "rate": given.rate,
        "semantic": given.semantic,
    }
    changes = {name: value for name, value in wanted.items() if value is not None}
    prior = chosen.prior
    if prior is not None and given.prior_minutes is not None:
        prior = dataclasses.replace(prior, minutes=given.prior_minutes)
    with told_in_one_line():
        common: dict[str, Any] = {
            "preset": given.preset,
            "options": dataclasses.replace(chosen.codec, **changes),
            "prior": prior,
            "labels": read_labels(given.labels),
            "start_from": given.start_from,
            "report": tell,
            "report_step": lambda facts: tell(step_line(facts)),
        }
        if given.workers is None:
            checkpoint = train_icmh_checkpoint(sources, output, device=given.device, **common)
        else:
            with needs_ray():
                from dicmh_ray.ray_plugin.icmh_training import train_icmh_on_ray
                from dicmh_ray.ray_plugin.training import Workers
            team = Workers(count=given.workers, use_gpu=given.use_gpu)
            checkpoint = train_icmh_on_ray(sources, output, workers=team, **common)
    say(f"{output / 'checkpoint'}\t{checkpoint.codec_id}")
