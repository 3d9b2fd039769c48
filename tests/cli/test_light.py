"""Commands are light: help in under two seconds, and no torch before there is work to do."""

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from librobot.cli.main import COMMANDS

REPOSITORY = Path(__file__).parents[2]
HYDRA_COMMANDS = ["train", "eval", "record"]


def run_module(name, *arguments, cwd=None):
    command = [sys.executable, "-m", f"librobot.cli.{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


@pytest.mark.parametrize("name", ["train", "eval", "record", "data", "export", "bench", "main", "app"])
def test_importing_a_command_imports_nothing_heavy(name):
    code = f"import json, sys, librobot.cli.{name}; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)))
    heavy = {"torch", "lightning", "numpy", "pandas", "pyarrow", "mujoco", "gymnasium", "av", "rich", "wandb"}
    assert not loaded & heavy


def test_a_whole_help_run_loads_no_torch(tmp_path):
    code = """
import sys, json
from librobot.cli.train import main
sys.argv = ["librobot-train", "--help"]
try:
    main()
finally:
    print("loaded:", sorted({"torch", "lightning", "numpy"} & set(sys.modules)))
"""
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    assert "loaded: []" in out


@pytest.mark.parametrize("name", HYDRA_COMMANDS)
def test_help_is_fast_and_useful(name, tmp_path):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run_module(name, "--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2.0
    assert done.returncode == 0
    assert f"librobot-{name}" in done.stdout
    assert "Examples" in done.stdout
    assert "--debug" in done.stdout
    frameworks = sorted(path.stem for path in (REPOSITORY / "conf/framework").glob("*.yaml"))
    assert f"framework: {', '.join(frameworks)}" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["data", "importing", "export", "bench"])
def test_the_other_commands_explain_themselves(name):
    done = run_module(name, "--help")
    assert done.returncode == 0
    assert f"librobot-{name.removesuffix('ing')}" in done.stdout


def test_the_umbrella_lists_every_command():
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    done = run_module("main")
    assert done.returncode == 0
    assert set(COMMANDS) == set(scripts) - {"librobot"}
    for name in COMMANDS:
        assert name in done.stdout


def test_command_files_stay_thin():
    for path in (REPOSITORY / "src/librobot/cli").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
