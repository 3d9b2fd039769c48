"""Statistics of what modules return: against torch's own, in the steps that are looked at and in no other."""

from types import SimpleNamespace

import pytest
import torch
from small_runs import fit, rows
from torch import nn

from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework
from librobot.training.callbacks.activations import Activations, matching, merged, moments, tensors
from librobot.training.callbacks.guards import Diverged

WITH = ["callbacks=[default,statistics]", "callbacks.activations.every_n_steps=2"]


class Policy(Framework):
    """Only what the callback asks of a policy: two blocks, and what is around them."""

    def __init__(self):
        nn.Module.__init__(self)
        self.vlm, self.block_lists = None, ("blocks",)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))
        self.logged = {}

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def log(self, name, value):
        self.logged[name] = value


def trainer(step):
    return SimpleNamespace(global_step=step, log_every_n_steps=1, world_size=1)


def step(callback, policy, number, *inputs):
    """Optimiser step `number` (from 1 on), of one batch for each input; the hooks while they ran."""
    hooks = []
    for x in inputs:
        callback.on_train_batch_start(trainer(number - 1), policy, None, 0)
        policy(x)
        hooks.append(sum(len(module._forward_hooks) for module in policy.modules()))
        callback.on_before_backward(trainer(number - 1), policy, x)
        done = number if x is inputs[-1] else number - 1
        callback.on_train_batch_end(trainer(done), policy, None, None, 0)
    return hooks


def test_they_are_torchs_own_of_a_steps_batches_and_other_steps_have_no_hooks():
    torch.manual_seed(0)
    policy, callback = Policy(), Activations(2)
    callback.on_fit_start(trainer(0), policy)
    first, second = torch.randn(5, 3), torch.randn(7, 3)
    assert step(callback, policy, 1, first) == [0]
    assert policy.logged == {}
    assert step(callback, policy, 2, first, second) == [2, 2]
    assert not any(module._forward_hooks for module in policy.modules())
    output = torch.cat((first, second))
    for index in (0, 1):
        output = policy.blocks[index](output)
        expected = {"mean": output.mean(), "std": output.std(correction=0), "max": output.abs().max()}
        expected |= {"zeros": (output == 0).float().mean(), "not_finite": torch.tensor(0.0)}
        found = {kind: policy.logged[f"activations/blocks.{index}/{kind}"] for kind in expected}
        assert found == pytest.approx({kind: value.item() for kind, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("not_finite", ["warn", "error"])
def test_the_first_module_that_is_not_finite_is_named(not_finite):
    policy, callback = Policy(), Activations(1, modules=["blocks.*"], not_finite=not_finite)
    callback.on_fit_start(trainer(0), policy)
    with torch.no_grad():
        policy.blocks[1][0].bias[2] = float("inf")
    message = (
        r"of 6 numbers that blocks\.1\.0 \(Linear\) gave in step 1, 2 are not finite; it is the first of 3 "
    )
    caught = pytest.raises(Diverged, match=message) if not_finite == "error" else pytest.warns(match=message)
    with caught:
        step(callback, policy, 1, torch.randn(2, 3))
    if not_finite == "warn":
        assert policy.logged["activations/blocks.1.0/not_finite"] == pytest.approx(1 / 3)
        assert policy.logged["activations/blocks.1.0/max"] < 100  # of the finite ones
    assert not callback.hooks


def test_compiled_blocks_are_looked_at_and_are_compiled_again():
    policy, callback = Policy(), Activations(2)
    for block in policy.blocks:
        block.compile(backend="eager")
    callback.on_fit_start(trainer(0), policy)
    x = torch.randn(2, 3)
    compiled = [block._compiled_call_impl for block in policy.blocks]
    step(callback, policy, 1, x)
    step(callback, policy, 2, x)
    assert policy.logged["activations/blocks.0/max"] == pytest.approx(policy.blocks[0](x).abs().max().item())
    assert [block._compiled_call_impl for block in policy.blocks] == compiled != [None, None]


def test_parts_make_up_a_whole_and_outputs_are_unpacked():
    x = torch.randn(4, 1000, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1, 1.0])[:, None] + 300
    x[0, :3] = float("nan")
    parts = torch.stack([moments(row) for row in x]).double()
    torch.testing.assert_close(merged(parts), moments(x).double(), rtol=1e-5, atol=0)
    packed = {"states": (torch.ones(2), torch.zeros(3, dtype=torch.long)), "cache": [None, torch.zeros(0)]}
    assert [tensor.tolist() for tensor in tensors(packed)] == [[1.0, 1.0]]


def test_a_run(dataset, tmp_path):
    """The blocks of an expert; those of the backbone where they run as a whole."""
    fit(dataset, tmp_path / "with", *WITH, "trainer.max_steps=2", framework="pi0")
    row = rows(tmp_path / "with")[1]
    assert float(row["activations/expert.layers.0/std"]) > 0
    assert float(row["activations/expert.layers.0/not_finite"]) == 0


def test_what_is_no_option():
    with pytest.raises(ValueError, match="not_finite must be one of"):
        Activations(not_finite="stop")
    with pytest.raises(LibrobotError, match=r"callbacks\.activations\.every_n_steps must be a multiple"):
        Activations(3).on_fit_start(SimpleNamespace(log_every_n_steps=2), Policy())
    with pytest.raises(
        LibrobotError, match=r"no module of framework Policy is called 'block'; did you mean 'blocks'"
    ):
        matching(Policy(), ["block"])
    assert list(matching(Policy(), ["blocks.*.0"])) == ["blocks.0.0", "blocks.1.0"]
