"""Curves of training runs, one after the other: ``python jobs/plot_training.py RUN... -o PICTURE``.

Rate and PSNR of each state on training crops, and the losses of the human view, from the logs that
``dicmh train`` leaves in a run's folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

SMOOTHED = 5
"""Lines of a log that a point is the mean of: batches differ more than the network does."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; none where the stage was not run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(axes: Axes, steps: list[int], values: list[float], **style: Any) -> None:
    """One smoothed curve."""
    if len(values) < SMOOTHED:
        return
    smooth = np.convolve(values, np.full(SMOOTHED, 1 / SMOOTHED), "valid")
    axes.plot(steps[SMOOTHED - 1 :], smooth, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", "-o", type=Path, default=Path("training.png"))
    arguments = parser.parse_args()
    figure, (rate, quality, human) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    start = 0
    for run in arguments.runs:
        log = read_log(run / "log.jsonl")
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
    rate.legend(fontsize=7)
    if human.lines:
        human.legend(fontsize=7)
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
