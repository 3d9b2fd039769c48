from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy.spatial.transform import Rotation

from librobot.data.sources.rlds import RldsSource
from librobot.data.standardise import Term, absolute_gripper, binarize, compose, euler, reached

CONF = Path(__file__).parents[2] / "conf/data"
ONE = np.array([8])


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


@pytest.mark.parametrize(
    ("relative", "absolute"),
    [
        ((0, 0, 1, 0, -1, 0), (1, 1, 0, 0, 1, 1)),  # closes first, so it was open
        ((0, -1, 0, 1), (0, 1, 1, 0)),  # opens first, so it was closed
        ((0, 0.05, -0.05), (1, 1, 1)),  # never
    ],
)
def test_relative_gripper_actions(relative: tuple, absolute: tuple) -> None:
    assert absolute_gripper(column(*relative))[:, 0].tolist() == list(absolute)


@pytest.mark.parametrize(
    ("given", "expected"),
    [((1, 0.7, 0.3, 0, 0.4, 0.99), (1, 0, 0, 0, 1, 1)), ((0, 0.5, 0.25), (0, 0.25, 0.25))],
)
def test_grippers_between_open_and_closed_take_what_comes(given: tuple, expected: tuple) -> None:
    np.testing.assert_allclose(binarize(column(*given))[:, 0], expected)


def test_differences_stay_within_an_episode() -> None:
    fields = {"s": column(1, 2, 4, 10, 11)}
    value, _ = compose([{"field": "s", "then": "reached"}], fields, np.array([3, 2]), "x")
    assert value[:, 0].tolist() == [1, 2, 0, 1, 0]
    assert reached(column(3)).tolist() == [[0]]


def test_a_vector_is_put_together() -> None:
    fields = {"a/b": np.arange(24.0).reshape(8, 3), "c": np.arange(8)}
    terms = [
        {
            "field": "a/b",
            "take": [1, None],
            "names": ["y", "z"],
            "kind": "ee_position",
            "unit": "m",
            "mode": "delta",
        },
        {"fill": 0.0, "count": 2, "names": ["p", "q"]},
        {"field": "c", "then": ["clip", "invert"]},
        "c",
    ]
    value, dims = compose(terms, fields, ONE, "action")
    assert value[2].tolist() == [7, 8, 0, 0, 0, 2]
    assert [dim.name for dim in dims] == ["y", "z", "p", "q", "c", "c_2"]
    assert (dims[1].unit, dims[1].kind, dims[1].mode) == ("m", "ee_position", "delta")
    assert value.dtype == np.float32


def test_quaternions() -> None:
    quaternions = Rotation.from_euler("xyz", [[0.1, -0.2, 0.3]]).as_quat()
    np.testing.assert_allclose(euler(quaternions), [[0.1, -0.2, 0.3]], atol=1e-6)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"field": "c", "them": "clip"}, r"action\[0\].them: did you mean 'then'"),
        ({"field": "c", "then": "flip"}, r"action\[0\].then: did you mean 'clip'"),
        ({"names": ["x"]}, r"expected either field or fill"),
        ("d", r"no field 'd'"),
        ({"field": "c", "names": ["x", "y"]}, r"2 names for the 1 dimensions of c"),
    ],
)
def test_bad_terms(term: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose([term], {"c": np.arange(8)}, ONE, "action")  # type: ignore[list-item]


@pytest.mark.parametrize("path", sorted(CONF.glob("oxe_*.yaml")), ids=lambda path: path.stem)
def test_every_dataset_of_open_x_embodiment_gives_openvlas_seven_dimensions(path: Path) -> None:
    source = OmegaConf.to_container(OmegaConf.load(path))["source"]
    names = [name for term in source["action"] for name in Term.parse(term, "action").names]
    assert names == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert all(Term.parse(term, "state").field for term in source["state"])
    assert source["pictures"]
    assert 1 <= source["control_hz"] <= 30
    assert set(source) <= set(inspect.signature(RldsSource).parameters)
