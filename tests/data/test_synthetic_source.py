"""data=synthetic: sizes as asked, the same on every opening, and training without a file."""

from __future__ import annotations

import numpy as np
import pytest
from omegaconf import open_dict
from small_runs import tiny

from librobot.config.compose import compose, read, write
from librobot.data.sources.base import Source
from librobot.data.sources.synthetic import synthetic
from librobot.training.launch import place


def test_sizes_and_numbers():
    given = {"episodes": 3, "length": (4, 6), "state_dim": 3, "action_dim": 5, "views": ["a", "b"]}
    given |= {"height": 20, "width": 30}
    source, again = synthetic(**given), synthetic(**given)  # type: ignore[arg-type]
    assert isinstance(source, Source)
    assert len(source.episode_lengths) == 3
    assert set(source.episode_lengths) <= {4, 5, 6}
    rows = np.arange(int(source.episode_lengths.sum()))
    assert source.states(rows).shape == (len(rows), 3)
    assert source.actions(rows).shape == (len(rows), 5)
    # An action is the state that follows, joint for joint, within an episode.
    np.testing.assert_allclose(source.actions(rows[:3])[:, :2], source.states(rows[1:4])[:, :2])
    assert set(np.unique(source.actions(rows)[:, -1])) <= {0.0, 1.0}
    first, second = source.images(rows), again.images(rows)
    assert first["a"].shape == (len(rows), 3, 20, 30)
    np.testing.assert_array_equal(first["a"], second["a"])
    assert len({frame.tobytes() for frames in first.values() for frame in frames}) == 2 * len(rows)
    other = synthetic(**given, seed=1)  # type: ignore[arg-type]
    assert not np.array_equal(other.images(rows[:1])["a"], first["a"][:1])
    assert source.prompts(rows)[0] != source.prompts(rows)[int(source.episode_lengths[0])]
    assert synthetic(**{**given, "state_dim": 0}).states(rows).shape == (len(rows), 0)  # type: ignore[arg-type]
    sized = synthetic(**given, cameras=["b"], image_size=(8, 8))  # type: ignore[arg-type]
    assert sized.images(rows[:2])["b"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1, found 0"),
        ({"length": (6, 4)}, r"length must be \[shortest, longest\] in frames, found \[6, 4\]"),
        ({"prompts": ()}, "prompts must hold at least one"),
        ({"state_dim": -1}, "state_dim must be at least 0"),
    ],
)
def test_wrong_sizes(given, message):
    with pytest.raises(ValueError, match=message):
        synthetic(**given)


def test_it_trains_without_a_file(tmp_path):
    from librobot.training.run import run

    sizes = ["episodes=2", "length=[4,6]", "height=16", "width=16", "views=[front]"]
    own = ["data=synthetic", *(f"data.source.{size}" for size in sizes)]
    cfg = compose([*tiny()[1:], *own, f"run_dir={tmp_path}", "name=dry", "trainer.max_steps=1"])
    with open_dict(cfg):
        place(cfg)
    assert np.isfinite(run(read(write(cfg, tmp_path / "config.yaml")))["train/loss"])
