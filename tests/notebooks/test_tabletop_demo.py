"""The notebooks run from top to bottom on a small checkpoint, and are kept without outputs."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
# The demo's experiment, with a handful of demonstrations and steps.
SMALL = [
    "experiment=tabletop/act",
    "data.source.episodes=10",
    "data.source.num_workers=1",
    "data.batch_size=8",
    "trainer.max_steps=4",
    "scheduler.warmup_steps=1",
]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "librobot.cli.train", *SMALL, f"run_dir={folder / 'train'}"]
    subprocess.run([*command, f"data.root={folder / 'cache'}"], check=True, cwd=REPOSITORY)
    return folder / "train"


@pytest.mark.slow
def test_tabletop_demo_runs(run_dir, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("LIBROBOT_DEMO", str(run_dir))
    notebook = nbformat.read(REPOSITORY / "notebooks" / "tabletop_demo.ipynb", as_version=4)
    resources = {"metadata": {"path": str(REPOSITORY / "notebooks")}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output.get("data", {}) for cell in code for output in cell.outputs]
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert sum("image/png" in data for data in shown) == 4  # observations, keypoints, attention, chunks
    assert any("video/mp4" in data.get("text/html", "") for data in shown)
    assert "ACT for tabletop" in printed
    assert "has no" not in printed  # neither keypoints nor attention were left out
