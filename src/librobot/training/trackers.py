"""Lightning's loggers with what a run has beside numbers: videos of episodes, checkpoints, its code."""

from __future__ import annotations

import io
import subprocess
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from librobot import __version__
from librobot.evaluation.wandb_run import Keep, checkpoint_artifact

Videos = Mapping[str, tuple[Path, str]]  # name -> mp4 file and caption
NAMES = ("best", "best_success", "last")  # of checkpoints that a tracker is told of at the end of a run


def show_videos(loggers: Iterable[Logger], videos: Videos, step: int, fps: float) -> None:
    """Give videos of episodes to every logger that can show them."""
    for logger in loggers:
        if isinstance(logger, WandbRun | TensorBoardRun | MLflowRun):
            logger.log_videos(videos, step, fps)


def keep_checkpoints(loggers: Iterable[Logger], folder: Path, step: int) -> None:
    """Tell every logger that keeps checkpoints of those in `folder`, at the end of a run."""
    found = {name: folder / f"{name}.ckpt" for name in NAMES if (folder / f"{name}.ckpt").is_file()}
    for logger in loggers:
        if isinstance(logger, WandbRun | MLflowRun):
            logger.log_checkpoints(found, step)


def code_version() -> dict[str, Any]:
    """librobot's version, and commit and state of the git repository that the run is started in."""
    found: dict[str, Any] = {"librobot": __version__}
    commit = _git("rev-parse", "HEAD")
    if commit:
        found |= {"commit": commit, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class WandbRun(WandbLogger):
    """Lightning's W&B logger, with the code's version in the configuration, and checkpoints as artifacts."""

    def __init__(self, *, checkpoints: Keep, **options: Any) -> None:
        super().__init__(**options)
        self.keep = checkpoints

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        super().log_hyperparams(params)
        self.experiment.config.update({"code": code_version()}, allow_val_change=True)

    @rank_zero_only
    def log_videos(self, videos: Videos, step: int, fps: float) -> None:
        import wandb

        shown = {
            f"rollouts/{name}": wandb.Video(str(path), caption=text, format="mp4")
            for name, (path, text) in videos.items()
        }
        self.experiment.log({**shown, "trainer/global_step": step})

    @rank_zero_only
    def log_checkpoints(self, checkpoints: Mapping[str, Path], step: int) -> None:
        import wandb

        if self.keep == "none":
            return
        for name, path in checkpoints.items():
            artifact = checkpoint_artifact(wandb, self.experiment.id, path, self.keep, step=step)
            self.experiment.log_artifact(artifact, aliases=[name, f"step-{step}"])


class TensorBoardRun(TensorBoardLogger):
    """Lightning's TensorBoard logger, with videos as moving pictures."""

    @rank_zero_only
    def log_videos(self, videos: Videos, step: int, fps: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        writer = self.experiment._get_file_writer()
        for name, (path, _) in videos.items():
            data, width, height = gif(path, fps)
            picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
            writer.add_summary(Summary(value=[Summary.Value(tag=f"rollouts/{name}", image=picture)]), step)
        writer.flush()


def gif(path: Path, fps: float) -> tuple[bytes, int, int]:
    """A video as a GIF, which is what TensorBoard plays; its width and height in pixels."""
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue(), *frames[0].size


class MLflowRun(MLFlowLogger):
    """Lightning's MLflow logger, going on in the run whose id is in `note`; videos, checkpoints as files."""

    def __init__(self, *, note: Path, checkpoints: Keep, **options: Any) -> None:
        super().__init__(run_id=note.read_text().strip() if note.is_file() else None, **options)
        self.note, self.keep = note, checkpoints

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        if self.note.is_file():
            return  # the run goes on, and MLflow lets no parameter change, not even ckpt=
        super().log_hyperparams(params)
        assert self.run_id is not None
        self.note.write_text(self.run_id)
        code = code_version()
        self.experiment.set_tag(self.run_id, "librobot.version", code["librobot"])
        if "commit" in code:
            self.experiment.set_tag(self.run_id, "mlflow.source.git.commit", code["commit"])

    @rank_zero_only
    def log_videos(self, videos: Videos, step: int, fps: float) -> None:
        for name, (path, _) in videos.items():
            self.experiment.log_artifact(self.run_id, str(path), f"rollouts/{name}/step={step:08d}")

    @rank_zero_only
    def log_checkpoints(self, checkpoints: Mapping[str, Path], step: int) -> None:
        for path in checkpoints.values():
            if self.keep == "upload":
                self.experiment.log_artifact(self.run_id, str(path), "checkpoints")
            elif self.keep == "reference":
                self.experiment.set_tag(self.run_id, f"checkpoint.{path.stem}", str(path.absolute()))
