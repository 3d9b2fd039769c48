from __future__ import annotations

import pytest
import torch

from librobot.relative_actions import (
    from_relative_to_previous,
    from_relative_to_state,
    relative_to_previous,
    relative_to_state,
)

ACTIONS = torch.tensor([[[10.0, 0.5, 3.0], [12.0, 0.6, 4.0], [15.0, 0.7, 6.0]]])
STATE = torch.tensor([[1.0, 8.0]])
DIMS = [1, -1, 0]


def test_relative_to_the_state():
    found = relative_to_state(ACTIONS, STATE, DIMS)
    assert torch.equal(found, torch.tensor([[[2.0, 0.5, 2.0], [4.0, 0.6, 3.0], [7.0, 0.7, 5.0]]]))
    assert torch.equal(from_relative_to_state(found, STATE, DIMS), ACTIONS)


def test_relative_to_the_action_before():
    found = relative_to_previous(ACTIONS, STATE, DIMS)
    assert torch.equal(found, torch.tensor([[[2.0, 0.5, 2.0], [2.0, 0.6, 1.0], [3.0, 0.7, 2.0]]]))
    assert torch.equal(from_relative_to_previous(found, STATE, DIMS), ACTIONS)


@pytest.mark.parametrize(
    ("there", "back"),
    [(relative_to_state, from_relative_to_state), (relative_to_previous, from_relative_to_previous)],
)
def test_samples_may_differ_and_have_no_batch(there, back):
    torch.manual_seed(0)
    actions, state = torch.randn(5, 7, 4).double(), torch.randn(5, 6).double()
    dims = torch.randint(-1, 6, (5, 4))
    found = there(actions, state, dims)
    for i in range(5):
        torch.testing.assert_close(found[i], there(actions[i], state[i], dims[i].tolist()))
    torch.testing.assert_close(back(found, state, dims), actions)


def test_without_a_state_nothing_can_be_relative():
    assert torch.equal(relative_to_state(ACTIONS, STATE[:, :0], [-1, -1, -1]), ACTIONS)
    with pytest.raises(ValueError, match="must lie below 0, the state's width"):
        relative_to_state(ACTIONS, STATE[:, :0], DIMS)


def test_wrong_dims():
    with pytest.raises(ValueError, match="for each of 3 action dimensions, found 2"):
        relative_to_state(ACTIONS, STATE, [0, 1])
    with pytest.raises(ValueError, match=r"must lie below 2, the state's width, found \[0, 1, 2\]"):
        relative_to_state(ACTIONS, STATE, [0, 1, 2])
