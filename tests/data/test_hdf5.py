"""HDF5 files as robomimic, LIBERO and ACT write them."""

from __future__ import annotations

import io
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from librobot.data.datamodule import DataModule
from librobot.data.sources.hdf5 import Hdf5Source
from librobot.data.sources.hdf5_layouts import LAYOUTS, read_layout
from librobot.errors import LibrobotError

LENGTHS = [4, 3] + [2] * 9  # eleven demonstrations: demo_10 comes after demo_2


def picture(episode: int, frame: int, camera: int, height: int = 8, width: int = 12) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 9 + frame, columns * 5 + episode, rows + columns + camera * 40], -1).astype(
        np.uint8
    )


def pictures(episode: int, length: int, camera: int) -> np.ndarray:
    return np.stack([picture(episode, frame, camera) for frame in range(length)])


def write_robomimic(path: Path, *, libero: bool = False) -> list[dict[str, np.ndarray]]:
    """robomimic's dataset_states_to_obs and LIBERO's create_dataset: float64 vectors, episodes in groups."""
    generator, written = np.random.default_rng(3), []
    image, wrist = (
        ("agentview_rgb", "eye_in_hand_rgb")
        if libero
        else (
            "agentview_image",
            "robot0_eye_in_hand_image",
        )
    )
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {}})
        data.attrs["total"] = sum(LENGTHS)
        if libero:
            problem = {
                "problem_name": "p",
                "language_instruction": ["put", "the", "bowl", "on", "the", "plate"],
            }
            data.attrs["problem_info"] = json.dumps(problem)
        for number, length in enumerate(LENGTHS):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            values = {"actions": generator.normal(size=(length, 7))}
            if libero:
                values |= {"ee_states": generator.normal(size=(length, 6))}
                values |= {"gripper_states": generator.normal(size=(length, 2))}
            else:
                values |= {"robot0_eef_pos": generator.normal(size=(length, 3))}
                values |= {"robot0_eef_quat": generator.normal(size=(length, 4))}
                values |= {"robot0_gripper_qpos": generator.normal(size=(length, 2))}
            demo.create_dataset("actions", data=values["actions"])
            demo.create_dataset("states", data=generator.normal(size=(length, 32)))
            demo.create_dataset("dones", data=np.zeros(length))
            obs = demo.create_group("obs")
            for name, value in values.items():
                if name != "actions":
                    obs.create_dataset(name, data=value)
            obs.create_dataset(image, data=pictures(number, length, 0), compression="gzip")
            obs.create_dataset(wrist, data=pictures(number, length, 1))
            written.append(values)
        file["mask/train"] = np.array(["demo_1", "demo_10"], dtype="S")
    return written


@pytest.mark.parametrize("layout", ["robomimic", "libero"])
def test_robomimic_and_libero(tmp_path: Path, layout: str) -> None:
    written = write_robomimic(tmp_path / "task_demo.hdf5", libero=layout == "libero")
    source = Hdf5Source(tmp_path, layout=layout)
    rows = np.arange(sum(LENGTHS))
    assert source.episode_lengths.tolist() == LENGTHS
    assert source.spec.camera_names == ("agentview", "wrist")
    assert source.spec.control_hz == 20
    assert source.spec.action[6].kind == "gripper"
    names = [name.rpartition("/")[2] for name in LAYOUTS[layout].state]
    state = np.concatenate([np.concatenate([e[name] for name in names], 1) for e in written])
    np.testing.assert_array_equal(source.states(rows), state.astype(np.float32))
    action = np.concatenate([e["actions"] for e in written]).astype(np.float32)
    np.testing.assert_array_equal(source.actions(rows), action)
    assert set(source.prompts(rows)) == {"Lift" if layout == "robomimic" else "put the bowl on the plate"}
    images = source.images(rows[::-1])  # in any order
    for camera, name in enumerate(("agentview", "wrist")):
        expected = np.concatenate([pictures(e, length, camera) for e, length in enumerate(LENGTHS)])
        np.testing.assert_array_equal(images[name].transpose(0, 2, 3, 1), expected[::-1])


def write_act(path: Path, number: int, length: int, *, compressed: bool = False) -> dict[str, Any]:
    """act/record_sim_episodes.py; `compressed` as in Mobile ALOHA: JPEG padded with zeros to one length."""
    generator = np.random.default_rng(number)
    qpos, action = generator.normal(size=(length, 14)), generator.normal(size=(length, 14))
    with h5py.File(path / f"episode_{number}.hdf5", "w", rdcc_nbytes=1024**2 * 2) as root:
        root.attrs["sim"] = True
        obs = root.create_group("observations")
        images = obs.create_group("images")
        for camera, name in enumerate(("cam_high", "cam_left_wrist")):
            frames = pictures(number, length, camera)
            if compressed:
                root.attrs["compress"] = True
                encoded = [jpeg(frame) for frame in frames]
                longest = max(map(len, encoded))
                padded = np.stack([np.frombuffer(e.ljust(longest, b"\0"), np.uint8) for e in encoded])
                images.create_dataset(name, data=padded, chunks=(1, longest))
            else:
                images.create_dataset(name, frames.shape, dtype="uint8", chunks=(1, *frames.shape[1:]))
                root[f"/observations/images/{name}"][...] = frames
        obs.create_dataset("qpos", (length, 14))
        obs.create_dataset("qvel", (length, 14))
        root.create_dataset("action", (length, 14))
        root["/observations/qpos"][...] = qpos
        root["/action"][...] = action
    return {"qpos": qpos.astype(np.float32), "action": action.astype(np.float32)}


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_act_and_aloha(tmp_path: Path, compressed: bool) -> None:
    folder = tmp_path / "sim_transfer_cube"
    folder.mkdir()
    written = [write_act(folder, i, length, compressed=compressed) for i, length in enumerate(LENGTHS)]
    source = pickle.loads(pickle.dumps(Hdf5Source(folder, layout="aloha")))
    rows = np.arange(sum(LENGTHS))
    assert source.episode_lengths.tolist() == LENGTHS
    assert [dim.name for dim in source.spec.action][6] == "left_gripper"
    np.testing.assert_array_equal(source.states(rows), np.concatenate([e["qpos"] for e in written]))
    np.testing.assert_array_equal(source.actions(rows), np.concatenate([e["action"] for e in written]))
    assert set(source.prompts(rows)) == {"sim transfer cube"}
    found = source.images(rows)["cam_left_wrist"].transpose(0, 2, 3, 1)
    expected = np.concatenate([pictures(e, length, 1) for e, length in enumerate(LENGTHS)])
    if compressed:
        expected = np.stack([np.asarray(Image.open(io.BytesIO(jpeg(frame)))) for frame in expected])
    np.testing.assert_array_equal(found, expected)


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "run.h5", "w") as file:
        for number in range(2):
            group = file.create_group(f"trials/trial{number}/steps")
            group["pose"] = np.arange(6.0).reshape(3, 2) + number
            group["grip"] = np.arange(3.0)
            group["command"] = np.arange(3.0) * 2
            group["top"] = pictures(number, 3, 0).transpose(0, 3, 1, 2)
            group.attrs["say"] = f"task {number}"
    layout = {
        "files": "*.h5",
        "episode": "trials/*/steps",
        "state": ["pose", "grip"],
        "action": "command",
        "cameras": {"above": "top"},
        "prompt": ".:say",
        "control_hz": 5,
        "action_dims": [{"name": "speed", "unit": "m/s"}],
    }
    source = Hdf5Source(tmp_path, layout=layout, robot="cart", rotate=True)
    assert source.states(np.array([4])).tolist() == [[3.0, 4.0, 1.0]]
    assert source.actions(np.array([4])).tolist() == [[2.0]]
    assert source.prompts(np.array([0, 5])) == ["task 0", "task 1"]
    assert (source.spec.name, source.spec.control_hz, source.spec.action[0].unit) == ("cart", 5, "m/s")
    expected = pictures(1, 3, 0)[1][::-1, ::-1]
    np.testing.assert_array_equal(source.images(np.array([4]))["above"][0].transpose(1, 2, 0), expected)


def test_the_mask_chooses_episodes(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "demo.hdf5")
    assert Hdf5Source(tmp_path, filter_key="train").episode_lengths.tolist() == [3, 2]
    with pytest.raises(LibrobotError, match=r"no mask/test; found \['train'\]"):
        Hdf5Source(tmp_path, filter_key="test")


def test_a_layout_changes_another() -> None:
    layout = read_layout({"base": "libero", "state": []})
    assert layout.state == ()
    assert layout.cameras == LAYOUTS["libero"].cameras
    with pytest.raises(ValueError, match="did you mean 'cameras'"):
        read_layout({"base": "libero", "camera": {}})
    with pytest.raises(ValueError, match="did you mean 'libero'"):
        read_layout("librero")


def damage(path: Path, change: Any) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def test_what_is_wrong_names_file_and_episode(tmp_path: Path) -> None:
    path = tmp_path / "demo.hdf5"

    def fails(change: Any, match: str, **options: Any) -> None:
        write_robomimic(path)
        damage(path, change)
        with pytest.raises(LibrobotError, match=match):
            Hdf5Source(path, **options)

    def replaced(name: str, value: np.ndarray) -> Any:
        def change(file: h5py.File) -> None:
            del file[name]
            file[name] = value

        return change

    fails(
        lambda f: f.__delitem__("data/demo_1/actions"), r"demo.hdf5: data/demo_1: no dataset 'actions'; found"
    )
    fails(replaced("data/demo_1/actions", np.zeros((5, 7))), r"data/demo_1: .* has 3 steps, actions 5")
    fails(replaced("data/demo_2/actions", np.zeros((2, 6))), r"data/demo_2: action: expected 7 .* found 6")
    fails(
        replaced("data/demo_1/obs/robot0_eef_pos", np.zeros((2, 3))),
        r"data/demo_1: its datasets differ in length",
    )
    fails(
        replaced("data/demo_1/obs/agentview_image", np.zeros((2, 8, 12, 3), np.uint8)),
        r"data/demo_1: .*agentview_image has 2 pictures, expected 3",
    )
    fails(
        replaced("data/demo_0/obs/agentview_image", np.zeros((4, 8, 12, 4), np.uint8)),
        r"expected a picture, uint8 .* found uint8 \(8, 12, 4\)",
    )
    fails(
        replaced("data/demo_1/actions", np.full((3, 7), np.nan)), r"data/demo_1: episode 1, frame 0: actions"
    )
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(LibrobotError, match=r"demo.hdf5: expected an HDF5 file, found 500 bytes"):
        Hdf5Source(path)


def test_episodes_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "demo.hdf5")
    damage(tmp_path / "demo.hdf5", lambda file: file.__delitem__("data/demo_1/actions"))
    with pytest.warns(
        UserWarning, match=r"1 of 11 episodes are left out .*data/demo_1: no dataset 'actions'"
    ):
        source = Hdf5Source(tmp_path, on_error="skip")
    assert source.episode_lengths.tolist() == [LENGTHS[0], *LENGTHS[2:]]


def test_values_that_are_not_finite_are_skipped_through_the_data_module(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "demo.hdf5")

    def change(file: h5py.File) -> None:
        file["data/demo_1/actions"][2, 3] = np.nan

    damage(tmp_path / "demo.hdf5", change)
    with pytest.raises(LibrobotError, match=r"episode 1, frame 2: actions dimension 'rx' is nan"):
        _ = DataModule(partial(Hdf5Source, tmp_path)).source
    with pytest.warns(UserWarning, match="1 of 11 episodes are left out"):
        source = DataModule(partial(Hdf5Source, tmp_path), on_error="skip").source
    assert source.episode_lengths.tolist() == [LENGTHS[0], *LENGTHS[2:]]
    found = source.images(np.array([4]))["agentview"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(found, picture(2, 0, 0))
