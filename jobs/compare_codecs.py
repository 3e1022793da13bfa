"""Codecs side by side: ``python jobs/compare_codecs.py NAME=CHECKPOINT... --pictures DIR``.

For each checkpoint and each of its states the bytes on whole pictures and what a view keeps: PSNR,
MS-SSIM, and how far the features of nets are from the originals'; then the BD-rates of every codec
against the first. It is how a change to training is judged before it is shipped: on photographs that
are not evaluation pictures, by nets that no training has seen, and on patterns drawn over them.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rich.console
import rich.progress

from dicmh_ray.bench import describe_environment
from dicmh_ray.bench.bd_rate import bd_rate
from dicmh_ray.bench.judges import FeatureJudge
from dicmh_ray.bench.metrics import Gauge, decibels, means
from dicmh_ray.bench.subject import find_images
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec, load_codec
from dicmh_ray.codec.patterns import lay_pattern
from dicmh_ray.errors import SourceImageError
from dicmh_ray.source import load_pixels
from dicmh_ray.vision.nets import find_nets

Picture = npt.NDArray[np.uint8]

PATTERN_CROP = 384
"""Pixels per side of the middle of a picture that a pattern is drawn over."""

PATTERN_SEED = 77
"""No training draws with it: its draws are seeded by three numbers."""

HEADLINE_BPP = (0.1, 1.0)

FIDELITY = ("psnr", "ms_ssim", "ms_ssim_rgb")


def pictures(paths: list[Path], *, patterns: bool) -> Iterator[Picture]:
    """The pictures that codecs take; or their middles with patterns, where they are large enough."""
    for number, path in enumerate(paths):
        try:
            image = load_pixels(path.read_bytes()).image
        except SourceImageError as exc:
            print(f"left out: {path}: {exc}", file=sys.stderr)
            continue
        if not patterns:
            yield image
            continue
        top, left = ((side - PATTERN_CROP) // 2 for side in image.shape[:2])
        if min(top, left) >= 0:
            crop = image[top : top + PATTERN_CROP, left : left + PATTERN_CROP]
            yield lay_pattern(crop.copy(), np.random.default_rng([PATTERN_SEED, number]))


def measure(
    codec: ImageCodec, image: Picture, judges: list[FeatureJudge], view: str
) -> list[dict[str, float]]:
    """What one picture costs and keeps, for each state."""
    gauge = Gauge(codec)
    wanted = [judge.features(image) for judge in judges]
    (data,) = codec.encode([image], tags=[()], exif_orientations=[1])
    rows = []
    for number, end in enumerate(prefix_bytes(data), start=1):
        (decoded,) = codec.decode([data], states=number, view=view)
        facts = {"bpp": 8 * end / image[..., 0].size, **gauge.measure(image, decoded)}
        for judge, features in zip(judges, wanted, strict=True):
            likeness = judge.compare(features, judge.features(decoded))
            facts[f"distance:{judge.spec.name}"] = likeness.distance
            facts[f"cosine:{judge.spec.name}"] = likeness.cosine
        rows.append(facts)
    return rows


def bd_rates(
    anchor: list[dict[str, float]], test: list[dict[str, float]]
) -> dict[str, Mapping[str, float | None]]:
    """Percent of bytes more than the anchor's at equal quality, over all rates and the headline's."""
    found: dict[str, Mapping[str, float | None]] = {}
    for metric in FIDELITY:
        curves = [
            [(facts["bpp"], decibels(metric, facts[metric])) for facts in states if metric in facts]
            for states in (anchor, test)
        ]
        rates = {"all": bd_rate(*curves), "headline": bd_rate(*curves, bpp_range=HEADLINE_BPP)}
        found[metric] = {name: rate[0] if rate else None for name, rate in rates.items()}
    return found


def named(argument: str) -> tuple[str, str]:
    """``NAME=CHECKPOINT``."""
    name, equals, checkpoint = argument.partition("=")
    if not (name and equals and checkpoint):
        raise argparse.ArgumentTypeError(f"{argument!r}, wanted NAME=CHECKPOINT")
    return name, checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("codecs", nargs="+", type=named, metavar="NAME=CHECKPOINT")
    parser.add_argument("--pictures", required=True, type=Path, help="folder of photographs")
    parser.add_argument("--nets", type=Path, help="folder of nets; docs/evaluation.md")
    parser.add_argument("--view", default="machine")
    parser.add_argument("--patterns", action="store_true", help="over the middles of the pictures")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th picture")
    parser.add_argument("--limit", type=int, help="of those the first so many")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if len(dict(arguments.codecs)) < len(arguments.codecs):
        parser.error("two codecs have one name")
    paths = [path for _, path in find_images([arguments.pictures])]
    paths = paths[:: arguments.every][: arguments.limit]
    nets = find_nets(arguments.nets) if arguments.nets else []
    judges = [FeatureJudge(net) for net in nets if net.taps]
    codecs = {name: load_codec(path, device="cpu") for name, path in arguments.codecs}
    rows: dict[str, list[list[dict[str, float]]]] = {name: [] for name in codecs}
    shown = rich.progress.track(
        pictures(paths, patterns=arguments.patterns),
        total=len(paths),
        console=rich.console.Console(stderr=True),
    )
    for image in shown:
        for name, codec in codecs.items():
            rows[name].append(measure(codec, image, judges, arguments.view))
    if not all(rows.values()):
        parser.error(f"no picture is of use; with --patterns it has {PATTERN_CROP} pixels a side")
    result = {
        name: [means(state) for state in zip(*own, strict=True)] for name, own in rows.items()
    }
    anchor, *others = result
    rates = {name: bd_rates(result[anchor], result[name]) for name in others}
    content: dict[str, Any] = {
        "environment": dataclasses.asdict(describe_environment()),
        "pictures": len(rows[anchor]),
        "view": arguments.view,
        "codecs": result,
        f"bd_rates_against_{anchor}": rates,
    }
    if arguments.json:
        json.dump(content, sys.stdout, indent=1)
        return
    names = list(result[anchor][0])
    print(" | ".join(["codec", "state", *names]))
    for name, states in result.items():
        for number, facts in enumerate(states, start=1):
            print(" | ".join([name, str(number), *(f"{facts[n]:.4f}" for n in names)]))
    for name, found in rates.items():
        for metric, rate in found.items():
            text = ", ".join(
                f"{where} {'-' if one is None else f'{one:+.1f} %'}" for where, one in rate.items()
            )
            print(f"BD-rate of {name} against {anchor}, {metric}: {text}")
    print(f"{len(rows[anchor])} pictures of {arguments.pictures.name}, {arguments.view} view")
    print(content["environment"])


if __name__ == "__main__":
    main()
