"""What every dataset format provides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from librobot.types import RobotSpec

CacheMode = Literal["none", "memmap", "video"]


@dataclass(frozen=True)
class CacheOptions:
    """How decoded frames are kept. mode: "memmap" as raw pixels, "video" as small video that decodes fast
    (lossy). build: "ahead" of training, or "background", beside it, when what is not there yet is decoded
    from the dataset. limit_gb: how much all caches in the folder may take; those used longest ago give way.
    """

    mode: CacheMode = "none"
    build: Literal["ahead", "background"] = "ahead"
    limit_gb: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("none", "memmap", "video"):
            raise ValueError(f"cache must be none, memmap or video, found {self.mode!r}")
        if self.build not in ("ahead", "background"):
            raise ValueError(f"cache_build must be ahead or background, found {self.build!r}")
        if self.limit_gb is not None and self.limit_gb <= 0:
            raise ValueError(f"cache_limit_gb must be above 0 or null, found {self.limit_gb}")


Cache = CacheMode | CacheOptions
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
    for the stored size. cache: "memmap" and "video" decode every frame once (`CacheOptions` says more),
    "none" at each use. A factory that can leave episodes out also takes on_error, which is only given
    as "skip".
    """

    def __call__(
        self,
        *,
        cameras: Sequence[str] | None,
        image_size: tuple[int, int] | None,
        cache: Cache,
    ) -> Source: ...
