"""The table and plots of a sweep's folder."""

import csv
import io
import json
import sys

import pytest
from PIL import Image
from sweep_folder import job, sweep

from librobot.cli import sweep_report
from librobot.errors import LibrobotError
from librobot.training.sweeps.importance import importances
from librobot.training.sweeps.report import report
from librobot.training.sweeps.table import csv_text, read_sweep


def test_the_table_has_every_job_and_what_differs_between_them(tmp_path):
    found = read_sweep(sweep(tmp_path))
    assert found.axes == ("optim.lr", "framework.horizon")
    assert (found.objective, found.direction) == ("val/loss", "minimize")
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [row["status"] for row in rows] == [*["finished"] * 8, "pruned", "failed"]
    assert float(rows[0]["optim.lr"]) == pytest.approx(1e-4)
    assert rows[9]["what went wrong"] == "out of memory"
    assert found.ranked[0].job.number == 4  # 1e-3


def test_another_metric_and_direction(tmp_path):
    found = read_sweep(sweep(tmp_path), "train/loss", "maximize")
    assert found.ranked[0].job.number == 4
    assert found.ranked[0].value == pytest.approx(2.0)
    with pytest.raises(LibrobotError, match="did you mean 'train/loss'"):
        read_sweep(tmp_path, "train/los")


def test_axes_are_logarithmic_where_they_were_searched_so_or_lie_far_apart(tmp_path):
    found = read_sweep(sweep(tmp_path))
    assert [found.is_log(axis) for axis in found.axes] == [True, False]
    spaces = {"optim.lr": "FloatDistribution(high=1.0, log=False, low=0.0, step=None)"}
    spaces["framework.horizon"] = "IntDistribution(high=16, log=True, low=8, step=1)"
    (tmp_path / "sweep.json").write_text(json.dumps({"axes": spaces}))
    found = read_sweep(tmp_path)
    assert [found.is_log(axis) for axis in found.axes] == [False, True]


def test_a_folder_that_is_no_sweep_is_said(tmp_path):
    with pytest.raises(LibrobotError, match="expected the folder of a sweep"):
        read_sweep(tmp_path)


def test_the_axis_that_made_the_difference_matters_most(tmp_path):
    pytest.importorskip("optuna")
    found = importances(read_sweep(sweep(tmp_path)))
    assert found["optim.lr"] > found["framework.horizon"]
    assert sum(found.values()) == pytest.approx(1.0)


def test_the_command_writes_page_table_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["librobot-sweep-report", str(sweep(tmp_path))])
    sweep_report.command()
    out = " ".join(capsys.readouterr().out.split())  # without the table's line breaks
    assert "10 jobs: 8 finished, 1 pruned, 1 failed" in out
    assert "librobot-train framework=act optim.lr=0.001 framework.horizon=8" in out
    page = (tmp_path / "report/index.html").read_text()
    assert "Best: job 4" in page
    names = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert names >= {"history", "curves", "slices", "parallel"}
    assert page.count("data:image/png;base64,") == len(names)
    for name in names:
        with Image.open(tmp_path / f"report/{name}.png") as picture:
            assert len(picture.convert("L").getcolors()) > 10  # something is drawn


def test_a_sweep_that_has_just_begun_has_a_report(tmp_path):
    job(tmp_path, 0, ["optim.lr=1.0"], status="running")
    page = report(tmp_path)
    assert "1 running" in page.read_text()
