"""Optuna's loop over jobs that only leave their files: settling, pruning, going on, what is refused."""

import json

import pytest

optuna = pytest.importorskip("optuna")

from librobot.errors import LibrobotError  # noqa: E402
from librobot.training.sweeps.jobs import PRUNE, REPORTS, begin, read_job, read_reports  # noqa: E402
from librobot.training.sweeps.locks import alone  # noqa: E402
from librobot.training.sweeps.optuna_sweep import OptunaSweep  # noqa: E402
from librobot.training.sweeps.space import parse  # noqa: E402
from librobot.training.sweeps.watch import Watch  # noqa: E402

OPTIONS = {
    "objective": "val/loss",
    "direction": "minimize",
    "n_trials": 5,
    "n_jobs": 1,
    "sampler": {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 2, "seed": 0},
    "pruner": None,
}
AXES = ["framework=act", "optim.lr=interval(0,1)", "head=l1,mse"]


class Killed(BaseException):
    """What a launcher never catches."""


class Jobs:
    """A launcher whose jobs end at once: `(lr - 0.3) ** 2`, a failure for numbers in `failing`."""

    def __init__(self, folder, failing=(), dying=(), killed_at=None):
        self.folder, self.failing, self.dying, self.killed_at = folder, failing, dying, killed_at
        self.launched = []

    def __call__(self, jobs, first):
        for number, overrides in enumerate(jobs, first):
            self.launched.append((number, overrides))
            run_dir = self.folder / str(number)
            job = begin(run_dir, number, overrides, "val/loss")
            if number == self.killed_at:
                raise Killed
            if number in self.dying:
                raise RuntimeError("the worker was lost")
            if number in self.failing:
                job.end(run_dir, "failed", error="out of memory")
                continue
            rate = float(dict(o.split("=") for o in overrides)["optim.lr"])
            job.end(run_dir, "finished", value=(rate - 0.3) ** 2)


def sweep(folder, jobs, axes=AXES, **options):
    return OptunaSweep(folder, parse(axes, None), jobs, **(OPTIONS | options))


def chosen(jobs):
    return dict(jobs.launched)


def states(study):
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def test_trials_that_failed_or_whose_worker_died_count_and_the_sweep_goes_on(tmp_path, capsys):
    jobs = Jobs(tmp_path, failing={1}, dying={2})
    study = sweep(tmp_path, jobs).run()
    assert states(study) == ["COMPLETE", "FAIL", "FAIL", *["COMPLETE"] * 2]
    assert [number for number, _ in jobs.launched] == list(range(5))
    assert all(overrides[-1] == "ckpt=auto" for _, overrides in jobs.launched)
    out = capsys.readouterr().out
    assert "the worker was lost" in out
    assert f"best: job {study.best_trial.number}, val/loss" in out


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_sweep_killed_half_way_goes_on_and_asks_what_it_would_have_asked(tmp_path, n_jobs):
    whole = Jobs(tmp_path / "whole")
    straight = sweep(tmp_path / "whole", whole, n_jobs=n_jobs).run()
    broken, rest = Jobs(tmp_path / "parts", killed_at=3), Jobs(tmp_path / "parts")
    with pytest.raises(Killed):
        sweep(tmp_path / "parts", broken, n_jobs=n_jobs).run()
    study = sweep(tmp_path / "parts", rest, n_jobs=n_jobs).run()
    assert chosen(rest)[3] == chosen(broken)[3]  # the same job again, with ckpt=auto
    assert chosen(broken) | chosen(rest) == chosen(whole)
    assert [t.value for t in study.trials] == [t.value for t in straight.trials]
    assert min(number for number, _ in rest.launched) == 3


def test_a_job_that_ended_while_nobody_looked_is_not_run_again(tmp_path):
    broken, rest = Jobs(tmp_path, killed_at=3), Jobs(tmp_path)
    with pytest.raises(Killed):
        sweep(tmp_path, broken).run()
    read_job(tmp_path / "3").end(tmp_path / "3", "finished", value=0.5)
    study = sweep(tmp_path, rest).run()
    assert study.trials[3].value == 0.5
    assert 3 not in chosen(rest)


def test_more_trials_go_on_with_a_finished_sweep(tmp_path):
    sweep(tmp_path, Jobs(tmp_path), n_trials=1).run()
    jobs = Jobs(tmp_path)
    assert len(sweep(tmp_path, jobs, n_trials=3).run().trials) == 3
    assert [number for number, _ in jobs.launched] == [1, 2]


def test_points_to_try_first(tmp_path):
    jobs = Jobs(tmp_path)
    sweep(tmp_path, jobs, n_trials=2, first=[{"optim.lr": 0.25, "head": "mse"}]).run()
    assert jobs.launched[0][1] == ["framework=act", "optim.lr=0.25", "head=mse", "ckpt=auto"]
    assert jobs.launched[1][1] != jobs.launched[0][1]


def test_another_question_is_refused_in_the_same_folder(tmp_path):
    sweep(tmp_path, Jobs(tmp_path), n_trials=1).run()
    for axes, options, message in (
        (["framework=pi0", *AXES[1:]], {}, r"begun with \['framework=act'\], not \['framework=pi0'\]"),
        ([*AXES[:2], "head=l1,cvae"], {}, "its axes is"),
        (AXES, {"direction": "maximize"}, "its direction is minimize, not maximize"),
        (AXES, {"objective": "train/loss"}, "its objective is val/loss, not train/loss"),
    ):
        with pytest.raises(LibrobotError, match=message):
            sweep(tmp_path, Jobs(tmp_path), axes, **options).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "down"}, "direction: expected minimize or maximize"),
        ({"first": [{"optim.lrr": 1.0}]}, "first: optim.lrr is not searched; the axes are optim.lr, head"),
        ({"first": [{"optim.lr": 2.0}]}, "optim.lr=2.0 is outside of what is searched"),
        ({"n_trials": 0}, "n_trials: expected at least 1"),
        ({"sampler": {"_target_": "optuna.samplers.TPESampler", "sed": 0}}, "hydra.sweeper.sampler"),
        ({"pruner": {"_target_": "optuna.pruners.MedianPruner", "n_startup": 0}}, "hydra.sweeper.pruner"),
    ],
)
def test_wrong_options_are_refused_before_the_first_job(options, message, tmp_path):
    jobs = Jobs(tmp_path)
    with pytest.raises(LibrobotError, match=message):
        sweep(tmp_path, jobs, **options).run()
    assert not jobs.launched


def test_a_sweep_whose_jobs_all_fail_says_so(tmp_path):
    with pytest.raises(LibrobotError, match="none of the sweep's 2 jobs came to its end"):
        sweep(tmp_path, Jobs(tmp_path, failing={0, 1}), n_trials=2).run()


def test_a_second_sweep_in_the_same_folder_is_refused(tmp_path):
    with alone(tmp_path), pytest.raises(LibrobotError, match="a sweep is running there already"):
        sweep(tmp_path, Jobs(tmp_path)).run()


def test_a_job_that_had_come_to_its_end_keeps_its_times(tmp_path):
    begin(tmp_path, 0, (), None).end(tmp_path, "finished")
    first = read_job(tmp_path)
    begin(tmp_path, 0, (), None, done=True).end(tmp_path, "finished")
    assert read_job(tmp_path) == first
    begin(tmp_path, 0, (), None).end(tmp_path, "finished")
    assert read_job(tmp_path).started > first.started


def test_a_job_that_does_worse_than_the_median_is_asked_to_end(tmp_path):
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    for value in (1.0, 2.0):
        trial = study.ask()
        trial.report(value, 10)
        study.tell(trial, value)
    trials = {tmp_path / name: study.ask() for name in ("good", "bad", "silent")}
    watch = Watch(trials)
    for name, value in (("good", 0.5), ("bad", 3.0)):
        begin(tmp_path / name, 0, (), "val/loss")
        lines = [json.dumps({"step": 10, "value": value}), '{"step": 20, "va']  # the second is being written
        (tmp_path / name / REPORTS).write_text("\n".join(lines))
    watch.look()
    watch.look()
    assert not (tmp_path / "good" / PRUNE).exists()
    assert (tmp_path / "bad" / PRUNE).read_text() == "after step 10, at 3\n"
    assert [study.trials[number].intermediate_values for number in (2, 3, 4)] == [{10: 0.5}, {10: 3.0}, {}]


def test_reports_of_a_resumed_job_count_once(tmp_path):
    lines = [(10, 1.0), (20, 2.0), (20, 3.0), (30, float("nan")), (5, 4.0)]
    text = "\n".join(json.dumps({"step": step, "value": value}) for step, value in lines)
    (tmp_path / REPORTS).write_text(text)
    assert read_reports(tmp_path) == [(5, 4.0), (10, 1.0), (20, 3.0)]
