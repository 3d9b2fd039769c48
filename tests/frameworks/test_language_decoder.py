"""The language model as a decoder, and actions as its words."""

import pytest
import torch

import tiny_models
from librobot.frameworks.language_decoder import ActionTokens, LanguageDecoder
from librobot.tokenizers.bins import Bins
from librobot.tokenizers.fast import FAST
from librobot.tokenizers.written import WrittenTokens
from librobot.vlms.base import Vocabulary


class Words:
    """Only what ActionTokens asks a backbone for."""

    hidden_size = 8

    def __init__(self, size: int, num_text: int) -> None:
        self.table = torch.nn.Embedding(size, 8)
        self.vocabulary = Vocabulary(size, num_text, 1, 2, 3, lambda text: [], lambda ids: "")

    def parameters(self):
        return self.table.parameters()

    def embed_tokens(self, ids):
        return self.table(ids)


def test_fast_token_0_is_paligemmas_token_257023():
    """vocab - 1 - 128 - i: PaliGemma has 257152 tokens, of which the last 128 mark segments."""
    tokens = ActionTokens(Words(257_216, 257_152), 2048, skip=128)
    assert tokens.ids[:3].tolist() == [257_023, 257_022, 257_021]
    assert tokens.ids[-1] == 257_152 - 1 - 128 - 2047
    assert tokens.embedding is None
    assert tokens.size == 257_216


def test_openvlas_bins_are_llamas_tokens_31999_down_to_31744():
    """The tokenizer's 32000 tokens count, not the 32064 rows that they are padded to."""
    assert ActionTokens(Words(32_064, 32_000), 256).ids[[0, 1, 255]].tolist() == [31_999, 31_998, 31_744]


def test_a_small_vocabulary_keeps_its_tokens_and_new_ones_follow():
    vlm = Words(258, 256)
    tokens = ActionTokens(vlm, 256)
    assert tokens.ids[[0, 255]].tolist() == [258, 513]
    assert tokens.size == 514
    embedded = tokens.embed(vlm, torch.tensor([[5, 258, 300]]))
    assert torch.equal(embedded[0, 0], vlm.table.weight[5])
    assert torch.equal(embedded[0, 1:], tokens.embedding[[0, 42]])


def test_a_backbone_without_actions_has_the_weights_it_always_had():
    one, other = tiny_models.build("openvla"), tiny_models.build("act")
    assert one.vlm.state_dict().keys() == other.vlm.state_dict().keys()
    torch.manual_seed(0)
    assert torch.equal(one.vlm.text.table.weight, other.vlm.text.table.weight)


@pytest.mark.parametrize("start", [(), (257,), (5, 6)])
@pytest.mark.parametrize("vlm", ["tiny", "qwen2vl_tiny"])
@torch.inference_mode()
def test_decoding_step_by_step_gives_what_one_pass_gives(vlm, start):
    framework = tiny_models.build("openvla", vlm=vlm).eval()
    decoder = LanguageDecoder(framework.vlm, framework.tokens, start)
    observation = tiny_models.batch().observation
    observation.image_mask["wrist"][1] = False
    prefix = framework.prefix(observation)
    tokens = torch.randint(0, framework.tokens.size, (4, 5))
    whole = decoder(tokens, prefix)
    writing = decoder.begin(prefix)
    steps = [writing(None)] + [writing(tokens[:, i]) for i in range(4)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_no_token_sees_a_later_one():
    framework = tiny_models.build("openvla").eval()
    prefix = framework.prefix(tiny_models.batch().observation)
    tokens = torch.randint(0, framework.tokens.size, (4, 5))
    before = framework.decoder(tokens, prefix)
    tokens[:, 2] = (tokens[:, 2] + 1) % 256
    after = framework.decoder(tokens, prefix)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def written(inner, ids, **options) -> WrittenTokens:
    inner.attach(horizon=2, action_dim=2)
    return WrittenTokens(inner, lambda: torch.tensor(ids), 40, **options)


def test_bins_between_words():
    inner = Bins(num_bins=4)
    tokens = written(inner, [30, 31, 32, 33], lead=(7, 8), after=(9, 2))
    ids, real = tokens.encode(torch.tensor([[[-1.0, 1.0], [0.1, -0.1]]]))
    assert ids.tolist() == [[7, 8, 30, 33, 32, 31, 9, 2]]
    assert real.all()
    assert tokens.around == (2, 2)
    decoded = tokens.decode(ids, real)
    assert decoded.tolist() == [[[-0.75, 0.75], [0.25, -0.25]]]


def fitted_fast() -> FAST:
    fast = FAST(vocab_size=64, scale=2.0)
    fast.attach(horizon=2, action_dim=2)
    fast.fit(torch.randn(50, 2, 2, generator=torch.Generator().manual_seed(0)))
    return fast


def test_the_stop_of_fast_is_the_first_word_behind():
    fast = fitted_fast()
    tokens = WrittenTokens(fast, lambda: 100 + torch.arange(64), 200, lead=(7,), after=(9, 2))
    actions = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1))
    inner, inner_real = fast.encode(actions)
    ids, real = tokens.encode(actions)
    for row in range(3):
        expected = [7, *(100 + i for i in inner[row][inner_real[row]].tolist()[:-1]), 9, 2]
        assert ids[row][real[row]].tolist() == expected
    assert torch.equal(tokens.decode(ids, real), fast.decode(inner, inner_real))


def test_text_that_is_no_chunk_gives_zeros():
    """openpi: an answer that cannot be decoded is all zeros."""
    tokens = WrittenTokens(fitted_fast(), lambda: 100 + torch.arange(64), 200, lead=(7,), after=(9, 2))
    good, real = tokens.encode(torch.ones(1, 2, 2))
    other = good.clone()
    other[0, 1] = 50  # a word amid the actions
    unled = good.clone()
    unled[0, 0] = 8
    assert tokens.decode(good, real).abs().sum() > 0
    assert tokens.decode(other, real).abs().sum() == 0
    assert tokens.decode(unled, real).abs().sum() == 0


def test_only_action_tokens_are_allowed_and_the_lead_is_given():
    inner = Bins(num_bins=4)
    tokens = written(inner, [30, 31, 32, 33], lead=(7,), after=(2,))
    constraint = tokens.constrain(1, torch.device("cpu"))
    assert constraint.allowed()[0].nonzero().flatten().tolist() == [7]
    constraint.advance(torch.tensor([7]))
    for _ in range(4):
        assert not constraint.done.any()
        assert constraint.allowed()[0].nonzero().flatten().tolist() == [30, 31, 32, 33]
        constraint.advance(torch.tensor([31]))
    assert constraint.done.all()
