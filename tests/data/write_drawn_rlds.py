"""Datasets of features drawn by chance, written by TFDS, and every value as TFDS's own reader gives it:
python write_drawn_rlds.py FOLDER SEED ..."""

import io
import json
import os
import sys
from pathlib import Path

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from librobot.data.images import encode_png

DTYPES = ("bool", "uint8", "int8", "uint16", "int32", "int64", "uint64", "float16", "float32", "float64")
LENGTHS = ((3, 1), (40,))
"""Steps of the episodes, by shard."""


def array(random, dtype, shape):
    if dtype == "bool":
        return random.random(shape) < 0.5
    if np.dtype(dtype).kind == "f":
        return (random.normal(size=shape) * 10.0 ** random.integers(-3, 4)).astype(dtype)
    info = np.iinfo(dtype)
    return random.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def leaf(random):
    """A feature, and what draws a value of it."""
    features = tfds.features
    kind = random.choice(["tensor", "tensor", "tensor", "scalar", "text", "label", "picture", "points"])
    dtype = str(random.choice(DTYPES))
    shape = tuple(int(size) for size in random.integers(1, 4, random.integers(0, 3)))
    encoding = str(random.choice(["none", "bytes", "zlib"]))
    if kind == "scalar":
        return features.Scalar(dtype=np.dtype(dtype)), lambda: array(random, dtype, ())[()]
    if kind == "text":
        return features.Text(), lambda: str(
            random.choice(["", "open it", "Schließe die Schublade", "拿起杯子"])
        )
    if kind == "label":
        return features.ClassLabel(num_classes=7), lambda: int(random.integers(7))
    if kind == "points":
        inner = features.Tensor(shape=shape, dtype=np.float32)
        return features.Sequence(inner), lambda: [array(random, "float32", shape)] * int(random.integers(3))
    if kind == "picture":
        form, colours = str(random.choice(["png", "jpeg"])), int(random.choice([1, 3]))
        side = (int(random.integers(5, 40)), int(random.integers(5, 40)), colours)
        image = features.Image(shape=side, encoding_format=form)
        return image, lambda: random.integers(0, 256, side, dtype=np.uint8)
    tensor = features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding=encoding)
    return tensor, lambda: array(random, dtype, shape)


def tree(random, depth):
    drawn = {f"f{i}": leaf(random) for i in range(6)}
    if depth:
        drawn |= {f"d{i}": tree(random, depth - 1) for i in range(2)}
    features = {name: feature for name, (feature, _) in drawn.items()}
    return features, lambda: {name: draw() for name, (_, draw) in drawn.items()}


def leaves(value, path=""):
    if isinstance(value, dict | tfds.features.FeaturesDict):
        for name, child in value.items():
            yield from leaves(child, f"{path}/{name}" if path else name)
    else:
        yield path, value


def accurate(data):
    """tensorflow's default for JPEG is its fast, inexact transform."""
    if tf.io.is_jpeg(data):
        return tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE").numpy()
    return tf.io.decode_png(data, channels=3).numpy()


def write(folder, seed):
    random = np.random.default_rng(seed)
    step, draw = tree(random, 1)
    step["picture"] = tfds.features.Image(shape=(24, 31, 3), encoding_format="jpeg")
    feature = tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(step), "episode_metadata": {"file": tfds.features.Text()}}
    )
    folder.mkdir(parents=True)
    for number, lengths in enumerate(LENGTHS):
        name = folder / f"drawn-train.tfrecord-{number:05d}-of-{len(LENGTHS):05d}"
        with tf.io.TFRecordWriter(str(name)) as writer:
            for length in lengths:
                frames = random.integers(0, 256, (length, 24, 31, 3), dtype=np.uint8)
                steps = [draw() | {"picture": frame} for frame in frames]
                if seed % 2:  # bytes as they are, also of another form than the feature names
                    steps[0]["picture"] = io.BytesIO(encode_png(frames[0]))
                episode = {"steps": steps, "episode_metadata": {"file": "a"}}
                writer.write(feature.serialize_example(episode))
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="drawn", split="train", filetype_suffix="tfrecord"
    )
    train = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(each) for each in LENGTHS], num_bytes=1, filename_template=template
    )
    tfds.folder_dataset.write_metadata(data_dir=str(folder), features=feature, split_infos=[train])
    (folder / "legacy.json").write_text(json.dumps(feature.to_json()))
    builder = tfds.builder_from_directory(str(folder))
    pictures = {p for p, f in leaves(builder.info.features["steps"].feature) if is_picture(f)}
    config = tfds.ReadConfig(interleave_cycle_length=1)
    dataset = builder.as_dataset(split="train", read_config=config)
    raw = builder.as_dataset(
        split="train", read_config=config, decoders={"steps": tfds.decode.SkipDecoding()}
    )
    read = {}
    for episode, encoded in zip(dataset, raw, strict=True):
        undecoded = dict(leaves(encoded["steps"]))
        for i, step in enumerate(episode["steps"]):
            for path, value in leaves(step):
                if isinstance(value, tf.RaggedTensor):
                    continue
                read.setdefault(path, []).append(
                    accurate(undecoded[path][i]) if path in pictures else value.numpy()
                )
    arrays = {}
    for path, values in read.items():
        if isinstance(values[0], bytes):
            values = [value.decode() for value in values]
        if len({np.shape(value) for value in values}) == 1:
            arrays[path] = np.stack(values)
    np.savez(folder / "read.npz", **arrays)


def is_picture(feature):
    return isinstance(feature, tfds.features.Image)


if __name__ == "__main__":
    for number in map(int, sys.argv[2:]):
        write(Path(sys.argv[1]) / f"drawn{number}/1.0.0", number)
