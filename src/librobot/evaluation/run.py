"""librobot-eval: a checkpoint or the scripted expert, its controls, and the report."""

from __future__ import annotations

import logging
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from librobot.checkpoint_path import checkpoint_file
from librobot.config.build import build_suite
from librobot.errors import LibrobotError, nearest
from librobot.evaluation import machine
from librobot.evaluation.controls import CONTROLS, Transform, blank_images, shuffled_prompts
from librobot.evaluation.environment import suite_node, warn_of_rate, warn_of_renderer
from librobot.evaluation.episode import EpisodeResult
from librobot.evaluation.report import print_table, write_report
from librobot.evaluation.rollout import BatchPolicy, ExpertPolicy, TimedPolicy, check_fit, evaluate_policy
from librobot.evaluation.statistics import latency, summarise
from librobot.evaluation.wandb_run import record_evaluation
from librobot.policy import Policy
from librobot.sim.base import Suite

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate what `cfg` (conf/eval.yaml) describes; write the report; return the content of eval.json.

    Raises LibrobotError for options that do not go together, a checkpoint that cannot be read, and a
    policy that does not fit the suite.
    """
    check_options(cfg)
    started = time.monotonic()
    policy, checkpoint = load_policy(cfg)
    env = suite_node(cfg.env, policy if isinstance(policy, Policy) else None)
    suite = build_suite(env)
    check_fit(policy, suite)
    if isinstance(policy, Policy):
        warn_of_renderer(policy.provenance.get("renderer"), suite.renderer)
        warn_of_rate(policy.spec.control_hz, suite.spec.control_hz, policy.provenance)
    folder = run_folder(cfg, checkpoint)
    timed = TimedPolicy(policy) if isinstance(policy, Policy) else policy
    main = run_episodes(cfg, timed, suite, title="evaluate", videos_per_kind=cfg.videos_per_kind)
    calls = timed.calls if isinstance(timed, TimedPolicy) else []
    result = {
        **summarise(main),
        "latency": latency(calls),
        "controls": run_controls(cfg, policy, suite, main),
        "policy": title(policy, checkpoint),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "suite": suite.to_dict(),
        "renderer": suite.renderer,
        "execution": execution_text(cfg, policy),
        "seed": cfg.seed,
        "command": machine.command(),
        "date": machine.now(),
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine.machine(),
        "versions": machine.versions(),
    }
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    resolved = OmegaConf.to_yaml(OmegaConf.create(plain | {"env": env}), resolve=True)
    page = write_report(folder, result, main, fps=suite.spec.control_hz, config=resolved)
    if cfg.wandb:
        trained = policy.config if isinstance(policy, Policy) else {}
        record_evaluation(
            result, {str(k): v for k, v in plain.items()}, folder, checkpoint, trained, recorded(folder, main)
        )
    print_table(result, page)
    return result


def recorded(folder: Path, episodes: list[EpisodeResult]) -> dict[Path, EpisodeResult]:
    """The videos that the report has written, and whose they are."""
    shown = [episode for episode in episodes if episode.frames]
    paths = [next((folder / "videos").glob(f"*_{episode.seed}_*.mp4"), None) for episode in shown]
    return {path: episode for path, episode in zip(paths, shown, strict=True) if path is not None}


def check_options(cfg: DictConfig) -> None:
    """Refuse options that do not go together, before anything is loaded."""
    if cfg.policy not in ("checkpoint", "expert"):
        raise LibrobotError(f"policy: {nearest(cfg.policy, ('checkpoint', 'expert'))}, found {cfg.policy!r}")
    if cfg.policy == "checkpoint" and not cfg.ckpt:
        raise LibrobotError(
            "ckpt: name what to evaluate, ckpt=PATH (a checkpoint or a run directory), or policy=expert"
        )
    if cfg.policy == "expert" and cfg.ckpt:
        raise LibrobotError(
            f"policy=expert evaluates no checkpoint, found ckpt={cfg.ckpt}; leave one of the two out"
        )
    if cfg.num_steps is not None and cfg.num_steps < 1:
        raise LibrobotError(f"num_steps must be at least 1, found {cfg.num_steps}")
    for name in cfg.controls:
        if name not in CONTROLS:
            raise LibrobotError(f"controls: no control is called {name!r}; {nearest(name, CONTROLS)}")


def load_policy(cfg: DictConfig) -> tuple[Policy | ExpertPolicy, Path | None]:
    """The policy and the checkpoint file that it is from."""
    if cfg.policy == "expert":
        return ExpertPolicy(), None
    path = checkpoint_file(cfg.ckpt)
    policy = Policy.from_checkpoint(path, device=cfg.device)
    policy.num_steps, policy.guidance = cfg.num_steps, cfg.guidance
    return policy, path


def run_episodes(
    cfg: DictConfig, policy: BatchPolicy | ExpertPolicy, suite: Suite, **options: Any
) -> list[EpisodeResult]:
    """`evaluate_policy` with the options of `cfg`, those in `options` first."""
    common = {
        "episodes": cfg.episodes,
        "seed": cfg.seed,
        "num_envs": cfg.num_envs,
        "num_workers": cfg.num_workers,
        "kinds": cfg.kinds,
        "execute_steps": cfg.execute_steps,
        "ensemble": cfg.ensemble,
    }
    return evaluate_policy(policy, suite, **(common | options))


def run_controls(
    cfg: DictConfig, policy: Policy | ExpertPolicy, suite: Suite, main: list[EpisodeResult]
) -> dict[str, dict[str, Any]]:
    """The controls' summaries; {"skipped": why} for one that cannot be run. None for the expert."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(policy, ExpertPolicy):
        return found
    scenes = main[: cfg.control_episodes]
    for name in cfg.controls:
        transform: Transform = blank_images
        if name == "shuffled_prompts":
            try:
                transform = shuffled_prompts(scenes, seed=cfg.seed)
            except LibrobotError as error:
                log.warning("control %s: %s", name, error)
                found[name] = {"skipped": str(error)}
                continue
        results = run_episodes(
            cfg, policy, suite, episodes=len(scenes), transform=transform, title=f"control {name}"
        )
        found[name] = summarise(results)
    return found


def run_folder(cfg: DictConfig, checkpoint: Path | None) -> Path:
    """Where the products go."""
    if cfg.output_dir:
        return Path(cfg.output_dir)
    stamp = datetime.now()
    name = "expert" if checkpoint is None else _name(checkpoint)
    return Path("outputs") / "eval" / f"{stamp:%Y-%m-%d}" / f"{stamp:%H-%M-%S}_{name}"


def title(policy: Policy | ExpertPolicy, checkpoint: Path | None) -> str:
    """What the report calls the policy: the run's name, else that of its directory."""
    if isinstance(policy, ExpertPolicy) or checkpoint is None:
        return "the scripted expert"
    return policy.config.get("name") or _name(checkpoint)


def _name(checkpoint: Path) -> str:
    """The name of the run's directory."""
    folder = checkpoint.absolute().parent
    return (folder.parent if folder.name == "checkpoints" else folder).name


def execution_text(cfg: DictConfig, policy: Policy | ExpertPolicy) -> str:
    """How chunks become actions, in words."""
    if isinstance(policy, ExpertPolicy):
        return "the expert's action at every step"
    if cfg.ensemble is not None:
        return f"asked at every step, chunks of {policy.horizon} averaged with decay {cfg.ensemble}"
    return f"{cfg.execute_steps or policy.horizon} steps of each chunk of {policy.horizon}"
