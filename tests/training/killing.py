"""`python killing.py DATASET FOLDER OVERRIDES`: a run without interruption in FOLDER/straight, and one in
FOLDER/killed that is killed twenty times at random moments and goes on each time (ckpt=auto).

Imports everything once and forks a process for each run. Prints the step of the checkpoint after each kill.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

KILLS = 20
LAST = "checkpoints/last.ckpt"


def forked(work) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def step_of(path: Path) -> int:
    from librobot.policy import read_checkpoint

    return int(read_checkpoint(path)["global_step"])


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def main(dataset: Path, folder: Path, overrides: list[str]) -> int:
    from small_runs import fit

    def run(name: str, *more: str):
        return lambda: fit(dataset, folder / name, *overrides, *more)

    _, status = os.waitpid(forked(run("straight")), 0)
    if status:
        return 1
    draw, seen, last = random.Random(0), [], folder / "killed" / LAST
    while len(seen) < KILLS:
        before = written(last)
        child = forked(run("killed", "ckpt=auto"))
        while written(last) == before:  # until it has begun to save
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                print(f"ended by itself with {status} after {len(seen)} kills", file=sys.stderr)
                return 1
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.append(step_of(last))
        print(json.dumps(seen), flush=True)
    _, status = os.waitpid(forked(run("killed", "ckpt=auto")), 0)
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
