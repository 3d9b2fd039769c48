"""A folder that lerobot's GrootPolicy wrote becomes a policy with the same numbers."""

import json

import pytest
import torch

import tiny_models
from librobot.interchange.base import ImportOptions, import_checkpoint
from librobot.interchange.gr00t_weights import weight_map
from librobot.policy import Policy

pytest.importorskip("lerobot")
pytest.importorskip("diffusers")

SHARED = {"positional_embeddings": None, "dropout": 0.2, "final_dropout": True}
SIZES = {
    "model_type": "Gr00tN1d7",
    "select_layer": 2,
    "backbone_embedding_dim": 64,
    "hidden_size": 48,
    "input_embedding_dim": 32,
    "max_state_dim": 8,
    "max_action_dim": 8,
    "action_horizon": tiny_models.HORIZON,
    "max_num_embodiments": 32,
    "max_seq_len": 16,
    "load_bf16": False,
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


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Ours, and lerobot's policy with its weights as `save_pretrained` writes it, processors included."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.groot import groot_n1_7, modeling_groot
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.processor_groot import make_groot_pre_post_processors

    ours = tiny_models.build(
        "groot_n17",
        vlm="qwen3vl_tiny",
        num_embodiments=32,
        slots=[10],
        picture_size=[64, 64],
        picture_crop=0.75,
        normalization={"state": "min_max", "action": "min_max"},
        clip_normalized=True,
        step_statistics=False,
    ).eval()
    backbone, base = tmp_path / "backbone", tmp_path / "base"
    for folder, files in (
        (backbone, ours.vlm.files()),
        (base, {"config.json": json.dumps(SIZES | {"model_name": str(backbone)})}),
    ):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)

    def from_pretrained(cls, **options):
        config = groot_n1_7.GR00TN17Config(**SIZES, model_name=str(backbone))
        return cls(config, load_backbone_weights=False)

    monkeypatch.setattr(modeling_groot.GR00TN17, "from_pretrained", classmethod(from_pretrained))
    spec = tiny_models.SPEC
    config = GrootConfig(
        base_model_path=str(base),
        chunk_size=tiny_models.HORIZON,
        n_action_steps=tiny_models.HORIZON,
        max_state_dim=8,
        max_action_dim=8,
        use_bf16=False,
        device="cpu",
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (spec.state_dim,)),
            **{
                f"observation.images.{c.name}": PolicyFeature(FeatureType.VISUAL, (3, c.height, c.width))
                for c in spec.cameras
            },
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (spec.action_dim,))},
    )
    policy = modeling_groot.GrootPolicy(config)
    policy._groot_model.load_state_dict(weight_map().to_theirs(ours.state_dict(), "ours"), strict=True)
    known = tiny_models.statistics()
    statistics = {
        theirs: {n: torch.tensor(known[key][n], dtype=torch.float32) for n in ("min", "max", "mean", "std")}
        for key, theirs in (("state", "observation.state"), ("action", "action"))
    }
    before, after = make_groot_pre_post_processors(config, dataset_stats=statistics)
    for step in before.steps:
        if hasattr(step, "image_target_size"):
            step.image_target_size, step.image_crop_size = [64, 64], [48, 48]
    folder = tmp_path / "lerobot"
    policy.save_pretrained(folder)
    before.save_pretrained(folder)
    after.save_pretrained(folder)
    return ours, folder, ImportOptions(tokenizer=str(backbone))


def test_a_written_folder(written, tmp_path):
    ours, folder, options = written
    output, imported = import_checkpoint(folder, tmp_path / "out.ckpt", options)
    assert [camera.name for camera in imported.spec.cameras] == ["front", "wrist"]  # in lerobot's order
    assert imported.slot_of_robot == [10]
    assert (imported.picture_size, imported.picture_crop) == ((64, 64), 0.75)
    own = {n: v for n, v in ours.state_dict().items() if not n.startswith("normalizer.")}
    read = Policy.from_checkpoint(output, device="cpu").framework.state_dict()
    assert set(own) == {n for n in read if not n.startswith("normalizer.")}
    assert all(torch.equal(read[name], value) for name, value in own.items())
    for key in ("state", "action"):
        for part in ("offset", "scale"):
            found, expected = read[f"normalizer.{key}_{part}"], ours.state_dict()[f"normalizer.{key}_{part}"]
            torch.testing.assert_close(found, expected)


def test_relative_actions_of_all_but_the_gripper(written, tmp_path):
    """lerobot's plain step, with the statistics that the checkpoint has."""
    _, folder, options = written
    path = folder / "policy_preprocessor.json"
    found = json.loads(path.read_text())
    plain = {"enabled": True, "exclude_joints": ["grip"], "action_names": ["lift", "turn", "gripper"]}
    found["steps"].insert(2, {"registry_name": "relative_actions_processor", "config": plain})
    path.write_text(json.dumps(found))
    imported = import_checkpoint(folder, tmp_path / "out.ckpt", options)[1]
    actions, state = torch.ones(1, tiny_models.HORIZON, 3), torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    changes = imported.robots.representation.encode(actions, state)
    assert changes[0, 0].tolist() == [0.0, -1.0, 1.0]
