"""The autoencoder computes what the official one does, under one convention for every kind."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dicmh_ray.codec.icmh.config import VaeConfig
from dicmh_ray.codec.icmh.key_seeded import key_seeded_state
from dicmh_ray.codec.icmh.official_keys import OFFICIAL_PREFIXES, to_ours
from dicmh_ray.codec.icmh.vae import Vae

SETTINGS = {"block_out_channels": [8, 12], "layers_per_block": 1, "latent_channels": 6}
TINY_SETTINGS = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
    "latent_channels": 4,
}
SMALL = [VaeConfig(settings=SETTINGS), VaeConfig(kind="tiny", settings=TINY_SETTINGS, scaling=1.0)]


@pytest.fixture(scope="module")
def tensors(reference: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(reference / "vae_tiny.safetensors")


@pytest.fixture(scope="module")
def vae(reference: Path) -> Vae:
    facts = json.loads((reference / "vae_tiny.json").read_text())
    width, multiples = facts["ddconfig"]["ch"], facts["ddconfig"]["ch_mult"]
    settings = {
        "block_out_channels": [width * m for m in multiples],
        "layers_per_block": facts["ddconfig"]["num_res_blocks"],
        "latent_channels": facts["ddconfig"]["z_channels"],
    }
    vae = Vae(VaeConfig(settings=settings)).eval()
    official = key_seeded_state(OFFICIAL_PREFIXES["vae"], facts["shapes"])
    vae.network.load_state_dict(to_ours("vae", official))
    return vae.requires_grad_(requires_grad=False)


def test_the_reference_is_met(vae: Vae, tensors: dict[str, Tensor]) -> None:
    mode = vae.encode(tensors["x"])
    torch.testing.assert_close(mode, tensors["mode"] * 0.18215, rtol=0, atol=2e-5)
    torch.testing.assert_close(vae.decode(mode), tensors["dec"], rtol=0, atol=1e-4)
    _, spread = vae.kind.posterior(vae.network, tensors["x"])
    assert spread is not None
    torch.testing.assert_close(2 * spread.log(), tensors["logvar"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("direction", "shape", "flops"),
    [("encode", (1, 3, 512, 768), 1.70e12), ("decode", (1, 4, 64, 96), 3.80e12)],
)
def test_full_width_has_the_parameters_and_the_cost_of_the_official_one(
    direction: str, shape: tuple[int, ...], flops: float
) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vae = Vae(VaeConfig())
        getattr(vae, direction)(torch.empty(shape))
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert counter.get_total_flops() == pytest.approx(flops, rel=2e-3)


def test_samples_are_the_mode_and_the_spread_of_the_posterior(
    vae: Vae, tensors: dict[str, Tensor]
) -> None:
    x = tensors["x"]
    drawn = vae.sample(x, torch.Generator().manual_seed(1))
    again = vae.sample(x, torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, again, rtol=0, atol=0)
    normal = torch.randn(tensors["mode"].shape, generator=torch.Generator().manual_seed(1))
    spread = (0.5 * tensors["logvar"]).exp()
    torch.testing.assert_close(drawn, 0.18215 * (tensors["mode"] + spread * normal))


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.kind)
def test_every_kind_keeps_the_convention(config: VaeConfig) -> None:
    torch.manual_seed(0)
    vae = Vae(config).eval()
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    z = vae.encode(x)
    assert z.shape == (2, config.settings["latent_channels"], 8, 12)
    assert vae.decode(z).shape == x.shape
    assert vae.sample(x).shape == z.shape
    raw, _ = vae.kind.posterior(vae.network, x)
    torch.testing.assert_close(z, raw * config.scaling)


def test_a_tiny_autoencoder_has_no_posterior_to_draw_from() -> None:
    vae = Vae(SMALL[1]).eval()
    x = torch.zeros(1, 3, 8, 8)
    torch.testing.assert_close(vae.sample(x), vae.encode(x), rtol=0, atol=0)


def test_widths_that_are_no_multiple_of_32_have_fewer_groups() -> None:
    assert Vae(SMALL[0]).network.config.norm_num_groups == 4
    chosen = VaeConfig(settings={**SETTINGS, "norm_num_groups": 2})
    assert Vae(chosen).network.config.norm_num_groups == 2


def test_an_unknown_kind_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"wanted one of kl, .*tiny"):
        Vae(VaeConfig(kind="jpeg"))  # type: ignore[arg-type]
