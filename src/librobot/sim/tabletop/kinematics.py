"""Forward and inverse kinematics of the tabletop arm, in closed form.

The arm has SO-101's five joints (pan, lift, elbow, wrist flex, wrist roll). Links lie in the vertical plane
that the pan joint turns; the hand always points straight down, so a pose is the tip's position and the yaw
of the fingers, and the plane's two-link problem has one elbow-up solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

SHOULDER_HEIGHT = 0.17  # m, above the table
UPPER_ARM = 0.22  # m, shoulder to elbow
FOREARM = 0.22  # m, elbow to wrist
HAND = 0.14  # m, wrist to fingertips
MIN_RADIUS, MAX_RADIUS = 0.11, 0.43  # m, of the tip around the pan axis
MIN_HEIGHT, MAX_HEIGHT = 0.008, 0.20  # m, of the tip above the table
MAX_YAW = np.deg2rad(80.0)


@dataclass(frozen=True)
class Pose:
    """The fingertips' position in m (base frame) and the yaw of the hand in rad.

    At yaw 0 the fingers open along the base's y axis; yaw turns them counter-clockwise seen from above.
    """

    position: Float[np.ndarray, "3"]
    yaw: float


def clamp(pose: Pose) -> Pose:
    """The nearest pose that the arm can take."""
    x, y, z = pose.position
    z = np.clip(z, MIN_HEIGHT, MAX_HEIGHT)
    stretched = np.sqrt((0.999 * (UPPER_ARM + FOREARM)) ** 2 - (z + HAND - SHOULDER_HEIGHT) ** 2)
    radius = float(np.hypot(x, y))
    scale = np.clip(radius, MIN_RADIUS, min(MAX_RADIUS, stretched)) / radius if radius > 1e-6 else 0.0
    x, y = (x * scale, y * scale) if scale else (MIN_RADIUS, 0.0)
    position = np.array([x, y, z])
    return Pose(position, float(np.clip(pose.yaw, -MAX_YAW, MAX_YAW)))


def inverse(pose: Pose) -> Float[np.ndarray, "5"]:
    """Joint angles in rad for a pose within reach (see `clamp`), elbow up and hand down."""
    x, y, z = pose.position
    pan = np.arctan2(y, x)
    radius, height = np.hypot(x, y), z + HAND - SHOULDER_HEIGHT  # the wrist, seen from the shoulder
    square = radius**2 + height**2
    cos_elbow = (square - UPPER_ARM**2 - FOREARM**2) / (2 * UPPER_ARM * FOREARM)
    elbow = -np.arccos(np.clip(cos_elbow, -1, 1))
    cos_shoulder = (square + UPPER_ARM**2 - FOREARM**2) / (2 * UPPER_ARM * np.sqrt(square))
    lift = np.arctan2(height, radius) + np.arccos(np.clip(cos_shoulder, -1, 1))
    flex = -np.pi / 2 - lift - elbow
    return np.array([pan, lift, elbow, flex, pan - pose.yaw])


def forward(joints: Float[np.ndarray, "5"]) -> Pose:
    """The pose of joint angles in rad. Yaw is exact where the hand points down, as `inverse` makes it."""
    pan, lift, elbow, flex, roll = joints
    pitch = np.array([lift, lift + elbow, lift + elbow + flex])
    lengths = np.array([UPPER_ARM, FOREARM, HAND])
    radius = float(np.sum(lengths * np.cos(pitch)))
    height = SHOULDER_HEIGHT + float(np.sum(lengths * np.sin(pitch)))
    return Pose(np.array([radius * np.cos(pan), radius * np.sin(pan), height]), float(pan - roll))
