"""LoRA and QLoRA on a published family's classes: what trains, what merging does, what the files hold."""

import json
import math

import pytest
import torch
from adapted_backbones import (
    FAMILIES,
    TARGETS,
    adapted,
    backbone,
    layers_with_adapters,
    outputs,
    read,
    train_a_little,
    trainable,
)
from omegaconf import OmegaConf
from peft import PeftModel
from torch import nn
from torch.nn import functional

import tiny_models
from librobot.config.build import build, build_framework
from librobot.config.check import check
from librobot.config.compose import compose
from librobot.config.schema import check_root
from librobot.errors import LibrobotError
from librobot.policy import Policy
from librobot.training.optimizers import paged_adamw
from librobot.vlms.adapter_files import load_adapter, save_adapter, save_merged
from librobot.vlms.adapters import lora, merge_adapter, qlora


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "gaussian"}, {"init": "pissa"}])
def test_an_untrained_adapter_changes_nothing(options):
    vlm = backbone()
    before = outputs(vlm)
    lora(vlm=vlm, **options)
    atol = 1e-5 if "init" in options else 0.0
    torch.testing.assert_close(outputs(vlm.eval()), before, atol=atol, rtol=0)
    assert not torch.allclose(outputs(train_a_little(vlm)), before, atol=1e-2)


def test_only_adapters_and_what_is_named_train():
    vlm = backbone()
    names = {name for name, _ in vlm.named_parameters()}
    lora(vlm=vlm, rank=3)
    assert {name.rpartition(".")[2] for name in layers_with_adapters(vlm)} == TARGETS
    assert len(layers_with_adapters(vlm)) == 2 * len(TARGETS)
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable(vlm))
    assert len(trainable(vlm)) == 4 * len(TARGETS)
    kept = {n.replace(".base_layer", "") for n, _ in vlm.named_parameters() if ".lora_" not in n}
    assert kept == names

    vlm = backbone()
    lora(vlm=vlm, train=["projector"])
    others = {name for name in trainable(vlm) if ".lora_" not in name}
    assert others == {n for n, _ in vlm.named_parameters() if n.startswith("model.model.visual.merger.")}


def test_gradients_reach_the_adapters_and_nothing_else():
    vlm = adapted(train=["projector"])
    read(vlm).hidden.square().mean().backward()
    assert {name for name, parameter in vlm.named_parameters() if parameter.grad is not None} == trainable(
        vlm
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_its_adapters_alone_and_merges_once(name):
    vlm = adapted(name)
    assert len(trainable(vlm)) == 2 * len(layers_with_adapters(vlm)) > 0
    assert all(".lora_A." in parameter or ".lora_B." in parameter for parameter in trainable(vlm))
    context = read(vlm)
    loss = sum(x.square().mean() for x in (context.hidden, *context.keys, *context.values))
    loss.backward()
    assert {n for n, parameter in vlm.named_parameters() if parameter.grad is not None} == trainable(vlm)
    before, plain = outputs(vlm), outputs(backbone(name))
    assert not torch.allclose(before, plain, atol=1e-2), "the adapter has no effect"
    merge_adapter(vlm)
    torch.testing.assert_close(outputs(vlm), before, atol=1e-5, rtol=0)
    assert not layers_with_adapters(vlm)
    with pytest.raises(LibrobotError, match="already merged"):
        merge_adapter(vlm)


def test_other_parts_get_adapters_when_asked():
    vlm = backbone()
    lora(vlm=vlm, parts=["vision", "projector"])
    found = layers_with_adapters(vlm)
    assert all(name.startswith("model.visual.") for name in found)
    assert {"model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.2"} <= found
    vlm = backbone()
    lora(vlm=vlm, parts=["vision", "language"], targets=["qkv", "self_attn.v_proj"])
    assert {name.rpartition(".")[2] for name in layers_with_adapters(vlm)} == {"qkv", "v_proj"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ["q_prj"]}, LibrobotError, r"no linear layer 'q_prj' in language .*'q_proj'"),
        (
            {"targets": ["q_proj"], "parts": ["vision"]},
            LibrobotError,
            r"no linear layer 'q_proj' in vision .*qkv",
        ),
        ({"parts": ["embeddings"]}, LibrobotError, "'embeddings' of Qwen2VL has no linear layers"),
        ({"parts": ["langage"]}, ValueError, "did you mean 'language'"),
        ({"parts": []}, ValueError, "at least one of"),
        ({"train": ["language"]}, ValueError, "in parts and in train"),
        ({"rank": 0}, ValueError, "rank must be positive, found 0"),
        ({"dropout": 1.0}, ValueError, "below 1, found 1.0"),
        ({"dora": True, "init": "pissa"}, ValueError, "exclude each other"),
    ],
)
def test_a_wrong_option_teaches(options, error, message):
    with pytest.raises(error, match=message):
        lora(vlm=backbone(), **options)


def test_what_cannot_have_an_adapter_says_so():
    with pytest.raises(LibrobotError, match="choose a published family"):
        lora(vlm=build(tiny_models.node("vlm", "tiny"), "vlm"))
    with pytest.raises(LibrobotError, match="already has one"):
        lora(vlm=adapted())
    with pytest.raises(ValueError, match=r"frozen by vlm\.freeze"):
        lora(vlm=backbone(freeze=["projector"]), train=["projector"])
    with pytest.raises(ValueError, match="four bits would round"):
        qlora(vlm=backbone(), init="olora")


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_counts_by_its_definition(rslora):
    vlm = adapted(rank=4, alpha=6, rslora=rslora)
    layer = vlm.blocks[0].self_attn.q_proj
    x = torch.randn(2, 3, layer.in_features)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale = 6 / math.sqrt(4) if rslora else 6 / 4
    expected = layer.base_layer(x) + scale * functional.linear(functional.linear(x, down), up)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_dora_learns_the_length_of_each_row():
    vlm = adapted(rank=4, alpha=6, dora=True)
    layer = vlm.blocks[0].mlp.up_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    length = layer.lora_magnitude_vector["default"].weight
    assert length.shape == (layer.out_features,)
    assert length.requires_grad
    moved = layer.base_layer.weight + 6 / 4 * up @ down
    x = torch.randn(5, layer.in_features)
    expected = functional.linear(x, length[:, None] * moved / moved.norm(dim=1, keepdim=True))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}, {"parts": ["vision", "language"]}])
def test_merging_keeps_the_outputs_and_happens_once(options):
    vlm = adapted(**options)
    before = outputs(vlm)
    merge_adapter(vlm)
    torch.testing.assert_close(outputs(vlm), before, atol=1e-5, rtol=0)
    assert {name for name, _ in vlm.named_parameters()} == {name for name, _ in backbone().named_parameters()}
    with pytest.raises(LibrobotError, match="already merged"):
        merge_adapter(vlm)
    torch.testing.assert_close(outputs(vlm), before, atol=1e-5, rtol=0)
    with pytest.raises(LibrobotError, match="built without one"):
        merge_adapter(backbone())


@pytest.mark.parametrize("options", [{"train": ["projector"]}, {"dora": True, "parts": ["vision"]}])
def test_saving_an_adapter_and_loading_it(tmp_path, options):
    vlm = adapted(rank=4, **options)
    with torch.no_grad():
        vlm.model.model.visual.merger.mlp[0].bias.add_(0.5)
    save_adapter(vlm, tmp_path / "adapter")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}
    again = backbone()
    if "train" not in options:
        with torch.no_grad():
            again.model.model.visual.merger.mlp[0].bias.add_(0.5)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(outputs(again.eval()), outputs(vlm))
    assert trainable(again) == trainable(vlm)
    with pytest.raises(LibrobotError, match="is not empty"):
        save_adapter(vlm, tmp_path / "adapter")


def test_peft_reads_what_is_saved(tmp_path):
    vlm = adapted(rank=4, train=["projector"])
    with torch.no_grad():
        vlm.model.model.visual.merger.mlp[0].bias.add_(0.5)
    save_adapter(vlm, tmp_path / "adapter")
    theirs = backbone()
    theirs.model = PeftModel.from_pretrained(theirs.model, tmp_path / "adapter").base_model.model
    torch.testing.assert_close(outputs(theirs.eval()), outputs(vlm), atol=1e-6, rtol=0)


def test_an_adapter_that_does_not_fit_says_so(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    with pytest.raises(LibrobotError, match=r"no adapter_config\.json"):
        load_adapter(backbone(), tmp_path)
    with pytest.raises(LibrobotError, match="already has an adapter"):
        load_adapter(adapted(), tmp_path / "adapter")
    with pytest.raises(LibrobotError, match=r"no layer 'model\.language_model\.layers\.1\."):
        load_adapter(backbone(num_layers=1), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(LibrobotError, match=r"does not fit its adapter_config\.json"):
        load_adapter(backbone(), tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(LibrobotError, match="not an adapter that can be read"):
        load_adapter(backbone(), tmp_path / "adapter")
    with pytest.raises(LibrobotError, match="save_merged"):
        save_adapter(adapted(init="pissa"), tmp_path / "pissa")


def test_a_merged_folder_is_a_checkpoint_that_refuses_its_adapter(tmp_path):
    vlm = adapted()
    expected = outputs(vlm)
    save_adapter(vlm, tmp_path / "adapter")
    save_merged(vlm, tmp_path / "merged")
    read_back = {"checkpoint": str(tmp_path / "merged"), "pretrained": True}
    again = backbone(**read_back)
    torch.testing.assert_close(outputs(again), expected, atol=1e-5, rtol=0)
    with pytest.raises(LibrobotError, match="already part of the weights"):
        load_adapter(again, tmp_path / "adapter")
    with pytest.raises(LibrobotError, match="is not empty"):
        save_merged(vlm, tmp_path / "merged")
    with pytest.raises(LibrobotError, match="built without one"):
        save_merged(backbone(), tmp_path / "other")

    lora(vlm=again)  # another adapter on the merged weights is a new start
    merge_adapter(train_a_little(again, seed=2))
    save_merged(again, tmp_path / "twice")
    twice = backbone(checkpoint=str(tmp_path / "twice"), pretrained=True)
    torch.testing.assert_close(outputs(twice), outputs(again), atol=1e-6, rtol=0)
    with pytest.raises(LibrobotError, match="already part of the weights"):
        load_adapter(twice, tmp_path / "adapter")


def policy(option: str, **changes):
    """A fitted pi0 whose backbone has the adapter of that option."""
    torch.manual_seed(0)
    adapter = OmegaConf.to_container(tiny_models.load("adapter", option)) | {"rank": 4} | changes
    plain = tiny_models.config("pi0", vlm="qwen2vl_tiny") | {"adapter": adapter}
    built = build_framework(OmegaConf.create(plain), tiny_models.SPEC)
    built.normalizer.fit(tiny_models.statistics())
    built.attach_run(config=plain, provenance={})
    return built


def written(framework, path):
    checkpoint = {"state_dict": framework.state_dict()}
    framework.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


@torch.no_grad()
def actions(framework):
    observation = tiny_models.batch().observation
    noise = torch.randn(
        4, framework.horizon, framework.action_width, generator=torch.Generator().manual_seed(5)
    )
    return framework.eval().sample_actions(observation, noise=noise)


CHANGES = [("lora", {}), ("lora", {"dora": True}), ("lora", {"init": "pissa"}), ("qlora", {})]
CHANGES += [("qlora", {"double_quant": False, "compute_dtype": "bfloat16"})]


@pytest.mark.parametrize(("option", "changes"), CHANGES)
def test_a_policy_with_an_adapter_trains_and_reloads(tmp_path, option, changes):
    framework = policy(option, **changes)
    groups = [{"params": [p for p in framework.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    frozen = {n: p.clone() for n, p in framework.vlm.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(tiny_models.fixed_loss(framework, tiny_models.batch()))
        losses[-1].backward()
        assert all(p.grad is not None for group in groups for p in group["params"])
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    for name, before in frozen.items():
        assert torch.equal(framework.vlm.get_parameter(name), before), name
    path = written(framework, tmp_path / "one.ckpt")
    again = Policy.from_checkpoint(path, device="cpu").framework
    assert torch.equal(actions(again), actions(framework))
    for name, value in framework.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("option", ["lora", "qlora"])
def test_a_merged_policy_reloads_and_is_not_merged_again(tmp_path, option):
    framework = policy(option)
    train_a_little(framework.vlm)
    with pytest.raises(LibrobotError, match="does not fit"):  # weights of another state of the same run
        merged = policy(option)
        merge_adapter(merged.vlm)
        framework.load_weights(merged.state_dict())
    expected = actions(framework)
    merge_adapter(framework.vlm)
    torch.testing.assert_close(actions(framework), expected, atol=1e-4, rtol=0)
    again = Policy.from_checkpoint(written(framework, tmp_path / "merged.ckpt"), device="cpu").framework
    assert torch.equal(actions(again), actions(framework))
    with pytest.raises(LibrobotError, match="already merged"):
        merge_adapter(again.vlm)


def test_a_policy_on_merged_weights_with_a_new_adapter_reloads(tmp_path):
    """What was merged before does not hide the adapter that is on now."""
    save_merged(adapted(), tmp_path / "merged")
    plain = tiny_models.config("pi0", vlm="qwen2vl_tiny")
    plain["vlm"] |= {"checkpoint": str(tmp_path / "merged"), "pretrained": True}
    plain["adapter"] = OmegaConf.to_container(tiny_models.load("adapter", "lora"))
    framework = build_framework(OmegaConf.create(plain), tiny_models.SPEC)
    framework.normalizer.fit(tiny_models.statistics())
    framework.attach_run(config=plain, provenance={})
    train_a_little(framework.vlm)
    again = Policy.from_checkpoint(written(framework, tmp_path / "new.ckpt"), device="cpu").framework
    assert layers_with_adapters(again.vlm) == layers_with_adapters(framework.vlm) != set()
    assert torch.equal(actions(again), actions(framework))


def test_the_group_composes_and_older_configurations_still_load():
    for option in ("none", "lora", "qlora"):
        cfg = compose(["vlm=qwen2vl_tiny", f"adapter={option}", "run_dir=runs/one"])
        check(cfg)
        assert (cfg.adapter is None) == (option == "none")
    with pytest.raises(LibrobotError, match=r"adapter\.rnk: .* did you mean 'rank'"):
        check(compose(["adapter=lora", "+adapter.rnk=3", "run_dir=runs/one"]))
    older = OmegaConf.create({name: node for name, node in compose([]).items() if name != "adapter"})
    OmegaConf.set_struct(older, True)
    check_root(older)
    with pytest.raises(LibrobotError, match="adapter: TinyVLM has no targets"):
        build_framework(compose(["adapter=lora"]), tiny_models.SPEC)
    with pytest.raises(LibrobotError, match=r"adapter \(lora\): rank must be positive"):
        build_framework(compose(["adapter=lora", "vlm=qwen2vl_tiny", "adapter.rank=0"]), tiny_models.SPEC)


def test_on_a_cpu_paged_adamw_is_adamw():
    weight = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="optim=adamw takes its place"):
        made = paged_adamw([{"params": [weight], "weight_decay": 0.0}], lr=0.5)
    assert type(made) is torch.optim.AdamW
    assert (made.param_groups[0]["lr"], made.param_groups[0]["weight_decay"]) == (0.5, 0.0)
    with pytest.raises(ValueError, match="8 or 32"):
        paged_adamw([{"params": [weight]}], bits=4)
