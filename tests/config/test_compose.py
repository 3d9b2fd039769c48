"""Overrides, experiments and third-party packages really take effect."""

import textwrap
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from librobot.config.compose import compose, read, resolve, write
from librobot.errors import LibrobotError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def test_a_framework_brings_its_natural_head():
    assert compose(["framework=pi0"]).head._target_.endswith("FlowMatching")
    assert compose(["framework=act"]).head._target_.endswith("L1")


def test_another_head_replaces_it():
    cfg = compose(["framework=pi0", "head=ddpm"])
    assert cfg.framework._target_.endswith("Pi0")
    assert cfg.head._target_.endswith("DDPM")
    assert "head" not in cfg.framework


def test_an_experiment_takes_effect_and_the_command_line_beats_it(here):
    add(
        here / "experiments/study/preset.yaml",
        """\
        # @package _global_
        # Picks a framework, a head that is not its own, and some values.
        defaults:
          - override /framework: pi0
          - override /head: ddpm
          - override /trainer: ddp
        seed: 7
        trainer:
          max_steps: 11
        head:
          num_steps: 3
        """,
    )
    cfg = compose(["experiment=study/preset"])
    assert cfg.framework._target_.endswith("Pi0")
    assert cfg.head._target_.endswith("DDPM")
    assert cfg.head.num_steps == 3
    assert cfg.trainer.strategy._target_.endswith("DDPStrategy")
    assert (cfg.seed, cfg.trainer.max_steps) == (7, 11)
    cfg = compose(["experiment=study/preset", "head=flow_matching", "seed=8", "framework=act"])
    assert cfg.head._target_.endswith("FlowMatching")
    assert cfg.framework._target_.endswith("ACT")
    assert (cfg.seed, cfg.trainer.max_steps) == (8, 11)


def test_an_experiment_without_a_head_gets_the_frameworks_own(here):
    add(here / "experiments/one.yaml", "# @package _global_\ndefaults:\n  - override /framework: pi0\n")
    assert compose(["experiment=one"]).head._target_.endswith("FlowMatching")


def test_the_debug_group_takes_effect():
    assert compose(["debug=fast"]).trainer.max_steps == 5
    assert compose(["debug=anomaly"]).trainer.detect_anomaly is True
    assert compose(["debug=overfit"]).trainer.overfit_batches == 2


def third_party(folder: Path) -> None:
    add(folder / "mylib/__init__.py", "class Mine:\n    def __init__(self, size): self.size = size\n")
    add(folder / "mylib/conf/__init__.py", "")
    add(
        folder / "mylib/conf/framework/mine.yaml",
        "# Mine.\ndefaults:\n  - /head@_global_.head: mse\n  - _self_\n_target_: mylib.Mine\nsize: 3\n",
    )


def test_a_third_party_package_is_found_by_its_entry_point(here, monkeypatch):
    third_party(here / "site")
    add(here / "site/mylib-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: mylib\nVersion: 1.0\n")
    add(here / "site/mylib-1.0.dist-info/entry_points.txt", "[librobot.conf]\nmylib = mylib.conf\n")
    monkeypatch.syspath_prepend(here / "site")
    cfg = compose(["framework=mine", "framework.size=4"])
    assert cfg.framework == {"_target_": "mylib.Mine", "size": 4}
    assert cfg.head._target_.endswith("MSE")


def test_a_third_party_folder_is_found_by_hydras_search_path(here):
    third_party(here)
    with pytest.raises(LibrobotError, match="framework=mine"):
        compose(["framework=mine"])
    cfg = compose(["framework=mine", f"hydra.searchpath=[file://{here}/mylib/conf]"])
    assert cfg.framework._target_ == "mylib.Mine"


def test_other_hydra_applications_do_not_see_experiments(here):
    add(here / "experiments/one.yaml", "# @package _global_\nseed: 1\n")
    add(here / "other/conf.yaml", "value: 1\n")
    with hydra.initialize_config_dir(str(here / "other"), version_base="1.3"):
        assert hydra.compose("conf", ["+experiment=one"]) == {"value": 1, "experiment": "one"}


def test_writing_resolves_and_reading_is_strict(here):
    cfg = compose(["logger=wandb", "name=mine", "run_dir=runs/a", "data=lerobot", "data.root=somewhere"])
    path = write(cfg, here / "runs/a/config.yaml")
    assert "${" not in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]
    again = read(path)
    assert again.logger.wandb.name == "mine"
    assert again.callbacks.checkpoints.dirpath == "runs/a/checkpoints"
    assert resolve(again) == resolve(cfg)
    with pytest.raises(AttributeError):
        _ = again.sed


def test_a_missing_value_is_named():
    with pytest.raises(LibrobotError, match=r"data\.root"):
        resolve(compose(["data=lerobot"]))


def test_reading_something_else_says_so(here):
    with pytest.raises(LibrobotError, match="no such file"):
        read(here / "config.yaml")
    add(here / "config.yaml", "- 1\n")
    with pytest.raises(LibrobotError, match="mapping"):
        read(here / "config.yaml")


def test_composing_leaves_hydra_as_it_was():
    compose([])
    assert not hydra.core.global_hydra.GlobalHydra.instance().is_initialized()
    assert OmegaConf.is_struct(compose([]))
