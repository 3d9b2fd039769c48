"""What every dataset format provides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from librobot.types import RobotSpec

CacheMode = Literal["none", "memmap"]
OnError = Literal["raise", "skip"]
"""What becomes of an episode that cannot be read."""


@runtime_checkable
class Source(Protocol):
    """Episodes of one robot, addressed by global frame index ("row"): episode 0's frames, then episode 1's,
    ...

    Picklable, and usable in several processes at once. `spec` gives the cameras in the size that `images`
    delivers. `provenance` holds plain types: {"root", "renderer", "env", ...}.
    """

    spec: RobotSpec
    episode_lengths: Int[np.ndarray, " episodes"]
    provenance: dict[str, Any]

    def states(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n s"]:
        """float32, physical units."""

    def actions(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n a"]:
        """float32, physical units."""

    def images(self, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n c h w"]]:
        """One array per camera, in the order of `spec.cameras`."""

    def prompts(self, rows: Int[np.ndarray, " n"]) -> list[str]:
        """The instruction of each frame."""

    def statistics(self) -> Any:
        """{"state" and "action": {"mean", "std", "min", "max", "q01", "q99"}}, float64, over every frame; a
        list of them where there are several robots."""


@runtime_checkable
class Mixture(Protocol):
    """What a source of several datasets, perhaps of several robots, has besides (see `MixtureSource`)."""

    names: tuple[str, ...]
    shares: Float[np.ndarray, " d"]
    embodiments: tuple[RobotSpec, ...]
    dataset_of_episode: Int[np.ndarray, " e"]

    def dataset(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Which dataset each row is of."""

    def embodiment(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Which of `embodiments` each row is of."""

    def image_masks(self, rows: Int[np.ndarray, " n"]) -> dict[str, Bool[np.ndarray, " n"]]:
        """False where a row's dataset lacks that camera."""


class SourceFactory(Protocol):
    """How a `source:` node with `_partial_: true` is called: with the options that every format shares.

    cameras: a subset by name, or None for all. image_size: (h, w) to resize to with the aspect kept, or None
    for the stored size. cache: "memmap" decodes every frame once into a file of raw pixels; "none" decodes at
    each use. A factory that can leave episodes out also takes on_error, which is only given as "skip".
    """

    def __call__(
        self,
        *,
        cameras: Sequence[str] | None,
        image_size: tuple[int, int] | None,
        cache: CacheMode,
    ) -> Source: ...
