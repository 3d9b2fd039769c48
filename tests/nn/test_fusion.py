"""State and backbone tokens become one context; each fusion against its formula."""

import pytest
import torch
from hydra.utils import instantiate

import tiny_models

WIDTH = 16
FUSIONS = tiny_models.options("fusion")
PREPENDS = ["concatenate", "cross_attention"]


def built(name: str, *, moved: bool = True, **changes) -> torch.nn.Module:
    """`moved` puts the parameters that start at zero elsewhere."""
    torch.manual_seed(0)
    fusion = instantiate(tiny_models.node("fusion", name, **changes))(width=WIDTH)
    if moved:
        with torch.no_grad():
            for parameter in fusion.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.5)
    return fusion


def inputs(num_state: int = 3, **kind):
    draw = torch.Generator().manual_seed(1)
    vision = torch.randn(2, 5, WIDTH, generator=draw).to(**kind)
    state = torch.randn(2, num_state, WIDTH, generator=draw).to(**kind)
    mask = torch.tensor([[True] * 5, [False, True, True, False, False]])
    return vision, mask, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSIONS)
def test_every_option_makes_a_context_and_trains(name, dtype):
    fusion, (vision, mask, state) = built(name).to(dtype), inputs(dtype=dtype)
    state.requires_grad_()
    values, real = fusion(vision, mask, state)
    assert values.dtype == dtype
    expected = torch.cat((torch.ones(2, 3, dtype=torch.bool), mask), dim=1) if name in PREPENDS else mask
    assert torch.equal(real, expected)
    assert values.shape == (*real.shape, WIDTH)
    values[real].float().square().sum().backward()
    assert (state.grad != 0).any(dim=-1).all()
    assert all((parameter.grad != 0).any() for parameter in fusion.parameters())


@pytest.mark.parametrize("name", FUSIONS)
def test_hidden_tokens_never_reach_real_ones(name):
    fusion, (vision, mask, state) = built(name), inputs()
    before, real = fusion(vision, mask, state)
    after, _ = fusion(vision.masked_fill(~mask[..., None], 1e4), mask, state)
    assert torch.equal(after[real], before[real])


@pytest.mark.parametrize("name", FUSIONS)
def test_real_state_and_samples_without_any_vision_are_finite_and_independent(name):
    fusion, (vision, mask, state) = built(name), inputs()
    mask[1] = False
    together, _ = fusion(vision, mask, state)
    assert together.isfinite().all()
    alone, _ = fusion(vision[:1], mask[:1], state[:1])
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FUSIONS)
def test_without_state_the_backbones_tokens_are_the_context(name):
    vision, mask, state = inputs(num_state=0)
    values, real = built(name)(vision, mask, state)
    assert torch.equal(values, vision)
    assert torch.equal(real, mask)


@pytest.mark.parametrize("name", ["film", "gated"])
def test_pretrained_features_pass_unchanged_at_first(name):
    vision, mask, state = inputs()
    assert torch.equal(built(name, moved=False)(vision, mask, state)[0], vision)
    assert not torch.allclose(built(name)(vision, mask, state)[0], vision, atol=1e-2)


def test_concatenate_puts_the_state_first():
    vision, mask, state = inputs()
    assert torch.equal(built("concatenate")(vision, mask, state)[0], torch.cat((state, vision), dim=1))


def test_film_scales_and_shifts_by_the_mean_state():
    fusion, (vision, mask, state) = built("film"), inputs()
    weight, bias = fusion.film.weight.view(2, WIDTH, WIDTH), fusion.film.bias.view(2, WIDTH)
    scale, shift = torch.einsum("pde,bne->pbd", weight, state) / 3 + bias[:, None]
    expected = vision * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(fusion(vision, mask, state)[0], expected, atol=1e-5, rtol=1e-5)


def attend(attention, x, context, mask):
    """Attention in plain einsum, two heads of width 8."""
    q, k, v = (
        project(y).unflatten(-1, (2, 8))
        for project, y in ((attention.q_proj, x), (attention.k_proj, context), (attention.v_proj, context))
    )
    logits = torch.einsum("bqhe,blhe->bhql", q, k) / 8**0.5
    weights = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    return attention.o_proj(torch.einsum("bhql,blhe->bqhe", weights, v).flatten(-2))


def test_cross_attention_lets_the_state_read_what_is_real():
    fusion, (vision, mask, state) = built("cross_attention", num_layers=2, num_heads=2), inputs()
    values, _ = fusion(vision, mask, state)
    assert torch.equal(values[:, 3:], vision)
    for block in fusion.layers:
        context = block.norm_context(vision)
        state = state + attend(block.attention, block.norm_x(state), context, mask)
        state = state + block.mlp(block.norm_mlp(state))
    torch.testing.assert_close(values[:, :3], state, atol=1e-5, rtol=1e-5)


def test_gated_lets_the_backbone_read_the_state():
    fusion, (vision, mask, state) = built("gated", num_layers=2, num_heads=2), inputs()
    values, _ = fusion(vision, mask, state)
    everything = torch.ones(2, 3, dtype=torch.bool)
    for block in fusion.layers:
        one, two = block.gates.tanh()
        context = block.norm_context(state)
        vision = vision + one * attend(block.attention, block.norm_x(vision), context, everything)
        vision = vision + two * block.mlp(block.norm_mlp(vision))
    torch.testing.assert_close(values, vision, atol=1e-5, rtol=1e-5)
