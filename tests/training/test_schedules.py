"""Learning rates step by step."""

import pytest
import torch

from librobot.errors import LibrobotError
from librobot.training import schedules
from librobot.training.optimizers import adamw, sgd


def rates(factory, steps: int = 12, **arguments) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = factory(optimizer, **arguments)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_constant():
    assert rates(schedules.constant, 3, total_steps=None) == [2.0, 2.0, 2.0]


def test_warmup_rises_to_the_peak():
    seen = rates(schedules.constant, 6, total_steps=None, warmup_steps=3)
    assert seen == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_cosine_and_linear_end_where_told():
    for factory, middle in ((schedules.cosine, 1.1), (schedules.linear, 1.1)):
        seen = rates(factory, 12, total_steps=10, final_factor=0.1)
        assert seen[0] == 2.0
        assert seen[5] == pytest.approx(middle)
        assert seen[10] == seen[11] == pytest.approx(0.2)
        assert seen == sorted(seen, reverse=True)
    explicit = rates(schedules.cosine, 6, total_steps=1000, decay_steps=4)
    assert explicit[4:] == pytest.approx([0.0, 0.0])


def test_warmup_stable_decay():
    seen = rates(schedules.warmup_stable_decay, 11, total_steps=10, warmup_steps=1, decay_fraction=0.4)
    assert seen == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("factory", [schedules.cosine, schedules.linear, schedules.warmup_stable_decay])
def test_an_unknown_end_is_refused(factory):
    with pytest.raises(LibrobotError, match="max_steps"):
        rates(factory, total_steps=None)
    rates(factory, total_steps=None, decay_steps=5)


def test_a_resumed_schedule_goes_on():
    straight = rates(schedules.cosine, 8, total_steps=8, warmup_steps=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = schedules.cosine(optimizer, total_steps=8, warmup_steps=2)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    again = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    resumed = schedules.cosine(again, total_steps=8, warmup_steps=2)
    resumed.load_state_dict(schedule.state_dict())
    again.load_state_dict(optimizer.state_dict())
    for expected in straight[4:]:
        assert again.param_groups[0]["lr"] == pytest.approx(expected)
        again.step()
        resumed.step()


@pytest.mark.parametrize("factory", [adamw, sgd])
def test_optimizers_take_groups_and_descend(factory):
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = factory([{"params": [parameter], "weight_decay": 0.0, "lr_multiplier": 1.0}], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert parameter.item() < 2.9


def test_rsqrt_as_published_for_octo():
    seen = rates(schedules.rsqrt, 8, total_steps=None, warmup_steps=2, timescale=4)
    assert seen == pytest.approx([2 / 3, 4 / 3, *(2 * (4 / (4 + n)) ** 0.5 for n in range(6))])


def test_one_cycle_is_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=10, cycle_momentum=False)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 10:
            theirs.step()
    seen = rates(schedules.one_cycle, 12, total_steps=10)
    assert seen[:10] == pytest.approx(expected)
    assert seen[10:] == pytest.approx([8e-6, 8e-6])  # where torch's would raise
    with pytest.raises(LibrobotError, match="max_steps"):
        rates(schedules.one_cycle, total_steps=None)
