"""Positions and times as vectors: rotary, sinusoidal, and two-dimensional sine embeddings."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_angles(
    positions: Int[Tensor, "b l"], head_dim: int, theta: float = 10_000.0
) -> tuple[Float[Tensor, "b 1 l e"], Float[Tensor, "b 1 l e"]]:
    """Cosine and sine tables of RoPE (Su et al. 2021), in float32, for `apply_rotary`."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(
    x: Float[Tensor, "b h l e"], angles: tuple[Float[Tensor, "b 1 l e"], Float[Tensor, "b 1 l e"]]
) -> Float[Tensor, "b h l e"]:
    """Rotate queries or keys. Dimension i is paired with i + e/2, the layout of Gemma, Llama and Qwen."""
    cos, sin = angles
    x_float = x.float()
    first, second = x_float.chunk(2, dim=-1)
    return (x_float * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def time_embedding(
    time: Float[Tensor, " b"], width: int, *, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Tensor, "b d"]:
    """Sines, then cosines, of a time in [0, 1], with log-spaced periods (openpi `posemb_sincos`).

    The shortest period turns 250 times, where single precision would leave errors of 1e-4: angles are made in
    double precision, if the device has it. The result is float32.
    """
    if width % 2:
        raise ValueError(f"a sinusoidal embedding needs an even width, found {width}")
    dtype = torch.float32 if time.device.type == "mps" else torch.float64
    fraction = torch.linspace(0.0, 1.0, width // 2, device=time.device, dtype=dtype)
    period = min_period * (max_period / min_period) ** fraction
    angle = time.to(dtype)[:, None] * (2 * math.pi / period)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).float()


def level_embedding(level: Float[Tensor, " b"], width: int) -> Float[Tensor, "b d"]:
    """Sines, then cosines, of a level of noise counted from 0 (Diffusion Policy's `SinusoidalPosEmb`): the
    frequencies fall from 1 to 1e-4."""
    if width < 4 or width % 2:
        raise ValueError(f"a level's embedding needs an even width of at least 4, found {width}")
    half = width // 2
    frequency = torch.exp(-math.log(10_000.0) / (half - 1) * torch.arange(half, device=level.device))
    angle = level.float()[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def sine_table(num_positions: int, width: int) -> Float[Tensor, "l d"]:
    """Interleaved sines and cosines of an integer position ("Attention is all you need", section 3.5)."""
    frequency = 10_000.0 ** (-2.0 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    even = torch.arange(width) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()


def sine_map(height: int, width: int, channels: int) -> Float[Tensor, "h w d"]:
    """DETR's two-dimensional sine positions: half the channels for y, half for x, over (0, 2 pi]."""
    if channels % 4:
        raise ValueError(f"two-dimensional sine positions need channels in fours, found {channels}")
    half = channels // 2
    frequency = 10_000.0 ** (-2.0 * (torch.arange(half, dtype=torch.float32) // 2) / half)

    def axis(size: int) -> Float[Tensor, "size half"]:
        place = torch.arange(1, size + 1, dtype=torch.float32) / (size + 1e-6) * (2 * math.pi)
        angle = place[:, None] * frequency
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)

    y = axis(height)[:, None].expand(height, width, half)
    x = axis(width)[None].expand(height, width, half)
    return torch.cat((y, x), dim=-1)


def age_embedding(num_steps: int, width: int) -> Float[Tensor, "t d"]:
    """A fixed vector for each observation step by its age (the last step has age 0 and the zero vector)."""
    age = torch.arange(num_steps - 1, -1, -1, dtype=torch.float32)[:, None]
    frequency = 100.0 ** (-torch.arange(width // 2, dtype=torch.float32) / max(width // 2, 1))
    table = torch.cat(((age * frequency).sin(), (age * frequency).cos() - 1.0), dim=-1)
    return torch.nn.functional.pad(table, (0, width - table.shape[-1]))
