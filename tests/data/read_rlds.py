"""What TFDS's own reader makes of an RLDS folder: python read_rlds.py FOLDER OUT.npz."""

import os
import sys

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import tensorflow_datasets as tfds

if __name__ == "__main__":
    config = tfds.ReadConfig(interleave_cycle_length=1)
    dataset = tfds.builder_from_directory(sys.argv[1]).as_dataset(split="train", read_config=config)
    episodes = [list(tfds.as_numpy(episode["steps"])) for episode in dataset]
    steps = [step for episode in episodes for step in episode]
    read = {"lengths": np.array([len(episode) for episode in episodes])}
    read |= {key: np.stack([step[key] for step in steps]) for key in ("action", "is_first", "is_last")}
    read |= {key: np.stack([s["observation"][key] for s in steps]) for key in steps[0]["observation"]}
    read["prompt"] = np.array([step["language_instruction"].decode() for step in steps])
    np.savez(sys.argv[2], **read)
