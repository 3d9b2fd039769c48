"""Episodes while training: what they say is what the checkpoint of that step does, and training goes on as if
there had been none."""

import pytest
import torch
from small_runs import fit, losses, rows
from stick_suite import StickSuite

from librobot.errors import LibrobotError
from librobot.evaluation.rollout import evaluate_policy
from librobot.evaluation.statistics import summarise
from librobot.policy import Policy

SUITE = "callbacks.rollouts.env={_target_: stick_suite.StickSuite}"
OPTIONS = [SUITE, "callbacks.rollouts.episodes=8", "callbacks.rollouts.num_workers=1", "optim.lr=1e-2"]
SEVERAL = ["callbacks.rollouts.every_n_steps=2", "callbacks.checkpoints.keep_every_n_steps=1"]


def success_of(checkpoint):
    policy = Policy.from_checkpoint(checkpoint, "cpu")
    results = evaluate_policy(policy, StickSuite(), episodes=8, num_workers=1, progress=False)
    return summarise(results)["success"]


def test_success_is_that_of_the_checkpoint_and_training_goes_on_untouched(dataset, tmp_path):
    common = ["trainer.max_steps=3", "framework.freeze=[vlm]"]
    plain = ["callbacks=[default,ema]", "optim.lr=1e-2", *common]
    fit(dataset, tmp_path / "plain", *plain)
    final = fit(
        dataset, tmp_path / "run", "callbacks=[default,ema,rollouts]", *OPTIONS, *SEVERAL, *common,
        "callbacks.rollouts.videos_per_kind=1", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("run", "plain")
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    found = {
        int(row["step"]) + 1: float(row["eval/success"])
        for row in rows(tmp_path / "run")
        if row["eval/success"]
    }
    assert list(found) == [2, 3]
    kept = tmp_path / "run/checkpoints"
    assert found == {step: success_of(kept / f"step={step:08d}.ckpt") for step in found}
    assert final["eval/success"] == found[3]
    assert {"eval/success/walk", "eval/success/run", "eval/seconds"} <= set(final)
    videos = sorted(path.parent.name for path in (tmp_path / "run/rollouts").rglob("*.mp4"))
    assert videos == ["step=00000002"] * 2 + ["step=00000003"] * 2


def test_the_best_by_success_is_kept(dataset, tmp_path):
    options = ["callbacks.rollouts.every_n_steps=1", "callbacks.checkpoints.keep_every_n_steps=1"]
    fit(dataset, tmp_path, "callbacks=best_success", *OPTIONS, *options, "trainer.max_steps=3")
    by_step = {int(row["step"]) + 1: float(row["eval/success"]) for row in rows(tmp_path)}
    best = torch.load(tmp_path / "checkpoints/best_success.ckpt", weights_only=True)["global_step"]
    assert by_step[best] == max(by_step.values())


def test_what_does_not_go_together_is_said_before_training(dataset, tmp_path):
    with pytest.raises(LibrobotError, match="does not fit the suite 'tabletop'"):
        fit(dataset, tmp_path, "callbacks=[default,rollouts]", "trainer.max_steps=1")
    with pytest.raises(LibrobotError, match="episodes must be at least 1, found 0"):
        fit(dataset, tmp_path, "callbacks=[default,rollouts]", "callbacks.rollouts.episodes=0")
    assert not (tmp_path / "metrics.csv").exists()
