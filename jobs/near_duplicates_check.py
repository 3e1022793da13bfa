"""How well near duplicates are found from latents: ``python jobs/near_duplicates_check.py PICTURE...``.

Each picture is changed in the ways that collections have, encoded, and compared with its original by
the embedding of ``--states`` states (``dicmh analyze --task embed-latent``). Prints for each change the
share of pictures whose cosine is at least each threshold, and the same for pairs of different pictures,
which should be none. Pictures are reduced to ``--side`` pixels on the longer side first.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

from dicmh_ray import load_codec
from dicmh_ray.analysis.latent_tasks import Floats, colours_of, embedding
from dicmh_ray.bench import describe_environment
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec

THRESHOLDS = (0.7, 0.8, 0.85, 0.9, 0.95)


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """The picture after JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cropped(picture: Image.Image, share: float) -> Image.Image:
    """The middle of it, ``share`` of each side."""
    width, height = (round(side * share) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 50": lambda picture: jpeg(picture, 50),
    "JPEG, quality 10": lambda picture: jpeg(picture, 10),
    "half the size": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "30 % brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.3),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "middle 95 %": lambda picture: cropped(picture, 0.95),
    "middle 85 %": lambda picture: cropped(picture, 0.85),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def embedded(codec: ImageCodec, colours: Floats, picture: Image.Image, states: int) -> Floats:
    """Of one picture."""
    (stream,) = codec.encode([np.asarray(picture)], tags=[()], exif_orientations=[1])
    (latent,) = codec.decode_latent([stream[: prefix_bytes(stream)[states - 1]]])
    return embedding(latent, colours)


def shares(cosines: Sequence[float]) -> list[float]:
    """At least each threshold."""
    return [float(np.mean(np.array(cosines) >= threshold)) for threshold in THRESHOLDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("--states", type=int, default=2)
    parser.add_argument("--side", type=int, default=384)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    codec = load_codec("default", device="cpu", threads=1)
    colours = colours_of(codec)
    originals = []
    cosines: dict[str, list[float]] = {name: [] for name in CHANGES}
    for path in arguments.pictures:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((arguments.side, arguments.side))
        originals.append(embedded(codec, colours, picture, arguments.states))
        for name, change in CHANGES.items():
            other = embedded(codec, colours, change(picture), arguments.states)
            cosines[name].append(float(originals[-1] @ other))
    cosines["another picture"] = [float(a @ b) for a, b in combinations(originals, 2)]
    environment = describe_environment(" ".join(["python", *sys.argv]))
    if arguments.json:
        rows = {name: shares(found) for name, found in cosines.items()}
        content = {"environment": asdict(environment), "thresholds": THRESHOLDS, "shares": rows}
        print(json.dumps(content))
        return
    print("| change", "pairs", "median", "lowest", "highest", *THRESHOLDS, "", sep=" | ")
    print("|---" * (len(THRESHOLDS) + 5), "|", sep="")
    for name, found in cosines.items():
        facts = (f"{value:.3f}" for value in (np.median(found), min(found), max(found)))
        print(f"| {name}", len(found), *facts, *(f"{x:.3f}" for x in shares(found)), "", sep=" | ")
    print("", f"Cosine at {arguments.states} of the states.", *environment.lines(), sep="\n")


if __name__ == "__main__":
    main()
