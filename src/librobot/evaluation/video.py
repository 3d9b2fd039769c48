"""Episodes as mp4 files that every browser plays (H.264, yuv420p), with a caption under each picture."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from librobot.evaluation.episode import EpisodeResult

SUCCESS, FAILURE = (46, 160, 103), (208, 76, 72)
INK, PAPER, MUTED = (240, 242, 245), (22, 25, 31), (152, 160, 172)
HOLD_SECONDS = 1.0


def episode_video(episode: EpisodeResult, fps: float) -> bytes:
    """The recorded frames of an episode as an mp4, the last one held for a second."""
    if not episode.frames:
        raise ValueError(f"episode {episode.index} was not recorded: it holds no frames")
    last = len(episode.frames) - 1
    pictures = [
        captioned(frame, episode, step=step, ended=step == last) for step, frame in enumerate(episode.frames)
    ]
    return encode(pictures + [pictures[-1]] * round(HOLD_SECONDS * fps), fps)


def captioned(
    frame: UInt8[np.ndarray, "h w 3"], episode: EpisodeResult, *, step: int, ended: bool
) -> UInt8[np.ndarray, "H w 3"]:
    """The frame over a strip with the instruction, the kind, the step and, at the end, the outcome."""
    height, width = frame.shape[:2]
    size = max(11, round(width / 28))
    font, small = ImageFont.load_default(size), ImageFont.load_default(max(9, round(0.75 * size)))
    strip = round(3.4 * size)
    picture = Image.new("RGB", (width, height + strip), PAPER)
    picture.paste(Image.fromarray(frame), (0, 0))
    draw = ImageDraw.Draw(picture)
    left, top = round(0.7 * size), height + round(0.45 * size)
    draw.text((left, top), _fitted(draw, episode.prompt, font, width - 2 * left), font=font, fill=INK)
    draw.text((left, top + round(1.5 * size)), f"{episode.kind}   step {step}", font=small, fill=MUTED)
    if ended:
        text, colour = ("success", SUCCESS) if episode.success else ("failure", FAILURE)
        wide = draw.textlength(text, font=small)
        box = (width - left - wide - size, top + round(1.35 * size), width - left, top + round(2.65 * size))
        draw.rounded_rectangle(box, radius=size / 3, fill=colour)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(middle, text, font=small, fill=(255, 255, 255), anchor="mm")
    return np.asarray(picture)


def _fitted(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float
) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def encode(frames: Sequence[UInt8[np.ndarray, "h w 3"]], fps: float) -> bytes:
    """Frames as an H.264 mp4. yuv420p halves the colour planes, so an odd edge loses its last pixel row."""
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_videos(episodes: Sequence[EpisodeResult], folder: Path, fps: float) -> dict[int, Path]:
    """Write every recorded episode to `folder/KIND_SEED_OUTCOME.mp4`; episode index -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for episode in episodes:
        if episode.frames:
            outcome = "success" if episode.success else "failure"
            path = folder / f"{re.sub(r'[^\w-]+', '_', episode.kind)}_{episode.seed}_{outcome}.mp4"
            partial = path.with_suffix(".mp4.partial")
            partial.write_bytes(episode_video(episode, fps))
            paths[episode.index] = partial.replace(path)
    return paths
