"""One of two data-parallel processes is killed in mid-epoch: the run ends, and goes on in the same order."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from seen_samples import seen
from small_runs import FRAMES, SPEC, losses, tiny, train

from librobot.data.writer import LeRobotWriter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
BATCH, EPOCHS = 2, 2
EPOCH_STEPS = FRAMES // (2 * BATCH)
STEPS = EPOCHS * EPOCH_STEPS
SAVED, KILLED = 16, 18  # steps, in the second epoch
PATIENCE = 60.0  # seconds in which the run has to end; what is left of it is given ten


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """The small dataset with each sample's number in its state."""
    root, generator = tmp_path_factory.mktemp("data") / "numbered", np.random.default_rng(0)
    with LeRobotWriter(root, SPEC, fps=10) as writer:
        for rows in np.arange(FRAMES).reshape(4, -1):
            writer.add_episode(
                images={"front": generator.integers(0, 255, (len(rows), 32, 32, 3), dtype=np.uint8)},
                state=np.stack([rows, generator.normal(size=len(rows))], axis=1).astype(np.float32),
                action=generator.normal(size=(len(rows), 2)).astype(np.float32),
                task="reach the red cube",
            )
    return root


def run(root, cwd, *overrides):
    here = str(Path(__file__).parent)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, before]))
    try:
        arguments = [*tiny(), f"data.root={root}", "run_dir=run", "trainer=ddp", "trainer.accelerator=cpu"]
        arguments += [f"trainer.max_steps={STEPS}", f"data.batch_size={BATCH}", "data.num_workers=1"]
        arguments += ["callbacks.checkpoints.every_n_steps=4", "+callbacks.seen._target_=seen_samples.Seen"]
        cwd.mkdir(exist_ok=True)
        return train(*arguments, *overrides, cwd=cwd)
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture(scope="module")
def straight(numbered, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("straight")
    done = run(numbered, cwd, "+callbacks.seen.folder=seen")
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd


def test_an_epoch_is_every_sample_once(straight):
    both = [seen(straight / "seen", rank) for rank in (0, 1)]
    assert [step for step, _ in both[0]] == list(range(STEPS))
    for epoch in range(EPOCHS):
        steps = range(epoch * EPOCH_STEPS, (epoch + 1) * EPOCH_STEPS)
        found = [number for each in both for step, samples in each if step in steps for number in samples]
        assert sorted(found) == list(range(FRAMES))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_run_of_a_killed_process_ends_with_a_message_and_goes_on_in_the_same_order(
    rank, numbered, straight, tmp_path
):
    kill = [f"+callbacks.seen.kill_rank={rank}", f"+callbacks.seen.kill_step={KILLED}"]
    done = run(numbered, tmp_path, "+callbacks.seen.folder=before", *kill)
    took = time.time() - float((tmp_path / "before/killed").read_text())
    print(f"rank {rank}: the run ended {took:.1f} s after the kill with exit code {done.returncode}")
    print(done.stderr[-2000:])
    assert done.returncode != 0
    assert took < PATIENCE
    assert "Traceback" not in done.stderr
    whom = "the training process" if rank == 0 else "process 1 of 2"
    assert f"{whom} was ended by SIGKILL" in done.stderr
    assert "go on from run/checkpoints/last.ckpt" in done.stderr
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == SAVED
    done = run(numbered, tmp_path, "+callbacks.seen.folder=after", "ckpt=last")
    assert done.returncode == 0, done.stdout + done.stderr
    for each in (0, 1):
        before = [one for one in seen(tmp_path / "before", each) if one[0] < SAVED]
        assert before + seen(tmp_path / "after", each) == seen(straight / "seen", each)
    assert losses(tmp_path / "run") == losses(straight / "run")
