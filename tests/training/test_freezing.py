"""Parts that begin to train later: which weights move at which step, alone, with EMA, and resumed."""

import pytest
import torch
from small_runs import fit, rows

from librobot.errors import LibrobotError

EVERY = ["callbacks.checkpoints.keep_every_n_steps=1", "optim.lr=1e-3"]
WITH = ["callbacks=[default,freezing,ema]", "callbacks.freezing.until.vlm=2", *EVERY]


def weights(run_dir, step):
    return torch.load(run_dir / f"checkpoints/step={step:08d}.ckpt", weights_only=True)["state_dict"]


def moved(run_dir, first, second):
    """The top-level parts whose weights differ between two steps."""
    before, after = weights(run_dir, first), weights(run_dir, second)
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_the_backbone_stands_still_until_its_step_and_a_resumed_run_agrees(dataset, tmp_path):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    fit(dataset, straight, *WITH, "trainer.max_steps=4")
    assert "vlm" not in moved(straight, 1, 2)
    assert moved(straight, 1, 2)
    assert {"vlm"} < moved(straight, 2, 3)
    fit(dataset, parts, *WITH, "trainer.max_steps=1")
    fit(dataset, parts, *WITH, "trainer.max_steps=4", "ckpt=last")
    assert rows(parts) == rows(straight)
    ours, theirs = weights(parts, 4), weights(straight, 4)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_last_pattern_counts_and_freeze_stays(dataset, tmp_path):
    until = "+callbacks.freezing.until={*: 2, action_out_proj: 0, decoder: 0}"
    frozen = ["callbacks=[default,freezing]", *EVERY, until, "framework.freeze=[encoder]"]
    fit(dataset, tmp_path, *frozen, "trainer.max_steps=4")
    assert moved(tmp_path, 1, 2) == {"action_out_proj", "decoder"}
    assert {"action_out_proj", "decoder"} < moved(tmp_path, 2, 3)
    first, last = weights(tmp_path, 1), weights(tmp_path, 4)
    assert all(torch.equal(first[n], last[n]) for n in first if n.startswith("encoder."))


def test_an_unknown_part_and_nothing_left_say_so(dataset, tmp_path):
    with pytest.raises(LibrobotError, match=r"no part 'vml'"):
        fit(dataset, tmp_path / "a", "callbacks=[default,freezing]", "+callbacks.freezing.until.vml=2")
    with pytest.raises(LibrobotError, match=r"nothing is left to train at step 0; leave a part out"):
        fit(dataset, tmp_path / "b", "callbacks=[default,freezing]", "+callbacks.freezing.until={*: 2}")
