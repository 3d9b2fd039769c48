"""From any source to any format: states, actions, instructions and episodes bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from librobot.data.episode_writer import EpisodeWriter
from librobot.data.hdf5_writer import Hdf5Writer
from librobot.data.new_folder import new_folder
from librobot.data.rlds_writer import RldsWriter
from librobot.data.selected import cut_by_instruction, rows_of
from librobot.data.sources.base import Source
from librobot.data.webdataset_writer import WebDatasetWriter
from librobot.data.writer import LeRobotWriter
from librobot.data.zarr_writer import ZarrWriter
from librobot.errors import LibrobotError, nearest
from librobot.progress import ProgressBar

Format = Literal["lerobot", "rlds", "hdf5", "zarr", "webdataset"]


class Writer(Protocol):
    """What writes a format: whole episodes, each on disk when `add_episode` returns."""

    @property
    def num_episodes(self) -> int:
        """Whole episodes on disk."""

    @property
    def add_episode(self) -> Callable[..., Any]:
        """Takes images, state, action and task, as `EpisodeWriter` does."""

    def finalize(self) -> None: ...


def convert(
    source: Source,
    target: str | Path,
    to: Format,
    *,
    video: bool = False,
    jpeg: int | None = None,
    fps: int | None = None,
    prompt: str | None = None,
    cut: bool = False,
    show: bool = True,
) -> Path:
    """Write every episode of `source` to the new folder `target`, which appears when it is whole.

    Called again after an interruption it goes on with the next episode (the parts lie in TARGET.partial).
    video: encode pictures, for lerobot only; jpeg: their quality as JPEG, for the others but zarr; else every
    pixel is kept. fps: for lerobot,
    whose rate is a whole number, where the source's is not. prompt: instead of the source's instructions.
    cut: every stretch of one instruction becomes an episode, for formats that hold one for each episode.

    Raises LibrobotError where `target` exists, the parts are of another conversion, and for episodes that
    the format cannot hold.
    """
    if to not in get_args(Format):
        raise LibrobotError(f"--to {to}: {nearest(to, get_args(Format))}")
    if cut and prompt is None:
        source = cut_by_instruction(source)
    elif to in WRITERS and WRITERS[to].one_instruction and prompt is None:
        _expect_one_instruction(source, to)
    described = {
        "source": str(source.provenance.get("root")),
        "episodes": len(source.episode_lengths),
        "frames": int(source.episode_lengths.sum()),
        "cameras": [[c.name, c.height, c.width] for c in source.spec.cameras],
        "to": to,
        "video": video,
        "jpeg": jpeg,
        "prompt": prompt,
    }
    make = _writer(source, to, video, jpeg, fps)
    with new_folder(target, described) as folder:
        try:
            writer = make(folder)
        except ValueError as error:
            raise LibrobotError(f"{source.provenance.get('root')}: {error}") from error
        write_episodes(source, writer, Path(target).name, prompt=prompt, show=show)
    return Path(target).expanduser().absolute()


WRITERS: dict[str, type[EpisodeWriter]] = {
    "hdf5": Hdf5Writer,
    "rlds": RldsWriter,
    "webdataset": WebDatasetWriter,
    "zarr": ZarrWriter,
}


def _writer(
    source: Source, to: Format, video: bool, jpeg: int | None, fps: int | None
) -> Callable[[Path], Writer]:
    if (video and to != "lerobot") or (jpeg is not None and to == "lerobot"):
        raise LibrobotError(
            f"--to {to}: takes {'--video' if to == 'lerobot' else '--jpeg QUALITY'} for smaller pictures"
        )
    if to != "lerobot":
        return partial(WRITERS[to], spec=source.spec, jpeg=jpeg)
    return partial(lerobot_writer, source=source, video=video, fps=whole_rate(source, fps))


def whole_rate(source: Source, fps: int | None) -> int:
    """The rate of a LeRobotDataset. Raises LibrobotError where the source's is not a whole number."""
    rate = fps if fps is not None else source.spec.control_hz
    if rate != int(rate):
        raise LibrobotError(
            f"{source.provenance.get('root')}: a LeRobotDataset's rate is a whole number of 1/s, found "
            f"{rate:g}; give --fps"
        )
    return int(rate)


def lerobot_writer(folder: Path, source: Source, video: bool, fps: int) -> LeRobotWriter:
    return LeRobotWriter(
        folder,
        source.spec,
        fps=fps,
        image_format="video" if video else "image",
        metadata={key: source.provenance.get(key) for key in ("renderer", "env")},
        resume=True,
    )


def _expect_one_instruction(source: Source, to: str) -> None:
    for episode, rows in enumerate(rows_of(source)):
        found = list(dict.fromkeys(source.prompts(rows)))
        if len(found) > 1:
            raise LibrobotError(
                f"{source.provenance.get('root')}: episode {episode} has {len(found)} instructions "
                f"({found[0]!r}, {found[1]!r}, ...), and {to} holds one for each episode; give --cut, which "
                "makes an episode of each stretch, or --prompt TEXT"
            )


def write_episodes(
    source: Source, writer: Writer, name: str, *, prompt: str | None = None, show: bool = True
) -> None:
    """Every episode of `source` that `writer` does not have yet, in order. name: for the progress bar."""
    episodes = rows_of(source)
    first = writer.num_episodes
    with ProgressBar(f"writing {name}", len(episodes), show=show) as progress:
        progress.advance(first)
        for episode in range(first, len(episodes)):
            rows = episodes[episode]
            images = source.images(rows)
            try:
                writer.add_episode(
                    images={n: np.ascontiguousarray(i.transpose(0, 2, 3, 1)) for n, i in images.items()},
                    state=source.states(rows),
                    action=source.actions(rows),
                    task=source.prompts(rows) if prompt is None else prompt,
                )
            except ValueError as error:
                place = source.provenance.get("root")
                raise LibrobotError(f"{place}: episode {episode}: {error}") from error
            progress.advance(1)
    writer.finalize()
