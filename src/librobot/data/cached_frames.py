"""Opening the frame caches of a dataset: which kind, made by whom, and kept while they are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from librobot.data.cache_build import build, build_beside, make_room, use
from librobot.data.camera_frames import CameraFrames
from librobot.data.frame_cache import FrameCache
from librobot.data.sources.base import CacheOptions
from librobot.data.video_cache import VERSION, VideoCache
from librobot.types import RobotSpec


def cache_name(mode: str) -> str:
    """What tells the caches of one dataset apart."""
    return f"video{VERSION}" if mode == "video" else mode


def open_caches(
    folder: Path,
    options: CacheOptions,
    frames: CameraFrames,
    stored: RobotSpec,
    unchanged: Callable[[], bool],
) -> Any:
    """Give `frames` its caches in `folder`, made first or meanwhile as `options` say. stored: the cameras at
    the sizes of the dataset. unchanged(): whether its files are still the same. Keep what is returned as long
    as the caches are used.
    """
    total = frames.total
    caches: dict[str, FrameCache] = {}
    for camera in stored.cameras:
        shape = (total, 3, *frames.sizes[camera.name])
        if options.mode == "video":
            caches[camera.name] = VideoCache(folder, camera.name, shape, (camera.height, camera.width))
        else:
            caches[camera.name] = FrameCache(folder, camera.name, shape)
    used = use(folder)
    make_room(folder, list(caches.values()), options.limit_gb)
    make = build if options.build == "ahead" else build_beside
    builder = make(folder, list(caches.values()), frames.decode, unchanged)
    frames.caches = caches
    return used, builder
