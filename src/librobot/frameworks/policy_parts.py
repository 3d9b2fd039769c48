"""A policy's parts by name, and whether its head finds the network that it needs."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING

from torch import nn

from librobot.errors import LibrobotError, nearest
from librobot.heads.base import ActionHead
from librobot.networks.base import OPTION_OF

if TYPE_CHECKING:
    from librobot.frameworks.base import Framework


def named_part(framework: nn.Module, part: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters whose names are `part`, begin with it and a dot, or match it as a pattern with `*`.
    Raises LibrobotError where there are none, naming the nearest part."""
    parameters = list(framework.named_parameters())
    found = [
        (n, p) for n, p in parameters if n == part or n.startswith(f"{part}.") or fnmatch.fnmatch(n, part)
    ]
    if not found:
        modules = {n for n, m in framework.named_modules() if n and next(m.parameters(), None) is not None}
        close = {n for n in modules if n.count(".") <= part.count(".")}
        raise LibrobotError(
            f"framework {type(framework).__name__} has no part {part!r}; {nearest(part, close)}"
        )
    return found


def check_head(framework: type[Framework], head: ActionHead) -> None:
    """Raises ValueError where the head needs a network that this framework does not bring."""
    if head.network not in framework.brings:
        needed = {"denoiser": "a denoiser", "decoder": "a decoder", "pair": "a denoiser and a decoder"}
        raise ValueError(
            f"head {type(head).__name__} needs {needed[head.network]}, and {framework.__name__} brings "
            f"{needed[framework.brings[0]]} of its own; take framework=custom "
            f"network={OPTION_OF[head.network]}, or a head such as flow_matching"
        )
