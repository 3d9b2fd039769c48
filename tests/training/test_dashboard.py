"""The W&B dashboard names metrics that runs log."""

import re

import pytest

from librobot.training.dashboard import LINES, dashboard


def test_the_dashboard_is_what_wandb_takes():
    pytest.importorskip("wandb_workspaces")
    spec = dashboard("me", "robots")._to_model().model_dump_json(by_alias=True)
    for section, panels in LINES.items():
        assert f'"name":"{section}"' in spec
        for title in panels:
            assert f'"{title}"' in spec
    assert "trainer/global_step" in spec
    assert "rollouts/.*" in spec


@pytest.mark.parametrize(
    "metric",
    [
        "eval/success/reach",
        "lr/0",
        "grad_norm/all",
        "val/error/x",
        "train/loss",
        "train/dim_loss/stick/x",
        "activations/vlm.blocks.0/std",
    ],
)
def test_metrics_are_on_it(metric):
    patterns = [name for panels in LINES.values() for names in panels.values() for name in names]
    assert any(re.fullmatch(pattern, metric) for pattern in patterns)
