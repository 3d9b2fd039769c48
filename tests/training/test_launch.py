"""Run directories and checkpoints: which a job takes, goes on with, or refuses."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from librobot.errors import LibrobotError
from librobot.training import launch
from librobot.training.launch import LAST, RUNS, checkpoint_of, new_run_dir, newest_run, place
from librobot.training.lost import lost_process
from librobot.training.sweeps.locks import in_turn


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def a_run(folder, age=0):
    """A run directory with a last checkpoint, `age` seconds old."""
    last = Path(folder) / LAST
    last.parent.mkdir(parents=True)
    last.write_text("weights")
    (Path(folder) / "config.yaml").write_text("{}")
    os.utime(last, (1e9 - age, 1e9 - age))
    return Path(folder)


def placed(job=None, job_dir=None, **keys):
    cfg = OmegaConf.create({"run_dir": None, "ckpt": None, "name": "act", **keys})
    place(cfg, job, job_dir)
    return cfg.run_dir, cfg.ckpt


def test_a_new_run_gets_its_own_directory_below_outputs():
    first, second = placed()[0], placed()[0]
    assert first != second
    for folder in (first, second):
        assert Path(folder).is_dir()
        assert Path(folder).parents[1] == RUNS
        assert folder.endswith("_act")


def test_runs_that_start_in_the_same_second_are_numbered(monkeypatch):
    class Frozen(launch.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 5, 6, 7, 8, 9)

    monkeypatch.setattr(launch, "datetime", Frozen)
    assert [new_run_dir("pi0").as_posix() for _ in range(3)] == [
        "outputs/train/2024-05-06/07-08-09_pi0",
        "outputs/train/2024-05-06/07-08-09-1_pi0",
        "outputs/train/2024-05-06/07-08-09-2_pi0",
    ]


def test_a_given_directory_is_taken_and_not_made_yet():
    assert placed(run_dir="here") == ("here", None)
    assert not Path("here").exists()


def test_the_jobs_of_a_sweep_get_numbered_directories():
    assert placed("3", "outputs/multirun/day/time/3") == ("outputs/multirun/day/time/3", None)
    assert placed("3", "outputs/multirun/day/time/3", run_dir="here") == ("here/3", None)


def test_a_run_is_never_overwritten():
    a_run("here")
    with pytest.raises(LibrobotError, match="run_dir=here already holds a run"):
        placed(run_dir="here")


def test_last_is_the_one_of_the_given_directory():
    a_run(RUNS / "day/10-00-00_act")
    a_run("here")
    assert placed(run_dir="here", ckpt="last") == ("here", f"here/{LAST}")
    with pytest.raises(LibrobotError, match=r"expected there/checkpoints/last\.ckpt"):
        placed(run_dir="there", ckpt="last")


def test_last_is_the_youngest_run_of_the_same_name_which_goes_on_in_place():
    a_run(RUNS / "day/12-00-00_act", age=50)
    youngest = a_run(RUNS / "day/10-00-00-1_act", age=10)  # by its checkpoint, not by its name
    a_run(RUNS / "day/13-00-00_pi0")
    a_run(RUNS / "day/14-00-00_other_act")
    assert newest_run("act") == youngest
    assert placed(ckpt="last") == (str(youngest), str(youngest / LAST))
    with pytest.raises(LibrobotError, match=r"no run called 'dp' .*day/13-00-00_pi0.* name one with run_dir"):
        newest_run("dp")


def test_a_run_without_a_checkpoint_is_nothing_to_go_on_with():
    (RUNS / "day/10-00-00_act").mkdir(parents=True)
    with pytest.raises(LibrobotError, match="with a checkpoint: none"):
        newest_run("act")


def test_a_named_checkpoint_starts_a_new_run():
    run = a_run("here")
    assert placed(run_dir="there", ckpt=str(run)) == ("there", f"here/{LAST}")
    assert placed(run_dir="there", ckpt=str(run / LAST)) == ("there", f"here/{LAST}")
    assert placed(ckpt="here")[0].endswith("_act")


def test_a_checkpoint_is_a_file_a_run_or_a_sharded_folder():
    assert checkpoint_of(a_run("here")) == Path("here") / LAST
    Path("sharded.ckpt").mkdir()
    assert checkpoint_of(Path("sharded.ckpt")) == Path("sharded.ckpt")
    Path("begun").mkdir()
    Path("begun/config.yaml").write_text("{}")
    for name in ("begun", "nowhere"):
        with pytest.raises(LibrobotError, match=f"ckpt={name}: expected a checkpoint, or a run directory"):
            checkpoint_of(Path(name))


def test_auto_goes_on_where_there_is_something_to_go_on_with():
    assert placed(run_dir="here", ckpt="auto") == ("here", None)
    a_run("here")
    assert placed(run_dir="here", ckpt="auto") == ("here", f"here/{LAST}")
    with pytest.raises(LibrobotError, match="expected run_dir=DIR"):
        placed(ckpt="auto")


def test_jobs_whose_directory_follows_their_name_are_not_numbered():
    assert placed("3", "outputs/multirun/day/time/3", run_dir="suite/${name}") == ("suite/act", None)


def test_a_run_is_finished_when_it_made_all_of_its_steps():
    cfg = OmegaConf.create({"run_dir": "here", "trainer": {"max_steps": 20}})
    assert not launch.is_finished(cfg)
    a_run("here")
    Path("here/metrics.json").write_text('{"step": 20.0}')
    assert launch.is_finished(cfg)
    cfg.trainer.max_steps = 30
    assert not launch.is_finished(cfg)


def test_a_job_waits_for_what_still_runs_of_it(tmp_path, capsys):
    """Also where the process that had the lock is gone, and only its training process is left."""
    with in_turn(tmp_path / "run") as (lock, waited):
        assert not waited
        left = subprocess.Popen(["sleep", "0.3"], pass_fds=(lock,))
    with in_turn(tmp_path / "run") as (_, waited):
        assert waited
        assert left.poll() is not None or left.wait(timeout=0.1) == 0
    assert "still running from before" in capsys.readouterr().out


def test_a_killed_process_of_several_is_named_with_how_to_go_on(tmp_path):
    processes = [subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"]), subprocess.Popen(["false"])]
    processes[0].wait()
    processes[2].wait()
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=processes)))
    assert lost_process(trainer, tmp_path) is None  # those that ended by themselves have said why
    processes[1].kill()
    processes[1].wait()
    assert "process 2 of 4 was ended by SIGKILL (out of memory?); nothing was saved yet" in str(
        lost_process(trainer, tmp_path)
    )
    a_run(tmp_path / "run")
    assert "go on from" in str(lost_process(trainer, tmp_path / "run"))
