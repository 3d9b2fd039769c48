"""One error path: a clear message, an exit code, no traceback unless --debug."""

import subprocess
import sys

import pytest

CASES = [
    ("train", ["framework=pi00"], "'pi0'"),
    ("train", ["trianer=ddp"], "'trainer'"),
    ("train", ["trainer.max_step=2"], "'max_steps'"),
    ("train", ["seed=abc"], "a whole number"),
    ("train", ["data=lerobot", "data.root=x", "ckpt=last"], "no run called 'act'"),
    ("train", ["data=lerobot", "data.root=x", "ckpt=nowhere.ckpt"], "nowhere.ckpt"),
    ("train", ["data=lerobot"], "data.root"),
    ("eval", [], "ckpt: name what to evaluate"),
    ("eval", ["ckpt=x", "episode=3"], "'episodes'"),
    ("eval", ["ckpt=/nowhere"], "no checkpoint at /nowhere"),
    ("record", [], "output: a value is needed"),
    ("data", ["info", "/nowhere"], "/nowhere"),
    ("export", ["merge", "/nowhere", "out.ckpt"], "no checkpoint at /nowhere"),
    ("bench", ["stepp"], "'step'"),
]


def run(name, *arguments, cwd):
    command = [sys.executable, "-m", f"librobot.cli.{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.parametrize(("name", "arguments", "part"), CASES)
def test_bad_input_is_one_message_and_exit_code_two(name, arguments, part, tmp_path):
    done = run(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("name", "given"), [("eval", "ckpt=/nowhere"), ("export", "merge /nowhere out.ckpt")]
)
def test_a_checkpoint_that_is_not_there_is_said_before_torch_is_imported(name, given, tmp_path):
    code = f"""
import sys
from librobot.cli.{name} import main
sys.argv = ["librobot-{name}", *{given.split()}]
try:
    main()
finally:
    print("loaded:", sorted({{"torch", "lightning", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "loaded: []" in done.stdout
    assert "error: no checkpoint at /nowhere" in done.stderr


def test_debug_adds_the_traceback(tmp_path):
    done = run("train", "framework=pi00", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "error: framework=pi00" in done.stderr


def test_the_worker_reports_what_the_check_finds_once(tmp_path):
    done = run("train", "data=lerobot", "data.root=x", "+optim.rate=3", "trainer=ddp", cwd=tmp_path)
    assert done.returncode == 2
    assert "optim.rate: adamw has no argument 'rate'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
