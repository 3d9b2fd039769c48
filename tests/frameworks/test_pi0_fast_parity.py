"""pi0-FAST's numbers beside lerobot's, with the same weights and the same inputs."""

from dataclasses import replace

import parity
import pytest
import torch
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build_framework
from librobot.interchange.lerobot.pi0_fast import weight_map

pytest.importorskip("lerobot")
from lerobot_pi0_fast import PICTURE, backbone_folder, reference, text_tokenizer


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Ours with lerobot's weights, lerobot's, and lerobot's tokenising steps."""
    plain = tiny_models.config("pi0_fast", start="begin", lowercase=False, skip_tokens=128)
    plain["framework"]["normalization"] = {"state": "mean_std", "action": "mean_std"}
    plain["vlm"] = tiny_models.node("vlm", "paligemma") | {
        "checkpoint": backbone_folder(tmp_path / "backbone"), "pretrained": True, "num_layers": None
    }  # fmt: skip
    plain["head"]["tokenizer"]["vocab_size"] = 256
    ours = build_framework(OmegaConf.create(plain), tiny_models.SPEC)
    ours.normalizer.fit(tiny_models.statistics())
    torch.manual_seed(0)
    ours.head.fit(torch.randn(64, ours.horizon, ours.action_width))
    theirs, *steps = reference(ours.head.tokenizer.inner, monkeypatch)
    own = ours.state_dict()
    arrived = weight_map().to_ours(theirs.state_dict(), "lerobot")
    assert set(arrived) == {n for n in own if not n.startswith("normalizer.") and n != "tokens.ids"}
    ours.load_state_dict(own | arrived)
    return ours, theirs, steps


def batch(size=3):
    data = tiny_models.batch(size)
    images = {
        n: torch.randint(0, 256, (size, 1, 3, PICTURE, PICTURE), dtype=torch.uint8)
        for n in data.observation.images
    }
    return replace(
        data,
        observation=replace(data.observation, images=images),
        action_mask=torch.ones_like(data.action_mask),
    )


def as_lerobot(ours, steps, data) -> dict:
    """What lerobot's own steps make of a batch."""
    from lerobot.lerobot_types import TransitionKey

    prompt_step, action_step = steps
    state = ours.normalizer.normalize("state", data.observation.state)[:, 0]
    transition = {
        TransitionKey.OBSERVATION: {"observation.state": state},
        TransitionKey.COMPLEMENTARY_DATA: {"task": list(data.observation.prompt)},
    }
    prompts = prompt_step(transition)[TransitionKey.COMPLEMENTARY_DATA]["task"]
    rows = [text_tokenizer()("<bos>" + text, add_special_tokens=False)["input_ids"] for text in prompts]
    length = max(map(len, rows)) + 5
    tokens, mask = action_step._tokenize_action(ours.normalizer.normalize("action", data.actions))
    return {
        **{
            f"observation.images.{n}": image[:, 0].float() / 255
            for n, image in data.observation.images.items()
        },
        "observation.language.tokens": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "observation.language.attention_mask": torch.arange(length) < torch.tensor([[len(r)] for r in rows]),
        "action.tokens": tokens,
        "action.token_mask": mask,
    }


def test_prompt_and_answer_are_lerobots_tokens(pair):
    ours, _, steps = pair
    data = batch()
    given = as_lerobot(ours, steps, data)
    inputs = ours.prepare(data.observation).inputs
    for row in range(3):
        text = inputs["input_ids"][row][(inputs["camera"][row] == 0) & inputs["attention_mask"][row]]
        mask = given["observation.language.attention_mask"][row]
        assert text.tolist() == given["observation.language.tokens"][row][mask].tolist()
    ids, real = ours.head.tokenizer.encode(ours.normalized_actions(data))
    for row in range(3):
        expected = given["action.tokens"][row][given["action.token_mask"][row]].tolist()
        assert [ours.vlm.vocabulary.begin, *ids[row][real[row]].tolist()] == expected


def test_loss_and_every_gradient(pair):
    ours, theirs, steps = pair
    data = batch(1)  # lerobot averages over a batch's tokens, openpi (and librobot) over each sample's
    ours.train(), theirs.train()
    loss, _ = ours.compute_loss(data)
    expected, _ = theirs.forward(as_lerobot(ours, steps, data))
    loss.backward(), expected.backward()
    difference = parity.relative(loss.detach(), expected.detach())
    gradients = parity.gradient_differences(ours, theirs, weight_map())
    assert gradients.keys() == {n for n, p in ours.named_parameters() if p.requires_grad}
    parity.check("pi0_fast", loss=difference, gradients=max(gradients.values()))


def test_sampled_actions_and_the_way_back(pair):
    """Both learn one batch by heart in ours; lerobot's class, given our weights, writes the same chunk."""
    ours, theirs, steps = pair
    data = batch(2)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    for _ in range(60):
        loss, _ = ours.compute_loss(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    theirs.load_state_dict(weight_map().to_theirs(ours.state_dict(), "librobot"), strict=True)
    theirs.config.validate_action_token_prefix = False
    ours.eval()
    with torch.inference_mode():
        sampled = ours.normalizer.normalize("action", ours.sample_actions(data.observation))
        expected = theirs.predict_action_chunk(as_lerobot(ours, steps, data)).float()
        assert float(loss) < 0.1, "nothing was learned, the comparison would be of noise"
        difference = parity.relative(sampled, expected)
        parity.check("pi0_fast", actions=difference)


def test_a_lerobot_folder_becomes_a_policy_that_samples_the_same(pair, tmp_path):
    """config.json, weights, statistics and tokenizers through the import; ours and the imported act alike."""
    import json

    from safetensors.torch import save_file

    from librobot.interchange.base import ImportOptions, import_checkpoint

    ours, theirs, _ = pair
    folder = tmp_path / "lerobot"
    folder.mkdir()
    theirs.config.save_pretrained(folder)
    save_file({n: x.clone() for n, x in theirs.state_dict().items()}, folder / "model.safetensors")
    ours.head.tokenizer.inner.save(folder / "action_tokenizer")
    statistics = {
        f"{name}.{key}": torch.tensor(value, dtype=torch.float32)
        for name, part in (("observation.state", "state"), ("action", "action"))
        for key, value in tiny_models.statistics()[part].items()
    }
    save_file(statistics, folder / "normalizer.safetensors")
    step = {"registry_name": "normalizer_processor", "config": {}, "state_file": "normalizer.safetensors"}
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "p", "steps": [step]}))
    _, imported = import_checkpoint(
        folder, tmp_path / "ours.ckpt", ImportOptions(tokenizer=str(tmp_path / "backbone"))
    )
    assert imported.head.tokenizer.inner.fitted
    for name, value in ours.state_dict().items():
        assert torch.equal(imported.state_dict()[name], value), name
