"""Keys and values that a denoiser learns to make of hidden states."""

import torch

from librobot.nn.learned_cache import LearnedCache


def make(**changes) -> LearnedCache:
    torch.manual_seed(0)
    options = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "rope_theta": 100.0}
    return LearnedCache(12, **(options | changes))


@torch.no_grad()
def test_every_layer_has_its_own_projections_and_keys_are_rotated_by_position():
    made, hidden = make(), torch.randn(1, 5, 12)
    keys, values = made(hidden, torch.ones(1, 5, dtype=torch.bool))
    assert len(keys) == len(values) == 3
    for layer in range(3):
        plain = (hidden @ made.k_proj[layer].weight.T).view(5, 2, 2, 4)  # token, head, half, pair
        turned = torch.complex(plain[:, :, 0], plain[:, :, 1])
        for token in range(5):
            for pair in range(4):
                angle = torch.tensor(token * 100.0 ** (-2 * pair / 8))
                turned[token, :, pair] *= torch.polar(torch.tensor(1.0), angle)
        expected = torch.cat((turned.real, turned.imag), dim=-1).transpose(0, 1)[None]
        torch.testing.assert_close(keys[layer], expected, atol=1e-5, rtol=1e-5)
        expected = (hidden @ made.v_proj[layer].weight.T).view(1, 5, 2, 8).transpose(1, 2)
        torch.testing.assert_close(values[layer], expected)


@torch.no_grad()
def test_tokens_that_are_not_real_take_no_position():
    made, hidden = make(), torch.randn(1, 3, 12)
    keys, _ = made(hidden, torch.ones(1, 3, dtype=torch.bool))
    gap = torch.full((1, 2, 12), 9.0)
    apart = torch.cat((gap, hidden[:, :1], gap, hidden[:, 1:], gap), dim=1)
    mask = torch.tensor([[0, 0, 1, 0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    moved, _ = made(apart, mask)
    for one, other in zip(keys, moved, strict=True):
        torch.testing.assert_close(other[:, :, mask[0]], one)


def test_hidden_states_of_another_dtype():
    keys, values = make()(torch.randn(1, 3, 12).bfloat16(), torch.ones(1, 3, dtype=torch.bool))
    assert keys[0].dtype == values[0].dtype == torch.float32
