"""Unknown names on the command line: one clear message with the nearest valid one."""

import pytest

from librobot.config.compose import compose
from librobot.errors import LibrobotError


@pytest.mark.parametrize(
    ("override", "place", "suggestion"),
    [
        ("framework=pi00", "framework=pi00", "'pi0'"),
        ("trainer=dpp", "trainer=dpp", "'ddp'"),
        ("trianer=ddp", "trianer", "'trainer'"),
        ("sede=1", "sede", "'seed'"),
        ("trainer.max_step=2", "trainer.max_step", "'max_steps'"),
        ("framework.horizn=2", "framework.horizn", "'horizon'"),
        ("framwork.horizon=2", "framwork", "'framework'"),
        ("logger.wandb.offline=true", "logger.wandb", "valid names: csv"),
        ("optim.lr.x=1", "optim.lr holds a value", ""),
        ("just_a_word", "just_a_word", "key=value"),
        ("debug=fats", "debug=fats", "'fast'"),
    ],
)
def test_the_message_names_the_place_and_the_nearest_name(override, place, suggestion):
    with pytest.raises(LibrobotError) as caught:
        compose([override])
    message = str(caught.value)
    assert place in message
    assert suggestion in message
    assert "_target_" not in message
    assert "\n" not in message


def test_the_nearest_name_is_found_beside_other_wrong_overrides():
    with pytest.raises(LibrobotError, match="'max_steps'"):
        compose(["trainer=ddp", "trainer.max_step=2", "optim.lrr=3"])


def test_an_unknown_experiment_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LibrobotError, match=r"\./experiments, which does not exist"):
        compose(["experiment=study/one"])
    (tmp_path / "experiments/study").mkdir(parents=True)
    (tmp_path / "experiments/study/one.yaml").write_text("# @package _global_\nseed: 1\n")
    with pytest.raises(LibrobotError, match="did you mean 'study/one'"):
        compose(["experiment=study/on"])


def test_a_mistake_inside_an_experiment_names_the_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/bad.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /framwork: pi0\n"
    )
    with pytest.raises(LibrobotError, match=r"experiment/bad.*framwork.*'framework'"):
        compose(["experiment=bad"])
