"""The latent coder computes what the official one does, key by key and step by step."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dicmh_ray.codec.icmh.config import LatentCoderConfig
from dicmh_ray.codec.icmh.layers import round_through
from dicmh_ray.codec.icmh.lfgcm import LatentCoder, anchor_mask, pack, unpack
from tests.codec.icmh.small_latent_coder import (
    SMALL,
    lively_coder,
    pictures,
    reference_coder,
    reference_tensors,
    reference_values,
)

TOLERANCE = 1e-5


def test_keys_and_shapes_at_full_width_are_the_official_ones(reference: Path) -> None:
    shapes = json.loads((reference.parent / "spec" / "diff-icmh-shapes.json").read_text())
    with torch.device("meta"):
        coder = LatentCoder(LatentCoderConfig())
    assert {k: list(v.shape) for k, v in coder.state_dict().items()} == shapes["preprocess_model"]


def test_every_intermediate_is_that_of_the_reference(reference: Path) -> None:
    coder, tensors = reference_coder(reference), reference_tensors(reference)
    found: dict[str, torch.Tensor] = {}

    def remember(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _m, _i, out: found.__setitem__(name, out))

    for index in range(4):
        if index:
            remember(f"channel_ctx.{index}", coder.channel_context[index])
        remember(f"local_ctx.{index}", coder.local_context[index])
        remember(f"params_anchor.{index}", coder.entropy_parameters_anchor[index])
        remember(f"params_nonanchor.{index}", coder.entropy_parameters_nonanchor[index])
    remember("hyper_params", coder.hyper_dec)
    remember("decoder_ref_f_c", coder.f_c)
    with torch.no_grad():
        out = coder(tensors["x"], tensors["ref"])
        parameters, _ = coder.round_y(out.y, out.z_hat)
        found["likelihood_y"] = coder.gaussian_conditional(out.y, *parameters, training=False)[1]
        found["likelihood_z"] = coder.entropy_bottleneck(out.z, training=False)[1]
    found |= {"y": out.y, "z": out.z, "y_hat": out.y_hat, "z_hat": out.z_hat}
    found["c_latent_hat"] = out.estimate
    wanted = {
        key.removeprefix("intermediates/"): tensor
        for key, tensor in tensors.items()
        if key.startswith("intermediates/")
    }
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE, msg=name)
    bpp = out.rounded_bits.item() / tensors["x"][0, 0].numel()
    assert bpp == pytest.approx(reference_values(reference)["intermediates/q_bpp"], abs=1e-4)


def test_tables_are_those_of_the_reference(reference: Path) -> None:
    coder = reference_coder(reference)
    coder.update_tables()
    state = coder.state_dict()
    for key, tensor in reference_tensors(reference).items():
        if key.startswith("tables/"):
            assert torch.equal(state[key.removeprefix("tables/")], tensor), key


def test_a_state_with_tables_loads_and_so_does_one_without() -> None:
    coder, other = lively_coder(), LatentCoder(SMALL)
    empty = {key: tensor.clone() for key, tensor in coder.state_dict().items()}
    coder.update_tables()
    for state in (coder.state_dict(), empty, coder.state_dict()):
        other.load_state_dict(state, strict=True)
        assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in state.items())
        parent = nn.ModuleDict({"coder": LatentCoder(SMALL)})
        parent.load_state_dict({f"coder.{key}": tensor for key, tensor in state.items()})


def test_a_missing_or_foreign_key_is_refused() -> None:
    state = lively_coder().state_dict()
    bias = state.pop("hyper_enc.h_a9.bias")
    with pytest.raises(RuntimeError, match=r"hyper_enc\.h_a9\.bias"):
        LatentCoder(SMALL).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"hyper_enc\.h_a10\.bias"):
        LatentCoder(SMALL).load_state_dict(
            state | {"hyper_enc.h_a9.bias": bias, "hyper_enc.h_a10.bias": bias}
        )


def test_anchors_are_where_row_and_column_differ_in_parity() -> None:
    assert anchor_mask((2, 3), torch.device("cpu")).tolist() == [
        [False, True, False],
        [True, False, True],
    ]
    values = torch.arange(24).reshape(1, 4, 6)
    mask = anchor_mask((4, 6), values.device)
    for is_anchor, own in ((True, mask), (False, ~mask)):
        packed = pack(values, is_anchor)
        assert packed[0].flatten().tolist() == values[0][own].tolist()
        assert torch.equal(unpack(packed, is_anchor), values * own)


def test_the_estimate_and_the_rate_train_every_parameter() -> None:
    coder = lively_coder().train()
    out = coder(*pictures(2, 64, 128))
    assert out.bits.shape == out.rounded_bits.shape == (2,)
    assert not out.rounded_bits.requires_grad
    (out.bits.sum() + out.estimate.square().sum() + coder.aux_loss()).backward()
    idle = [name for name, p in coder.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_noise_costs_about_as_much_as_rounding() -> None:
    coder = lively_coder()
    with torch.no_grad():
        out = coder(*pictures(2, 128, 128))
    torch.testing.assert_close(out.bits, out.rounded_bits, rtol=0.2, atol=0)


def test_y_is_rounded_around_its_means_and_gradients_pass() -> None:
    coder = lively_coder()
    y, z = (t.detach() for t in coder.analyse(*pictures(1, 64, 64)))
    y.requires_grad_()
    parameters, y_hat = coder.round_y(y, coder.round_z(z))
    symbols = y_hat - parameters.means
    torch.testing.assert_close(symbols, symbols.round(), rtol=0, atol=1e-5)
    assert (y_hat - y).abs().max() <= 0.5 + 1e-5
    last = SMALL.slices[-1]
    y_hat[:, -last:].sum().backward()
    assert y.grad is not None
    assert (y.grad[:, -last:] == 1).all()


def test_rounding_gives_exactly_the_rounded_values() -> None:
    x = torch.linspace(-7.5, 7.5, 10_001)
    assert torch.equal(round_through(x), torch.round(x))


def test_a_batch_of_two_costs_what_the_two_cost_alone() -> None:
    coder = lively_coder()
    x, ref = pictures(2, 64, 64)
    with torch.no_grad():
        both = coder(x, ref).rounded_bits
        alone = [coder(x[i : i + 1], ref[i : i + 1]).rounded_bits for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone))


@pytest.mark.parametrize(("image", "latent"), [((60, 64), (7, 8)), ((64, 64), (8, 9))])
def test_sides_that_do_not_fit_are_refused(image: tuple, latent: tuple) -> None:
    with pytest.raises(ValueError, match="64"):
        lively_coder().analyse(torch.zeros(1, 3, *image), torch.zeros(1, 4, *latent))
