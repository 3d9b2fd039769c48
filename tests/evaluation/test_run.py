import json
from dataclasses import replace

import pytest
import torch
from fake_suite import FakeSuite
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build_framework
from librobot.config.compose import compose
from librobot.errors import LibrobotError
from librobot.evaluation.run import checkpoint_file, evaluate
from librobot.types import Camera, RobotSpec

SUITE = {"_target_": "fake_suite.FakeSuite", "limit": 4}


def save_checkpoint(path, spec, provenance):
    plain = tiny_models.config("act") | {"env": SUITE}
    framework = build_framework(OmegaConf.create(plain), spec)
    framework.normalizer.fit(tiny_models.statistics(spec))
    framework.attach_run(config=plain, provenance=provenance)
    checkpoint = {"state_dict": framework.state_dict()}
    framework.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True)
    torch.save(checkpoint, path)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    provenance = {"renderer": "none", "env": {"name": "point", "limit": 3}}
    save_checkpoint(folder / "checkpoints" / "last.ckpt", FakeSuite().spec, provenance)
    return folder


def configuration(folder, **values):
    cfg = compose(["episodes=4", "num_envs=4", "num_workers=1"], "eval")
    OmegaConf.set_struct(cfg, False)
    cfg = OmegaConf.merge(cfg, {"output_dir": str(folder), "env": SUITE}, values)
    OmegaConf.set_struct(cfg, True)  # as the command gives it
    return cfg


def test_a_run_directory_gives_report_json_and_videos(run_dir, tmp_path, capsys):
    result = evaluate(configuration(tmp_path, ckpt=str(run_dir)))
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["episodes"] == 4
    assert set(found["tasks"]) == {"walk", "run"}
    assert found["success"] == pytest.approx(sum(t["success"] for t in found["tasks"].values()) / 2)
    assert [found["controls"][name]["episodes"] for name in ("blank_images", "shuffled_prompts")] == [4, 4]
    assert found["checkpoint"] == str(run_dir / "checkpoints" / "last.ckpt")
    assert found["policy"] == "first"
    assert found["latency"]["batch_size"]["max"] == 4
    assert {"renderer", "command", "date", "versions", "machine", "seed", "interval"} <= set(found)
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2
    assert "tiny_models" not in (tmp_path / "report.html").read_text()
    assert "report.html" in capsys.readouterr().out
    assert found["success"] == result["success"]


def test_the_suite_of_training_is_the_default(run_dir, tmp_path):
    cfg = configuration(tmp_path, ckpt=str(run_dir), controls=[], videos_per_kind=0)
    cfg.env = OmegaConf.create({}, flags={"struct": True})
    assert evaluate(cfg)["suite"] == {"name": "point", "limit": 3}


def test_a_single_instruction_cannot_be_shuffled_and_the_report_says_so(run_dir, tmp_path):
    cfg = configuration(
        tmp_path, ckpt=str(run_dir), episodes=1, kinds=["walk"], controls=["shuffled_prompts"]
    )
    skipped = evaluate(cfg)["controls"]["shuffled_prompts"]["skipped"]
    assert "cannot be shuffled" in skipped
    assert skipped.split(";")[0] in (tmp_path / "report.html").read_text().replace("&#39;", "'")


def test_the_expert_is_the_ceiling(tmp_path):
    cfg = configuration(tmp_path, policy="expert", env={**SUITE, "limit": 30})
    result = evaluate(cfg)
    assert result["success"] == 1.0
    assert (result["controls"], result["latency"], result["checkpoint"]) == ({}, None, None)


def test_a_policy_of_strides_is_not_evaluated_at_the_recorded_rate_without_a_word(tmp_path, caplog):
    spec = FakeSuite().spec
    strided = replace(spec, control_hz=spec.control_hz / 2)
    provenance = {"stride": 2, "recorded_hz": spec.control_hz}
    for name, learnt, origin in (("same", spec, {}), ("strided", strided, provenance)):
        save_checkpoint(tmp_path / name / "last.ckpt", learnt, origin)
        evaluate(
            configuration(tmp_path, ckpt=str(tmp_path / name), episodes=1, controls=[], videos_per_kind=0)
        )
    (said,) = [record.getMessage() for record in caplog.records if "Hz" in record.getMessage()]
    assert f"data.stride=2 of {spec.control_hz:g} Hz" in said
    assert "motions are 2 times as fast" in said


def test_a_policy_of_another_robot_is_refused(tmp_path):
    other = RobotSpec(**{**FakeSuite().spec.to_dict(), "cameras": (Camera("tip", 16, 16),)})
    save_checkpoint(tmp_path / "run" / "last.ckpt", other, {})
    with pytest.raises(LibrobotError, match="camera 'tip'; did you mean 'top'"):
        evaluate(configuration(tmp_path, ckpt=str(tmp_path / "run")))
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "ckpt=PATH"),
        ({"ckpt": "nowhere"}, "neither a file nor a folder"),
        ({"policy": "exprt"}, "did you mean 'expert'"),
        ({"policy": "expert", "ckpt": "x"}, "leave one of the two out"),
        ({"policy": "expert", "controls": ["blank"]}, "did you mean 'blank_images'"),
    ],
)
def test_impossible_options_are_refused(values, message, tmp_path):
    with pytest.raises(LibrobotError, match=message):
        evaluate(configuration(tmp_path, **values))


def test_a_folder_without_a_checkpoint_says_what_was_looked_for(tmp_path):
    with pytest.raises(LibrobotError, match=r"none of checkpoints/last\.ckpt, last\.ckpt"):
        checkpoint_file(tmp_path)
