"""Train a checkpoint without a terminal: one process, or several through Ray Train.

    python jobs/train_codec.py photographs/ -o run/ --minutes 90 --teacher mobilenet.safetensors
    python jobs/train_codec.py photographs/ -o run/ --preset diff-icmh --from sd21/ --rate 8 \
        --workers 8 --gpu --ray-address auto

``-o`` is the run: a run that is there goes on from its last state, so a restart policy is all the fault handling it needs from outside. With
workers on several machines it is a folder that all of them see. Logs a line a report, and prints the
checkpoint as one JSON line at the end. Exit 0: done, 1: an error.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dicmh_ray.codec import Checkpoint
from dicmh_ray.errors import DicmhError
from dicmh_ray.icmh_recipe import ICMH_PRESETS, train_icmh_checkpoint
from dicmh_ray.recipe import PRESETS, read_labels, train_checkpoint

_log = logging.getLogger("train_codec")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The job. What is not here has the preset's values."""

    photographs: Sequence[str]
    output: Path
    preset: str
    steps: int | None
    minutes: float | None
    human_minutes: float | None
    teacher: Path | None
    rate: float | None
    labels: Sequence[Path]
    start_from: str | None
    device: str
    workers: int | None
    gpu: bool
    ray_address: str | None


def parse(arguments: Sequence[str]) -> Options:
    """The command line as options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("photographs", nargs="+", metavar="SRC")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--preset", default="default", choices=(*PRESETS, *ICMH_PRESETS))
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--minutes", type=float, help="end the schedule by then")
    parser.add_argument("--human-minutes", type=float, help="default: then train the human view")
    parser.add_argument("--teacher", type=Path, help="default: weights of a classifier")
    parser.add_argument("--rate", type=float, help="Diff-ICMH: weight of bits per pixel")
    parser.add_argument("--labels", type=Path, action="append", default=[], help="CSV: file,label")
    parser.add_argument("--from", dest="start_from", help="improve a checkpoint")
    parser.add_argument("--device", default="auto", help="without --workers")
    parser.add_argument("--workers", type=int, help="processes of Ray Train")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--ray-address", help="auto, ray://host:10001; default: a local Ray")
    options = Options(**vars(parser.parse_args(arguments)))
    if options.preset in PRESETS and options.rate is not None:
        parser.error("--rate is for the presets of Diff-ICMH")
    if options.preset in ICMH_PRESETS and (options.teacher or options.human_minutes):
        parser.error("--teacher and --human-minutes are for the other presets")
    if options.human_minutes is not None and options.teacher is None:
        parser.error("--human-minutes wants --teacher")
    if options.workers is None and (options.gpu or options.ray_address):
        parser.error("--gpu and --ray-address want --workers")
    return options


def run(options: Options) -> Checkpoint:
    """Train to the end."""
    given = {"steps": options.steps, "minutes": options.minutes, "rate": options.rate}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    common: dict[str, Any] = {
        "preset": options.preset,
        "labels": read_labels(options.labels),
        "start_from": options.start_from,
        "report": _log.info,
        "report_step": lambda facts: _log.info("%s", json.dumps(facts)),
    }
    if options.preset in PRESETS:
        preset = PRESETS[options.preset]
        human = preset.human
        if options.human_minutes is not None:
            human = replace(human, minutes=options.human_minutes)
        common |= {"options": replace(preset.options, **changes), "human": human}
        common["teacher"] = options.teacher
    else:
        icmh = ICMH_PRESETS[options.preset]
        common |= {"options": replace(icmh.codec, **changes), "prior": icmh.prior}
    if options.workers is None:
        train = train_checkpoint if options.preset in PRESETS else train_icmh_checkpoint
        return train(options.photographs, options.output, device=options.device, **common)
    from dicmh_ray.ray_plugin.icmh_training import train_icmh_on_ray
    from dicmh_ray.ray_plugin.training import Workers, train_on_ray

    workers = Workers(count=options.workers, use_gpu=options.gpu, address=options.ray_address)
    train_together = train_on_ray if options.preset in PRESETS else train_icmh_on_ray
    return train_together(options.photographs, options.output, workers=workers, **common)


def main() -> int:
    """Train, print the checkpoint, return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    options = parse(sys.argv[1:])
    try:
        checkpoint = run(options)
    except (DicmhError, OSError, ValueError) as exc:
        _log.error("%s", exc)
        return 1
    folder = str(options.output / "checkpoint")
    print(json.dumps({"checkpoint": folder, "codec_id": checkpoint.codec_id}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
