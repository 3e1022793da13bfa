"""Single-rate codecs side by side: ``python jobs/compare_codecs.py NAME=CHECKPOINT... --pictures DIR``.

For each checkpoint and each of its states the bytes on whole pictures and what the machine view keeps:
PSNR, MS-SSIM, and how far the features of nets are from the originals'. It is how a change to training,
such as leaving out the semantic-consistency loss, is judged: by nets that no training has seen.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dicmh_ray.bench import describe_environment
from dicmh_ray.bench.judges import FeatureJudge
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec, load_codec
from dicmh_ray.vision.nets import find_nets


def measure(
    codec: ImageCodec, pictures: list[Path], judges: list[FeatureJudge], view: str
) -> list[dict[str, float]]:
    """Means over the pictures for each state."""
    rows: list[list[dict[str, float]]] = []
    for path in pictures:
        with Image.open(path) as opened:
            image = np.asarray(opened.convert("RGB"))
        wanted = [judge.features(image) for judge in judges]
        (data,) = codec.encode([image], tags=[()], exif_orientations=[1])
        row = []
        for number, end in enumerate(prefix_bytes(data), start=1):
            (decoded,) = codec.decode([data], states=number, view=view)
            (quality,) = codec.measure([image], [decoded])
            facts = {"bpp": 8 * end / image[..., 0].size, "psnr": quality.psnr}
            if quality.ms_ssim is not None:
                facts["ms_ssim"] = quality.ms_ssim
            for judge, features in zip(judges, wanted, strict=True):
                likeness = judge.compare(features, judge.features(decoded))
                facts[f"{judge.spec.name} distance"] = likeness.distance
                facts[f"{judge.spec.name} cosine"] = likeness.cosine
            row.append(facts)
        rows.append(row)
    return [
        {name: float(np.mean([row[state][name] for row in rows])) for name in rows[0][state]}
        for state in range(len(rows[0]))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("codecs", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--pictures", required=True, type=Path, help="folder of PNG or JPEG")
    parser.add_argument("--nets", type=Path, help="folder of nets; docs/evaluation.md")
    parser.add_argument("--view", default="machine")
    parser.add_argument("--limit", type=int, help="the first so many pictures")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = sorted(p for p in arguments.pictures.iterdir() if p.suffix in (".png", ".jpg"))
    pictures = found[: arguments.limit]
    nets = find_nets(arguments.nets) if arguments.nets else []
    judges = [FeatureJudge(net) for net in nets if net.taps]
    result: dict[str, Any] = {}
    for argument in arguments.codecs:
        name, _, checkpoint = argument.partition("=")
        codec = load_codec(checkpoint, device="cpu")
        result[name] = measure(codec, pictures, judges, arguments.view)
    environment = dataclasses.asdict(describe_environment())
    if arguments.json:
        content = {"environment": environment, "pictures": len(pictures), "codecs": result}
        json.dump(content, sys.stdout, indent=1)
        return
    names = list(next(iter(result.values()))[0])
    print(" | ".join(["codec", "state", *names]))
    for name, states in result.items():
        for number, facts in enumerate(states, start=1):
            print(" | ".join([name, str(number), *(f"{facts[n]:.4f}" for n in names)]))
    print(f"{len(pictures)} pictures of {arguments.pictures.name}, {arguments.view} view")
    print(environment)


if __name__ == "__main__":
    main()
