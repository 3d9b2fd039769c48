"""openpi's PyTorch export, made of lerobot's model, whose tensors have the same names."""

import json

import pytest
import torch

pytest.importorskip("lerobot")

import lerobot_pi
import tiny_models
from librobot.errors import LibrobotError
from librobot.interchange.base import ImportOptions, import_checkpoint
from librobot.vlms.loading import byte_tokenizer

WORDS = ["<pad>", "<eos>", "<bos>", "<image>"]
NORM_STATS = {
    "norm_stats": {
        "state": {"mean": [0.5] * 5, "std": [2.0] * 5, "q01": [-1.0] * 5, "q99": [3.0] * 5},
        "actions": {"mean": [0.0] * 3, "std": [1.0, 1.0, 0.0], "q01": [-2.0] * 3, "q99": [2.0, 2.0, -2.0]},
    }
}


@pytest.fixture(params=["pi0", "pi05"])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    theirs = lerobot_pi.reference(kind, monkeypatch)
    named = {name.removeprefix("model."): value for name, value in theirs.state_dict().items()}
    # safetensors keeps one of two names of a tied tensor: openpi's file has the output layer's.
    embedding = named.pop("paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight")
    named["paligemma_with_expert.paligemma.lm_head.weight"] = embedding
    made = tmp_path / "export"
    (made / "assets" / "lab" / "arm").mkdir(parents=True)
    save_file({n: v.clone().to(torch.bfloat16) for n, v in named.items()}, made / "model.safetensors")
    config = {
        "action_dim": 8,
        "action_horizon": tiny_models.HORIZON,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": "bfloat16",
    }
    (made / "config.json").write_text(json.dumps(config))
    (made / "assets" / "lab" / "arm" / "norm_stats.json").write_text(json.dumps(NORM_STATS))
    byte_tokenizer(WORDS, pad="<pad>", eos="<eos>").save_pretrained(tmp_path / "words")
    return made


def load(folder, **options):
    words = ImportOptions(tokenizer=str(folder.parent / "words"), **options)
    return import_checkpoint(folder, folder.parent / "ours.ckpt", words)[1]


def test_the_folder_becomes_a_policy(kind, folder):
    from safetensors.torch import load_file

    framework = load(folder)
    assert type(framework).__name__ == {"pi0": "Pi0", "pi05": "Pi05"}[kind]
    assert framework.spec.camera_names == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    assert (framework.spec.state_dim, framework.spec.action_dim, framework.action_width) == (5, 3, 8)
    assert (framework.horizon, framework.picture_size) == (tiny_models.HORIZON, (224, 224))
    stored = load_file(folder / "model.safetensors")
    words = stored["paligemma_with_expert.paligemma.lm_head.weight"].float()
    assert torch.equal(framework.vlm.model.get_input_embeddings().weight, words)


def test_statistics_as_openpi_applies_them(kind, folder):
    """z-score for pi0, quantiles for pi0.5, each with 1e-6; a dimension that never moves is only centred."""
    framework = load(folder)
    offset, scale = framework.normalizer.state_offset, framework.normalizer.state_scale
    expected = {"pi0": (0.5, 2.0), "pi05": (1.0, 2.0)}[kind]
    torch.testing.assert_close(offset, torch.full((5,), expected[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(scale, torch.full((5,), expected[1]), rtol=0, atol=2e-6)
    assert framework.normalizer.action_scale[-1] == 1.0


@pytest.mark.parametrize("kind", ["pi05"])
def test_pi05_libero_does_not_see_the_state(kind, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"discrete_state_input": False}))
    assert not load(folder).state_in_prompt


def test_statistics_that_lack_something_are_named(kind, folder):
    (folder / "assets" / "other").mkdir()
    other = folder / "assets" / "other" / "norm_stats.json"
    other.write_text(json.dumps({"norm_stats": {"state": NORM_STATS["norm_stats"]["state"]}}))
    with pytest.raises(LibrobotError, match=r"found statistics of lab/arm, other; choose one by embodiment="):
        load(folder)
    with pytest.raises(LibrobotError, match=r"expected mean, std.* of 'actions', found no mean"):
        load(folder, embodiment="other")
    assert load(folder, embodiment="lab/arm").spec.action_dim == 3
