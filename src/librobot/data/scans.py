"""What was once read out of large files, kept by their content: the next start reads it again at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from librobot.data.files import locked, written_whole
from librobot.data.frame_cache import file_fingerprint
from librobot.data.sources.stored import default_cache_dir

Arrays = dict[str, np.ndarray]


def kept_at(kind: str, path: Path, described: Any) -> Path:
    """Where `scanned` keeps its arrays."""
    return default_cache_dir() / kind / f"{path.stem}-{file_fingerprint([path], described)}.npz"


def scanned(kind: str, path: Path, described: Any, scan: Callable[[], Mapping[str, np.ndarray]]) -> Arrays:
    """The arrays that `scan` makes of the file `path` in the way `described` (plain values), from
    $LIBROBOT_CACHE/<kind> where they are there. Processes that start at once wait for the first one.

    What `scan` raises is not kept. Arrays of numbers and of texts (dtype U), none of objects.
    """
    kept = kept_at(kind, path, described)
    if not kept.exists():
        with locked(kept.with_suffix(".lock")):
            if not kept.exists():
                arrays = scan()
                with written_whole(kept) as temporary, temporary.open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
        kept.with_suffix(".lock").unlink(missing_ok=True)
    with np.load(kept, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
