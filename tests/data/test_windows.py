from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from librobot.data.windows import WindowDataset, Windows

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(lengths=LENGTHS, horizon=st.integers(1, 15), obs_steps=st.integers(1, 5), data=st.data())
def test_windows_stay_in_their_episode(
    lengths: list[int], horizon: int, obs_steps: int, data: st.DataObject
) -> None:
    episodes = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1).map(sorted))
    offset = data.draw(st.integers(1 - horizon, 0))
    windows = Windows(np.array(lengths), episodes, horizon=horizon, obs_steps=obs_steps, action_offset=offset)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    frame = np.concatenate([np.arange(length) for length in lengths])
    samples = np.arange(len(windows))
    rows = windows.rows
    # One sample per frame of the chosen episodes, in order.
    np.testing.assert_array_equal(rows, np.flatnonzero(np.isin(owner, episodes)))

    seen = windows.observation_rows(samples)
    acted, mask = windows.action_rows(samples)
    for i, row in enumerate(rows):
        first, last = row - frame[row], row - frame[row] + lengths[owner[row]] - 1
        assert seen[i].tolist() == [max(first, row - back) for back in range(obs_steps - 1, -1, -1)]
        steps = [row + offset + ahead for ahead in range(horizon)]
        assert acted[i].tolist() == [min(max(step, first), last) for step in steps]
        assert mask[i].tolist() == [first <= step <= last for step in steps]
    assert mask[:, -offset].all()  # the current action is always real


@pytest.mark.parametrize("wrong", [{"horizon": 0, "obs_steps": 1}, {"horizon": 1, "obs_steps": 0}])
def test_windows_need_a_step(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Windows(np.array([3]), [0], **wrong)


@pytest.mark.parametrize("offset", [1, -3])
def test_a_chunk_holds_the_current_action(offset: int) -> None:
    with pytest.raises(ValueError, match=r"between -2 .* and 0"):
        Windows(np.array([5]), [0], horizon=3, obs_steps=1, action_offset=offset)


def test_a_chunk_from_the_first_observation_step_on(array_source: Callable) -> None:
    """Diffusion Policy's: the actions of the observed steps, the current one, and those to come."""
    source = array_source([4])
    windows = Windows(source.episode_lengths, [0], horizon=4, obs_steps=2, action_offset=-1)
    batch = WindowDataset(source, windows).__getitems__([0, 1, 3])
    assert batch.actions[:, :, 0].tolist() == [
        [0.5, 0.5, 1.5, 2.5],
        [0.5, 1.5, 2.5, 3.5],
        [2.5, 3.5, 3.5, 3.5],
    ]
    assert batch.action_mask.int().tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_batches_are_gathered_whole(array_source: Callable) -> None:
    source = array_source([4, 3])
    windows = Windows(source.episode_lengths, [0, 1], horizon=3, obs_steps=2)

    def processor(prompts: list[str], images: dict, state: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"length": torch.tensor([len(prompt) for prompt in prompts])}

    batch = WindowDataset(source, windows, processor).__getitems__([3, 4, 0])
    state = batch.observation.state
    assert state.shape == (3, 2, 4)
    assert state[:, :, 0].tolist() == [[2, 3], [4, 4], [0, 0]]
    front = batch.observation.images["front"]
    assert front.shape == (3, 2, 3, 32, 48)
    assert front.dtype == torch.uint8
    torch.testing.assert_close(front[:, :, 0, 0, 0].float(), state[:, :, 0])
    assert batch.actions[:, :, 0].tolist() == [[3.5, 3.5, 3.5], [4.5, 5.5, 6.5], [0.5, 1.5, 2.5]]
    assert batch.action_mask.tolist() == [[True, False, False], [True, True, True], [True, True, True]]
    assert batch.observation.prompt == ["task 3", "task 4", "task 0"]
    assert batch.observation.inputs is not None
    assert batch.observation.inputs["length"].tolist() == [6, 6, 6]
    assert batch.observation.image_mask["wrist"].tolist() == [True, True, True]
    assert batch.extra["rows"].tolist() == [3, 4, 0]
