"""A dataset as a robot's cameras record it: texture, motion and sensor noise, in AV1 as lerobot encodes it.

Neither flat colours nor pure noise, which would make a decoder's work too small or too large: surfaces have
1/f texture, the arm and the objects move over them, the second camera moves with the wrist, and every pixel
has the noise of a small sensor (a standard deviation of 2 of 255 levels).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from librobot.data.writer import LeRobotWriter
from librobot.progress import ProgressBar
from librobot.types import Camera, Dim, RobotSpec

FPS = 30
JOINTS = 14
TASKS = ("put the cube into the bowl", "open the drawer", "fold the cloth")
NOISE = 2.0


def write_footage(root: Path, *, episodes: int, length: int, height: int = 480, width: int = 640) -> None:
    """Write `episodes` of `length` frames with cameras `top` and `wrist` into `root`, a LeRobotDataset."""
    dims = tuple(Dim(f"joint_{i}", "rad", "joint") for i in range(JOINTS))
    cameras = (Camera("top", height, width), Camera("wrist", height, width))
    spec = RobotSpec("bench", cameras, dims, dims, float(FPS))
    with (
        LeRobotWriter(root, spec, fps=FPS, image_format="video", resume=True) as writer,
        ProgressBar("writing episodes", episodes) as progress,
    ):
        progress.advance(writer.num_episodes)
        for episode in range(writer.num_episodes, episodes):
            generator = np.random.default_rng([episode, 7])
            state = motion(generator, length)
            writer.add_episode(
                images={
                    "top": view(generator, state[:, :4], height, width, pan=0.0),
                    "wrist": view(generator, state[:, 4:8], height, width, pan=40.0),
                },
                state=state,
                action=np.concatenate([state[1:], state[-1:]]),
                task=TASKS[episode % len(TASKS)],
            )
            progress.advance()


def motion(generator: np.random.Generator, length: int) -> Float[np.ndarray, "t joints"]:
    """Smooth joint angles in rad: three slow waves in each joint."""
    time = np.arange(length)[:, None, None] / FPS
    speed, phase = generator.uniform(0.1, 1.2, (JOINTS, 3)), generator.uniform(0, 6.3, (JOINTS, 3))
    return np.sin(time * speed + phase).mean(axis=2).astype(np.float32)


def view(
    generator: np.random.Generator, joints: Float[np.ndarray, "t 4"], height: int, width: int, *, pan: float
) -> UInt8[np.ndarray, "t height width 3"]:
    """What a camera sees; `pan`: by how many pixels it moves with a joint."""
    margin = 48
    wall = texture(generator, height + 2 * margin, width + 2 * margin)
    objects = [
        (texture(generator, height // 4, width // 5), generator.uniform(0.2, 0.8, 2)) for _ in range(4)
    ]
    noise = generator.normal(0, NOISE, (8, height + 32, width + 32, 3)).round().astype(np.int16)
    out = np.empty((len(joints), height, width, 3), np.uint8)
    for frame, (a, b, c, d) in enumerate(joints):
        y, x = margin + round(pan * float(c)), margin + round(pan * float(d))
        picture = wall[y : y + height, x : x + width].astype(np.int16)
        for number, (patch, (row, column)) in enumerate(objects):
            moving = number < 2
            top = int((row + 0.3 * float(a) * moving) * (height - patch.shape[0])) % (height - patch.shape[0])
            left = int((column + 0.3 * float(b) * moving) * (width - patch.shape[1])) % (
                width - patch.shape[1]
            )
            picture[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
        dy, dx = generator.integers(0, 32, 2)
        picture += noise[frame % len(noise), dy : dy + height, dx : dx + width]
        out[frame] = picture.clip(0, 255)
    return out


def texture(generator: np.random.Generator, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """Noise whose spectrum falls as 1/f^1.5, as that of photographs does, around a random colour."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(generator.normal(size=(height, width))) / frequency**1.5
    gray = np.fft.irfft2(spectrum, s=(height, width))
    gray *= 40 / gray.std()
    colour, tint = generator.uniform(60, 190, 3), generator.uniform(0.7, 1.3, 3)
    return (colour + gray[..., None] * tint).clip(0, 255).astype(np.uint8)


def write_tables(root: Path, *, episodes: int, length: int) -> None:
    """The same without cameras: states and actions alone."""
    dims = tuple(Dim(f"joint_{i}", "rad", "joint") for i in range(JOINTS))
    with LeRobotWriter(root, RobotSpec("bench", (), dims, dims, float(FPS)), fps=FPS) as writer:
        for episode in range(episodes):
            state = motion(np.random.default_rng([episode, 7]), length)
            writer.add_episode(images={}, state=state, action=state, task=TASKS[episode % len(TASKS)])
