"""Folders in NVIDIA's layout become policies with the same numbers; what does not fit is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny_models
from librobot.errors import LibrobotError
from librobot.interchange import gr00t_actions
from librobot.interchange.base import ImportOptions, import_checkpoint
from librobot.interchange.gr00t_weights import EAGLE, QWEN, weight_map
from librobot.policy import Policy
from librobot.representation import ActionRepresentation
from librobot.types import Dim, RobotSpec

GROUPS = {
    "state": {"arm": slice(0, 2), "wrist": slice(2, 4), "gripper": slice(4, 5)},
    "action": {"arm": slice(0, 2), "gripper": slice(2, 3)},
}
ROBOT = RobotSpec(
    name="new_embodiment",
    cameras=tiny_models.SPEC.cameras,
    state=tuple(Dim(n) for n in ("arm_0", "arm_1", "wrist_0", "wrist_1", "gripper")),
    action=tuple(Dim(n) for n in ("arm_0", "arm_1", "gripper")),
    control_hz=15.0,
)  # fmt: skip
SHARED = {"positional_embeddings": None, "dropout": 0.2, "final_dropout": True}
HEAD = {
    "hidden_size": 48,
    "input_embedding_dim": 32,
    "max_state_dim": 8,
    "max_action_dim": 8,
    "action_horizon": tiny_models.HORIZON,
    "max_num_embodiments": 32,
    "max_seq_len": 16,
    "num_inference_timesteps": 4,
    "diffusion_model_cfg": SHARED
    | {
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "norm_type": "ada_norm",
        "output_dim": 48,
        "interleave_self_attention": True,
    },
    "vl_self_attention_cfg": SHARED | {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16},
}


def grouped(statistics):
    """NVIDIA keeps statistics by groups of dimensions."""
    return {
        key: {
            group: {name: np.asarray(value)[part].tolist() for name, value in statistics[key].items()}
            for group, part in groups.items()
        }
        for key, groups in GROUPS.items()
    }


def write(folder, framework, names, config):
    folder.mkdir()
    theirs = weight_map(backbone=names).to_theirs(framework.state_dict(), "ours")
    theirs.pop("backbone.model.lm_head.weight", None)
    halves = sorted(theirs)[::2], sorted(theirs)[1::2]
    weights = {}
    for number, half in enumerate(halves, start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: theirs[name].clone() for name in half}, folder / shard)
        weights |= dict.fromkeys(half, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / "config.json").write_text(json.dumps(config))
    backbone = folder.with_name("backbone")
    backbone.mkdir()
    for name, text in framework.vlm.files().items():
        (backbone / name).write_text(text)
    return ImportOptions(tokenizer=str(backbone), control_hz=15.0)


@pytest.fixture
def n15(tmp_path):
    framework = tiny_models.build("groot_n15", vlm="eagle25_tiny", num_embodiments=32, slots=[31]).eval()
    config = {
        "model_type": "gr00t_n1_5",
        "action_head_cfg": HEAD | {"num_target_vision_tokens": 32},
        "backbone_cfg": {"select_layer": 2, "project_to_dim": None},
    }
    options = write(tmp_path / "n15", framework, EAGLE, config)
    video = {
        camera.name: {"resolution": [camera.width, camera.height], "channels": 3, "fps": 15.0}
        for camera in ROBOT.cameras
    }
    metadata = {
        "new_embodiment": {"statistics": grouped(tiny_models.statistics()), "modalities": {"video": video}}
    }
    (tmp_path / "n15" / "experiment_cfg").mkdir()
    (tmp_path / "n15" / "experiment_cfg" / "metadata.json").write_text(json.dumps(metadata))
    return framework, tmp_path / "n15", options


@pytest.fixture
def n17(tmp_path):
    framework = tiny_models.build(
        "groot_n17",
        vlm="qwen3vl_tiny",
        num_embodiments=32,
        slots=[10],
        picture_size=[64, 64],
        picture_crop=0.75,
    )
    config = HEAD | {
        "model_type": "Gr00tN1d7",
        "model_name": "nvidia/Cosmos-Reason2-2B",
        "select_layer": 2,
        "state_dropout_prob": 0.2,
    }
    options = write(tmp_path / "n17", framework, QWEN, config)
    processor = {
        "use_percentiles": True,
        "clip_outliers": False,
        "image_target_size": [64, 64],
        "image_crop_size": [48, 48],
        "modality_configs": {
            "new_embodiment": {
                "video": {"modality_keys": ["wrist", "front"], "delta_indices": [0]},
                "state": {"modality_keys": ["arm", "wrist", "gripper"]},
                "action": {"modality_keys": ["arm", "gripper"], "delta_indices": list(range(4))},
            }
        },
    }
    beside = tmp_path / "n17" / "processor"
    beside.mkdir()
    for name, content in (
        ("processor_config.json", {"processor_kwargs": processor}),
        ("statistics.json", {"new_embodiment": grouped(tiny_models.statistics())}),
        ("embodiment_id.json", {"new_embodiment": 10}),
    ):
        (beside / name).write_text(json.dumps(content))
    return framework.eval(), tmp_path / "n17", options


def same(expected, found):
    observation = tiny_models.batch().observation
    noise = torch.randn(4, tiny_models.HORIZON, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            found.sample_actions(observation, noise=noise),
            expected.sample_actions(observation, noise=noise),
            rtol=1e-5,
            atol=1e-5,
        )


def test_n15(n15, tmp_path):
    framework, folder, options = n15
    output, imported = import_checkpoint(folder, tmp_path / "out.ckpt", options)
    assert imported.spec == ROBOT
    assert imported.slot_of_robot == [31]
    same(framework, Policy.from_checkpoint(output, device="cpu").framework)


def test_all_robots_of_a_checkpoint(n15, tmp_path):
    """Without a name all of them: each with its own cameras, statistics and weights."""
    _, folder, options = n15

    def add(found):
        known = found["new_embodiment"]
        statistics = {key: {"arm": known["statistics"][key]["arm"]} for key in GROUPS}
        video = {"front": known["modalities"]["video"]["front"]}
        found["gr1"] = {"statistics": statistics, "modalities": {"video": video}}

    edited(folder / "experiment_cfg" / "metadata.json", add)
    imported = import_checkpoint(folder, tmp_path / "out.ckpt", options)[1]
    assert [robot.name for robot in imported.embodiments] == ["new_embodiment", "gr1"]
    assert [robot.action_dim for robot in imported.embodiments] == [3, 2]
    assert imported.slot_of_robot == [31, 24]
    assert imported.normalizer.state_offset.shape == (2, 5)
    one = import_checkpoint(
        folder, tmp_path / "one.ckpt", ImportOptions(tokenizer=options.tokenizer, embodiment="gr1")
    )[1]
    assert (one.spec.action_dim, one.spec.camera_names, one.slot_of_robot) == (2, ("front",), [24])


def test_n17(n17, tmp_path):
    framework, folder, options = n17
    framework.vlm.final_norm = False
    framework.vlm.norm.register_forward_pre_hook(framework.vlm._keep_norm_input)
    framework.vlm.processor.template = type(framework.vlm.processor.template)(
        **vars(framework.vlm.processor.template) | {"tail": "<|im_end|>\n"}
    )
    with pytest.warns(UserWarning, match="the first 4 of 6 actions"):
        output, imported = import_checkpoint(folder, tmp_path / "out.ckpt", options)
    assert [camera.name for camera in imported.spec.cameras] == ["wrist", "front"]
    assert imported.slot_of_robot == [10]
    assert imported.picture_crop == 0.75
    same(framework, Policy.from_checkpoint(output, device="cpu").framework)


STEPS = {"min": [[-1.0, -2.0], [-2.0, -6.0]], "max": [[1.0, 2.0], [4.0, 2.0]]}
"""Of two steps of the arm's relative actions; the four that follow share the second's."""


def relative(found, **how):
    """The arm's actions as changes of the wrist's state."""
    kwargs = found["processor_kwargs"]
    kwargs["use_relative_action"] = True
    kwargs["modality_configs"]["new_embodiment"]["action"]["action_configs"] = [
        {"rep": "RELATIVE", "type": "NON_EEF", "format": "DEFAULT", "state_key": "wrist"} | how,
        {"rep": "ABSOLUTE", "type": "NON_EEF", "format": "DEFAULT", "state_key": None},
    ]  # fmt: skip


@pytest.fixture
def relative_n17(n17):
    _, folder, options = n17
    edited(folder / "processor" / "processor_config.json", relative)
    edited(
        folder / "processor" / "statistics.json",
        lambda found: found["new_embodiment"].update(relative_action={"arm": STEPS}),
    )
    return folder, options


@pytest.mark.filterwarnings("ignore:robot 'new_embodiment' was trained on")
def test_relative_actions_by_hand(relative_n17, tmp_path):
    """Wrist at (10, 20): targets (10.5, 22), then (13, 14) are (0.5, 2) and (3, -6) from there."""
    folder, options = relative_n17
    imported = import_checkpoint(folder, tmp_path / "out.ckpt", options)[1]
    seen = imported.robots.representation
    state = torch.tensor([[1.0, 2.0, 10.0, 20.0, 5.0]])
    actions = torch.tensor([[[10.5, 22.0, 1.0]] + [[13.0, 14.0, 4.0]] * 5])
    changes = seen.encode(actions, state)
    assert torch.equal(changes, torch.tensor([[[0.5, 2.0, 1.0]] + [[3.0, -6.0, 4.0]] * 5]))
    # The gripper's quantiles are 1 - 3 and 1 + 3 throughout.
    normalized = torch.tensor([[[0.5, 1.0, 0.0]] + [[2 / 3, -1.0, 1.0]] * 5])
    torch.testing.assert_close(imported.normalizer.normalize("action", changes), normalized)
    torch.testing.assert_close(
        seen.decode(imported.normalizer.unnormalize("action", normalized), state), actions
    )


@pytest.mark.filterwarnings("ignore:robot 'new_embodiment' was trained on")
def test_relative_actions_as_lerobot_sees_them(relative_n17, tmp_path):
    pytest.importorskip("lerobot")
    from lerobot.policies.groot.processor_groot import GrootN17ActionDecodeStep, GrootN17PackInputsStep
    from lerobot.processor import TransitionKey

    folder, options = relative_n17
    edited(
        folder / "processor" / "processor_config.json",
        lambda found: found["processor_kwargs"].update(clip_outliers=True),
    )
    output, imported = import_checkpoint(folder, tmp_path / "out.ckpt", options)
    known = json.loads((folder / "processor" / "statistics.json").read_text())["new_embodiment"]
    known["relative_action"]["arm"] = {
        name: [*rows, *[rows[-1]] * (tiny_models.HORIZON - 2)] for name, rows in STEPS.items()
    }
    groups = json.loads((folder / "processor" / "processor_config.json").read_text())
    groups = groups["processor_kwargs"]["modality_configs"]["new_embodiment"]
    groups["action"].pop("delta_indices")
    pack = GrootN17PackInputsStep(
        action_horizon=tiny_models.HORIZON, valid_action_horizon=tiny_models.HORIZON, max_state_dim=8,
        max_action_dim=8, raw_stats=known, modality_config=groups, use_percentiles=True,
    )  # fmt: skip
    policy = Policy.from_checkpoint(output, device="cpu")
    framework, batch = policy.framework, tiny_models.batch()
    state = batch.observation.state[:, -1]
    made = pack(
        {
            TransitionKey.OBSERVATION: {"observation.state": state},
            TransitionKey.ACTION: batch.actions.clone(),
            TransitionKey.COMPLEMENTARY_DATA: {"task": batch.observation.prompt},
        }
    )
    seen = framework.robots.representation
    batch.actions = seen.encode(batch.actions, state)
    found = framework.clipped("action", framework.normalized_actions(batch))
    torch.testing.assert_close(found, made[TransitionKey.ACTION][..., :3], rtol=1e-5, atol=1e-5)

    predicted = 1.5 * torch.randn(4, tiny_models.HORIZON, 3)
    decode = GrootN17ActionDecodeStep(
        env_action_dim=3, raw_stats=known, modality_config=groups, use_percentiles=True,
        use_relative_action=True, pack_step=pack,
    )  # fmt: skip
    expected = decode({TransitionKey.ACTION: predicted})[TransitionKey.ACTION]
    decoded = framework.physical_actions(framework.clipped("action", predicted), batch.observation)
    torch.testing.assert_close(seen.decode(decoded, state), expected, rtol=1e-5, atol=1e-5)

    assert policy.spec.action == imported.robots.own_union.action == ROBOT.action


POSE = {"rep": "RELATIVE", "type": "ActionType.EEF", "format": "ActionFormat.XYZ_ROT6D", "state_key": "hand"}


def test_an_end_effectors_pose_is_relative_as_lerobot_has_it():
    """Of groups (gripper, hand: xyz and rot6d): our way back from what the policy says, and lerobot's."""
    pytest.importorskip("lerobot")
    from lerobot.policies.groot.utils import relative_eef_to_absolute

    def one(size):
        return {"min": np.zeros(size), "max": np.ones(size)}

    known = {"state": {"hand": one(9), "grip": one(1)}, "action": {"grip": one(1), "hand": one(9)}}
    action = {"modality_keys": ["grip", "hand"], "action_configs": [{"rep": "ABSOLUTE"}, POSE]}
    groups = gr00t_actions.relative_groups("arm", action, known, Path("here"))
    dims = {name: [Dim(n) for n in gr00t_actions.dim_names(name, size)] for name, size in SIZES.items()}
    robot = RobotSpec("arm", (), (*dims["hand"], *dims["grip"]), (*dims["grip"], *dims["hand"]), control_hz=5)
    described = gr00t_actions.seen_actions(
        groups, known, robot, state=["hand", "grip"], action=["grip", "hand"]
    )
    for robots in ([robot], [robot, replace(robot, name="other")]):
        made = gr00t_actions.representation({r.name: described for r in robots}, robots, Path("here"))
        seen = ActionRepresentation(made["groups"]).bind(robot)
        predicted, state = torch.randn(3, 5, 10), torch.randn(3, 10)
        expected = relative_eef_to_absolute(predicted[..., 1:].numpy(), state[:, :9].numpy())
        back = seen.decode(predicted, state)
        torch.testing.assert_close(back[..., 1:], torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
        assert torch.equal(back[..., 0], predicted[..., 0])
        again = seen.decode(seen.encode(back, state), state)
        torch.testing.assert_close(again, back, rtol=1e-5, atol=1e-5)
    other = [{"dims": described[0]["dims"][:3], "frame": "relative", "state": described[0]["state"][:3]}]
    with pytest.raises(LibrobotError, match="choose one of them by --embodiment NAME"):
        robots = [robot, replace(robot, name="other")]
        gr00t_actions.representation({"arm": described, "other": other}, robots, Path("here"))


SIZES = {"hand": 9, "grip": 1}


def edited(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_named(n17, tmp_path):
    _, folder, options = n17
    out = tmp_path / "out.ckpt"
    with pytest.raises(LibrobotError, match=r"does not know robot 'gr1'; .*new_embodiment"):
        import_checkpoint(folder, out, ImportOptions(tokenizer=options.tokenizer, embodiment="gr1"))

    processor = folder / "processor" / "processor_config.json"
    before = processor.read_text()
    edited(processor, lambda found: relative(found, type="EEF", format="XYZ_QUAT"))
    with pytest.raises(LibrobotError, match="rep=relative type=eef format=xyz_quat; librobot does not read"):
        import_checkpoint(folder, out, options)
    edited(processor, lambda found: relative(found, type="EEF", format="XYZ_ROT6D"))
    with pytest.raises(LibrobotError, match=r"as xyz and rot6d has 9 dimensions, found \(2,\)"):
        import_checkpoint(folder, out, options)
    edited(processor, lambda found: relative(found, type="NON_EEF", state_key="gripper"))
    with pytest.raises(LibrobotError, match=r"must have as many dimensions, found \(2,\) and \(1,\)"):
        import_checkpoint(folder, out, options)
    edited(processor, relative)
    with pytest.raises(LibrobotError, match=r"expected relative_action\.arm, and 'relative_action' is not"):
        import_checkpoint(folder, out, options)
    processor.write_text(before)

    edited(folder / "config.json", lambda found: found.update(use_vlln=False))
    with pytest.raises(LibrobotError, match=r"config\.json: use_vlln must be True"):
        import_checkpoint(folder, out, options)
    edited(folder / "config.json", lambda found: found.update(use_vlln=True, max_action_dim=9))
    with pytest.raises(LibrobotError, match=r"of another shape: action_encoder\.action\.weight"):
        import_checkpoint(folder, out, options)
    edited(folder / "config.json", lambda found: found.update(max_action_dim=8))
    edited(
        folder / "model.safetensors.index.json",
        lambda found: found.update(weight_map={"x": "model-00001-of-00002.safetensors"}),
    )
    with pytest.raises(LibrobotError, match=r"missing: .*"):
        import_checkpoint(folder, out, options)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(LibrobotError, match=r"model-00001-of-00002\.safetensors: expected a file"):
        import_checkpoint(folder, out, options)
    assert not out.exists()


def test_n15_needs_a_tokenizer(n15, tmp_path):
    with pytest.raises(LibrobotError, match="holds no tokenizer; name a folder"):
        import_checkpoint(n15[1], tmp_path / "out.ckpt", ImportOptions())
