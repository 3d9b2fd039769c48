"""RLDS: any TFDS folder, such as the datasets of Open X-Embodiment, without tensorflow in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from librobot.data.files import locked
from librobot.data.frame_cache import file_fingerprint
from librobot.data.images import decode_image
from librobot.data.rlds_export import PROGRESS
from librobot.data.sources.base import Cache, OnError
from librobot.data.sources.stored import Episodes, StoredSource, default_cache_dir
from librobot.data.spec_file import read_spec
from librobot.data.standardise import compose
from librobot.data.tensorflow_process import run_with_tensorflow
from librobot.errors import LibrobotError, nearest
from librobot.progress import ProgressBar
from librobot.types import Camera, RobotSpec

Term = str | Mapping[str, Any]


class RldsSource(StoredSource):
    """A folder with dataset_info.json and features.json, its `split` exported once into a cache folder
    (`export_dir`, default $LIBROBOT_CACHE/rlds) by a process of its own; pictures stay encoded there.

    pictures: camera -> field of a step ("observation/image"); None: every picture of three colours. state,
    action: terms of fields (`librobot.data.standardise.Term`); None: observation/state and action. prompt:
    the field with the instruction, None for none. drop_first, drop_last: steps that every episode leaves out
    at its ends, after the composition. robot, control_hz: RLDS does not say, but what `convert` wrote does:
    its librobot.json holds the robot's spec.

    Raises LibrobotError for a folder that TFDS cannot open, unknown fields and episodes too short.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        pictures: Mapping[str, str] | None = None,
        state: Sequence[Term] | None = None,
        action: Sequence[Term] | None = None,
        prompt: str | None = "language_instruction",
        drop_first: int = 0,
        drop_last: int = 0,
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: Cache = "none",
        cache_dir: str | Path | None = None,
        export_dir: str | Path | None = None,
        robot: str | None = None,
        control_hz: float | None = None,
        on_error: OnError = "raise",
    ) -> None:
        root = Path(root).expanduser().absolute()
        folder = exported(root, split, Path(export_dir or default_cache_dir() / "rlds").expanduser())
        content = json.loads((folder / "content.json").read_text(encoding="utf-8"))
        lengths = np.array(content["lengths"], np.int64)
        known: dict[str, dict[str, Any]] = content["fields"]
        numbers = {
            name: np.memmap(folder / f"{f['file']}.bin", f["dtype"], "r", shape=(lengths.sum(), *f["shape"]))
            for name, f in known.items()
            if f["kind"] == "numbers"
        }
        if state is None:
            state = ["observation/state"] if "observation/state" in numbers else []
        try:
            states, state_dims = compose(state, numbers, lengths, f"{root}: data.source.state")
            actions, action_dims = compose(
                ["action"] if action is None else action, numbers, lengths, f"{root}: data.source.action"
            )
        except ValueError as error:
            unread = [f"{name} ({why})" for name, why in content["left_out"].items()]
            note = f". Left out of the dataset: {', '.join(unread)}" if unread else ""
            raise LibrobotError(f"{error}{note}") from error
        written = read_spec(root)
        if written is not None:
            state_dims = list(written.state) if len(written.state) == len(state_dims) else state_dims
            action_dims = list(written.action) if len(written.action) == len(action_dims) else action_dims
            if pictures is None:
                pictures = {name: f"observation/{name}" for name in written.camera_names}
        kept, kept_lengths = _kept(lengths, drop_first, drop_last, root)
        columns, cameras_found = {}, []
        for name, column in self._columns_of(folder, root, known, pictures).items():
            column.rows = kept
            columns[name] = column
            height, width = column.read(np.array([0]))[0].shape[:2]
            cameras_found.append(Camera(name, height, width))
        prompts, prompt_of_row = _prompts(folder, root, known, prompt, int(lengths.sum()))
        super().__init__(
            Episodes(
                root=root,
                spec=RobotSpec(
                    name=robot or (written.name if written else content["name"]),
                    cameras=tuple(cameras_found),
                    state=tuple(state_dims),
                    action=tuple(action_dims),
                    control_hz=control_hz or (written.control_hz if written else 10.0),
                ),
                lengths=kept_lengths,
                states=states[kept],
                actions=actions[kept],
                prompts=prompts,
                prompt_of_row=prompt_of_row[kept],
                columns=columns,
                files=[folder / "content.json"],
                places=[f"{root}: {split}"] * len(lengths),
                provenance={"format": "rlds", "split": split},
            ),
            cameras=cameras,
            image_size=image_size,
            cache=cache,
            cache_dir=cache_dir,
            described=[pictures, drop_first, drop_last],
            on_error=on_error,
        )

    @staticmethod
    def _columns_of(
        folder: Path, root: Path, known: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, str] | None
    ) -> dict[str, EncodedColumn]:
        found = {
            name: EncodedColumn(folder, root, name, f["file"])
            for name, f in known.items()
            if f["kind"] == "picture"
        }
        if wanted is None:
            return {name.rpartition("/")[2]: column for name, column in found.items()}
        for name in wanted.values():
            if name not in found:
                raise LibrobotError(
                    f"{root}: data.source.pictures: no pictures {name!r}; {nearest(name, found)}"
                )
        return {camera: found[name] for camera, name in wanted.items()}


class EncodedColumn:
    """One camera: encoded pictures one after another in a file, and where each ends. `rows` chooses steps."""

    def __init__(self, folder: Path, root: Path, field: str, file: str) -> None:
        self.root, self.field = root, field
        self.blob_path, self.ends_path = folder / f"{file}.blob", folder / f"{file}.bin"
        self.rows: Int[np.ndarray, " n"] = np.zeros(0, np.int64)
        self._maps: tuple[np.ndarray, np.ndarray] | None = None

    def read(self, rows: Int[np.ndarray, " n"]) -> list[UInt8[np.ndarray, "h w 3"]]:
        if self._maps is None:
            self._maps = (  # as plain arrays, whose slices are cheaper than those of a memmap
                np.asarray(np.memmap(self.blob_path, np.uint8, "r")),
                np.asarray(np.memmap(self.ends_path, np.int64, "r")),
            )
        blob, ends = self._maps
        images = []
        for step in self.rows[rows]:
            begin = int(ends[step - 1]) if step else 0
            try:
                images.append(decode_image(blob[begin : int(ends[step])].tobytes()))
            except ValueError as error:
                raise LibrobotError(
                    f"{self.root}: step {step}: {self.field}: expected a PNG or JPEG picture: {error}"
                ) from error
        return images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None}


def exported(root: Path, split: str, folder: Path) -> Path:
    """The folder with what `librobot.data.rlds_export` made of `split`, made now where it is not there.

    It appears whole or not at all; processes that start at once wait for the first one.
    """
    if not (root / "dataset_info.json").is_file():
        found = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else []
        raise LibrobotError(
            f"{root}: expected a TFDS folder with dataset_info.json (NAME/VERSION), found "
            f"{', '.join(found) or 'nothing'}"
        )
    files = sorted(path for path in root.iterdir() if path.is_file())
    target = folder / f"{root.parent.name}-{file_fingerprint(files, [str(root), split])}"
    if (target / "content.json").exists():
        return target
    with locked(target.with_suffix(".lock")):
        if not (target / "content.json").exists():
            _export(root, split, target)
    return target


def _export(root: Path, split: str, target: Path) -> None:
    """Goes on with what an interrupted export left in PARTIAL."""
    partial = target.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    progress: list[ProgressBar] = []

    def show(line: str) -> None:
        now, total = (int(number) for number in line.split())
        if not progress:
            progress.append(ProgressBar(f"reading RLDS {root.parent.name}", total).__enter__())
        progress[0].advance(now - progress[0].done)

    try:
        arguments = [str(root), split, str(partial)]
        run_with_tensorflow("librobot.data.rlds_export", arguments, partial / "log.txt", line=show)
    except RuntimeError as error:
        if not (partial / PROGRESS).exists():
            shutil.rmtree(partial)
        raise LibrobotError(f"{root}: TFDS cannot read it: {error}") from error
    finally:
        for bar in progress:
            bar.__exit__(None, None, None)
    (partial / PROGRESS).unlink(missing_ok=True)
    partial.rename(target)


def _kept(
    lengths: Int[np.ndarray, " e"], first: int, last: int, root: Path
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " e"]]:
    """The steps that stay, and the episodes' lengths then."""
    shorter = lengths - first - last
    if (shorter < 1).any():
        episode = int(np.argmax(shorter < 1))
        raise LibrobotError(
            f"{root}: episode {episode} has {lengths[episode]} steps; drop_first={first} and "
            f"drop_last={last} leave none"
        )
    frames = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.flatnonzero((frames >= first) & (frames < np.repeat(lengths, lengths) - last)), shorter


def _prompts(
    folder: Path, root: Path, known: Mapping[str, Mapping[str, Any]], field: str | None, total: int
) -> tuple[list[str], Int[np.ndarray, " n"]]:
    if field is None:
        return [""], np.zeros(total, np.int64)
    texts = [name for name, f in known.items() if f["kind"] == "text" or _holds_codes(f)]
    if field not in texts:
        raise LibrobotError(f"{root}: data.source.prompt: no text {field!r}; {nearest(field, texts)}")
    described = known[field]
    path = folder / f"{described['file']}.bin"
    if described["kind"] == "text":
        return list(described["texts"]), np.fromfile(path, np.int32).astype(np.int64)
    codes = np.fromfile(path, described["dtype"]).reshape(-1, *described["shape"])
    unique, index = np.unique(codes, axis=0, return_inverse=True)
    return ["".join(map(chr, row)).partition("\0")[0] for row in unique], index.reshape(-1)


def _holds_codes(field: Mapping[str, Any]) -> bool:
    """Whether it may be a text as code points, zeros at its end (Language-Table)."""
    return field["kind"] == "numbers" and field["dtype"] in ("int32", "int64") and len(field["shape"]) == 1
