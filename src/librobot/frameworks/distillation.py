"""A policy that starts from a trained one of its configuration, and whose head learns from its denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from librobot.errors import LibrobotError

if TYPE_CHECKING:
    from librobot.frameworks.base import Framework


def learn_from(student: Framework, teacher: Framework) -> None:
    """Start from a trained policy of the same configuration, and let the head learn from its denoiser.

    What the two share (all but `denoiser_parts`) is frozen, so that both read the same context, and is the
    student's alone from here on: the teacher has no second copy, wherever the student's parts go. The
    denoiser starts from the teacher's too where that predicts what the student will: the velocity of a
    flow in the house's time convention. Raises LibrobotError where the head does not learn from a
    teacher, or the weights do not fit.
    """
    if not hasattr(student.head, "teach"):
        raise LibrobotError(
            f"head {type(student.head).__name__} does not learn from a trained policy; take "
            f"head=consistency or head=reflow"
        )
    if not student.denoiser_parts:
        raise LibrobotError(f"framework {type(student).__name__} has no denoiser that could be distilled")
    weights = dict(teacher.state_dict())
    if getattr(teacher.head, "time_convention", None) != "noise_at_one":
        own = student.state_dict()
        weights |= {n: own[n] for n in own if n.partition(".")[0] in student.denoiser_parts}
    student.load_weights(weights)
    for name, parameter in student.named_parameters():
        if name.partition(".")[0] not in student.denoiser_parts:
            parameter.requires_grad_(False)
    teacher.eval().requires_grad_(False)
    for name in shared_parts(student):
        setattr(teacher, name, getattr(student, name))
    student._teacher = (teacher,)
    teach: Any = student.head.teach  # a Tensor or a Module, as far as nn.Module's types know
    teach(teacher.head, teacher.denoise)


def shared_parts(student: Framework) -> list[str]:
    return [name for name, _ in student.named_children() if name not in (*student.denoiser_parts, "head")]


def move_own_parts(student: Framework, teacher: Framework, device: torch.device, dtype: torch.dtype) -> None:
    """Move what the teacher does not share. Each process has it whole, however the student is spread."""
    shared = {name: teacher._modules.pop(name) for name in shared_parts(student)}
    teacher.to(device, dtype)
    teacher._modules.update(shared)
