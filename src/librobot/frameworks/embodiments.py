"""The robots that one policy is for, where they are several: which a sample is of, and what it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from librobot.errors import LibrobotError
from librobot.representation import Representation
from librobot.types import Batch, DimKind, Observation, RobotSpec


class Embodiments(nn.Module):
    """`specs` are the robots; `union` holds all of their cameras and as many dimensions as the widest.

    `representation`, set by what builds the framework, is how they differ from the robots as they are: None
    where their actions are seen unchanged.

    Raises ValueError where a robot does not fit into the union.
    """

    action_dims: Tensor
    representation: Representation | None = None

    def __init__(self, union: RobotSpec, specs: Sequence[RobotSpec] | None) -> None:
        super().__init__()
        self.union = union
        self.specs = (union,) if specs is None else tuple(specs)
        for robot in self.specs:
            lacking = set(robot.camera_names) - set(union.camera_names)
            if robot.state_dim > union.state_dim or robot.action_dim > union.action_dim or lacking:
                raise ValueError(
                    f"embodiments: robot {robot.name!r} must fit into spec {union.name!r} (at most "
                    f"{union.state_dim} state and {union.action_dim} action dimensions, cameras of "
                    f"{list(union.camera_names)}), found {robot.state_dim} and {robot.action_dim}, "
                    f"{list(robot.camera_names)}"
                )
        dims = torch.tensor([robot.action_dim for robot in self.specs])
        self.register_buffer("action_dims", dims, persistent=False)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def own_union(self) -> RobotSpec:
        """`union` with the robots' own actions."""
        return self.union if self.representation is None else self.representation.robot

    @property
    def own(self) -> tuple[RobotSpec, ...]:
        """`specs` with their own actions."""
        return self.specs if self.representation is None else self.representation.robots

    def actions_of_kind(self, kind: DimKind) -> list[list[bool]]:
        """For each robot, which of its action dimensions are of that kind, such as `gripper`."""
        return [[dim.kind == kind for dim in robot.action] for robot in self.specs]

    def ids(self, observation: Observation) -> Int[Tensor, " b"]:
        """Each sample's robot; 0 for all where the observation does not say.

        Raises LibrobotError where there is no such robot.
        """
        ids = observation.embodiment
        if ids is None:
            return torch.zeros(len(observation.state), dtype=torch.long, device=observation.state.device)
        # On a device the look would wait for it; an index out of range fails there by itself.
        if ids.device.type == "cpu" and not ((ids >= 0) & (ids < len(self))).all():
            names = ", ".join(robot.name for robot in self.specs)
            raise LibrobotError(
                f"the policy knows {len(self)} robots ({names}), found embodiments {ids.tolist()}"
            )
        return ids

    def owned_dims(self, batch: Batch) -> Bool[Tensor, "b 1 a"]:
        """The action dimensions that each sample's robot has."""
        dims = self.action_dims[self.ids(batch.observation)]
        return (torch.arange(batch.actions.shape[-1], device=dims.device) < dims[:, None])[:, None]
