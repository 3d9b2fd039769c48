"""A trained policy's adapter: folded into the backbone's weights, or alone in peft's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from librobot.checkpoint_path import checkpoint_file
from librobot.errors import LibrobotError
from librobot.policy import Policy
from librobot.training.checkpoints import AtomicCheckpointIO
from librobot.vlms.adapter_files import save_adapter
from librobot.vlms.adapters import merge_adapter


def merge(checkpoint: str | Path, output: str | Path) -> Path:
    """Write the policy of `checkpoint` with its adapter folded into the weights; returns the file written.

    The result is a checkpoint whose configuration has no adapter: whatever reads a policy reads it, and a
    four-bit backbone has become an ordinary one. It holds no optimiser, so no run goes on from it. Raises
    LibrobotError where the policy has no adapter or one that is already merged, and where `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise LibrobotError(f"{output}: expected a new file, found one; name another, or remove it")
    policy, place = _read(checkpoint)
    framework = policy.framework
    with _named(place):
        merge_adapter(framework.vlm)  # type: ignore[arg-type]  # _read has looked
    framework.attach_run(config=policy.config | {"adapter": None}, provenance=policy.provenance)
    contents: dict[str, Any] = {"state_dict": framework.state_dict()}
    framework.on_save_checkpoint(contents)
    AtomicCheckpointIO().save_checkpoint(contents, output)
    return output


def adapters(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write the adapter of the policy in `checkpoint` alone, as peft reads it; returns the folder.

    The parts of the backbone that train in full beside the adapter are in it, the action head is not. Raises
    LibrobotError where the policy has no adapter, and where `folder` exists and is not empty.
    """
    policy, place = _read(checkpoint)
    with _named(place):
        save_adapter(policy.framework.vlm, folder)  # type: ignore[arg-type]
    return Path(folder)


def _read(checkpoint: str | Path) -> tuple[Policy, Path]:
    """The policy on the CPU, and the file that it is from."""
    path = checkpoint_file(checkpoint)
    policy = Policy.from_checkpoint(path, device="cpu")
    if policy.framework.vlm is None:
        raise LibrobotError(
            f"{path}: expected a policy with an adapter on its backbone, found "
            f"{type(policy.framework).__name__} without a backbone; there is nothing to export"
        )
    return policy, path


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """Errors begin with the checkpoint that they are about."""
    try:
        yield
    except LibrobotError as error:
        raise LibrobotError(f"{place}: {error}") from error
