"""What every network must hold, whatever its form."""

from dataclasses import replace

import network_cases as cases
import pytest
import torch
from network_cases import SIZES

QUIET = replace(SIZES, takes_noise=False)
VARIANTS = [
    *((name, {}) for name in cases.DENOISERS),
    ("dit", {"cross_attention": "alternate", "modulation": "adaln", "pool_context": True, "num_layers": 3}),
    ("unet", {"pool": "attention", "film_scale": False}),
    ("detr", {"pre_norm": True, "activation": "gelu"}),
]


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join((v[0], *map(str, v[1].values()))))
def variant(request):
    return request.param


@pytest.fixture(params=[SIZES, QUIET], ids=["noise", "quiet"])
def sizes(request):
    return request.param


@pytest.fixture
def denoiser(variant, sizes):
    return cases.build(variant[0], sizes=sizes, **variant[1])


@pytest.fixture
def decoder():
    return cases.build("causal")


def tokens(size: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(SIZES.vocabulary, (size, SIZES.max_tokens), generator=draw)


def test_kinds():
    assert {name: cases.build(name).kind for name in cases.OPTIONS} == {
        name: cases.kind_of(name) for name in cases.OPTIONS
    }


def test_shape(denoiser, decoder):
    out = denoiser(*cases.chunk(), cases.context())
    assert out.shape == (4, SIZES.horizon, SIZES.output_width)
    assert decoder(tokens(), cases.context()).shape == (4, SIZES.max_tokens, SIZES.vocabulary)


@torch.no_grad()
def test_masked_tokens_have_no_influence_and_real_ones_have(denoiser, decoder):
    given = cases.context()
    hidden = given.values.masked_fill(~given.mask.unsqueeze(-1), 1e6)
    changed = given.values + given.mask.unsqueeze(-1) * torch.linspace(-1, 1, SIZES.context_width)
    for network, inputs in ((denoiser, cases.chunk()), (decoder, (tokens(),))):
        before = network(*inputs, given)
        assert torch.equal(network(*inputs, replace(given, values=hidden)), before)
        after = network(*inputs, replace(given, values=changed))
        assert ((after - before).abs().amax(dim=-1) > 1e-4).all()


@torch.no_grad()
def test_a_dropped_context_is_the_same_for_all(denoiser, decoder):
    x_t, time = cases.chunk(1)
    given = cases.context().dropped(torch.ones(4, dtype=torch.bool))
    for out in (
        denoiser(x_t.expand(4, -1, -1), time.expand(4), given),
        decoder(tokens(1).expand(4, -1), given),
    ):
        torch.testing.assert_close(out, out[:1].expand_as(out))


@torch.no_grad()
def test_samples_are_independent(denoiser, decoder):
    given = cases.context()
    for network, inputs in ((denoiser, cases.chunk()), (decoder, (tokens(),))):
        together = network(*inputs, given)
        alone = network(*(x[2:3] for x in inputs), cases.rows(given, slice(2, 3)))
        torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=1e-4)


def idle(variant, sizes) -> set[str]:
    """Without noise, DETR's first self-attention is among zeros, which nothing but rounding multiplies."""
    if variant[0] != "detr" or sizes.takes_noise:
        return set()
    first = "decoder.layers.0."
    return {first + "self_attention.in_proj_weight", first + "around_self_attention.norm.weight"}


def test_a_gradient_for_every_parameter(denoiser, variant, sizes):
    denoiser(*cases.chunk(), cases.context()).square().sum().backward()
    without = {n for n, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()}
    assert without <= idle(variant, sizes)


def test_a_gradient_for_every_parameter_of_the_decoder(decoder):
    decoder(tokens(), cases.context()).square().sum().backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_gradient_reaches_the_context(denoiser):
    given = cases.context()
    values = given.values.requires_grad_()
    denoiser(*cases.chunk(), given).square().sum().backward()
    assert values.grad is not None
    moved = values.grad.abs().amax(dim=-1) > 0
    assert torch.equal(moved, given.mask)


@torch.no_grad()
def test_noise_and_time_count_only_where_the_head_has_them(denoiser, sizes):
    x_t, time = cases.chunk()
    before = denoiser(x_t, time, cases.context())
    noisier = denoiser(x_t + 1, time, cases.context())
    later = denoiser(x_t, time + 0.05, cases.context())
    if sizes.takes_noise:
        assert (noisier - before).abs().amax(dim=(1, 2)).min() > 1e-4
        assert (later - before).abs().amax(dim=(1, 2)).min() > 1e-4
    else:
        assert torch.equal(noisier, before)
        assert torch.equal(later, before)


@torch.no_grad()
def test_steps_of_a_chunk_see_each_other(variant):
    x_t, time = cases.chunk()
    network = cases.build(variant[0], **variant[1])
    before = network(x_t, time, cases.context())
    x_t[:, 0] += 1.0
    assert ((network(x_t, time, cases.context()) - before)[:, 2].abs().amax(dim=-1) > 1e-5).all()


@torch.no_grad()
def test_half_precision_takes_inputs_of_any(denoiser, decoder):
    for network, inputs in ((denoiser, cases.chunk()), (decoder, (tokens(),))):
        exact = network(*inputs, cases.context())
        rounded = network.bfloat16()(*inputs, cases.context())
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.02


@torch.no_grad()
def test_autocast(denoiser):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert denoiser(*cases.chunk(), cases.context()).isfinite().all()


def test_the_horizon_is_checked(variant):
    x_t, time = cases.chunk()
    with pytest.raises(ValueError, match=r"6 actions.*found 5"):
        cases.build(variant[0], **variant[1])(x_t[:, :5], time, cases.context())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dit", {"cross_attention": "odd"}, "cross_attention.*every, alternate"),
        ("dit", {"modulation": "film"}, "modulation.*adaln_zero, adaln"),
        ("dit", {"num_layers": 1, "cross_attention": "alternate"}, "num_layers.*at least 2"),
        ("dit", {"num_layers": 0}, "num_layers.*at least 1"),
        ("dit", {"num_heads": 5}, "num_heads must divide"),
        ("mlp", {"width": 31}, "width must be even.*31"),
        ("unet", {"pool": "max"}, "pool.*mean, attention"),
        ("unet", {"level_channels": [16, 36], "num_groups": 8}, "level_channels.*num_groups=8"),
        ("unet", {"level_channels": [8], "num_groups": 8}, "level_channels"),
        ("unet", {"level_channels": []}, "level_channels"),
        ("unet", {"kernel_size": 4}, "kernel_size must be odd"),
        ("oft", {"num_layers": 0}, "num_layers.*at least 1"),
        ("detr", {"num_layers": 0}, "num_layers.*at least 1"),
        ("causal", {"num_heads": 32}, "multiple of 2"),
        ("ensemble", {"num_members": 3}, "output width of 10, found 3"),
    ],
)
def test_options_are_checked(name, changes, message):
    with pytest.raises(ValueError, match=message):
        cases.build(name, **changes)
