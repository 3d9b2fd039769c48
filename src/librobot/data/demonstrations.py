"""The demonstrations of a simulated suite as a dataset: recorded once into a cache folder, then read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from librobot.data.files import locked
from librobot.data.sources.base import Cache
from librobot.data.sources.lerobot import LeRobotSource

if TYPE_CHECKING:
    from librobot.sim.base import Suite


def demonstrations(
    root: str | Path,
    *,
    suite: Suite,
    episodes: int,
    noise: float,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    num_workers: int = 2,
    cameras: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    cache: Cache = "none",
) -> LeRobotSource:
    """Record `episodes` demonstrations of `suite` under `root`, unless they are there, and open them.

    root: the cache folder; whatever shapes the data has its own dataset in it. kinds, noise, seed,
    num_workers: see `librobot.sim.record.ensure_demonstrations`. Processes that start together (the
    ranks of a run) wait for the first one to record.
    """
    from librobot.sim.record import ensure_demonstrations

    folder = Path(root).expanduser()
    with locked(folder / "recording.lock"):
        dataset = ensure_demonstrations(
            suite,
            episodes=episodes,
            kinds=kinds,
            noise=noise,
            seed=seed,
            num_workers=num_workers,
            cache_dir=folder,
        )
    return LeRobotSource(
        dataset, cameras=cameras, image_size=image_size, cache=cache, cache_dir=folder / "frames"
    )
