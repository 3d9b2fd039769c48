"""data.on_error: what cannot be read stops the run, or is left out, counted and reported."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
from synthetic import ArraySource
from test_datamodule import Recorder, trainer
from test_lerobot_v2 import VIDEO, write_v21

from librobot.data.datamodule import DataModule
from librobot.data.sources.lerobot import LeRobotSource
from librobot.errors import LibrobotError
from librobot.types import RobotSpec


def test_videos_that_are_missing_or_cut_short(
    tmp_path: Path, spec: RobotSpec, episodes: list[dict[str, Any]]
) -> None:
    root = write_v21(tmp_path / "d", spec, episodes)
    whole = LeRobotSource(root)
    (root / f"videos/chunk-000/{VIDEO}/episode_000001.mp4").unlink()
    video = root / f"videos/chunk-001/{VIDEO}/episode_000002.mp4"
    video.write_bytes(video.read_bytes()[:-200])
    with pytest.raises(LibrobotError, match=r"episode_000001.mp4: missing"):
        DataModule(partial(LeRobotSource, root)).spec  # noqa: B018
    with pytest.warns(UserWarning, match=r"2 of 4 episodes are left out .*missing.*episode 2"):
        source = DataModule(partial(LeRobotSource, root), on_error="skip").source
    assert source.episode_lengths.tolist() == [5, 6]
    rows = np.array([0, 4, 5, 10])
    kept = np.array([0, 4, 14, 19])
    np.testing.assert_array_equal(source.states(rows), whole.states(kept))
    for camera, frames in whole.images(kept).items():
        np.testing.assert_array_equal(source.images(rows)[camera], frames)
    cached = LeRobotSource(root, on_error="skip", cache="memmap", cache_dir=tmp_path / "c")
    np.testing.assert_array_equal(cached.images(rows)["front"], source.images(rows)["front"])


class Damaged(ArraySource):
    """Its row 7 cannot be read."""

    def images(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        if 7 in rows:
            raise LibrobotError("d: episode 1, frame 1: damaged")
        return super().images(rows)


@pytest.mark.filterwarnings("ignore")
def test_a_frame_that_fails_in_training(tmp_path: Path, spec: RobotSpec) -> None:
    def fit(**options: Any) -> tuple[Recorder, DataModule]:
        module = DataModule(lambda **_: Damaged([6, 6], spec), batch_size=4, **options)
        module.configure(horizon=2)
        model = Recorder()
        trainer(tmp_path, max_epochs=2).fit(model, datamodule=module)
        return model, module

    with pytest.raises(LibrobotError, match="frame 1: damaged"):
        fit()
    lightning.seed_everything(0, verbose=False)
    model, module = fit(on_error="skip")
    rows = [row for batch, _ in model.steps for row in batch]
    assert len(rows) == 24
    assert 7 not in rows
    assert set(rows) == set(range(12)) - {7}
    assert module.skipped == 2
    with pytest.warns(UserWarning, match="2 training samples could not be read"):
        module.teardown("fit")
