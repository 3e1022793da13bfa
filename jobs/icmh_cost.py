"""What a Diff-ICMH codec costs: ``python jobs/icmh_cost.py CHECKPOINT`` or ``--full-width``.

Time of one image of 512x768 in this process, floating-point operations (2 x multiply-adds) and peak
memory. ``--full-width`` is the codec of the paper around Stable Diffusion 2.1, with weights that
follow from the parameters' names, for nobody needs trained ones to measure cost; its human view is one
guided evaluation, measured, times the sampler's steps.
"""

import argparse
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dicmh_ray.bench import describe_environment
from dicmh_ray.codec import read_checkpoint
from dicmh_ray.codec.icmh.config import IcmhConfig
from dicmh_ray.codec.icmh.control import ControlledUNet, RestorerOptions, apply_options
from dicmh_ray.codec.icmh.key_seeded import key_seeded
from dicmh_ray.codec.icmh.lfgcm import LatentCoder
from dicmh_ray.codec.icmh.official_keys import OFFICIAL_PREFIXES, Part, to_official, to_ours
from dicmh_ray.codec.icmh.parts import Parts, load_human_parts, load_machine_parts
from dicmh_ray.codec.icmh.vae import Vae

HEIGHT, WIDTH, TOKENS = 512, 768, 77


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one step of the codec."""

    step: str
    tflop: float
    seconds: float


def seeded_full_width() -> Parts:
    """The networks of the paper without its text encoder, weights from their official names."""
    config = IcmhConfig()
    with torch.device("meta"):
        vae = Vae(config.vae)
        restorer = ControlledUNet(config.restorer, config.latent_coder.latent_channels)
        coder = LatentCoder(config.latent_coder)
    seeded_parts: dict[Part, nn.Module] = {
        "vae": vae.network,
        "unet": restorer.unet,
        "control": restorer.control,
    }
    for part, module in seeded_parts.items():
        shapes = to_official(part, module.state_dict())
        prefix = OFFICIAL_PREFIXES[part]
        seeded = {name: _value(prefix + name, meta) for name, meta in shapes.items()}
        module.load_state_dict(to_ours(part, seeded), assign=True)
    state = {
        name: _value(f"preprocess_model.{name}", meta) for name, meta in coder.state_dict().items()
    }
    coder.load_state_dict(state, assign=True)
    for module in (vae, restorer, coder):
        module.eval().requires_grad_(requires_grad=False)
    return Parts(config=config, vae=vae, latent_coder=coder, restorer=restorer)


def _value(name: str, meta: Tensor) -> Tensor:
    if name.endswith("scale_list") or not meta.is_floating_point() or not meta.numel():
        return torch.ones(meta.shape, dtype=meta.dtype)
    return key_seeded(name, meta.shape)


def measure(parts: Parts, rounds: int) -> list[Cost]:
    """Every step, in the order in which a codec takes them."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, HEIGHT, WIDTH)
    coder, vae, restorer = parts.latent_coder, parts.vae, parts.restorer
    costs = []

    def step(name: str, call: Callable[[], Any], scale: float = 1.0) -> Any:
        taken = []
        for number in range(rounds):
            counting = FlopCounterMode(display=False) if not number else nullcontext()
            started = time.perf_counter()
            with counting:
                result = call()
            taken.append(time.perf_counter() - started)
            if isinstance(counting, FlopCounterMode):
                flop = counting.get_total_flops()
        costs.append(Cost(name, scale * flop / 1e12, scale * min(taken)))
        return result

    with torch.inference_mode():
        reference = step("VAE encode", lambda: vae.encode(2 * x - 1))
        y, z = step("latent coder: analysis", lambda: coder.analyse(x, reference))
        z_hat = coder.round_z(z)
        y_hat = step("latent coder: entropy parameters", lambda: coder.round_y(y, z_hat))[1]
        estimate = step("latent coder: estimate", lambda: coder.estimate(y_hat, z_hat))
        step("VAE decode", lambda: vae.decode(estimate))
        if restorer is not None:
            context = torch.randn(2, TOKENS, parts.config.restorer.context_channels)
            steps = parts.config.sampler.steps
            guided = 1 if parts.config.sampler.guidance in (0, 1) else 2
            noisy, hint = (torch.cat([t] * guided) for t in (reference, estimate))
            t_B = torch.full((guided,), 500)
            step(
                f"U-Net and control: {steps} steps x {guided}",
                lambda: restorer(noisy, t_B, context[:guided], hint),
                steps,
            )
    return costs


def parameters(parts: Parts) -> dict[str, float]:
    """Millions of parameters of each part."""
    modules: dict[str, nn.Module] = {"latent_coder": parts.latent_coder, "vae": parts.vae.network}
    if parts.restorer is not None:
        modules |= {"unet": parts.restorer.unet, "control": parts.restorer.control}
    if parts.text is not None:
        modules["text"] = parts.text
    return {
        name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in modules.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--full-width", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many is reported")
    parser.add_argument("--bf16", action="store_true", help="the restorer in bfloat16")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.full_width == (arguments.checkpoint is not None):
        parser.error("give a checkpoint directory or --full-width")
    if arguments.full_width:
        parts = seeded_full_width()
    else:
        checkpoint = read_checkpoint(arguments.checkpoint)
        parts = load_machine_parts(checkpoint)
        load_human_parts(checkpoint, parts)
    if arguments.bf16 and parts.restorer is not None:
        apply_options(parts.restorer, RestorerOptions(dtype=torch.bfloat16))
    costs = measure(parts, arguments.rounds)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if arguments.json:
        content = {
            "environment": dataclasses.asdict(describe_environment()),
            "millions_of_parameters": parameters(parts),
            "costs": [dataclasses.asdict(cost) for cost in costs],
            "peak_gib": peak_gib,
        }
        json.dump(content, sys.stdout, indent=1)
        return
    print(f"{'':44}{'TFLOP':>10}{'seconds':>10}")
    for cost in costs:
        print(f"{cost.step:44}{cost.tflop:10.4f}{cost.seconds:10.2f}")
    print(", ".join(f"{name} {count:.2f} M" for name, count in parameters(parts).items()))
    print(f"peak memory {peak_gib:.1f} GiB; {describe_environment()}")


if __name__ == "__main__":
    main()
