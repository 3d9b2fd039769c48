"""An RLDS folder through TFDS and tf.data alone, for `librobot-bench data`: a process of its own.

    python -m librobot.bench._tfds_peer '{"root": ..., "cameras": ..., ...}'     see `_rlds.peer`

As the loaders of Open X-Embodiment do it: whole episodes with their pictures still encoded, chunks of
actions, steps out of a shuffle buffer, pictures decoded behind it, batches. Prints what a
`_data_memory.Series` holds, as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

from librobot.bench._process_memory import own_mebibytes


def batches(task: dict[str, Any]) -> Any:
    """tf.data's dataset of batches, without end."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(task["threads"])
    builder = tfds.builder_from_directory(task["root"])
    episodes = builder.as_dataset(
        split="train",
        shuffle_files=True,
        decoders={"steps": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(try_autocache=False),
    )

    def samples(episode: Any) -> Any:
        steps = episode["steps"]
        length = tf.shape(steps["action"])[0]
        rows = tf.range(length)[:, None] + tf.range(task["horizon"])[None]
        return {
            **{camera: steps["observation"][camera] for camera in task["cameras"]},
            "state": steps["observation"]["state"],
            "action": tf.gather(steps["action"], tf.minimum(rows, length - 1)),
            "mask": rows < length,
            "prompt": steps["language_instruction"],
        }

    def decoded(sample: Any) -> Any:
        pictures = {camera: tf.io.decode_jpeg(sample[camera], channels=3) for camera in task["cameras"]}
        return sample | pictures

    options = tf.data.Options()
    options.threading.private_threadpool_size = task["threads"]
    options.threading.max_intra_op_parallelism = 1
    return (
        episodes.repeat()
        .map(samples, num_parallel_calls=task["threads"])
        .flat_map(tf.data.Dataset.from_tensor_slices)
        .shuffle(task["buffer"])
        .map(decoded, num_parallel_calls=task["threads"])
        .batch(task["batch_size"], drop_remainder=True)
        .prefetch(2)
        .with_options(options)
        .as_numpy_iterator()
    )


def main(task: dict[str, Any]) -> dict[str, Any]:
    for module in ("tensorflow", "tensorflow_datasets"):
        importlib.import_module(module)
    start = time.perf_counter()
    made = batches(task)
    if task["only_first"]:
        next(made)
        return {"seconds": time.perf_counter() - start}
    for _ in range(task["warm_batches"]):
        next(made)
    spent = time.perf_counter if task["clock"] == "wall" else time.process_time
    samples: list[int] = []
    memory: list[float] = []
    count, weighed, begun, start = 0, 0.0, time.perf_counter(), spent()
    while len(memory) < task["least"] or time.perf_counter() - begun < task["seconds"]:
        next(made)
        count += task["batch_size"]
        if time.monotonic() - weighed >= task["every"]:
            weighed = time.monotonic()
            samples.append(count)
            memory.append(own_mebibytes())
    return {
        "samples": samples,
        "memory": memory,
        "milliseconds": 1000 * (spent() - start) / count,
        "rate": count / (time.perf_counter() - begun),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
