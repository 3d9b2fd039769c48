"""State encoders and the vector quantiser against their definitions."""

import math

import pytest
import torch
from hydra.utils import instantiate
from torch.nn import functional

import tiny_models
from librobot.nn.positions import age_embedding
from librobot.nn.state_encoders import MLPState, StateEncoder, TokenState, TransformerState, VQState
from librobot.nn.vector_quantizer import VectorQuantizer, perplexity

SIZES = {"state_dim": 5, "width": 16}


def built(name: str, obs_steps: int = 1, **changes) -> StateEncoder:
    torch.manual_seed(0)
    made = instantiate(tiny_models.node("state_encoder", name, **changes))(obs_steps=obs_steps, **SIZES)
    return made.eval()


@pytest.mark.parametrize("obs_steps", [1, 3])
@pytest.mark.parametrize("name", tiny_models.options("state_encoder"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_option_makes_tokens_and_trains(name, obs_steps, dtype):
    encoder = built(name, obs_steps).to(dtype)
    state = torch.randn(4, obs_steps, 5).to(dtype)
    tokens = encoder(state)
    assert tokens.shape == (4, encoder.num_tokens, 16)
    assert tokens.dtype == dtype
    loss = tokens.square().sum()
    (loss + encoder.auxiliary_loss() if name == "vq" else loss).backward()
    assert all((parameter.grad != 0).any() for parameter in encoder.parameters())
    alone = encoder(state[1:2])
    torch.testing.assert_close(alone[0], tokens[1], atol=1e-5 if dtype == torch.float32 else 5e-2, rtol=1e-2)


@pytest.mark.parametrize("name", tiny_models.options("state_encoder"))
def test_every_option_tells_steps_apart_and_needs_a_state(name):
    encoder = built(name, 2)
    same = encoder(torch.zeros(1, 2, 5)).unflatten(1, (2, -1))
    assert not torch.allclose(same[:, 0], same[:, 1])
    with pytest.raises(ValueError, match="state_dim must be at least 1, found 0"):
        instantiate(tiny_models.node("state_encoder", name))(state_dim=0, obs_steps=1, width=16)


def test_one_layer_of_the_perceptron_is_linear():
    encoder = built("mlp", 3, num_layers=1)
    linear, state = next(m for m in encoder.modules() if isinstance(m, torch.nn.Linear)), torch.randn(2, 3, 5)
    expected = torch.einsum("bts,ds->btd", state, linear.weight) + linear.bias + age_embedding(3, 16)
    torch.testing.assert_close(encoder(state), expected)
    deeper = built("mlp", 3, num_layers=3, mlp_width=7)
    assert [m.out_features for m in deeper.modules() if isinstance(m, torch.nn.Linear)] == [7, 7, 16]
    with pytest.raises(ValueError, match="num_layers must be at least 1, found 0"):
        MLPState(**SIZES, obs_steps=1, num_layers=0)


def silenced(encoder: TransformerState) -> TransformerState:
    with torch.no_grad():
        for layer in encoder.encoder.layers:
            for last in (layer.self_attn.out_proj, layer.linear2):
                last.weight.zero_()
                last.bias.zero_()
    return encoder


def test_the_transformers_tokens_stand_for_dimensions():
    """With silenced layers, token (t, s) is project(norm(value * weight_s + bias_s + age_t))."""
    encoder, state = silenced(built("transformer", 2)), torch.randn(3, 2, 5)
    tokens = torch.einsum("bts,sd->btsd", state, encoder.weight) + encoder.bias
    inner = tokens.shape[-1]
    tokens = tokens + age_embedding(2, inner)[:, None]
    expected = encoder.project(functional.layer_norm(tokens, (inner,)))
    torch.testing.assert_close(encoder(state), expected.flatten(1, 2))
    pooled = silenced(built("transformer", 2, pool=True))
    torch.testing.assert_close(pooled(state), expected.mean(dim=2), atol=1e-5, rtol=1e-5)


def test_the_transformer_mixes_dimensions_and_steps():
    encoder, state = built("transformer", 2), torch.randn(1, 2, 5)
    moved = state.clone()
    moved[0, 0, 0] += 1.0
    difference = (encoder(moved) - encoder(state)).abs().amax(dim=-1)[0]
    assert (difference > 1e-4).all()
    with pytest.raises(ValueError, match="num_heads must divide inner_width=128, found 3"):
        TransformerState(**SIZES, obs_steps=1, num_heads=3)


def test_bins_are_openpis_and_their_edges_are_exact():
    """openpi numbers them by digitize over linspace(-1, 1, 257)[:-1]; here the ends are clipped too."""
    encoder = TokenState(**SIZES, obs_steps=1, low=-1.0, high=1.0)
    values = torch.cat((torch.linspace(-1.3, 1.3, 995), torch.tensor([-1.0, 0.0, 1.0, 0.5, -0.25])))
    edges = torch.linspace(-1, 1, 257)[:-1]
    expected = (torch.bucketize(values, edges, right=True) - 1).clamp(0, 255)
    assert torch.equal(encoder.bins(values.view(1, 200, 5)).flatten(), expected)
    assert expected[-5:].tolist() == [0, 128, 255, 192, 96]
    wider = TokenState(**SIZES, obs_steps=1, num_bins=4, low=-3.0, high=1.0)
    assert wider.bins(torch.tensor([[[-9.0, -2.5, -1.5, 0.5, 7.0]]])).flatten().tolist() == [0, 0, 1, 3, 3]


def test_each_dimension_has_a_table_of_its_own():
    encoder = TokenState(**SIZES, obs_steps=2, num_bins=8)
    tables = encoder.table.weight.view(5, 8, 16)
    state = torch.rand(3, 2, 5) * 6 - 3
    tokens = encoder(state).view(3, 2, 5, 16) - age_embedding(2, 16)[:, None]
    bins = encoder.bins(state)
    for s in range(5):
        torch.testing.assert_close(tokens[:, :, s], tables[s, bins[:, :, s]])
    for changes, message in (({"num_bins": 1}, "num_bins must be at least 2"), ({"low": 4.0}, "low must be")):
        with pytest.raises(ValueError, match=message):
            TokenState(**SIZES, obs_steps=1, **changes)


def test_the_code_is_the_nearest_one():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(7, 3), torch.randn(4, 6, 3)
    quantized = quantizer(z)
    distance = (z[:, :, None] - quantizer.codebook.weight).square().sum(-1)
    assert torch.equal(quantized.codes, distance.argmin(-1))
    torch.testing.assert_close(quantized.values, quantizer.codebook.weight[quantized.codes])


def test_the_gradient_passes_straight_through():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(7, 3), torch.randn(5, 3, requires_grad=True)
    direction = torch.randn(5, 3)
    (quantizer(z).values * direction).sum().backward()
    torch.testing.assert_close(z.grad, direction)
    assert quantizer.codebook.weight.grad is None or (quantizer.codebook.weight.grad == 0).all()


@pytest.mark.parametrize("commitment", [0.0, 0.25, 2.0])
def test_the_loss_pulls_codes_to_vectors_and_vectors_to_codes(commitment):
    """The gradient of mean((z - e)^2) is 2 (z - e) / count: whole for the code, times commitment for z."""
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(7, 3, commitment=commitment), torch.randn(5, 3, requires_grad=True)
    quantized = quantizer(z)
    apart = (z - quantizer.codebook.weight[quantized.codes]).detach()
    torch.testing.assert_close(quantized.loss.detach(), (1 + commitment) * apart.square().mean())
    quantized.loss.backward()
    torch.testing.assert_close(z.grad, commitment * 2 * apart / 15)
    expected = torch.zeros(7, 3).index_add_(0, quantized.codes, -2 * apart / 15)
    torch.testing.assert_close(quantizer.codebook.weight.grad, expected)


def test_perplexity_counts_codes():
    assert perplexity(torch.tensor([3, 3, 3]), 8).item() == pytest.approx(1.0)
    assert perplexity(torch.arange(8).view(2, 4), 8).item() == pytest.approx(8.0)
    three_to_one = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert perplexity(torch.tensor([0, 0, 0, 5]), 8).item() == pytest.approx(math.exp(three_to_one))


@pytest.mark.parametrize(
    ("changes", "message"), [({"num_codes": 1}, "num_codes"), ({"commitment": -1}, "commit")]
)
def test_the_quantizer_refuses_nonsense(changes, message):
    with pytest.raises(ValueError, match=message):
        VQState(**SIZES, obs_steps=1, **changes)


def test_a_learned_codebook_keeps_what_the_state_says():
    """Trained to give the state back, it explains most of its variance with many codes in use."""
    torch.manual_seed(0)
    encoder = VQState(state_dim=2, obs_steps=1, width=16, num_codes=32, mlp_width=32)
    read = torch.nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *read.parameters()], lr=1e-2)
    assert encoder.auxiliary_loss() == 0
    for _ in range(150):
        state = torch.rand(32, 1, 2) * 2 - 1
        loss = functional.mse_loss(read(encoder(state)), state) + encoder.auxiliary_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = torch.rand(2000, 1, 2) * 2 - 1
    with torch.no_grad():
        error = functional.mse_loss(read(encoder(state)), state) / state.var()
        codes = encoder.quantizer(encoder.encoder(state)).codes
    assert error < 0.2
    assert perplexity(codes, 32) > 8
