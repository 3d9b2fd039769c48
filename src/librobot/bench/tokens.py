"""librobot-bench tokens: FAST's and VQ's action tokens beside 256 bins, on a dataset's own actions.

FAST and VQ are fitted on three quarters of the episodes; all tokenize the chunks of the others. Two rows of
each for every horizon: tokens in a chunk (FAST's stop token included), and the root mean square error after
decoding, in units in which the actions' 1% and 99% quantiles are -1 and 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from librobot.bench._rows import Row, print_rows, write_rows
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.windows import Windows
from librobot.errors import LibrobotError
from librobot.normalize import Normalizer
from librobot.tokenizers.base import ActionTokenizer
from librobot.tokenizers.bins import Bins
from librobot.tokenizers.fast import FAST
from librobot.tokenizers.vq import VQ

OUTPUT = Path("outputs/bench/tokens.json")


def main(options: Sequence[str]) -> list[Row]:
    """Measure, print a table, write the JSON; returns the rows."""
    arguments = parser().parse_args(list(options))
    source = LeRobotSource(arguments.root)
    episodes = len(source.episode_lengths)
    if episodes < 4:
        raise LibrobotError(f"{arguments.root}: at least 4 episodes are needed, found {episodes}")
    order = np.random.default_rng(0).permutation(episodes)
    normalizer = Normalizer({"action": source.spec.action_dim}, {"action": "quantile"})
    normalizer.fit({"action": source.statistics()["action"]})
    rows: list[Row] = []
    for horizon in arguments.horizon:
        fitted, held_out = (
            normalizer.normalize("action", chunks(source, part, horizon, arguments.chunks))
            for part in (order[episodes // 4 :], order[: episodes // 4])
        )
        tokenizers: dict[str, ActionTokenizer] = {
            "FAST": FAST(vocab_size=arguments.vocab_size, scale=arguments.scale),
            "VQ": VQ(num_quantizers=arguments.codebooks, num_train_steps=arguments.vq_steps),
            "bins": Bins(),
        }
        measured = {}
        for name, tokenizer in tokenizers.items():
            tokenizer.attach(horizon=horizon, action_dim=source.spec.action_dim)
            if not tokenizer.fitted:
                tokenizer.fit(fitted)
            measured[name] = measure(tokenizer, held_out)
        peers = measured.pop("bins")
        for name, values in measured.items():
            for place, (what, unit) in enumerate(
                (("tokens per chunk", "tokens"), ("round-trip error", "RMS"))
            ):
                title = f"{name}, {horizon} actions, {what}"
                rows.append(Row(title, values[place], peers[place], "256 bins", unit))
    write_rows(arguments.output, rows)
    print_rows("action tokens", rows, arguments.output)
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("librobot-bench tokens", description=__doc__.partition("\n")[0])
    made.add_argument("--root", type=Path, required=True, help="a LeRobotDataset v3.0")
    made.add_argument("--horizon", type=int, nargs="+", default=[16, 50])
    made.add_argument("--chunks", type=int, default=20_000, help="at most so many of either part")
    made.add_argument("--vocab-size", type=int, default=1024)
    made.add_argument("--scale", type=float, default=10.0)
    made.add_argument("--codebooks", type=int, default=2, help="VQ's, and so its tokens (default: 2)")
    made.add_argument("--vq-steps", type=int, default=3000, help="of VQ's training (default: 3000)")
    made.add_argument("--output", type=Path, default=OUTPUT)
    return made


def chunks(source: LeRobotSource, episodes: np.ndarray, horizon: int, limit: int) -> Tensor:
    """Chunks (n, k, a) of those episodes that end before the episode does, evenly spread."""
    windows = Windows(source.episode_lengths, episodes.tolist(), horizon=horizon, obs_steps=1)
    rows, mask = windows.action_rows(np.arange(len(windows)))
    rows = rows[mask.all(axis=1)]
    if not len(rows):
        raise LibrobotError(f"no episode has {horizon} actions; choose a smaller --horizon")
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(limit, len(rows))).astype(int))]
    return torch.from_numpy(source.actions(rows.reshape(-1))).unflatten(0, rows.shape)


def measure(tokenizer: ActionTokenizer, actions: Tensor) -> tuple[float, float]:
    """Tokens per chunk, and the root mean square error of what comes back."""
    ids, mask = tokenizer.encode(actions)
    error = (tokenizer.decode(ids, mask) - actions).square().mean().sqrt()
    return mask.sum(dim=1).float().mean().item(), error.item()
