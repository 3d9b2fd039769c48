"""Writes an RLDS dataset with TFDS, and what TFDS's own reader makes of it: python write_rlds.py FOLDER."""

import os
import sys
from pathlib import Path

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

LENGTHS = (5, 3, 8, 4)


class Robot(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features
        step = {
            "observation": {
                "image": features.Image(shape=(12, 16, 3), encoding_format="png"),
                "wrist": features.Image(shape=(8, 8, 3), encoding_format="jpeg"),
                "depth": features.Tensor(shape=(3, 4), dtype=np.float32),
                "state": features.Tensor(shape=(7,), dtype=np.float64),
                "packed": features.Tensor(shape=(2,), dtype=np.float32, encoding="zlib"),
                "letters": features.Tensor(shape=(8,), dtype=np.int32),
                "points": features.Sequence(features.Tensor(shape=(2,), dtype=np.float32)),
            },
            "action": {
                "world_vector": features.Tensor(shape=(3,), dtype=np.float32),
                "rotation_delta": features.Tensor(shape=(3,), dtype=np.float32),
                "gripper": features.Tensor(shape=(1,), dtype=np.float32),
                "open": np.bool_,
            },
            "is_first": np.bool_,
            "is_last": np.bool_,
            "language_instruction": features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=features.FeaturesDict({"steps": features.Dataset(step)})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        generator = np.random.default_rng(5)
        for number, length in enumerate(LENGTHS):
            steps = [
                {
                    "observation": {
                        "image": generator.integers(0, 256, (12, 16, 3), dtype=np.uint8),
                        "wrist": np.full((8, 8, 3), 20 * step, np.uint8),
                        "depth": np.zeros((3, 4), np.float32),
                        "state": generator.normal(size=7),
                        "packed": generator.normal(size=2).astype(np.float32),
                        "letters": np.array([ord(c) for c in f"go {number}"] + [0] * 4, np.int32),
                        "points": [np.zeros(2, np.float32)] * step,
                    },
                    "action": {
                        "world_vector": generator.normal(size=3).astype(np.float32),
                        "rotation_delta": generator.normal(size=3).astype(np.float32),
                        "gripper": np.array([(0, 1, 0, 0, -1, 0, 0, 0)[step]], np.float32),
                        "open": bool(step % 2),
                    },
                    "is_first": step == 0,
                    "is_last": step == length - 1,
                    "language_instruction": f"open drawer {number % 2}",
                }
                for step in range(length)
            ]
            yield number, {"steps": steps}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    builder = Robot(data_dir=str(root))
    builder.download_and_prepare()
    read = {}
    dataset = tfds.builder_from_directory(str(builder.data_path)).as_dataset(split="train")
    episodes = [list(tfds.as_numpy(episode["steps"])) for episode in dataset]
    steps = [step for episode in episodes for step in episode]
    read["lengths"] = np.array([len(episode) for episode in episodes])
    for key in ("image", "wrist", "state", "packed"):
        read[key] = np.stack([step["observation"][key] for step in steps])
    for key in ("world_vector", "rotation_delta", "gripper", "open"):
        read[key] = np.stack([step["action"][key] for step in steps])
    read["prompt"] = np.array([step["language_instruction"].decode() for step in steps])
    read["letters"] = np.stack([step["observation"]["letters"] for step in steps])
    np.savez(root / "read.npz", **read)
    assert tf.__version__
