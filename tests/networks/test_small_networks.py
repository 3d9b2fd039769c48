"""Definitions of the plain networks (OFT's MLP, Octo's, ACT's decoder), and networks made of others."""

from dataclasses import replace

import network_cases as cases
import pytest
import torch
from network_cases import SIZES
from torch.nn import functional

from librobot.networks.causal import CausalDecoder
from librobot.networks.ensemble import DeepEnsemble
from librobot.networks.mlp import MLPDenoiser
from librobot.networks.oft import ResidualMLP
from librobot.networks.pair import Pair

QUIET = replace(SIZES, takes_noise=False)


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def linears(module):
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear)]


@torch.no_grad()
def test_the_residual_mlp_is_its_definition():
    """Norms still have weights of one and biases of zero, so they drop out of the definition."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    mlp = ResidualMLP(12, 3, width=8, num_blocks=2)
    first, *branches, last = linears(mlp)
    expected = first(layer_norm(x)).relu()
    for linear in branches:
        expected = expected + linear(layer_norm(expected)).relu()
    assert len(branches) == 2
    torch.testing.assert_close(mlp(x), last(layer_norm(expected)))


@torch.no_grad()
def test_oft_keeps_dimensions_and_actions_in_order():
    """With attention switched off, an action's output depends on its own numbers alone."""
    network = cases.build("oft")
    for layer in network.layers:
        layer.attention.o_proj.weight.zero_()
    x_t, time = cases.chunk()
    before = network(x_t, time, cases.context())
    x_t[:, 2, 1] += 1.0
    moved = (network(x_t, time, cases.context()) - before).abs().amax(dim=(0, 2)) > 1e-5
    assert moved.tolist() == [False, False, True, False, False, False]


@torch.no_grad()
def test_oft_slots_are_a_number_a_position_and_a_time():
    network = cases.build("oft")
    seen: dict[str, torch.Tensor] = {}
    network.layers[0].register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0], all=inputs[1]))
    x_t, time = cases.chunk()
    network(x_t, time, cases.context())
    number = torch.einsum("bka,d->bkad", x_t, network.value_proj.weight[:, 0]) + network.value_proj.bias
    slots = number + network.positions + network.time_mlp(time)[:, None, None]
    torch.testing.assert_close(seen["x"], slots.reshape(4, 18, -1))
    torch.testing.assert_close(seen["all"][:, :5], network.context_proj(cases.context()))
    torch.testing.assert_close(seen["all"][:, 5:], seen["x"])


@torch.no_grad()
def test_the_smallest_denoiser_is_its_definition():
    torch.manual_seed(0)
    network = MLPDenoiser(sizes=SIZES, width=16, num_blocks=2)
    assert network.time_mlp is not None
    x_t, time = cases.chunk()
    given = cases.context()
    mean = torch.stack([v[m].mean(dim=0) for v, m in zip(given.values, given.mask, strict=True)])
    parts = (x_t.flatten(1), network.time_mlp(time), network.context_pool.proj(mean))
    x = network.enter(torch.cat(parts, dim=-1))
    for block in network.blocks:
        wide, narrow = linears(block)
        x = x + narrow(functional.silu(wide(layer_norm(x))))
    expected = network.leave(functional.silu(x)).reshape(4, SIZES.horizon, SIZES.output_width)
    torch.testing.assert_close(network(x_t, time, given), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_detr_is_torchs_decoder_where_positions_are_zero():
    network = cases.build("detr", sizes=SIZES)
    network.queries.weight.zero_()
    own = network.decoder.layers[0].self_attention
    reference = torch.nn.TransformerDecoder(
        torch.nn.TransformerDecoderLayer(own.embed_dim, own.num_heads, 48, batch_first=True),
        len(network.decoder.layers),
        norm=torch.nn.LayerNorm(own.embed_dim),
    ).eval()
    names = {
        "self_attention": "self_attn",
        "cross_attention": "multihead_attn",
        "feed_forward.0": "linear1",
        "feed_forward.3": "linear2",
        "around_self_attn.norm": "norm1",
        "around_multihead_attn.norm": "norm2",
        "around_feed_forward.norm": "norm3",
    }
    weights = {}
    for name, value in network.decoder.state_dict().items():
        for before, after in names.items():
            name = name.replace(before, after)
        weights[name] = value
    reference.load_state_dict(weights, strict=True)
    x_t, time = cases.chunk()
    given = cases.context()
    x = network.action_proj(x_t) + network.time_mlp(time)[:, None]
    expected = reference(x, network.context_proj(given), memory_key_padding_mask=~given.mask)
    torch.testing.assert_close(network(x_t, time, given), network.output_proj(expected), atol=1e-5, rtol=1e-5)


def member(*, sizes):
    return MLPDenoiser(sizes=sizes, width=16, num_blocks=1)


def decoder(*, sizes):
    return CausalDecoder(sizes=sizes, width=16, num_layers=1, num_heads=2, mlp_width=32)


@torch.no_grad()
def test_an_ensemble_is_its_members_side_by_side():
    torch.manual_seed(0)
    ensemble = DeepEnsemble(sizes=QUIET, member=member, num_members=5)
    out = ensemble(*cases.chunk(), cases.context()).unflatten(-1, (5, 2))
    for i, alone in enumerate(ensemble.members):
        assert torch.equal(out[..., i, :], alone(*cases.chunk(), cases.context()))
    assert (out[..., 0, :] - out[..., 1, :]).abs().mean() > 0.01, "each has weights of its own"


def test_members_do_not_learn_from_each_other():
    ensemble = DeepEnsemble(sizes=QUIET, member=member, num_members=5)
    ensemble(*cases.chunk(), cases.context())[..., 2:4].square().sum().backward()
    learning = [any(p.grad is not None and p.grad.any() for p in m.parameters()) for m in ensemble.members]
    assert learning == [False, True, False, False, False]


def test_a_pair_is_a_mapping():
    pair = Pair(sizes=SIZES, denoiser=member, decoder=decoder)
    assert dict(pair) == {"denoiser": pair.denoiser, "decoder": pair.decoder}
    assert isinstance(pair["denoiser"], MLPDenoiser)
    assert isinstance(pair["decoder"], CausalDecoder)
    parts = (pair.denoiser, pair.decoder)
    assert len(list(pair.parameters())) == sum(len(list(part.parameters())) for part in parts)
    with pytest.raises(KeyError):
        pair["critic"]


def test_wrong_kinds():
    with pytest.raises(ValueError, match=r"decoder must be .* found MLPDenoiser, which is a denoiser"):
        Pair(sizes=SIZES, denoiser=member, decoder=member)
    with pytest.raises(ValueError, match="member must be a denoiser, found CausalDecoder"):
        DeepEnsemble(sizes=SIZES, member=decoder, num_members=2)
