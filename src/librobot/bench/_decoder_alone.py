"""The decoder alone: the frames of the same samples out of packets in memory, dropped as they come.

No loader on this decoder is quicker: it opens, seeks, converts, copies and hands over nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Int
from torch.utils.data import Dataset

from librobot.bench._loaders import HORIZON, Task, loader
from librobot.data.metadata import read_metadata
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.video_column import VideoColumn
from librobot.data.windows import Windows


def decoder_alone(task: Task, samples: Sequence[int]) -> Iterable[Any]:
    """Numbers of frames, in batches as the loaders', from as many processes."""
    return loader(_Decoding(task), task, samples, collate_fn=int)


class _Decoding(Dataset[int]):
    def __init__(self, task: Task) -> None:
        source, metadata = LeRobotSource(task.root), read_metadata(task.root)
        lengths = source.episode_lengths
        self.windows = Windows(lengths, range(len(lengths)), horizon=HORIZON, obs_steps=task.window)
        self.columns = [
            VideoColumn(metadata, key)
            for key, feature in metadata.features.items()
            if feature["dtype"] == "video"
        ]
        self.files: dict[Path, _File] = {}

    def __getitems__(self, samples: Sequence[int]) -> int:
        rows = np.unique(self.windows.observation_rows(np.asarray(samples)))
        return sum(self._decode(column, rows) for column in self.columns)

    def _decode(self, column: VideoColumn, rows: Int[np.ndarray, " n"]) -> int:
        count = 0
        files = column.files_of(rows)
        for number in np.unique(files):
            path = column.paths[number]
            if path not in self.files:
                self.files[path] = _File(path)
            frames = np.round(column.times[rows[files == number]] * column.fps)
            count += self.files[path].decode(frames.astype(int).tolist())
        return count


class _File:
    def __init__(self, path: Path) -> None:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            self.packets = [
                (bytes(packet), packet.is_keyframe) for packet in container.demux(stream) if packet.size
            ]
            codec = av.CodecContext.create(stream.codec_context.codec, "r")
            assert isinstance(codec, av.VideoCodecContext)
            self.codec = codec
            self.codec.extradata = stream.codec_context.extradata
        self.codec.thread_count = 1

    def decode(self, frames: Sequence[int]) -> int:
        """Ascending `frames`, each from its keyframe on, or from the one before; how many were decoded."""
        count = at = 0
        for frame in frames:
            first = frame
            while not self.packets[first][1] and first != at:
                first -= 1
            for content, _ in self.packets[first : frame + 1]:
                count += len(self.codec.decode(av.Packet(content)))
            at = frame + 1
        return count
