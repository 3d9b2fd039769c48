"""The wheel in a fresh environment, with Hydra and nothing heavier, composes from anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
COMPOSE = """
import importlib.util, json, sys
from pathlib import Path

import librobot.conf
from librobot.config.compose import compose

assert importlib.util.find_spec("torch") is None
root = Path(librobot.conf.__path__[0])
options = sorted(f"{path.parent.name}={path.stem}" for path in root.glob("*/*.yaml"))
composed = {option: "_target_" in str(compose([option])) for option in options}
for option in options:
    if option.startswith("env="):
        compose([option], "eval"), compose([option], "record")
print(json.dumps({"root": str(root), "composed": composed}))
"""


def run(*command: str | Path, cwd: Path | str = "/") -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def binaries(tmp_path_factory) -> Path:
    """bin/ of an environment that holds the wheel, hydra-core and omegaconf."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # a copy: a build leaves files in its tree
    for name in ("src", "conf"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree / name)
    run(UV, "build", "--wheel", "--python", sys.executable, "--out-dir", folder / "dist", cwd=tree)
    (wheel,) = (folder / "dist").glob("librobot-*.whl")
    run(UV, "venv", "--python", sys.executable, folder / "venv")
    python = folder / "venv/bin/python"
    run(UV, "pip", "install", "--python", python, "hydra-core>=1.3.2,<1.4", "omegaconf>=2.3,<2.4")
    run(UV, "pip", "install", "--python", python, "--no-deps", wheel)
    return python.parent


def test_every_option_of_every_group_composes_from_anywhere(binaries):
    found = json.loads(run(binaries / "python", "-c", COMPOSE))
    assert Path(found["root"]).is_relative_to(binaries.parent)
    wanted = {f"{path.parent.name}={path.stem}" for path in (REPOSITORY / "conf").glob("*/*.yaml")}
    assert set(found["composed"]) == wanted
    assert all(found["composed"].values())


def test_the_console_scripts_are_there_and_explain_themselves_without_torch(binaries):
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert "librobot-train" in scripts
    for name in scripts:
        assert name in run(binaries / name, "--help")


def test_a_composed_configuration_is_printed_from_anywhere(binaries):
    text = run(binaries / "librobot-train", "framework=pi0", "head=ddpm", "--cfg", "job")
    assert "librobot.heads.ddpm" in text
