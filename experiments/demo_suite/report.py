"""Evaluate every finished run of this study and write the table and the plot of its README.

    python experiments/demo_suite/report.py [outputs/demo_suite]

Each run is evaluated once, on 50 unseen episodes of each kind of instruction; what was evaluated is not
evaluated again. The table goes between the markers in README.md, the plot beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from librobot.config.compose import compose
from librobot.evaluation.run import evaluate
from librobot.policy import Policy

HERE = Path(__file__).parent
EVALUATION = ("episodes=100", "kinds=[reach,press]", "controls=[]", "videos_per_kind=1")
EXECUTED = 8  # steps of each chunk, or all of a shorter one
CALLS = 20  # of which the median is the time of a chunk
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
GOAL = 0.7


def main(runs: Path) -> None:
    rows = []
    for metrics in sorted(runs.glob("*/metrics.json")):
        run = metrics.parent
        policy = Policy.from_checkpoint(run, device="cpu")
        if not (run / "eval.json").exists():
            steps = f"execute_steps={min(EXECUTED, policy.horizon)}"
            evaluate(compose([f"ckpt={run}", f"output_dir={run}", steps, *EVALUATION], "eval"))
        rows.append(row(run, policy, json.loads(metrics.read_text())))
    if not rows:
        sys.exit(f"{runs}: no finished run; first librobot-train -m experiment=demo_suite/act,...")
    rows.sort(key=lambda each: -each["success"])
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(before + BEGIN + "\n" + table(rows) + "\n" + END + after)
    plot(rows, HERE / "results.png")
    print(table(rows))


def row(run: Path, policy: Policy, metrics: dict[str, float]) -> dict[str, Any]:
    """What the table says of one run."""
    result = json.loads((run / "eval.json").read_text())
    return {
        "name": run.name,
        "success": result["success"],
        "interval": result["interval"],
        "tasks": {kind: task["success"] for kind, task in result["tasks"].items()},
        "minutes": metrics["train_seconds"] / 60,
        "steps": int(metrics["step"]),
        "parameters": sum(p.numel() for p in policy.framework.parameters()),
        "chunk_ms": chunk_ms(policy),
    }


def chunk_ms(policy: Policy) -> float:
    """Milliseconds of one thread from an observation to its chunk: the median of several calls, in the
    processor's time, so that other work on the machine counts little."""
    torch.set_num_threads(1)
    spec, t = policy.spec, policy.obs_steps
    observation = {
        "images": {c.name: np.zeros((t, c.height, c.width, 3), np.uint8) for c in spec.cameras},
        "state": np.zeros((t, spec.state_dim), np.float32),
        "prompt": "reach the red cube",
    }
    times = []
    for _ in range(CALLS + 1):
        start = time.process_time()
        policy.infer(observation)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times[1:])


def table(rows: list[dict[str, Any]]) -> str:
    kinds = list(rows[0]["tasks"])
    head = ["framework", "success", *kinds, "training", "steps", "parameters", "a chunk"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for each in rows:
        low, high = (round(100 * bound) for bound in each["interval"])
        cells = [
            each["name"],
            f"{100 * each['success']:.0f}% ({low} to {high})",
            *(f"{100 * each['tasks'][kind]:.0f}%" for kind in kinds),
            f"{each['minutes']:.1f} min",
            str(each["steps"]),
            f"{each['parameters'] / 1e6:.2f} M",
            f"{each['chunk_ms']:.0f} ms",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Success with its interval, best first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(rows) + 1.2))
    names = [each["name"] for each in rows][::-1]
    success = [100 * each["success"] for each in rows][::-1]
    low = [s - 100 * each["interval"][0] for s, each in zip(success, rows[::-1], strict=True)]
    high = [100 * each["interval"][1] - s for s, each in zip(success, rows[::-1], strict=True)]
    axes.barh(names, success, xerr=[low, high], color="#4477aa", ecolor="#333333", capsize=2)
    axes.axvline(100 * GOAL, color="#bb5566", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 100), xlabel="success, %, with 95% Wilson intervals")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("outputs/demo_suite"))
