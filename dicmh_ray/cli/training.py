"""Body of ``dicmh train``: the only command that needs torch to start."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from dicmh_ray.cli.output import say, tell, told_in_one_line
from dicmh_ray.codec import Checkpoint
from dicmh_ray.codec.icmh.presets import ICMH_PRESETS
from dicmh_ray.errors import MissingExtraError
from dicmh_ray.recipe import PRESETS, read_labels, train_checkpoint, train_icmh_checkpoint


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
    of_icmh = {
        "--prior-minutes": prior_minutes,
        "--rate": rate,
        "--semantic": semantic,
        "--workers": workers,
        "--gpu": use_gpu or None,
    }
    if preset in ICMH_PRESETS:
        of_layered = {"--human-minutes": human_minutes, "--teacher": teacher}
        _refuse(of_layered, preset)
        if use_gpu and workers is None:
            raise typer.BadParameter("--gpu is for --workers; a single process has --device")
        if workers is not None and device != "auto":
            raise typer.BadParameter("--device does nothing with --workers; there is --gpu")
        _train_icmh(
            sources,
            output,
            preset=preset,
            changes={
                "steps": steps,
                "minutes": minutes,
                "rate": rate,
                "semantic": semantic,
            },
            prior_minutes=prior_minutes,
            labels=labels,
            device=device,
            start_from=start_from,
            workers=workers,
            use_gpu=use_gpu,
        )
        return
    if preset not in PRESETS:
        names = ", ".join([*PRESETS, *ICMH_PRESETS])
        raise typer.BadParameter(f"--preset {preset!r}: there are {names}")
    _refuse(of_icmh, preset)
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


def _train_icmh(
    sources: Sequence[str],
    output: Path,
    *,
    preset: str,
    changes: Mapping[str, float | None],
    prior_minutes: float | None,
    labels: Sequence[Path],
    device: str,
    start_from: str | None,
    workers: int | None,
    use_gpu: bool,
) -> None:
    chosen = ICMH_PRESETS[preset]
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    prior = chosen.prior
    if prior is not None and prior_minutes is not None:
        prior = dataclasses.replace(prior, minutes=prior_minutes)
    with told_in_one_line():
        common: dict[str, Any] = {
            "preset": preset,
            "options": dataclasses.replace(chosen.codec, **given),
            "prior": prior,
            "labels": read_labels(labels),
            "start_from": start_from,
            "report": tell,
            "report_step": lambda facts: tell(_step_line(facts)),
        }
        if workers is None:
            checkpoint = train_icmh_checkpoint(sources, output, device=device, **common)
        else:
            train_on_ray = _ray_training()
            checkpoint = train_on_ray(sources, output, workers=workers, use_gpu=use_gpu, **common)
    say(f"{output / 'checkpoint'}\t{checkpoint.codec_id}")


def _ray_training() -> Callable[..., Checkpoint]:
    """``train_icmh_on_ray``. Raises MissingExtraError where there is no Ray."""
    try:
        from dicmh_ray.ray_plugin.training import train_icmh_on_ray
    except ModuleNotFoundError as exc:
        if exc.name != "ray":
            raise
        raise MissingExtraError("ray", "ray") from exc
    return train_icmh_on_ray


def _refuse(options: Mapping[str, Any], preset: str) -> None:
    """Options that another kind of preset has."""
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(f"{name} does nothing with --preset {preset}")


def _step_line(facts: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in facts.items()
    )
