"""Curves of training runs: ``python jobs/plot_training.py RUN... -o PICTURE``.

From the logs that ``dicmh train`` leaves in a run's folder. Runs of the layered codec are drawn one
after the other: rate and PSNR of each state on training crops, and the losses of the human view.
Runs of Diff-ICMH, which may be given as NAME=RUN, are drawn over each other: the terms of their loss.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SMOOTHED = 5
"""Lines of a long log that a point is the mean of: batches differ more than the network does."""


ICMH_PANELS = {
    "rounded_bpp": "rate [bits per pixel]",
    "distortion": "distortion of the latent (MSE)",
    "semantic": "semantic distance (SC)",
    "diffusion": "diffusion loss (MSE of the noise)",
}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; none where the stage was not run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(axes: Axes, steps: list[int], values: list[float], **style: Any) -> None:
    """One smoothed curve."""
    lines = min(SMOOTHED, 1 + len(values) // 10)
    smooth = np.convolve(values, np.full(lines, 1 / lines), "valid")
    axes.plot(steps[lines - 1 :], smooth, **style)


def draw_layered(runs: list[Path]) -> Figure:
    """Runs that each went on from the one before."""
    figure, (rate, quality, human) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    start = 0
    for run in runs:
        # A run that starts from a checkpoint decodes nothing at first.
        log = [line for line in read_log(run / "log.jsonl") if "psnr" in line]
        steps = [start + line["step"] for line in log]
        for key, axes in (("bpp", rate), ("psnr", quality)):
            for state in range(len(log[0][key])):
                label = f"state {state + 1}" if not start else None
                draw(axes, steps, [r[key][state] for r in log], color=f"C{state}", label=label)
            if start:
                axes.axvline(start, color="0.7", linewidth=0.8)
        losses = read_log(run / "human.jsonl")
        for name in ("perceptual", "texture") if losses else ():
            draw(human, [line["step"] for line in losses], [r[name] for r in losses], label=name)
        start = steps[-1]
    rate.set(title="bits per pixel, training crops", xlabel="step", yscale="log")
    quality.set(title="PSNR [dB], training crops", xlabel="step")
    human.set(title="human view: distances of the teacher", xlabel="step")
    for axes in (rate, quality, human):
        axes.locator_params(axis="x", nbins=4)
    rate.legend(fontsize=7)
    if human.lines:
        human.legend(fontsize=7)
    return figure


def draw_icmh(runs: dict[str, Path]) -> Figure:
    """Runs that differ in something, by name."""
    figure, axes = plt.subplots(1, len(ICMH_PANELS), figsize=(12, 3), layout="constrained")
    for name, run in runs.items():
        log = read_log(run / "codec.jsonl")
        for panel, key in zip(axes, ICMH_PANELS, strict=True):
            lines = [line for line in log if key in line]
            draw(panel, [r["step"] for r in lines], [r[key] for r in lines], label=name)
    for panel, title in zip(axes, ICMH_PANELS.values(), strict=True):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step")
    axes[0].legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", "-o", type=Path, default=Path("training.png"))
    arguments = parser.parse_args()
    named = [(left or right, Path(right or left)) for left, _, right in map(_cut, arguments.runs)]
    for _, run in named:
        log = [*read_log(run / "log.jsonl"), *read_log(run / "codec.jsonl")]
        if not any("psnr" in line or "rounded_bpp" in line for line in log):
            parser.error(f"{run} has no curve yet: a run logs a point every 50 steps")
    is_icmh = [(run / "codec.jsonl").exists() for _, run in named]
    if any(is_icmh) and not all(is_icmh):
        parser.error("runs of both codecs do not go into one picture")
    figure = draw_icmh(dict(named)) if all(is_icmh) else draw_layered([run for _, run in named])
    figure.savefig(arguments.output, dpi=110)


def _cut(argument: str) -> tuple[str, str, str]:
    return argument.partition("=")


if __name__ == "__main__":
    main()
