"""Optimisers against their definitions, in the policy's own parameter groups, and across a resume."""

import functools

import pytest
import torch
from small_runs import fit, rows

import tiny_models
from librobot.errors import LibrobotError
from librobot.frameworks.groups import ParameterGroups
from librobot.training import optimizers
from librobot.training.lion import Lion
from librobot.training.muon import MuonAdamW

MAKERS = {
    "adamw": optimizers.adamw,
    "adamw_8bit": optimizers.adamw_8bit,
    "lion": Lion,
    "muon": MuonAdamW,
    "sgd": optimizers.sgd,
}


def parameters(seed=0):
    random = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(*shape, generator=random)) for shape in ((6, 4), (4,), (2, 3, 3, 3))
    ]


def descend(optimizer, params, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(p.square().sum() for p in params).backward()
        optimizer.step()
    return [p.detach().clone() for p in params]


def test_lion_is_algorithm_2():
    (theta, *_), lr, decay = parameters(), 0.1, 0.5
    expected, m = theta.detach().clone(), torch.zeros_like(theta)
    optimizer = Lion([{"params": [theta]}], lr=lr, betas=(0.8, 0.95), weight_decay=decay)
    for _ in range(3):
        g = 2 * expected
        c = 0.8 * m + 0.2 * g
        expected = expected - lr * (c.sign() + decay * expected)
        m = 0.95 * m + 0.05 * g
        descend(optimizer, [theta], 1)
        torch.testing.assert_close(theta.detach(), expected)


def test_muon_steps_matrices_and_adamw_the_rest():
    ours, theirs = parameters(), parameters()
    embedding = torch.nn.Parameter(torch.ones(5, 3))
    groups = [{"params": ours, "decays": True}, {"params": [embedding], "decays": False, "weight_decay": 0.0}]
    optimizer = MuonAdamW(groups, lr=0.1)
    muon = torch.optim.Muon(theirs[:1], lr=0.1, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[1:], lr=0.1, weight_decay=1e-2, betas=(0.9, 0.95))
    for _ in range(3):
        descend(optimizer, [*ours, embedding], 1)
        for other in (muon, adamw):
            other.zero_grad()
        sum(p.square().sum() for p in theirs).backward()
        muon.step()
        adamw.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    assert "exp_avg" in optimizer.state[embedding]
    assert [set(optimizer.state[p]) for p in ours[:1]] == [{"momentum_buffer"}]
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize("name", MAKERS)
def test_a_reloaded_optimizer_goes_on(name, tmp_path):
    make = functools.partial(MAKERS[name], lr=0.05)
    straight = parameters()
    expected = descend(make([{"params": straight}]), straight, 6)
    first = parameters()
    optimizer = make([{"params": first}])
    descend(optimizer, first, 3)
    torch.save({"optimizer": optimizer.state_dict(), "weights": first}, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved", weights_only=True)
    again = [torch.nn.Parameter(p.detach().clone()) for p in saved["weights"]]
    resumed = make([{"params": again}])
    resumed.load_state_dict(saved["optimizer"])
    found = descend(resumed, again, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(p.square().sum() for p in found) < sum(p.square().sum() for p in parameters())


@pytest.mark.parametrize("name", ["lion", "muon", "adamw_8bit"])
def test_a_run_resumes_with_it(name, dataset, tmp_path):
    straight, parts, own = tmp_path / "straight", tmp_path / "parts", [f"optim={name}"]
    fit(dataset, straight, *own, "trainer.max_steps=4")
    fit(dataset, parts, *own, "trainer.max_steps=2")
    fit(dataset, parts, *own, "trainer.max_steps=4", "ckpt=last")
    assert rows(parts) == rows(straight)
    ours, theirs = (
        torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (parts, straight)
    )
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


def test_adamw_is_fused_where_the_device_has_it():
    on_cpu = optimizers.adamw([{"params": parameters()}])
    nowhere = optimizers.adamw([{"params": [torch.nn.Parameter(torch.ones(2, device="meta"))]}])
    assert [o.param_groups[0]["fused"] for o in (on_cpu, nowhere)] == [True, False]


def settings(rules, framework, multipliers=()):
    """name -> its group."""
    names = {id(p): n for n, p in framework.named_parameters()}
    groups = rules(framework, dict(multipliers))
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)  # each exactly once
    assert set(found) == {n for n, p in framework.named_parameters() if p.requires_grad}
    return found


def test_what_weight_decay_spares_is_counted():
    framework = tiny_models.build("pi0")
    found = settings(ParameterGroups(), framework)
    tables = {f"{n}.weight" for n, m in framework.named_modules() if isinstance(m, torch.nn.Embedding)}
    spared = {n for n, p in framework.named_parameters() if p.requires_grad and (p.ndim < 2 or n in tables)}
    assert {n for n, group in found.items() if group.get("weight_decay") == 0.0} == spared
    assert 0 < len(spared) < len(found)
    assert len(tables & spared) >= 1


def test_parts_have_their_own_weight_decay():
    framework = tiny_models.build("pi0")
    found = settings(ParameterGroups(weight_decays={"vlm": 0.3, "vlm.blocks.0": 0.0}), framework)
    given = {n: group.get("weight_decay") for n, group in found.items() if group["decays"]}
    for name, value in given.items():
        inside = name.startswith("vlm.")
        assert value == (0.0 if name.startswith("vlm.blocks.0.") else 0.3 if inside else None), name
    assert {0.0, 0.3, None} == set(given.values())
    assert all(group["weight_decay"] == 0.0 for group in found.values() if not group["decays"])


def test_layers_have_falling_learning_rates():
    framework = tiny_models.build("pi0")
    n = len(framework.vlm.blocks)
    found = settings(ParameterGroups(layer_decay=0.5), framework, {"vlm.blocks.0": 0.1})
    rates = {name: group["lr_multiplier"] for name, group in found.items()}
    for name, rate in rates.items():
        if not name.startswith("vlm."):
            assert rate == 1.0, name
        elif name.startswith("vlm.blocks."):
            index = int(name.split(".")[2])
            assert rate == pytest.approx(0.5 ** (n - index) * (0.1 if index == 0 else 1.0)), name
        elif name.startswith("vlm.towers."):
            assert rate == 0.5 ** (n + 1), name
    assert sum(name.startswith(f"vlm.blocks.{n - 1}.") for name in rates) > 0


def test_what_lies_behind_the_blocks_keeps_its_learning_rate():
    from librobot.frameworks.groups import layer_multipliers

    backbone = torch.nn.Module()
    backbone.tower = torch.nn.Linear(2, 2)
    backbone.model = torch.nn.Module()
    backbone.model.embed = torch.nn.Embedding(3, 2)
    backbone.model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    backbone.model.norm = torch.nn.LayerNorm(2)
    factors = layer_multipliers(backbone, backbone.model.layers, 0.5)
    found = {name: factors[id(p)] for name, p in backbone.named_parameters() if not name.endswith("bias")}
    assert found == {
        "tower.weight": 0.5**4,
        "model.embed.weight": 0.5**4,
        "model.layers.0.weight": 0.5**3,
        "model.layers.1.weight": 0.5**2,
        "model.layers.2.weight": 0.5,
        "model.norm.weight": 1.0,
    }


def test_groups_of_a_run_come_from_its_configuration(dataset, tmp_path):
    fit(dataset, tmp_path, "+param_groups.weight_decays={vlm: 0.25}", "trainer.max_steps=1")
    groups = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0][
        "param_groups"
    ]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25, 1e-4}
    with pytest.raises(LibrobotError, match=r"param_groups.*layer_decay must lie in \(0, 1\], found 2"):
        fit(dataset, tmp_path / "a", "param_groups.layer_decay=2")
    with pytest.raises(LibrobotError, match=r"has no part 'vml'; did you mean 'vlm'"):
        fit(dataset, tmp_path / "b", "+param_groups.weight_decays={vml: 0.25}", "trainer.max_steps=1")


def test_a_fused_kernel_steps_clipped_gradients_in_bf16_mixed(dataset, tmp_path):
    """The default of trainer=gpu, which Lightning alone refuses."""
    options = ["trainer.precision=bf16-mixed", "optim.fused=true", "trainer.gradient_clip_val=1e-3"]
    fit(dataset, tmp_path, *options, "trainer.max_steps=1")
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    first = torch.stack([own["exp_avg"].square().sum() for own in state.values()]).sum().sqrt()
    assert first.item() == pytest.approx((1 - 0.9) * 1e-3, rel=1e-2)
