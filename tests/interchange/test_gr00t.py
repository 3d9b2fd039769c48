"""Folders in NVIDIA's layout become policies with the same numbers; what does not fit is named."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny_models
from librobot.errors import LibrobotError
from librobot.interchange.base import ImportOptions, import_checkpoint
from librobot.interchange.gr00t_weights import EAGLE, QWEN, weight_map
from librobot.policy import Policy
from librobot.types import Dim, RobotSpec

GROUPS = {
    "state": {"arm": slice(0, 4), "gripper": slice(4, 5)},
    "action": {"arm": slice(0, 2), "gripper": slice(2, 3)},
}
ROBOT = RobotSpec(
    name="new_embodiment",
    cameras=tiny_models.SPEC.cameras,
    state=tuple(Dim(n) for n in ("arm_0", "arm_1", "arm_2", "arm_3", "gripper")),
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
                "state": {"modality_keys": ["arm", "gripper"]},
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

    def relative(found):
        kwargs = found["processor_kwargs"]
        kwargs["use_relative_action"] = True
        kwargs["modality_configs"]["new_embodiment"]["action"]["action_configs"] = [
            {"rep": "RELATIVE"}, {"rep": "ABSOLUTE"}
        ]  # fmt: skip

    processor = folder / "processor" / "processor_config.json"
    before = processor.read_text()
    edited(processor, relative)
    with pytest.raises(LibrobotError, match="actions 'arm' of robot 'new_embodiment' are relative"):
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
