"""Hydra's words for sweeps as Optuna's distributions, and back as overrides that Hydra reads."""

import pytest

optuna = pytest.importorskip("optuna")

from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

from librobot.errors import LibrobotError  # noqa: E402
from librobot.training.sweeps.space import assignment, parse  # noqa: E402


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=interval(1e-5,1e-2)", FloatDistribution(1e-5, 1e-2)),
        ("optim.lr=tag(log,interval(1e-5,1e-2))", FloatDistribution(1e-5, 1e-2, log=True)),
        ("data.batch_size=int(tag(log,interval(8,256)))", IntDistribution(8, 256, log=True)),
        ("framework.horizon=range(4,21,4)", IntDistribution(4, 20, step=4)),
        ("framework.horizon=range(4,20,4)", IntDistribution(4, 16, step=4)),
        ("framework.dropout=range(0.0,0.5,0.1)", FloatDistribution(0.0, 0.4, step=0.1)),
        ("framework=act,pi0", CategoricalDistribution(("act", "pi0"))),
        ("optim.betas=[0.9,0.95],[0.9,0.999]", CategoricalDistribution(("[0.9,0.95]", "[0.9,0.999]"))),
        ("framework.pre_norm=choice(true,false)", CategoricalDistribution((True, False))),
        ("framework.freeze=null,[vlm]", CategoricalDistribution(("null", "[vlm]"))),
    ],
)
def test_an_override_is_a_distribution(override, expected):
    (found,) = parse([override], None).axes.values()
    assert found == expected


@pytest.mark.parametrize("value", [True, False, 3, 1.5e-07, "null", "act", "[0.9,0.95]", "{a:1}", "'a b'"])
def test_a_value_comes_back_from_hydra_as_it_was(value):
    (read,) = OverridesParser.create().parse_overrides([assignment("+a.b", value)])
    assert read.get_key_element() == "+a.b"
    if isinstance(value, str):
        assert assignment("+a.b", read.get_value_element_as_str()) == f"+a.b={value}"
    else:
        assert read.value() == value
        assert type(read.value()) is type(value)


def test_a_trials_overrides_hold_what_is_fixed_and_what_was_chosen():
    space = parse(["framework=act", "optim.lr=interval(0,1)", "+a=1,2", "framework=pi0"], None)
    assert space.fixed == ("framework=pi0",)  # the later one counts
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    overrides = space.overrides(trial)
    assert overrides == space.overrides(trial)
    assert overrides[0] == "framework=pi0"
    assert overrides[1:] == [f"optim.lr={trial.params['optim.lr']}", f"+a={trial.params['+a']}"]


def test_corners_have_every_choice_and_both_ends():
    corners = parse(["head=l1,mse,flow_matching", "optim.lr=interval(0.1,1)", "seed=1"], None).corners()
    assert [corner[0] for corner in corners] == ["seed=1"] * 3
    assert {corner[1] for corner in corners} == {"head=l1", "head=mse", "head=flow_matching"}
    assert {corner[2] for corner in corners} == {"optim.lr=0.1", "optim.lr=1.0"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["framework=act"], "expected something to search"),
        (["optim.lr=tag(log,interval(0,1))"], "optim.lr=tag.*nothing that Optuna can search"),
        (["optim.lr=interval(1,0.1)"], "optim.lr=interval.*nothing that Optuna can search"),
        (["framework.horizon=range(4,4)"], "the range is empty"),
        (["seed=1,1"], "one value comes twice"),
    ],
)
def test_what_cannot_be_searched_is_said(overrides, message):
    with pytest.raises(LibrobotError, match=message):
        parse(overrides, None)
