"""What one model for all rates costs: a prefix of k states against a model trained for that rate alone.

For each state asked for, the shipped network is trained further for that state only (one quantiser, its
own tables, no parents), with the same recipe and photographs, then both code the same pictures. The
single-rate model has the longer training, so the loss is if anything overstated.

    python jobs/scalable_loss.py PHOTOGRAPHS... --pictures KODAK --state 3 --minutes 5 -o run/
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
from PIL import Image

from dicmh_ray.bench.environment import describe_environment
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec, load_codec, read_checkpoint, tables
from dicmh_ray.codec.export import export
from dicmh_ray.codec.network import NetworkConfig
from dicmh_ray.codec.training import TrainOptions, train
from dicmh_ray.recipe import PRESETS, pack_photographs

Floats = npt.NDArray[np.float64]

WIDE_ALPHABET = 1023
"""Largest symbol of the single-rate models. Their one quantiser is finer than any first state of the
format, and without a parent its symbols are larger than the format has codes for."""


def single_state_checkpoint(checkpoint: str, state: int, folder: Path) -> NetworkConfig:
    """Write the network of one state of a checkpoint as a checkpoint of its own."""
    found = read_checkpoint(checkpoint)
    config = NetworkConfig.from_dict(found.config["network"])
    weights = {}
    for name, value in safetensors.torch.load(found.files["weights.safetensors"]).items():
        if name.startswith("human."):
            continue
        weights[name] = value[state : state + 1].clone() if ".film." in name else value
    alone = dataclasses.replace(
        config, num_states=1, finest_step=config.steps[state], human_width=0, human_words=()
    )
    folder.mkdir(parents=True, exist_ok=True)
    content = found.config | {"network": alone.to_dict()}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "weights.safetensors").write_bytes(safetensors.torch.save(weights))
    (folder / "tables.safetensors").write_bytes(found.files["tables.safetensors"])
    return alone


def options_for(state: int, num_states: int, minutes: float) -> TrainOptions:
    """The recipe's options, for one state."""
    options = PRESETS["default"].options
    return dataclasses.replace(
        options,
        minutes=minutes,
        steps=10**6,
        learning_rate=options.learning_rate / 3,
        finest_lambda=options.lambdas(num_states)[state],
        faithful_states=int(state >= num_states - options.faithful_states),
        semantic_states=int(state < options.semantic_states),
    )


def measure(codec: ImageCodec, pictures: list[Path]) -> Floats:
    """Means over pictures for each state: bits per pixel, PSNR, MS-SSIM in dB; ``[K, 3]``."""
    rows = []
    for path in pictures:
        image = np.asarray(Image.open(path).convert("RGB"))
        data = codec.encode([image], tags=[()], exif_orientations=[1])[0]
        for end in prefix_bytes(data):
            (quality,) = codec.measure([image], codec.decode([data[:end]]))
            structure = -10 * np.log10(1 - min(quality.ms_ssim or 0.0, 0.99999))
            rows.append((8 * end / image[..., 0].size, quality.psnr, structure))
    means: Floats = np.array(rows).reshape(len(pictures), -1, 3).mean(0)
    return means


def loss_percent(scalable: Floats, alone: Floats, metric: int) -> float:
    """Bytes that the scalable codec needs beyond the single one, at the single one's quality."""
    log_bpp = np.interp(alone[0, metric], scalable[:, metric], np.log(scalable[:, 0]))
    return float(100 * (np.exp(log_bpp) / alone[0, 0] - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photographs", nargs="+", help="training photographs, as for dicmh train")
    parser.add_argument("--pictures", required=True, type=Path, help="folder to measure on")
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--state", type=int, action="append", required=True, help="from 1")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training for each state")
    parser.add_argument("--teacher", type=Path, help="weights of the classifier of the SC loss")
    parser.add_argument("--output", "-o", type=Path, required=True)
    arguments = parser.parse_args()
    pictures = sorted(p for p in arguments.pictures.iterdir() if p.suffix in (".png", ".jpg"))
    photographs = pack_photographs(arguments.photographs, arguments.output / "pack", report=print)
    codec = load_codec(arguments.checkpoint)
    scalable = measure(codec, pictures)
    result: dict[str, Any] = {
        "environment": dataclasses.asdict(describe_environment()),
        "scalable": scalable.tolist(),
    }
    tables.COARSEST_LIMIT = WIDE_ALPHABET
    for number in arguments.state:
        state = number - 1
        folder = arguments.output / f"state-{number}"
        with tempfile.TemporaryDirectory() as start:
            config = single_state_checkpoint(arguments.checkpoint, state, Path(start))
            network = train(
                photographs,
                folder,
                options=options_for(state, codec.num_states, arguments.minutes),
                network=config,
                start_from=start,
                teacher=arguments.teacher,
                report=print,
            )
        export(network, photographs, folder / "checkpoint", provenance={})
        alone = measure(load_codec(folder / "checkpoint"), pictures)
        result[f"state {number}"] = {
            "alone": alone[0].tolist(),
            "prefix": scalable[state].tolist(),
            "loss_percent_psnr": round(loss_percent(scalable, alone, 1), 1),
            "loss_percent_ms_ssim": round(loss_percent(scalable, alone, 2), 1),
        }
        print(json.dumps(result[f"state {number}"]))
    (arguments.output / "scalable_loss.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
