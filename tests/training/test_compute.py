"""How blocks compute changes nothing of what they compute; what a machine lacks is said."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import fit, losses
from torch import nn

from librobot.errors import LibrobotError
from librobot.policy import Policy
from librobot.training.callbacks import compute
from librobot.training.strategies import check_machine
from librobot.vlms.blocks import Recomputed

WITH = "callbacks=[default,compute]"


@pytest.mark.parametrize("framework", ["act", "pi0"])
def test_recomputed_blocks_give_the_same_run(framework, dataset, tmp_path, monkeypatch):
    made, own = [], compute.recompute
    monkeypatch.setattr(compute, "recompute", lambda blocks: (own(blocks), made.extend(blocks)))
    fit(dataset, tmp_path / "plain", "trainer.max_steps=3", framework=framework)
    before = torch.get_float32_matmul_precision()
    fit(
        dataset,
        tmp_path / "again",
        WITH,
        "callbacks.compute.recompute=true",
        "trainer.max_steps=3",
        framework=framework,
    )
    assert torch.get_float32_matmul_precision() == before
    ours, theirs = ([float(x) for x in losses(tmp_path / name)] for name in ("again", "plain"))
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert len(made) >= 2
    assert all(isinstance(block, Recomputed) for block in made)


def test_the_precision_of_products_is_set_for_the_run(monkeypatch):
    callback, framework = compute.Compute(matmul="high"), object.__new__(compute.Framework)
    before = torch.get_float32_matmul_precision()
    callback.setup(None, framework, "fit")
    assert torch.get_float32_matmul_precision() == "high"
    callback.teardown(None, framework, "fit")
    assert torch.get_float32_matmul_precision() == before


def on(device, **strategy):
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device), **strategy))


def test_eight_bits_need_a_gpu_that_has_them(dataset, tmp_path, monkeypatch):
    with pytest.raises(
        LibrobotError,
        match=r"callbacks\.compute\.fp8: .*8\.9 or later.*found a CPU; set it to false .*bf16-mixed",
    ):
        fit(dataset, tmp_path, WITH, "callbacks.compute.fp8=true", "trainer.max_steps=1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(LibrobotError, match=r"found NVIDIA A100 \(8\.0\)"):
        compute.check_fp8(on("cuda"), emulated=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    compute.check_fp8(on("cuda"), emulated=False)
    with pytest.raises(LibrobotError, match=r"not split over devices .*take trainer=fsdp2"):
        compute.check_fp8(on("cuda", tensor=2), emulated=False)
    with pytest.raises(LibrobotError, match=r"trainer\.precision=fp8: .*callbacks\.compute\.fp8=true"):
        check_machine({"precision": "fp8"})


def test_what_is_no_option():
    with pytest.raises(ValueError, match="matmul must be null, highest, high or medium, found 'low'"):
        compute.Compute(matmul="low")
    with pytest.raises(ValueError, match="fp8 must be true, false or emulated, found 'e4m3'"):
        compute.Compute(fp8="e4m3")


class Block(nn.Module):
    """Two layers that fit, one whose width does not, one of a kind of its own, one that is not called."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 24)
        self.own = type("Quantised", (nn.Linear,), {})(32, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x):
        x = x + self.attention(x, x, x)[0] + self.own(x)
        return self.odd(self.down(torch.relu(self.up(x))))


def test_eight_bits_on_the_cpu_are_those_layers_and_nearly_the_same_numbers():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    plain = Block()
    ours = copy.deepcopy(plain)
    parameters = dict(ours.named_parameters())
    assert compute.to_fp8([ours], emulated=True) == 2
    converted = {name for name, layer in ours.named_modules() if type(layer).__name__ == "Float8Linear"}
    assert converted == {"up", "down"}
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert all(parameters[name] is parameter for name, parameter in ours.named_parameters())
    x, y = torch.randn(3, 7, 32), torch.randn(3, 7, 24)  # 21 tokens: no multiple of 16
    found = [(block(x) - y).square().mean() for block in (ours, plain)]
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-2)
    assert found[0] != found[1]
    for loss in found:
        loss.backward()
    for name in ("up", "down", "odd"):  # e4m3 rounds by up to 1/16 of a number, e5m2 (gradients) by 1/8
        ours, theirs = parameters[f"{name}.weight"].grad, plain.get_submodule(name).weight.grad
        assert 0 < (ours - theirs).norm() / theirs.norm() < 0.2, name
    with pytest.raises(LibrobotError, match=r"no linear layer .* multiples of 16, found \[\(8, 8\)\]"):
        compute.to_fp8([nn.Linear(8, 8)], emulated=True)


def test_a_run_in_emulated_eight_bits(dataset, tmp_path):
    """It goes on exactly, acts as any policy, and its losses are near those of 32 bits."""
    pytest.importorskip("torchao")
    options = [WITH, "callbacks.compute.fp8=emulated"]
    fit(dataset, tmp_path / "plain", "trainer.max_steps=2", framework="pi0")
    fit(dataset, tmp_path / "whole", *options, "trainer.max_steps=2", framework="pi0")
    fit(dataset, tmp_path / "cut", *options, "trainer.max_steps=1", framework="pi0")
    fit(dataset, tmp_path / "cut", *options, "trainer.max_steps=2", "ckpt=last", framework="pi0")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ours, theirs = ([float(x) for x in losses(tmp_path / name)] for name in ("whole", "plain"))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=2e-2)
    policy = Policy.from_checkpoint(tmp_path / "whole", device="cpu")
    observation = {"images": {"front": np.zeros((32, 32, 3), np.uint8)}, "prompt": "go"}
    actions = policy.infer({**observation, "state": np.zeros(2, np.float32)})["actions"]
    assert np.isfinite(actions).all()
