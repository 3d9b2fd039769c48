"""What an episode asks and where things lie, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from librobot.sim.tabletop.scene import COLOURS, DRAWER_TRAVEL, RING_CENTRE

Kind = Literal["reach", "push", "press", "drawer", "put"]
KINDS: tuple[Kind, ...] = get_args(Kind)

AREA = np.array([[0.16, -0.15], [0.38, 0.15]])  # m, the working area's corners: 22 x 30 cm
SPACING = 0.090  # m, between the centres of neighbouring things
PUSH_DISTANCE = (0.08, 0.16)  # m, from the cube to its disc
MAX_PUSH_ANGLE = np.deg2rad(65)  # between a push and the base's x axis: what the wrist can follow
DRAWER_ANGLE = np.deg2rad(40)  # the drawer opens towards the base, turned by up to this

PROMPTS = {
    "reach": "reach the {subject} cube",
    "push": "push the {subject} cube onto the {target} disc",
    "press": "press the {subject} button",
    "drawer": "{subject} the drawer",
    "put": "put the {subject} cube on the {target} disc",
}


@dataclass(frozen=True)
class Task:
    """One instruction. `subject` is a colour, for the drawer "open" or "close"; `target` a disc's colour."""

    kind: Kind
    subject: str
    target: str = ""

    @property
    def prompt(self) -> str:
        return PROMPTS[self.kind].format(subject=self.subject, target=self.target)


@dataclass(frozen=True)
class Layout:
    """Where each thing of an episode lies: (x, y) in m and a yaw in rad, by the body's name."""

    task: Task
    places: dict[str, Float[np.ndarray, "2"]]
    yaws: dict[str, float] = field(default_factory=dict)
    drawer_opening: float = 0.0


def draw_layout(kind: Kind, generator: np.random.Generator) -> Layout:
    """A task of `kind` with everything placed at random: colours, positions and orientations."""
    colours = list(COLOURS)
    subject = str(generator.choice(colours))
    if kind == "drawer":
        return _draw_drawer(generator)
    if kind == "press":
        bodies = [f"button_{c}" for c in colours]
        bodies += [f"{thing}_{generator.choice(colours)}" for thing in ("cube", "disc")]
        places = _scatter(bodies, generator)
        return _with_yaws(Task("press", subject), places, generator)
    discs = [str(c) for c in generator.permutation(colours)[:2]]
    task = Task(kind, subject, discs[0] if kind in ("push", "put") else "")
    bodies = [f"cube_{c}" for c in colours] + [f"disc_{c}" for c in discs]
    while True:
        places = _scatter(bodies, generator)
        if kind != "push" or _can_push(f"cube_{subject}", f"disc_{discs[0]}", places):
            return _with_yaws(task, places, generator)


def _scatter(
    bodies: list[str], generator: np.random.Generator, taken: list[np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Uniform places in the working area, at least `SPACING` apart, by rejection."""
    while True:
        places: list[np.ndarray] = list(taken or [])
        for _ in bodies:
            for _ in range(50):
                place = generator.uniform(AREA[0], AREA[1])
                if all(np.linalg.norm(place - other) >= SPACING for other in places):
                    places.append(place)
                    break
        if len(places) == len(bodies) + len(taken or []):
            return dict(zip(bodies, places[len(taken or []) :], strict=True))


def _can_push(cube: str, disc: str, places: dict[str, np.ndarray]) -> bool:
    """The way is of the right length and direction, free of other cubes, and the arm can get behind."""
    start, goal = places[cube], places[disc]
    way = goal - start
    length = float(np.linalg.norm(way))
    if not PUSH_DISTANCE[0] <= length <= PUSH_DISTANCE[1]:
        return False
    direction = way / length
    if abs(np.arctan(direction[1] / direction[0])) > MAX_PUSH_ANGLE:
        return False
    behind = start - 0.06 * direction
    if not 0.13 <= np.hypot(*behind) <= 0.42:
        return False
    for name, place in places.items():
        if name in (cube, disc) or name.startswith("disc"):
            continue
        along = np.clip((place - behind) @ direction, 0, length + 0.06)
        if np.linalg.norm(place - behind - along * direction) < 0.065:
            return False
    return True


def _draw_drawer(generator: np.random.Generator) -> Layout:
    """The handle's place at half opening is uniform; the cabinet stands behind it."""
    task = Task("drawer", str(generator.choice(["open", "close"])))
    opening = generator.uniform(0.35, 0.65) * DRAWER_TRAVEL
    middle = generator.uniform([0.20, -0.12], [0.33, 0.12])
    yaw = np.pi + generator.uniform(-DRAWER_ANGLE, DRAWER_ANGLE)
    axis = np.array([np.cos(yaw), np.sin(yaw)])
    base = middle - axis * (RING_CENTRE + DRAWER_TRAVEL / 2)
    occupied = [base + axis * s for s in np.linspace(-0.03, RING_CENTRE + DRAWER_TRAVEL + 0.03, 5)]
    cubes = [f"cube_{c}" for c in generator.permutation(list(COLOURS))[:2]]
    places = {"drawer": base} | _scatter(cubes, generator, occupied)
    drawn = _with_yaws(task, places, generator)
    return Layout(task, places, drawn.yaws | {"drawer": float(yaw)}, float(opening))


def _with_yaws(task: Task, places: dict[str, np.ndarray], generator: np.random.Generator) -> Layout:
    return Layout(task, places, {name: float(generator.uniform(-np.pi, np.pi)) for name in places})
