"""Rotations from one representation to another, in torch, for any leading dimensions.

    quaternion   (x, y, z, w), unit length; q and -q are the same rotation
    axis_angle   axis times angle, in radians; made here, the angle lies in [0, pi]
    euler        (roll, pitch, yaw): turns about the fixed axes x, then y, then z ("xyz" of scipy), in radians
    rot6d        the first two rows of the matrix (Zhou et al. 2019, section 4.2, in the layout of pytorch3d,
                 Diffusion Policy and GR00T); continuous everywhere, and any six numbers are a rotation

Every other representation has places where a small turn is a large jump of numbers: q and -q, axis-angle at
pi, Euler angles at +-pi and at a pitch of +-pi/2. `nearest_*` choose the representative next to a reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

RotationKind = Literal["quaternion", "axis_angle", "euler", "rot6d"]
WIDTHS: dict[str, int] = {"quaternion": 4, "axis_angle": 3, "euler": 3, "rot6d": 6}
GIMBAL = 1e-6
"""cos(pitch) below which roll and yaw turn about the same axis."""


def convert(x: Float[Tensor, "*b n"], source: RotationKind, target: RotationKind) -> Float[Tensor, "*b m"]:
    """`x` in another representation."""
    return from_matrix(to_matrix(x, source), target)


def to_matrix(x: Float[Tensor, "*b n"], kind: RotationKind) -> Float[Tensor, "*b 3 3"]:
    """Raises ValueError for an unknown kind, or numbers of another width."""
    if kind not in get_args(RotationKind):
        raise ValueError(f"rotation must be one of {', '.join(get_args(RotationKind))}, found {kind!r}")
    if x.shape[-1] != WIDTHS[kind]:
        raise ValueError(f"{kind} has {WIDTHS[kind]} numbers, found {x.shape[-1]}")
    return TO_MATRIX[kind](x)


def from_matrix(matrix: Float[Tensor, "*b 3 3"], kind: RotationKind) -> Float[Tensor, "*b m"]:
    if kind not in get_args(RotationKind):
        raise ValueError(f"rotation must be one of {', '.join(get_args(RotationKind))}, found {kind!r}")
    return FROM_MATRIX[kind](matrix)


def matrix_from_quaternion(q: Float[Tensor, "*b 4"]) -> Float[Tensor, "*b 3 3"]:
    """Of any length but 0."""
    x, y, z, w = functional.normalize(q, dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def quaternion_from_matrix(m: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 4"]:
    """With w >= 0. Computed from the largest of the four numbers, so nothing is divided by a small one
    (Shepperd 1978)."""
    m00, m11, m22 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    squares = torch.stack(
        (1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22, 1 + m00 + m11 + m22), dim=-1
    )
    xy, xz, yz = m[..., 1, 0] + m[..., 0, 1], m[..., 2, 0] + m[..., 0, 2], m[..., 2, 1] + m[..., 1, 2]
    xw, yw, zw = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    x2, y2, z2, w2 = squares.unbind(-1)
    candidates = torch.stack(
        [
            torch.stack(row, dim=-1)
            for row in ((x2, xy, xz, xw), (xy, y2, yz, yw), (xz, yz, z2, zw), (xw, yw, zw, w2))
        ],
        dim=-2,
    )
    best = squares.argmax(dim=-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    q = functional.normalize(candidates.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(q[..., 3:] < 0, -q, q)


def matrix_from_axis_angle(v: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    angle = v.norm(dim=-1, keepdim=True)
    # sin(x / 2) / x, which is 1/2 at 0.
    share = 0.5 * torch.sinc(angle / (2 * math.pi))
    return matrix_from_quaternion(torch.cat((v * share, (angle / 2).cos()), dim=-1))


def axis_angle_from_matrix(m: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3"]:
    q = quaternion_from_matrix(m)
    vector, w = q[..., :3], q[..., 3:]
    sine = vector.norm(dim=-1, keepdim=True)
    small = sine < 1e-6
    # angle / sin(angle / 2), which is 2 at 0. atan2 is exact at 0 and at pi, where acos and asin are not.
    scale = 2 * torch.atan2(sine, w) / torch.where(small, 1.0, sine)
    return vector * torch.where(small, 2.0, scale)


def matrix_from_euler(angles: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    (sr, sp, sy), (cr, cp, cy) = angles.sin().unbind(-1), angles.cos().unbind(-1)
    rows = (
        (cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr),
        (sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr),
        (-sp, cp * sr, cp * cr),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def euler_from_matrix(m: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3"]:
    """Roll and yaw in (-pi, pi], pitch in [-pi/2, pi/2]; at a pitch of +-pi/2 only roll -+ yaw is known, and
    yaw is 0, as in scipy."""
    cosine = torch.hypot(m[..., 0, 0], m[..., 1, 0])
    locked = cosine < GIMBAL
    pitch = torch.atan2(-m[..., 2, 0], cosine)
    roll = torch.where(
        locked, torch.atan2(-m[..., 1, 2], m[..., 1, 1]), torch.atan2(m[..., 2, 1], m[..., 2, 2])
    )
    yaw = torch.where(locked, 0.0, torch.atan2(m[..., 1, 0], m[..., 0, 0]))
    return torch.stack((roll, pitch, yaw), dim=-1)


def matrix_from_rot6d(x: Float[Tensor, "*b 6"]) -> Float[Tensor, "*b 3 3"]:
    """Gram-Schmidt: any two rows that are not parallel."""
    first = functional.normalize(x[..., :3], dim=-1)
    second = x[..., 3:] - (first * x[..., 3:]).sum(dim=-1, keepdim=True) * first
    second = functional.normalize(second, dim=-1)
    return torch.stack((first, second, torch.linalg.cross(first, second)), dim=-2)


def rot6d_from_matrix(m: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 6"]:
    return m[..., :2, :].flatten(-2)


TO_MATRIX: dict[str, Callable[[Tensor], Tensor]] = {
    "quaternion": matrix_from_quaternion,
    "axis_angle": matrix_from_axis_angle,
    "euler": matrix_from_euler,
    "rot6d": matrix_from_rot6d,
}
FROM_MATRIX: dict[str, Callable[[Tensor], Tensor]] = {
    "quaternion": quaternion_from_matrix,
    "axis_angle": axis_angle_from_matrix,
    "euler": euler_from_matrix,
    "rot6d": rot6d_from_matrix,
}


def nearest_quaternion(q: Float[Tensor, "*b 4"], reference: Float[Tensor, "*b 4"]) -> Float[Tensor, "*b 4"]:
    """q or -q, whichever is nearer to `reference`."""
    return torch.where((q * reference).sum(dim=-1, keepdim=True) < 0, -q, q)


def nearest_axis_angle(v: Float[Tensor, "*b 3"], reference: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:
    """The same rotation by an angle that may lie outside [0, pi], nearest to `reference`: a turn past pi goes
    on instead of coming back from the other side. A turn by less than a millionth has hardly an axis: after
    whole turns it takes `reference`'s."""
    angle, far = v.norm(dim=-1, keepdim=True), reference.norm(dim=-1, keepdim=True)
    none = (angle < 1e-6) & (far > math.pi)
    axis = torch.where(none, reference / far.clamp_min(1e-12), v / angle.clamp_min(1e-12))
    angle = torch.where(none, 0.0, angle)
    turns = (((reference * axis).sum(dim=-1, keepdim=True) - angle) / (2 * math.pi)).round()
    return torch.where(none | (turns != 0), axis * (angle + 2 * math.pi * turns), v)


def nearest_euler(angles: Float[Tensor, "*b 3"], reference: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:
    """The same rotation, each angle moved by full turns to `reference`; of the two triples that are one
    rotation, (r, p, y) and (r + pi, pi - p, y + pi), the nearer."""
    mirrored = torch.stack(
        (angles[..., 0] + math.pi, math.pi - angles[..., 1], angles[..., 2] + math.pi), dim=-1
    )
    both = [x + 2 * math.pi * ((reference - x) / (2 * math.pi)).round() for x in (angles, mirrored)]
    first, second = ((x - reference).square().sum(dim=-1, keepdim=True) for x in both)
    return torch.where(first <= second, both[0], both[1])


def nearest(x: Tensor, reference: Tensor, kind: RotationKind) -> Tensor:
    """The representative of the rotation `x` that is nearest to `reference`; rot6d has only one."""
    chosen = {
        "quaternion": nearest_quaternion,
        "axis_angle": nearest_axis_angle,
        "euler": nearest_euler,
    }.get(kind)
    return x if chosen is None else chosen(x, reference)


def continuous(x: Float[Tensor, "*b t n"], kind: RotationKind) -> Float[Tensor, "*b t n"]:
    """A trajectory without jumps: each step represented next to the one before it."""
    steps = [x[..., 0, :]]
    for i in range(1, x.shape[-2]):
        steps.append(nearest(x[..., i, :], steps[-1], kind))
    return torch.stack(steps, dim=-2)
