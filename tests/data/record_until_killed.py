"""Records a small dataset in processes that are killed; run by test_writer.py.

    python record_until_killed.py record FOLDER FORMAT      one recording, a dot for every stored episode
    python record_until_killed.py kill FOLDER FORMAT        kills one at each rename, then goes on with it
    python record_until_killed.py kill FOLDER FORMAT 3 15   only at these

For each kill the second prints a JSON object {"folder", "stored", "resumed"}: the episodes that
`add_episode` had returned before, and those that the next recording found. FOLDER/whole is never killed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas  # noqa: F401  (once here instead of in every child)

from librobot.data.files import TEMPORARY
from librobot.data.writer import LeRobotWriter
from librobot.types import Camera, Dim, RobotSpec

SPEC = RobotSpec("arm", (Camera("front", 64, 64),), (Dim("s"),), (Dim("x"), Dim("y")), 10.0)
NUM_EPISODES = 4


def make_episode(index: int) -> dict[str, Any]:
    generator = np.random.default_rng(index)
    length = 3 + index % 3
    return {
        "images": {"front": generator.integers(0, 256, (length, 64, 64, 3), np.uint8)},
        "state": generator.normal(size=(length, 1)).astype(np.float32),
        "action": generator.normal(size=(length, 2)).astype(np.float32),
        "task": f"task {index % 3}",
    }


def record(root: Path, image_format: Literal["image", "video"], note: Callable[[bytes], Any]) -> None:
    """Two sessions of two episodes; goes on with what is there. `note` hears of the start and episodes."""
    writer = LeRobotWriter(root, SPEC, fps=10, image_format=image_format, resume=True)
    note(str(writer.num_episodes).encode())
    for goal in (NUM_EPISODES // 2, NUM_EPISODES):
        if writer.num_episodes <= goal:
            while writer.num_episodes < goal:
                writer.add_episode(**make_episode(writer.num_episodes))
                note(b".")
            writer.finalize()


def in_child(work: Callable[[Callable[[bytes], Any]], Any]) -> tuple[str, int]:
    """Run `work(note)` in a fork: what it noted, and its wait status."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda text: os.write(writing, text))
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        noted = pipe.read().decode()
    return noted, os.waitpid(child, 0)[1]


def kill_at(rename: int, *, before: bool) -> None:
    """Kill this process at its `rename`-th rename or clearing of a folder: before it, temporary file half
    written, or just after it."""
    count = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(source: Path, *others: Any, **options: Any) -> None:
            nonlocal count
            count += 1
            if count == rename and before:
                if TEMPORARY in Path(source).name:
                    os.truncate(source, Path(source).stat().st_size // 2)
                elif Path(source).is_dir():
                    next(path for path in Path(source).iterdir() if path.is_file()).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            change(source, *others, **options)
            if count == rename:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    os.replace = counted(os.replace)
    shutil.rmtree = counted(shutil.rmtree)


def killed(root: Path, image_format: Literal["image", "video"], rename: int, before: bool) -> bool:
    """One kill and the recording after it; False where there were fewer renames."""

    def work(note: Callable[[bytes], Any]) -> None:
        kill_at(rename, before=before)
        record(root, image_format, note)

    noted, status = in_child(work)
    if status == 0:
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL, noted
    resumed, status = in_child(lambda note: record(root, image_format, note))
    print(json.dumps({"folder": root.name, "stored": noted.count("."), "resumed": resumed}), flush=True)
    return True


def main(mode: str, folder: str, image_format: Literal["image", "video"], *renames: str) -> None:
    if mode == "record":
        record(Path(folder), image_format, lambda text: os.write(1, text))
        return
    in_child(lambda note: record(Path(folder) / "whole", image_format, note))
    for before, word in ((True, "before"), (False, "after")):
        for rename in map(int, renames) if renames else itertools.count(1):
            if not killed(Path(folder) / f"{word}-{rename}", image_format, rename, before):
                break


if __name__ == "__main__":
    main(*sys.argv[1:])
