"""Long histories in bounded memory: against the definition, token by token."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build
from librobot.vlms.sliding_cache import SlidingCache

SINKS, WINDOW = 3, 8


def text_model(num_layers: int):
    torch.manual_seed(0)
    node = tiny_models.node("vlm", "qwen2vl_tiny", num_layers=num_layers)
    return build(OmegaConf.create(node), "vlm").eval()


def stream(vlm, embeddings: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, list[int]]:
    """The outputs of all tokens, fed in portions of these sizes, and the memory after each portion."""
    cache = SlidingCache(vlm.geometry, SINKS, WINDOW)
    outputs, memory, place = [], [], 0
    for size in sizes:
        positions = cache.make_room(size)
        out = vlm.text(
            inputs_embeds=embeddings[:, place : place + size],
            position_ids=positions.expand(len(embeddings), -1),
            past_key_values=cache,
            use_cache=True,
        )
        outputs.append(out.last_hidden_state)
        memory.append(cache.memory)
        place += size
    return torch.cat(outputs, dim=1), memory


@torch.inference_mode()
def test_the_newest_token_sees_sinks_and_window_at_their_places():
    """In one layer a token's keys depend on that token only: the definition is a pass over what is kept."""
    vlm = text_model(num_layers=1)
    embeddings = torch.randn(2, 40, vlm.hidden_size)
    outputs, _ = stream(vlm, embeddings, [1] * 40)
    for last in (5, SINKS + WINDOW - 1, SINKS + WINDOW, 23, 39):
        begin = max(SINKS, last + 1 - WINDOW)
        kept = torch.cat((embeddings[:, : min(SINKS, last + 1)], embeddings[:, begin : last + 1]), dim=1)
        expected = vlm.text(inputs_embeds=kept).last_hidden_state[:, -1]
        torch.testing.assert_close(outputs[:, last], expected, atol=1e-5, rtol=1e-4)
    full = vlm.text(inputs_embeds=embeddings).last_hidden_state
    assert not torch.allclose(outputs[:, 39], full[:, 39], atol=1e-3)


@torch.inference_mode()
def test_nothing_is_forgotten_while_all_fits():
    vlm = text_model(num_layers=2)
    embeddings = torch.randn(2, SINKS + WINDOW, vlm.hidden_size)
    outputs, _ = stream(vlm, embeddings, [4, 1, 5, 1])
    full = vlm.text(inputs_embeds=embeddings).last_hidden_state
    torch.testing.assert_close(outputs, full, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_memory_stays_flat():
    vlm = text_model(num_layers=2)
    _, memory = stream(vlm, torch.randn(1, 300, vlm.hidden_size), [1] * 300)
    shape = vlm.geometry
    full = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4 * (SINKS + WINDOW)
    assert set(memory[SINKS + WINDOW - 1 :]) == {full}
    assert memory[: SINKS + WINDOW] == sorted(memory[: SINKS + WINDOW])


def test_more_than_the_window_at_once_is_refused():
    vlm = text_model(num_layers=1)
    cache = SlidingCache(vlm.geometry, SINKS, WINDOW)
    with pytest.raises(ValueError, match="between 1 and 8 tokens"):
        cache.make_room(9)
    with pytest.raises(ValueError, match="window"):
        SlidingCache(vlm.geometry, 4, 0)
