"""Tensor code against formulae."""

import math

import pytest
import torch

from librobot.errors import LibrobotError
from librobot.nn import positions
from librobot.nn.attention import Attention, block_mask, with_self
from librobot.nn.norms import GemmaRMSNorm
from librobot.nn.text import ByteEncoder, ByteTokenizer
from librobot.nn.vision import KeypointTower, PatchTower


def test_rotary_products_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8)

    def product(at_q: int, at_k: int) -> float:
        angles = [positions.rotary_angles(torch.tensor([[p]]), 8) for p in (at_q, at_k)]
        rotated = [positions.apply_rotary(x, a) for x, a in zip((q, k), angles, strict=True)]
        return (rotated[0] * rotated[1]).sum().item()

    assert product(3, 1) == pytest.approx(product(12, 10), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-5)
    assert product(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-5)


def test_time_embedding_is_openpis():
    """sin and cos of 2 pi t / period, periods log-spaced from 4e-3 to 4."""
    out = positions.time_embedding(torch.tensor([0.3]), 6)
    periods = [4e-3, math.sqrt(4e-3 * 4.0), 4.0]
    angles = [0.3 * 2 * math.pi / p for p in periods]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(out, torch.tensor([expected]), atol=1e-4, rtol=0)


def test_age_of_the_last_step_is_zero():
    table = positions.age_embedding(3, 7)
    assert (table[-1] == 0).all()
    assert len({tuple(row.tolist()) for row in table}) == 3


def test_sine_map_tells_places_apart():
    table = positions.sine_map(4, 5, 16).flatten(0, 1)
    distance = torch.cdist(table, table) + torch.eye(20)
    assert distance.min() > 0.05


def test_gemma_norm_starts_as_plain_rms():
    norm = GemmaRMSNorm(8)
    x = torch.randn(3, 8) * 5
    torch.testing.assert_close(norm(x), x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt())
    with torch.no_grad():
        norm.scale.fill_(1.0)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.full((3,), 4.0), rtol=1e-4, atol=1e-4)


def test_block_mask():
    blocks = torch.tensor([[0, 0, 1, 2, 2]])
    real = torch.tensor([[True, False, True, True, True]])
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 1], [1, 0, 1, 1, 1]]
    ).bool()
    mask = block_mask(blocks, blocks, real)
    assert torch.equal(mask[0], expected)
    assert with_self(mask)[0, 1, 1]


def test_grouped_heads_equal_repeated_ones():
    grouped, full = Attention(16, 4, 2, 4), Attention(16, 4, 4, 4)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 5, 16)
    angles = positions.rotary_angles(torch.arange(5).expand(2, 5), 4)
    mask = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    outputs = [a(x, angles, *a.keys_values(x, angles), mask) for a in (grouped, full)]
    torch.testing.assert_close(outputs[0], outputs[1])
    with pytest.raises(ValueError, match="num_kv_heads"):
        Attention(16, 4, 3, 4)


def test_tokenizer():
    made = ByteTokenizer(max_tokens=6)(["ab", "é!"])
    assert made["tokens"].tolist() == [[257, 97, 98, 256], [257, 195, 169, 33]]
    assert made["token_mask"].sum(1).tolist() == [3, 4]
    with pytest.raises(LibrobotError, match=r"5 bytes, found 6.*'abcdef'"):
        ByteTokenizer(max_tokens=6)(["abcdef"])


def test_sentence_vector_ignores_padding_and_reads_order():
    encoder = ByteEncoder(8)
    vectors = [
        encoder(made["tokens"], made["token_mask"])
        for made in (ByteTokenizer(40)(prompts) for prompts in (["red on blue"], ["red on blue", "x" * 30]))
    ]
    torch.testing.assert_close(vectors[0][0], vectors[1][0])
    made = ByteTokenizer(40)(["red on blue", "blue on red"])
    first, second = encoder(made["tokens"], made["token_mask"])
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (33, 47)])
def test_towers_take_any_size(size):
    pixels, sentence = torch.randn(2, 3, *size), torch.randn(2, 16)
    tower = KeypointTower(24, num_keypoints=12, keypoints_per_token=4, text_width=16)
    assert tower(pixels, sentence).shape == (2, 3 + 1, 24)
    patches = PatchTower(24, patch_size=16)(pixels, None)
    assert patches.shape == (2, math.ceil(size[0] / 16) * math.ceil(size[1] / 16), 24)


class First(torch.nn.Module):
    """Passes the features on, whatever the instruction."""

    def forward(self, features, sentence):
        return features


def test_keypoints_follow_what_they_track():
    """A hand-made detector of red finds a red square wherever it is."""
    torch.manual_seed(0)
    tower = KeypointTower(8, channels=16, num_blocks=0, num_keypoints=1, keypoints_per_token=1)
    tower.stem, tower.stem_film = torch.nn.AvgPool2d(4), First()
    tower.keypoints = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        tower.keypoints.weight[:] = torch.tensor([[20.0, 0.0, 0.0]])
        tower.log_temperature.zero_()
    for y, x in ((8, 40), (48, 4)):
        pixels = torch.zeros(1, 3, 64, 64)
        pixels[:, 0, y : y + 8, x : x + 8] = 1.0
        with torch.no_grad():
            heatmaps, _ = tower.heatmaps(pixels, torch.zeros(1, 96))
        assert heatmaps.sum().item() == pytest.approx(1.0, abs=1e-4)
        grid = torch.linspace(-1, 1, 16)
        found = tuple((heatmaps[0, :, :, 0].sum(axis) @ grid).item() for axis in (1, 0))
        expected = ((y / 4 + 0.5) / 7.5 - 1, (x / 4 + 0.5) / 7.5 - 1)
        assert found == pytest.approx(expected, abs=0.05)


def test_the_instruction_steers_the_keypoints():
    torch.manual_seed(0)
    tower, pixels = KeypointTower(8), torch.randn(1, 3, 64, 64)
    one, other = (tower.heatmaps(pixels, torch.randn(1, 96))[0] for _ in range(2))
    assert not torch.allclose(one, other)
