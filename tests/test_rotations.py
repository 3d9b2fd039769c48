"""Rotations against scipy's, also where representations are at their worst: near the identity and near pi."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from librobot import rotations
from librobot.rotations import WIDTHS, continuous, convert, from_matrix, nearest, to_matrix

KINDS = ("quaternion", "axis_angle", "euler", "rot6d")
ANGLES = (0.0, 1e-9, 1e-5, 1e-3, 0.7, 2.0, math.pi - 1e-3, math.pi - 1e-5, math.pi - 1e-9, math.pi)


def axes(count: int = 40) -> np.ndarray:
    own = np.random.default_rng(0).normal(size=(count, 3))
    own[:6] = np.concatenate([np.eye(3), -np.eye(3)])
    return own / np.linalg.norm(own, axis=1, keepdims=True)


def hard_rotations() -> Rotation:
    """Every angle about every axis."""
    return Rotation.from_rotvec(np.concatenate([axes() * angle for angle in ANGLES]))


def scipy_value(rotation: Rotation, kind: str) -> np.ndarray:
    if kind == "rot6d":
        return rotation.as_matrix()[:, :2].reshape(-1, 6)
    if kind == "euler":
        return rotation.as_euler("xyz")
    return rotation.as_quat() if kind == "quaternion" else rotation.as_rotvec()


def angle_between(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Chordal: exact for small angles."""
    return (first - second).flatten(-2).norm(dim=-1) / math.sqrt(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Gimbal lock")
def test_matrices_are_scipys(kind):
    rotation = hard_rotations()
    ours = to_matrix(torch.from_numpy(scipy_value(rotation, kind)), kind)
    assert angle_between(ours, torch.from_numpy(rotation.as_matrix())).max() < 1e-12


@pytest.mark.parametrize("kind", ["quaternion", "axis_angle", "rot6d"])
def test_numbers_are_scipys(kind):
    rotation = hard_rotations()
    ours = from_matrix(torch.from_numpy(rotation.as_matrix()), kind)
    theirs = torch.from_numpy(scipy_value(rotation, kind))
    if kind == "axis_angle":  # at pi both signs are the rotation
        flipped = (ours + theirs).norm(dim=-1) < (ours - theirs).norm(dim=-1)
        assert (theirs.norm(dim=-1)[flipped] > math.pi - 1e-6).all()
        theirs = torch.where(flipped[:, None], -theirs, theirs)
    if kind == "quaternion":
        theirs = rotations.nearest_quaternion(theirs, ours)
    torch.testing.assert_close(ours, theirs, atol=2e-7, rtol=0)


def test_euler_angles_are_scipys_away_from_the_lock():
    angles = np.random.default_rng(1).uniform(-1, 1, (500, 3)) * [math.pi, 1.5, math.pi]
    matrix = torch.from_numpy(Rotation.from_euler("xyz", angles).as_matrix())
    torch.testing.assert_close(from_matrix(matrix, "euler"), torch.from_numpy(angles), atol=1e-9, rtol=0)


@pytest.mark.parametrize("pitch", [math.pi / 2, -math.pi / 2, math.pi / 2 - 1e-8])
def test_euler_angles_in_gimbal_lock_are_the_same_rotation(pitch):
    matrix = to_matrix(torch.tensor([[0.4, pitch, -1.1]], dtype=torch.float64), "euler")
    again = to_matrix(from_matrix(matrix, "euler"), "euler")
    assert angle_between(matrix, again).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_round_trips_at_every_hard_angle(source, target, dtype):
    matrix = torch.from_numpy(hard_rotations().as_matrix())
    given_ = from_matrix(matrix, source).to(dtype)
    back = convert(convert(given_, source, target), target, source)
    bound = 1e-6 if dtype == torch.float64 else 2e-3  # float32: the Euler lock's square root
    assert angle_between(to_matrix(given_, source), to_matrix(back, source)).max() < bound


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=3, max_size=3).filter(lambda v: np.linalg.norm(v) > 1e-3),
    st.floats(0, math.pi),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
)
def test_any_rotation_comes_back(axis, angle, source, target):
    vector = torch.tensor(axis, dtype=torch.float64)
    matrix = to_matrix(vector / vector.norm() * angle, "axis_angle")
    x = from_matrix(matrix, source)
    assert x.shape == (WIDTHS[source],)
    assert angle_between(matrix, to_matrix(convert(x, source, target), target)) < 1e-6


def test_any_six_numbers_are_a_rotation():
    matrix = to_matrix(
        torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), "rot6d"
    )
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3).double().expand(100, 3, 3))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(100).double())


@pytest.mark.parametrize("kind", ["quaternion", "axis_angle", "euler"])
def test_a_turn_past_pi_goes_on(kind):
    """Two full turns about an axis in steps of 3 degrees: no number jumps, and every step is its rotation."""
    axis = torch.tensor([0.2, 0.1, 0.97], dtype=torch.float64)
    turn = torch.linspace(0.1, 4 * math.pi, 240, dtype=torch.float64)[:, None] * axis / axis.norm()
    matrices = to_matrix(turn, "axis_angle")
    plain = from_matrix(matrices, kind)
    smooth = continuous(plain, kind)
    assert plain.diff(dim=0).abs().max() > 1
    assert smooth.diff(dim=0).abs().max() < 0.2
    assert angle_between(matrices, to_matrix(smooth, kind)).max() < 1e-9
    if kind == "axis_angle":
        torch.testing.assert_close(smooth, turn)


def test_the_nearest_of_two_euler_triples():
    reference = torch.tensor(
        [[3.0, 1.8, 3.0]], dtype=torch.float64
    )  # past the pitch that euler_from_matrix gives
    given_ = from_matrix(to_matrix(reference, "euler"), "euler")
    assert (given_ - reference).abs().max() > 1
    torch.testing.assert_close(nearest(given_, reference, "euler"), reference)
    sixd = torch.randn(4, 6)
    assert nearest(sixd, torch.zeros(4, 6), "rot6d") is sixd


def test_a_wrong_kind_or_width():
    with pytest.raises(ValueError, match=r"quaternion has 4 numbers, found 3"):
        to_matrix(torch.zeros(2, 3), "quaternion")
    with pytest.raises(ValueError, match=r"rotation must be one of .*rot6d, found 'rpy'"):
        convert(torch.zeros(2, 3), "rpy", "rot6d")  # type: ignore[arg-type]
