"""`librobot-export merge` and `adapters`: what is written acts as the policy did, and is not merged again."""

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel

import tiny_models
from librobot.config.build import build, build_framework
from librobot.errors import LibrobotError
from librobot.export.adapters import adapters, merge
from librobot.policy import Policy


def policy_checkpoint(path, adapter="lora", **changes):
    """Write a pi0 whose adapter has moved from where it started; returns its actions."""
    torch.manual_seed(0)
    config = tiny_models.config("pi0", vlm="qwen2vl_tiny")
    config["adapter"] = adapter and tiny_models.node("adapter", adapter, **{"rank": 4} | changes)
    framework = build_framework(OmegaConf.create(config), tiny_models.SPEC)
    framework.normalizer.fit(tiny_models.statistics())
    framework.attach_run(config=config, provenance={"renderer": "test-renderer"})
    with torch.no_grad():
        for name, parameter in framework.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    checkpoint = {"state_dict": framework.state_dict()}
    framework.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return actions(framework.eval())


@torch.no_grad()
def actions(framework):
    draw = torch.Generator().manual_seed(5)
    noise = torch.randn(4, framework.horizon, framework.action_width, generator=draw)
    return framework.sample_actions(tiny_models.batch().observation, noise=noise)


@pytest.mark.parametrize("option", ["lora", "qlora"])
def test_a_merged_checkpoint_acts_the_same_without_an_adapter(tmp_path, option):
    expected = policy_checkpoint(tmp_path / "run/checkpoints/last.ckpt", option)
    assert merge(tmp_path / "run", tmp_path / "out/merged.ckpt") == tmp_path / "out/merged.ckpt"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged.ckpt"]
    contents = torch.load(tmp_path / "out/merged.ckpt", weights_only=True)
    assert contents["librobot"]["config"]["adapter"] is None
    assert not [n for n in contents["state_dict"] if "lora" in n or "base_layer" in n or "quant" in n]
    policy = Policy.from_checkpoint(tmp_path / "out/merged.ckpt", device="cpu")
    assert policy.renderer == "test-renderer"
    torch.testing.assert_close(actions(policy.framework), expected, atol=1e-4, rtol=0)
    with pytest.raises(LibrobotError, match=r"merged\.ckpt: .* its adapter is already merged"):
        merge(tmp_path / "out/merged.ckpt", tmp_path / "again.ckpt")
    assert not (tmp_path / "again.ckpt").exists()


def test_an_exported_adapter_is_read_by_peft(tmp_path):
    policy_checkpoint(tmp_path / "last.ckpt")
    folder = adapters(tmp_path / "last.ckpt", tmp_path / "adapter")
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    own = Policy.from_checkpoint(tmp_path / "last.ckpt", device="cpu").framework.vlm
    torch.manual_seed(0)
    base = build(tiny_models.node("vlm", "qwen2vl_tiny"), "vlm").model
    weights = {n.replace(".base_layer", ""): p for n, p in own.model.named_parameters() if ".lora_" not in n}
    base.load_state_dict(weights, strict=False)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected, found = (m(input_ids=tokens, use_cache=False).logits for m in (own.model.eval(), theirs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_cannot_be_exported_says_so(tmp_path):
    with pytest.raises(LibrobotError, match="no checkpoint at"):
        merge(tmp_path / "absent.ckpt", tmp_path / "out.ckpt")
    policy_checkpoint(tmp_path / "plain.ckpt", None)
    for export in (merge, adapters):
        with pytest.raises(LibrobotError, match=r"plain\.ckpt: .* built without one \(adapter=lora\)"):
            export(tmp_path / "plain.ckpt", tmp_path / "out")
    policy_checkpoint(tmp_path / "lora.ckpt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/other.txt").write_text("kept")
    with pytest.raises(LibrobotError, match="expected a new file"):
        merge(tmp_path / "lora.ckpt", tmp_path / "out/other.txt")
    with pytest.raises(LibrobotError, match="is not empty"):
        adapters(tmp_path / "lora.ckpt", tmp_path / "out")
    assert (tmp_path / "out/other.txt").read_text() == "kept"
    policy_checkpoint(tmp_path / "pissa.ckpt", init="pissa")
    with pytest.raises(LibrobotError, match=r"pissa\.ckpt: .*adapter alone is not enough"):
        adapters(tmp_path / "pissa.ckpt", tmp_path / "pissa")
