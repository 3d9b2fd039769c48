"""Frameworks that write, with rows of several samples: the losses and gradients of rows of one."""

import json

import pytest
import torch

import tiny_models
from librobot.errors import LibrobotError
from librobot.frameworks.vision_language import Pairs
from librobot.heads.base import hold_last

WRITERS = ["pi0_fast", "openvla", "rt2"]
BACKBONES = ["tiny", "qwen2vl_tiny", "paligemma_tiny"]


@pytest.fixture
def pairs(tmp_path):
    lines = [("what is it?", "a square"), ("two and two?", "four"), ("and now, after all of that?", "no")]
    text = "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in lines)
    (tmp_path / "pairs.jsonl").write_text(text)
    return {"file": str(tmp_path / "pairs.jsonl"), "ratio": 1.0}


def data_for(framework):
    data = tiny_models.batch(8, horizon=framework.horizon)
    data.observation.image_mask["wrist"][2:5] = False  # absent cameras are padding too
    data.actions *= torch.linspace(0.1, 3.0, 8)[:, None, None]  # of which FAST makes answers of all lengths
    return data


def learned(name, vlm, **options):
    """Losses of each sample, the loss, and all gradients."""
    framework = tiny_models.build(name, vlm=vlm, **options).train()
    of_samples = []
    loss_of = framework.head.loss
    framework.head.loss = lambda *given, **more: of_samples.append(loss_of(*given, **more)) or of_samples[-1]
    loss = tiny_models.fixed_loss(framework, data_for(framework))
    loss.backward()
    gradients = {n: p.grad for n, p in framework.named_parameters() if p.grad is not None}
    return framework, of_samples[0].detach(), loss.detach(), gradients


def assert_same(one, other):
    for ours, theirs in zip(one[1:3], other[1:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert one[3].keys() == other[3].keys()
    for name, gradient in one[3].items():
        torch.testing.assert_close(gradient, other[3][name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("vlm", BACKBONES)
@pytest.mark.parametrize("name", WRITERS)
def test_losses_and_gradients_are_those_of_padded_rows(name, vlm):
    assert_same(learned(name, vlm), learned(name, vlm, pack=True))


@pytest.mark.parametrize("options", [{"pack_length": 1}, {"pack_length": 4000}, {"start": "begin"}])
def test_whatever_the_length_of_a_row_and_with_a_start_token(options):
    start = {key: value for key, value in options.items() if key == "start"}
    assert_same(learned("pi0_fast", "tiny", **start), learned("pi0_fast", "tiny", pack=True, **options))


@pytest.mark.parametrize("name", ["pi0_fast", "rt2"])
def test_pairs_of_question_and_answer_are_packed_too(name, pairs):
    options = {"vision_language": pairs}
    assert_same(learned(name, "tiny", **options), learned(name, "tiny", **options, pack=True))


def test_of_pi05_the_pairs_are_packed(pairs, monkeypatch):
    drawn = [Pairs(**pairs).draw(8, (16, 16)) for _ in range(2)]
    monkeypatch.setattr(Pairs, "draw", lambda *_: drawn[0])
    answering, counted = [], []
    for pack in (False, True):
        framework = tiny_models.build("pi05", vision_language=pairs, pack=pack).train()
        framework.vlm.blocks[0].register_forward_hook(lambda block, given, out: counted.append(out[0]))
        answering.append(framework.co_training.answering(drawn[0], torch.device("cpu")))
    torch.testing.assert_close(*answering, atol=1e-5, rtol=1e-5)
    prefix, behind, packed = (x.shape[0] * x.shape[1] for x in counted)
    assert packed < 0.8 * (prefix + behind)
    with pytest.raises(LibrobotError, match="pack=true has no effect without vision_language"):
        tiny_models.build("pi05", pack=True)


def test_the_tokens_that_are_computed_are_the_real_ones_and_a_twentieth():
    computed = []
    for pack in (False, True):
        framework = tiny_models.build("pi0_fast", pack=pack).train()
        shapes = []
        framework.vlm.blocks[0].register_forward_hook(
            lambda block, given, out, shapes=shapes: shapes.append(out[0].shape[:2])
        )
        data = data_for(framework)
        long = "turn the blue cup round, then put it back"
        data.observation.prompt = ["reach", "lift", "stop", "push it", "open", "shut", "wait", long]
        framework.compute_loss(data)
        computed.append(sum(rows * columns for rows, columns in shapes))
        _, mask = framework.vlm.embed(framework.prepare(data.observation))
        seen = hold_last(framework.normalized_actions(data), framework.real_actions(data))
        _, real = framework.head.tokenizer.encode(seen)
    needed = int(mask.sum() + real[:, 1:].sum())
    assert 1 - needed / computed[0] > 0.3
    assert 0 <= 1 - needed / computed[1] <= 0.05


def test_what_cannot_be_packed_is_refused_with_what_can():
    with pytest.raises(LibrobotError, match="pack_length=64 has no effect with pack=false"):
        tiny_models.build("openvla", pack_length=64)
    with pytest.raises(LibrobotError, match="pack_length must be at least 1 token, found 0"):
        tiny_models.build("openvla", pack=True, pack_length=0)
    with pytest.raises(LibrobotError, match=r"flex_attention takes no mask of pairs.*sdpa or eager"):
        config = {"attn_implementation": "flex_attention"}
        node = tiny_models.node
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                tiny_models, "node", lambda g, o, **c: node(g, o, **c, **(config if g == "vlm" else {}))
            )
            tiny_models.build("rt2", vlm="paligemma_tiny", pack=True)
    with pytest.raises(LibrobotError, match="decoder-only backbone"):
        tiny_models.build("rt2", vlm="florence2_tiny", pack=True)
