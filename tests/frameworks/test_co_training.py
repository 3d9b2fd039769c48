"""Questions about pictures beside robot data: counts, the weighted sum, files in their three forms."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_models
from librobot.errors import LibrobotError
from librobot.frameworks.vision_language import Pairs
from librobot.frameworks.vision_language_files import read_pairs


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "grey.png")
    talk = [
        ("human", "<image>\nwhat is it?"),
        ("gpt", "a square"),
        ("human", "what colour?"),
        ("gpt", "grey"),
    ]
    entry = {"id": "0", "image": "grey.png"}
    entry["conversations"] = [{"from": who, "value": what} for who, what in talk]
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    (tmp_path / "b.jsonl").write_text('{"question": "two and two?", "answer": "four"}\n')
    return tmp_path


def test_llava_json_lines_and_a_folder_of_both(folder):
    pairs = read_pairs(folder)
    assert [(pair.question, pair.answer) for pair in pairs] == [
        ("what is it?", "a square"),
        ("what colour?", "grey"),
        ("two and two?", "four"),
    ]
    assert [pair.image and pair.image.name for pair in pairs] == ["grey.png", "grey.png", None]
    (folder / "a.json").write_text('[{"conversations": [{"from": "human"}]}]')
    with pytest.raises(LibrobotError, match=r"a\.json: entry 0: expected"):
        read_pairs(folder)


@pytest.mark.parametrize("name", ["rt2", "pi05", "pi0_fast"])
def test_the_loss_is_the_weighted_sum_at_the_ratio(name, folder, monkeypatch):
    options = {"file": str(folder), "ratio": 0.5, "weight": 0.25}
    framework = tiny_models.build(name, vision_language=options).train()
    drawn = []
    monkeypatch.setattr(
        Pairs, "draw", lambda self, *given, draw=Pairs.draw: drawn.append(draw(self, *given)) or drawn[-1]
    )
    data = tiny_models.batch(horizon=framework.horizon)
    torch.manual_seed(0)
    loss, metrics = framework.compute_loss(data)
    assert [len(one.questions) for one in drawn] == [2]  # with four robot samples
    answering = framework.co_training.answering(drawn[0], loss.device)
    torch.testing.assert_close(metrics["vision_language_loss"], 0.25 * answering.detach())
    torch.testing.assert_close(loss.detach(), metrics["action_loss"] + metrics["vision_language_loss"])
    loss.backward()
    without = [n for n, p in framework.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    framework.eval()
    assert "vision_language_loss" not in framework.compute_loss(data)[1]


def test_actions_alone_leave_what_only_answers_need_frozen():
    plain = tiny_models.build("pi05")
    assert not all(p.requires_grad for p in plain.vlm.parameters())
