"""What training and evaluation tell Weights & Biases in the same words, and an evaluation as a W&B run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from librobot.errors import LibrobotError, require
from librobot.evaluation.episode import EpisodeResult

Keep = Literal["none", "reference", "upload"]
NOTE = "wandb_id"  # in a run directory: the id of its W&B run


def has_account(wandb: ModuleType) -> bool:
    """Whether W&B knows who the user is; asks nobody, neither the user nor the network."""
    if "prompt" in inspect.signature(wandb.login).parameters:  # since the autumn of 2026
        return bool(wandb.login(prompt=False, verify=False))
    return wandb.api.api_key is not None


def is_offline(wandb: ModuleType) -> bool:
    """Whether a run is kept on disk: by the user's wish, or because no API key is configured."""
    return os.environ.get("WANDB_MODE") == "offline" or not has_account(wandb)


def checkpoint_artifact(wandb: ModuleType, run_id: str, path: Path, keep: Keep, **metadata: Any) -> Any:
    """A checkpoint as an artifact of the training run with this id.

    It is made of the file's name and contents alone, so that training and evaluation, which may both be
    offline, make the same one, and W&B sees the latter use what the former made. `reference` leaves the file
    where it is and sends its checksum, `upload` sends the file.
    """
    artifact = wandb.Artifact(f"checkpoint-{run_id}", type="model", metadata={"path": str(path), **metadata})
    if keep == "upload":
        artifact.add_file(str(path), name=path.name, policy="immutable")
    else:
        artifact.add_reference(path.absolute().as_uri(), name=path.name)
    return artifact


def use_artifact(run: Any, artifact: Any) -> None:
    """Note that `run` used `artifact`, also offline, where W&B's own method is refused."""
    if run.settings._offline:
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def record_evaluation(
    result: Mapping[str, Any],
    config: Mapping[str, Any],
    folder: Path,
    checkpoint: Path | None,
    trained: Mapping[str, Any],
    videos: Mapping[Path, EpisodeResult],
) -> str:
    """Write an evaluation as a W&B run in `folder`; returns its id.

    `trained` is the configuration that the checkpoint was trained with: its W&B project is taken, where
    WANDB_PROJECT names none. A checkpoint of a run that was tracked is the artifact that this run uses.
    """
    wandb = require("wandb", "wandb")
    settings = (trained.get("logger") or {}).get("wandb") or {}
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or settings.get("project") or "librobot",
        entity=os.environ.get("WANDB_ENTITY") or settings.get("entity"),
        name=f"eval {result['policy']}",
        job_type="evaluation",
        dir=str(folder),
        mode="offline" if is_offline(wandb) else "online",
        config={**config, "trained": dict(trained)},
        reinit="finish_previous",
    )
    try:
        note = None if checkpoint is None else run_note(checkpoint)
        if checkpoint is not None and note is not None:
            keep = settings.get("checkpoints", "reference")
            use_artifact(run, checkpoint_artifact(wandb, note.read_text().strip(), checkpoint, keep))
        metrics: dict[str, Any] = {"eval/success": result["success"], "eval/episodes": result["episodes"]}
        metrics |= {f"eval/success/{kind}": group["success"] for kind, group in result["tasks"].items()}
        for name, control in result["controls"].items():
            metrics |= {f"eval/{name}": control["success"]} if "success" in control else {}
        metrics |= {
            f"eval/video/{episode.kind}/{episode.seed}": wandb.Video(str(path), caption=caption(episode))
            for path, episode in videos.items()
        }
        run.log(metrics)
    finally:
        run.finish()
    return str(run.id)


def run_note(checkpoint: Path) -> Path | None:
    """The file that holds the W&B id of the run that a checkpoint is of; None where it has none."""
    folder = checkpoint.absolute().parent
    note = (folder.parent if folder.name == "checkpoints" else folder) / NOTE
    return note if note.is_file() else None


def caption(episode: EpisodeResult) -> str:
    return f"{episode.prompt}: {'success' if episode.success else 'failure'}"


def check_keep(keep: str, place: str) -> None:
    if keep not in ("none", "reference", "upload"):
        raise LibrobotError(f"{place}: expected none, reference or upload, found {keep!r}")
