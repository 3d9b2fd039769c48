"""The argument check: config path, nearest valid name, everything wrong at once."""

from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from librobot.config.check import check, targets
from librobot.config.compose import compose
from librobot.config.schema import TrainConfig
from librobot.errors import LibrobotError

HERE = __name__


class Part:
    def __init__(
        self, size: int, *, rate: float = 0.1, kind: Literal["a", "b"] = "a", note: str | None = None
    ) -> None:
        self.size = size


def factory(items: Any, *, speed: float) -> Any:
    return items, speed


def problems(**groups) -> str:
    """What the check says of a configuration in which these groups are replaced."""
    cfg = compose(["data=lerobot", "data.root=somewhere", "run_dir=runs/one"])
    OmegaConf.set_struct(cfg, False)
    for name, node in groups.items():
        cfg[name] = node
    with pytest.raises(LibrobotError) as caught:
        check(cfg, TrainConfig)
    return str(caught.value)


def part(**arguments):
    return {"_target_": f"{HERE}.Part", **arguments}


def test_a_right_configuration_passes():
    check(compose(["data=lerobot", "data.root=somewhere", "run_dir=runs/one"]))


def test_an_unknown_argument_has_a_path_and_a_suggestion():
    assert "vlm.sise: Part has no argument 'sise'; did you mean 'size'?" in problems(vlm=part(sise=3))


def test_a_missing_argument_is_named():
    assert "vlm.size: Part needs this argument" in problems(vlm=part())


def test_nested_nodes_are_checked_in_dictionaries_and_lists():
    text = problems(
        vlm=part(size=1, note=None, rate=0.5),
        callbacks={
            "x": {"_target_": f"{HERE}.Part", "size": 1},
            "y": {"items": [part(size=1), part(sizes=2)]},
        },
    )
    assert "callbacks.y.items[1].sizes" in text


def test_everything_wrong_is_listed_at_once():
    text = problems(vlm=part(size=1, ratte=2), head=part(size=1, kindd="a"))
    assert "vlm.ratte" in text
    assert "head.kindd" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"size": "three"}, "vlm.size: expected int, found 'three'"),
        ({"size": True}, "vlm.size: expected int, found True"),
        ({"size": 1, "rate": "fast"}, "vlm.rate: expected float, found 'fast'"),
        ({"size": 1, "kind": "c"}, "vlm.kind: expected 'a' or 'b', found 'c'"),
        ({"size": 1, "note": 3}, "vlm.note: expected str or null, found 3"),
    ],
)
def test_simple_types_are_checked(arguments, expected):
    assert expected in problems(vlm=part(**arguments))


def test_a_whole_number_is_a_number():
    cfg = compose(["data=lerobot", "data.root=somewhere", "run_dir=runs/one", "optim.weight_decay=0"])
    OmegaConf.set_struct(cfg, False)
    cfg.vlm = part(size=1, rate=2)
    check(cfg)


def test_a_partial_node_may_leave_arguments_out():
    cfg = compose(["data=lerobot", "data.root=somewhere", "run_dir=runs/one"])
    OmegaConf.set_struct(cfg, False)
    cfg.vlm = part(size=1, note=None)
    cfg.optim = {"_target_": f"{HERE}.factory", "_partial_": True}
    check(cfg)


def test_what_librobot_fills_in_may_not_be_configured():
    cfg = compose(["data=lerobot", "data.root=somewhere", "run_dir=runs/one"])
    framework = OmegaConf.to_container(cfg.framework)
    assert "framework.spec: this argument of ACT is filled in" in problems(framework={**framework, "spec": 1})


def test_a_target_that_does_not_import_is_named():
    text = problems(vlm={"_target_": "no_such_package.Thing"})
    assert "vlm._target_: cannot import 'no_such_package.Thing'" in text
    text = problems(vlm={"_target_": f"{HERE}.Prt"})
    assert "did you mean 'Part'?" in text


def test_missing_values_say_what_to_give():
    with pytest.raises(LibrobotError, match=r"data\.root: a value is needed here; give data\.root=VALUE"):
        check(compose(["data=lerobot", "run_dir=runs/one"]))


def test_unknown_keys_and_wrong_types_at_the_root():
    assert "sed: the configuration has no such key at its root; did you mean 'seed'?" in problems(sed=1)
    assert "seed: expected a whole number, found 'abc'" in problems(seed="abc")
    assert "framework: expected one of the group's options, found 'act'" in problems(framework="act")


def test_targets_walks_everything():
    node = {"a": {"_target_": "x", "b": [{"_target_": "y"}]}, "c": 1}
    assert [path for path, _ in targets(node)] == ["a", "a.b[0]"]
