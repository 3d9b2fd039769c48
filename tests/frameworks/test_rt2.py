"""RT-2: one test for each fact of the paper."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_models
from librobot.errors import LibrobotError
from librobot.frameworks.rt2 import Question, word_ids
from librobot.frameworks.vision_language import Pairs
from librobot.types import Dim
from librobot.vlms.base import Vocabulary

ARM = (
    Dim("gripper", kind="gripper"),
    *(Dim(f"r{i}", kind="ee_rotation") for i in range(3)),
    *(Dim(f"p{i}", kind="ee_position") for i in range(3)),
)


def build(monkeypatch=None, **changes):
    if monkeypatch is not None:
        spec = replace(tiny_models.SPEC, action=ARM)
        known = tiny_models.statistics(spec)
        monkeypatch.setattr(tiny_models, "SPEC", spec)
        monkeypatch.setattr(tiny_models, "statistics", lambda: known)
    return tiny_models.build("rt2", **changes).eval()


def vocabulary(tokenize) -> Vocabulary:
    return Vocabulary(500, 400, 1, 2, 3, tokenize, lambda ids: "")


def test_the_prompt_is_a_question_that_ends_with_a():
    asked = Question()(["pick up the cup"], torch.zeros(1, 1, 1))
    assert asked == ["Q: what action should the robot take to pick up the cup? A:"]


def test_the_string_is_terminate_position_rotation_gripper(monkeypatch):
    """1 128 91 241 5 101 127, of which the first is terminate: 7 numbers there, 8 with all of an arm's."""
    framework = build(monkeypatch, horizon=1)
    bins = torch.tensor([[128, 91, 241, 5, 101, 127, 7]])  # position, rotation, gripper
    values = (bins + 0.5) / 128 - 1
    in_spec = torch.cat((values[:, 6:], values[:, 3:6], values[:, :3]), dim=1)[:, None]
    written = framework.written(in_spec, framework.bin_centre(1))
    ids, _ = framework.head.tokenizer.encode(written)
    own = framework.head.tokenizer.inner_of(ids.device)[ids[0, :-1]]
    assert own.tolist() == [1, 128, 91, 241, 5, 101, 127, 7]
    assert ids[0, -1] == framework.vlm.vocabulary.end


@torch.inference_mode()
def test_decoded_actions_are_in_the_robots_own_order(monkeypatch):
    framework = build(monkeypatch, horizon=1)
    values = torch.linspace(-0.9, 0.9, 7).reshape(1, 1, 7)
    ids, real = framework.head.tokenizer.encode(framework.written(values, framework.bin_centre(1)))
    decoded = framework.head.tokenizer.decode(ids, real)
    monkeypatch.setattr(framework.head, "sample", lambda *args, **options: decoded)
    observation = tiny_models.batch(1).observation
    acted = framework.normalizer.normalize("action", framework.sample_actions(observation))
    torch.testing.assert_close(acted, values, atol=1 / 256 + 1e-5, rtol=0)
    assert framework.wants_to_stop.tolist() == [[True]]


def test_256_uniform_bins():
    inner = build(horizon=1).head.tokenizer.inner
    assert inner.vocabulary == 256
    ids, _ = inner.encode(torch.tensor([[[-1.0, -1 + 2 / 256 + 1e-6, 1.0, 0.0]]]))
    assert ids[0].tolist() == [0, 1, 255, 128]


def test_terminate_is_1_at_the_last_step_that_the_chunk_shows():
    framework = build()
    data = tiny_models.batch()
    values = framework.terminate_values(data)[..., 0]
    last = torch.zeros(4, 6, dtype=torch.bool)
    last[3, 3] = True  # the last sample's last two steps lie past its end
    assert torch.equal(values == framework.bin_centre(1), last)


def test_integers_are_their_own_tokens_where_each_is_one():
    ids = word_ids(vocabulary(lambda text: [100 + int(text)]), 256, "auto", None)
    assert ids == [100 + i for i in range(256)]


def test_else_the_least_used_tokens_are_overwritten(tmp_path):
    digits = vocabulary(lambda text: [ord(c) for c in text.strip()])
    assert word_ids(digits, 256, "auto", None) is None  # the last ones, or new ones
    (tmp_path / "corpus.txt").write_text("".join(map(chr, range(4, 400))), encoding="utf-8")
    assert word_ids(digits, 4, "least_used", str(tmp_path / "corpus.txt"))[:4] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="corpus=FILE"):
        word_ids(digits, 4, "least_used", None)
    with pytest.raises(ValueError, match="words=integers"):
        word_ids(digits, 256, "integers", None)


@torch.inference_mode()
def test_robot_prompts_give_action_tokens_only_and_questions_any():
    framework = build()
    framework.tokens.output -= 100 * framework.tokens.output.sign()  # actions are unlikely
    observation = tiny_models.batch().observation
    seen = []
    decode = framework.head.tokenizer.decode
    framework.head.tokenizer.decode = lambda ids, mask: seen.append(ids[mask]) or decode(ids, mask)
    framework.sample_actions(observation)
    assert torch.isin(seen[0], framework.tokens.ids).all()
    answers = framework.answer(replace(observation, prompt=["what is this?"] * 4), max_tokens=5)
    assert len(answers) == 4
    assert all(isinstance(answer, str) for answer in answers)


@pytest.fixture
def pairs_file(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "grey.png")
    lines = [
        {"image": "grey.png", "question": "what colour is it?", "answer": "grey"},
        {"question": "what is two and two?", "answer": "four"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_pairs_are_learned_beside_actions_in_training_alone(pairs_file):
    options = {"file": str(pairs_file), "ratio": 0.5, "weight": 2.0}
    framework = build(vision_language=options).train()
    data = tiny_models.batch()
    torch.manual_seed(0)
    loss, metrics = framework.compute_loss(data)
    assert set(metrics) == {"action_loss", "vision_language_loss"}
    torch.testing.assert_close(loss.detach(), metrics["action_loss"] + metrics["vision_language_loss"])
    assert framework.eval().compute_loss(data)[1] == {}
    optimizer = torch.optim.Adam(framework.parameters(), lr=3e-3)
    framework.train()
    learning = framework.co_training
    for _ in range(40):
        optimizer.zero_grad()
        spoken = learning.answering(learning.pairs.draw(8, (24, 32)), data.actions.device)
        spoken.backward()
        optimizer.step()
    framework.eval()
    observation = replace(tiny_models.batch(1).observation, prompt=["what is two and two?"])
    absent = {name: torch.zeros(1, dtype=torch.bool) for name in observation.images}
    assert framework.answer(replace(observation, image_mask=absent)) == ["four"]


def test_ratio_pairs_come_with_each_robot_sample(pairs_file):
    drawn = Pairs(file=str(pairs_file), ratio=0.5).draw(8, (24, 32))
    assert len(drawn.questions) == 4
    assert drawn.pictures.shape == (4, 1, 3, 24, 32)
    for question, seen, picture in zip(drawn.questions, drawn.has_picture, drawn.pictures, strict=True):
        assert bool(seen) == ("colour" in question)
        assert (picture == (200 if seen else 0)).all()


def test_a_policy_that_acts_needs_no_file_and_a_bad_line_is_named(tmp_path):
    framework = build(vision_language={"file": str(tmp_path / "gone.jsonl")})
    framework.sample_actions(tiny_models.batch().observation)
    with pytest.raises(LibrobotError, match=r"gone\.jsonl: expected a file"):
        framework.train().compute_loss(tiny_models.batch())
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": 3}\n')
    with pytest.raises(LibrobotError, match=r"bad\.jsonl:2: expected"):
        Pairs(file=str(tmp_path / "bad.jsonl")).draw(1, (8, 8))
