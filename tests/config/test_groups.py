"""Every option of every group, and every experiment, composes and passes the argument check."""

from pathlib import Path

import librobot.conf
import pytest
from omegaconf import OmegaConf

from librobot.config.check import check, missing
from librobot.config.compose import compose, resolve
from librobot.config.schema import PARTS, EvalConfig, RecordConfig, TrainConfig

CONF = Path(librobot.conf.__path__[0])
REPOSITORY = Path(__file__).parents[2]
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))
EXPERIMENTS = sorted(
    path.relative_to(REPOSITORY / "experiments").with_suffix("").as_posix()
    for path in (REPOSITORY / "experiments").rglob("*.yaml")
)
SCHEMAS = {"train": TrainConfig, "eval": EvalConfig, "record": RecordConfig}


def checked(overrides, config_name="train"):
    extra = ["run_dir=runs/one"] if config_name == "train" else []
    cfg = compose([*overrides, *extra], config_name)
    for key in missing(OmegaConf.to_container(cfg)):  # what only a user can know: data.root, ckpt, output
        OmegaConf.update(cfg, key, "given")
    check(cfg, SCHEMAS[config_name])
    return resolve(cfg)


def test_the_groups_are_the_ones_of_the_design():
    groups = {path.name for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__"}
    wanted = {"framework", "vlm", "adapter", "head", "data", "robot", "env", "optim", "scheduler"}
    assert wanted | {"trainer", "callbacks", "logger", "debug"} <= groups


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_passes_the_check(option):
    resolved = checked(["framework=custom", option] if option.partition("=")[0] in PARTS else [option])
    assert "hydra" not in resolved
    assert "${" not in str(resolved)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_check(experiment, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert checked([f"experiment={experiment}"]) != checked([])


@pytest.mark.parametrize("env", [option for option in OPTIONS if option.startswith("env=")])
@pytest.mark.parametrize("command", ["eval", "record"])
def test_every_environment_composes_for_the_other_commands(command, env):
    checked([env], command)


@pytest.mark.parametrize("path", [*CONF.rglob("*.yaml")], ids=lambda path: str(path.relative_to(CONF)))
def test_every_yaml_opens_with_what_it_is_and_its_command(path):
    lines = path.read_text().splitlines()
    comments = []
    for line in lines:
        if not line.startswith("#"):
            break
        comments.append(line)
    opening = [line for line in comments if not line.startswith("# @package")]
    assert len(opening) >= 2, f"{path}: a comment that says what it is, and one with the command"
    assert any("librobot-" in line for line in opening), f"{path}: no command in the opening comment"
