"""A W&B dashboard for runs: `python -m librobot.training.dashboard ENTITY PROJECT` saves it there."""

from __future__ import annotations

import argparse
from typing import Any

from librobot.errors import require

# Section -> its panels: title and metrics; a name with * is a pattern.
LINES: dict[str, dict[str, list[str]]] = {
    "Closed loop": {"success": ["eval/success"], "by kind of task": ["eval/success/.*"]},
    "Training": {"loss": ["train/loss"], "learning rate": ["lr/.*"], "gradients": ["grad_norm/.*"]},
    "Parts of the training loss": {
        "by action dimension": ["train/dim_loss/.*"],
        "by dataset": ["train/dataset_loss/.*"],
        "by robot": ["train/robot_loss/.*"],
    },
    "Activations": {
        "standard deviation": ["activations/.*/std"],
        "largest": ["activations/.*/max"],
        "share of zeros": ["activations/.*/zeros"],
        "share that is not finite": ["activations/.*/not_finite"],
    },
    "Validation": {
        "loss": ["val/loss"],
        "action error": ["val/action_error", "val/action_error/.*"],
        "by action dimension": ["val/error/.*"],
    },
    "Speed": {"samples a second": ["speed/samples_per_second"], "wait for data": ["speed/data_wait"]},
}
STEP = "trainer/global_step"


def dashboard(entity: str, project: str) -> Any:
    """The dashboard as a `wandb_workspaces.workspaces.Workspace`; nothing is sent."""
    workspaces = require("wandb_workspaces.workspaces", "wandb")
    reports = require("wandb_workspaces.reports.v2", "wandb")
    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[_lines(reports, title, metrics) for title, metrics in panels.items()],
        )
        for name, panels in LINES.items()
    ]
    videos = reports.MediaBrowser(title="rollouts", media_keys=["rollouts/.*"])
    sections.insert(1, workspaces.Section(name="Videos", is_open=True, panels=[videos]))
    return workspaces.Workspace(entity=entity, project=project, name="librobot", sections=sections)


def _lines(reports: Any, title: str, metrics: list[str]) -> Any:
    plain = [metric for metric in metrics if "*" not in metric]
    patterns = [metric for metric in metrics if "*" in metric]
    return reports.LinePlot(
        title=title, x=STEP, y=plain, metric_regex="|".join(patterns) if patterns else None
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m librobot.training.dashboard", description=__doc__)
    parser.add_argument("entity")
    parser.add_argument("project")
    given = parser.parse_args(arguments)
    print(dashboard(given.entity, given.project).save().url)


if __name__ == "__main__":
    main()
