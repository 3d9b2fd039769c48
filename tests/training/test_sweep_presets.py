"""The presets of the sweep demo: what they search is there, for Optuna and for W&B's agent."""

from pathlib import Path

import pytest
import yaml

from librobot.config.check import check
from librobot.config.compose import compose

STUDY = Path(__file__).parents[2] / "experiments/sweep_demo"
SWEEP = yaml.safe_load((STUDY / "wandb_sweep.yml").read_text())
ENDS = ("min", "max")


@pytest.mark.parametrize("end", [0, -1])
def test_each_job_of_wandbs_sweep_composes(end, monkeypatch):
    monkeypatch.chdir(STUDY.parents[1])
    assert SWEEP["program"] == "librobot-train"
    assert SWEEP["command"][-1] == "${args_no_hyphens}"  # W&B's KEY=VALUE
    values = {
        key: axis["values"][end] if "values" in axis else axis[ENDS[end]]
        for key, axis in SWEEP["parameters"].items()
    }
    cfg = compose(
        ["run_dir=runs", *SWEEP["command"][1:-1], *(f"{key}={value}" for key, value in values.items())]
    )
    check(cfg)
    assert cfg.optim.lr == values["optim.lr"]
    assert "wandb" in cfg.logger
    assert "rollouts" in cfg.callbacks  # which logs the metric that W&B looks at
    assert SWEEP["metric"]["name"] == "eval/success"


def test_optunas_search_space_is_there(monkeypatch):
    monkeypatch.chdir(STUDY.parents[1])
    pytest.importorskip("optuna")
    from librobot.training.sweeps.space import parse

    preset = yaml.safe_load((STUDY / "act.yaml").read_text())["hydra"]["sweeper"]
    space = parse([f"{key}={value}" for key, value in preset["params"].items()], None)
    assert all(set(point) == set(space.axes) for point in preset["first"])
    for job in space.corners():
        cfg = compose(["experiment=sweep_demo/act", *job])
        check(cfg)
        assert cfg.objective == "eval/success"
