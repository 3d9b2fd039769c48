"""Checkpoints on the way to the disk: in a thread, on a full disk, in a killed process, to another place."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from small_runs import fit, losses, rows, start, tiny

from librobot.errors import LibrobotError
from librobot.training.checkpoints import AtomicCheckpointIO, NotSaved

LAST = "checkpoints/last.ckpt"
EVERY = ["callbacks.checkpoints.every_n_steps=1", "callbacks.checkpoints.keep_every_n_steps=2"]
KILLED_STEPS = 600
BACKGROUND = "callbacks.checkpoints.asynchronous=true"


def same(one: Path, other: Path) -> bool:
    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_thread_writes_what_the_step_was(dataset, tmp_path):
    fit(dataset, tmp_path / "plain", *EVERY, "trainer.max_steps=4")
    fit(dataset, tmp_path / "thread", *EVERY, BACKGROUND, "trainer.max_steps=4")
    for name in ("last.ckpt", "step=00000002.ckpt", "step=00000004.ckpt"):
        assert same(tmp_path / "plain/checkpoints" / name, tmp_path / "thread/checkpoints" / name)
    assert losses(tmp_path / "plain") == losses(tmp_path / "thread")
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_copy_does_not_follow_the_weights(tmp_path):
    io, weights = AtomicCheckpointIO(), torch.zeros(3)
    io.asynchronous = True
    io.save_checkpoint({"state_dict": {"w": weights}}, tmp_path / "a.ckpt")
    weights += 1
    io.wait()
    assert torch.load(tmp_path / "a.ckpt")["state_dict"]["w"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("more", [[], [BACKGROUND]], ids=["at once", "in a thread"])
def test_a_full_disk_leaves_the_checkpoint_before(more, dataset, tmp_path):
    fit(dataset, tmp_path, "trainer.max_steps=1")
    before = (tmp_path / LAST).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # no file may become as large
    try:
        with pytest.raises(
            NotSaved, match=r"last\.ckpt: .*the disk is full.*File too large.*before stays as it was"
        ):
            fit(dataset, tmp_path, *more, "trainer.max_steps=2", "ckpt=last")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / LAST).read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))
    assert fit(dataset, tmp_path, *more, "trainer.max_steps=2", "ckpt=auto")["step"] == 2


def test_what_a_killed_process_left_goes_at_the_next_save(tmp_path):
    left = tmp_path / ".a.ckpt.99999.tmp"
    left.write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_checkpoints_arrive_elsewhere(kind, dataset, tmp_path):
    address = f"memory://{tmp_path.name}/run" if kind == "memory" else f"file://{tmp_path}/there"
    options = ["callbacks=[default,upload]", f"callbacks.upload.address={address}", *EVERY]
    fit(dataset, tmp_path / "run", *options, "trainer.max_steps=3")
    fs, root = fsspec.core.url_to_fs(address)
    assert sorted(Path(name).name for name in fs.ls(root, detail=False)) == [
        "last.ckpt",
        "step=00000002.ckpt",
    ]
    for name in ("last.ckpt", "step=00000002.ckpt"):
        assert fs.cat_file(f"{root}/{name}") == (tmp_path / "run/checkpoints" / name).read_bytes()


def test_an_address_that_nobody_understands_is_refused_before_training(dataset, tmp_path):
    options = ["callbacks=[default,upload]", "callbacks.upload.address=nowhere://bucket"]
    with pytest.raises(LibrobotError, match=r"callbacks\.upload\.address=nowhere://bucket: .*s3fs"):
        fit(dataset, tmp_path, *options, "trainer.max_steps=1")
    with pytest.raises(LibrobotError, match=r"callbacks\.upload\.address: a value is needed here"):
        fit(dataset, tmp_path, "callbacks=[default,upload]", "trainer.max_steps=1")


def test_a_store_that_fails_is_said_and_training_goes_on(dataset, tmp_path):
    blocked = tmp_path / "there"
    blocked.mkdir()
    (blocked / "last.ckpt").mkdir()
    (blocked / ".last.ckpt.part").mkdir()
    options = ["callbacks=[default,upload]", f"callbacks.upload.address=file://{blocked}"]
    fit(dataset, tmp_path / "run", *options, "trainer.max_steps=1")  # folders in the way are replaced
    assert (blocked / "last.ckpt").read_bytes() == (tmp_path / "run" / LAST).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("background", [False, True], ids=["at once", "in a thread"])
def test_twenty_kills_lose_nothing(background, dataset, tmp_path):
    """SIGKILL at random moments: every checkpoint can be read, and the end is that of a run without."""
    options = ["callbacks.checkpoints.every_n_steps=1", f"trainer.max_steps={KILLED_STEPS}"]
    options += [f"scheduler.decay_steps={KILLED_STEPS}", "callbacks=[default,ema]", "logger=csv"]
    options += [f"callbacks.checkpoints.asynchronous={str(background).lower()}"]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killing.py")), str(dataset), str(tmp_path), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
        capture_output=True,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")][-1]
    assert len(seen) == 20
    assert seen == sorted(seen)
    assert seen[-1] < KILLED_STEPS
    ours, theirs = (
        [(int(row["step"]), row["train/loss"]) for row in rows(tmp_path / name)]
        for name in ("killed", "straight")
    )
    assert [step for step, _ in theirs] == list(range(KILLED_STEPS))
    assert ours == theirs
    assert same(tmp_path / "killed" / LAST, tmp_path / "straight" / LAST)
    ours, theirs = (
        torch.load(tmp_path / name / LAST, weights_only=True)["average"]["weights"]
        for name in ("killed", "straight")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((tmp_path / "killed/checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_preempted_slurm_job_saves_and_queues_itself_again(dataset, tmp_path, monkeypatch):
    fake = tmp_path / "bin/scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    options = [*tiny(), f"data.root={dataset}", "run_dir=run", "ckpt=auto", "trainer.max_steps=1000000"]
    options += [
        "callbacks.progress.every_n_seconds=0.01",
        "callbacks.save_on_signal.requeue=true",
        BACKGROUND,
    ]
    process = start(*options, cwd=tmp_path)
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "job 4711 is back in the queue" in err
    assert (tmp_path / "called").read_text() == "requeue 4711\n"
    stopped = torch.load(tmp_path / "run" / LAST, weights_only=True)["global_step"]
    assert f"stopped by SIGTERM after step {stopped}" in err
