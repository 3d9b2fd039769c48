"""RLDS: any TFDS folder of TFRecords, such as the datasets of Open X-Embodiment, without tensorflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from librobot.data.remote import local_root
from librobot.data.scans import Arrays, kept_at, scanned
from librobot.data.sources.base import Cache, OnError
from librobot.data.sources.encoded_pictures import EncodedColumn
from librobot.data.sources.rlds_features import Described, Field, described
from librobot.data.sources.rlds_shards import scan_shard
from librobot.data.sources.stored import Episodes, StoredSource, read_each
from librobot.data.spec_file import read_spec
from librobot.data.standardise import compose, fields_of
from librobot.errors import LibrobotError, nearest
from librobot.progress import ProgressBar
from librobot.types import Camera, RobotSpec

Term = str | Mapping[str, Any]


class RldsSource(StoredSource):
    """A folder with dataset_info.json and features.json, whose shards are read through once; what was found
    is kept in $LIBROBOT_CACHE/rlds, and pictures are read from the shards when asked for.

    pictures: camera -> field of a step ("observation/image"); None: every picture of three colours. state,
    action: terms of fields (`librobot.data.standardise.Term`); None: observation/state and action. prompt:
    the field with the instruction, None for none. drop_first, drop_last: steps that every episode leaves out
    at its ends, after the composition. robot, control_hz: RLDS does not say, but what `convert` wrote does:
    its librobot.json holds the robot's spec.

    Raises LibrobotError for a folder of another kind, unknown fields and episodes too short; by shard and
    record for what is missing, cut short, does not agree with its checksum or with features.json.
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
        robot: str | None = None,
        control_hz: float | None = None,
        on_error: OnError = "raise",
    ) -> None:
        root = local_root(root)
        dataset, written = described(root, split), read_spec(root)
        numbers = [name for name, field in dataset.fields.items() if field.kind in ("numbers", "encoded")]
        if state is None:
            state = ["observation/state"] if "observation/state" in numbers else []
        action = ["action"] if action is None else action
        taken = _taken(dataset, numbers, state, action, root)
        if pictures is None and written is not None:
            pictures = {name: f"observation/{name}" for name in written.camera_names}
        pictures = _pictures(dataset, pictures, root)
        text = _text(dataset, prompt, root)
        read = _Steps(dataset, sorted({*taken, *pictures.values(), *text}), root, on_error)
        lengths = read.lengths
        values = {name: read.joined(f"numbers/{name}") for name in taken}
        states, state_dims = compose(state, values, lengths, f"{root}: data.source.state")
        actions, action_dims = compose(action, values, lengths, f"{root}: data.source.action")
        if written is not None:
            state_dims = list(written.state) if len(written.state) == len(state_dims) else state_dims
            action_dims = list(written.action) if len(written.action) == len(action_dims) else action_dims
        kept, kept_lengths = _kept(lengths, drop_first, drop_last, read.places)
        paths, file_of_row = [path for path, _ in dataset.shards], read.shard_of_row[kept]
        columns = {
            camera: EncodedColumn(paths, file_of_row, read.joined(f"places/{field}")[kept])
            for camera, field in pictures.items()
        }
        sizes = {camera: next(column.read(np.array([0]))).shape[:2] for camera, column in columns.items()}
        prompts, prompt_of_row = read.prompts(prompt)
        super().__init__(
            Episodes(
                root=root,
                spec=RobotSpec(
                    name=robot or (written.name if written else dataset.name),
                    cameras=tuple(Camera(camera, *size) for camera, size in sizes.items()),
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
                files=paths,
                places=read.places,
                provenance={"format": "rlds", "split": split},
            ),
            cameras=cameras,
            image_size=image_size,
            cache=cache,
            cache_dir=cache_dir,
            described=[pictures, drop_first, drop_last],
            on_error=on_error,
        )


class _Steps:
    """What the shards hold of the named fields, one row for each step of the episodes that can be read."""

    def __init__(self, dataset: Described, names: Sequence[str], root: Path, on_error: OnError) -> None:
        self.fields = {name: dataset.fields[name] for name in names}
        self.scans = _scans(dataset, self.fields, root)
        episodes = read_each(_episodes(self.scans), _sound, on_error)
        if not episodes:
            raise LibrobotError(f"{root}: the split has no episode")
        self.lengths = np.array([length for _, _, length, _ in episodes], np.int64)
        self.places = [
            f"{dataset.shards[shard][0]}: record {self.scans[shard]['records'][place]}"
            for shard, place, _, _ in episodes
        ]
        self.shard_of_row = np.repeat([shard for shard, _, _, _ in episodes], self.lengths)

    def joined(self, name: str) -> np.ndarray:
        """An array over the steps of all shards; an episode that cannot be read has no steps in them."""
        return np.concatenate([scan[name] for scan in self.scans])

    def prompts(self, field: str | None) -> tuple[list[str], Int[np.ndarray, " n"]]:
        if field is None:
            return [""], np.zeros(int(self.lengths.sum()), np.int64)
        if self.fields[field].kind != "text":
            codes, index = np.unique(self.joined(f"numbers/{field}"), axis=0, return_inverse=True)
            return ["".join(map(chr, row)).partition("\0")[0] for row in codes], index.reshape(-1)
        each = [scan[f"texts/{field}"] for scan in self.scans]
        texts, number = np.unique(np.concatenate(each), return_inverse=True)
        first = np.cumsum([0, *(len(texts) for texts in each)])
        rows = [scan[f"text_of_row/{field}"] + begin for scan, begin in zip(self.scans, first, strict=False)]
        return texts.tolist(), number.reshape(-1)[np.concatenate(rows)]


def _scans(dataset: Described, fields: Mapping[str, Field], root: Path) -> list[Arrays]:
    wanted = {name: asdict(field) for name, field in fields.items()}
    new = {
        path for path, expected in dataset.shards if not kept_at("rlds", path, [wanted, expected]).exists()
    }
    scans = []
    with ProgressBar(f"reading RLDS {root.parent.name}", max(1, len(new)), show=bool(new)) as progress:
        for path, expected in dataset.shards:
            scan = partial(scan_shard, path, fields, expected)
            scans.append(scanned("rlds", path, [wanted, expected], scan))
            if path in new:
                progress.advance()
    return scans


def _episodes(scans: Sequence[Arrays]) -> list[tuple[int, int, int, str]]:
    """Shard, which of its episodes, steps, and what is wrong; also what is wrong with a whole shard."""
    found = []
    for shard, scan in enumerate(scans):
        each = zip(scan["lengths"].tolist(), scan["problems"].tolist(), strict=True)
        found += [(shard, i, length, problem) for i, (length, problem) in enumerate(each)]
        if broken := str(scan["broken"]):
            found.append((shard, -1, 0, broken))
    return found


def _sound(episode: tuple[int, int, int, str]) -> tuple[int, int, int, str]:
    if episode[3]:
        raise LibrobotError(episode[3])
    return episode


def _taken(
    dataset: Described, numbers: Sequence[str], state: Sequence[Term], action: Sequence[Term], root: Path
) -> list[str]:
    """The fields that state and action are composed of."""
    try:
        return fields_of(state, numbers, f"{root}: data.source.state") + fields_of(
            action, numbers, f"{root}: data.source.action"
        )
    except ValueError as error:
        unread = [f"{name} ({why})" for name, why in dataset.left_out.items()]
        note = f". Left out of the dataset: {', '.join(unread)}" if unread else ""
        raise LibrobotError(f"{error}{note}") from error


def _pictures(dataset: Described, wanted: Mapping[str, str] | None, root: Path) -> dict[str, str]:
    """Camera -> the field of its pictures."""
    found = [name for name, field in dataset.fields.items() if field.kind == "picture"]
    if wanted is None:
        return {name.rpartition("/")[2]: name for name in found if dataset.fields[name].shape[-1] == 3}
    for name in wanted.values():
        if name not in found:
            why = f"it is {dataset.left_out[name]}" if name in dataset.left_out else nearest(name, found)
            raise LibrobotError(f"{root}: data.source.pictures: no pictures {name!r}; {why}")
    return dict(wanted)


def _text(dataset: Described, prompt: str | None, root: Path) -> list[str]:
    """The field of the instruction, if any: a text, or code points with zeros after them (Language-Table)."""
    if prompt is None:
        return []
    texts = [
        name
        for name, field in dataset.fields.items()
        if field.kind == "text" or (field.dtype in ("int32", "int64") and len(field.shape) == 1)
    ]
    if prompt not in texts:
        raise LibrobotError(f"{root}: data.source.prompt: no text {prompt!r}; {nearest(prompt, texts)}")
    return [prompt]


def _kept(
    lengths: Int[np.ndarray, " e"], first: int, last: int, places: Sequence[str]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " e"]]:
    """The steps that stay, and the episodes' lengths then."""
    shorter = lengths - first - last
    if (shorter < 1).any():
        episode = int(np.argmax(shorter < 1))
        raise LibrobotError(
            f"{places[episode]}: episode {episode} has {lengths[episode]} steps; drop_first={first} and "
            f"drop_last={last} leave none"
        )
    frames = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.flatnonzero((frames >= first) & (frames < np.repeat(lengths, lengths) - last)), shorter
