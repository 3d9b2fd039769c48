"""The memory that training steps really take, by torch's allocator, and by the process as a whole:
`python measured_memory.py OVERRIDES` prints both beside the estimate. The second has more than tensors in it:
code that is loaded, threads, and what glibc does not give back."""

import resource
import sys

import numpy as np
import torch
from omegaconf import OmegaConf, open_dict
from torch.profiler import ProfilerActivity, profile

from librobot.config.build import build, build_framework
from librobot.config.compose import compose, resolve
from librobot.training.estimates.estimate import estimate
from librobot.training.estimates.step import half_of
from librobot.training.estimates.subject import PROMPT, robot_of, smooth, unit_statistics
from librobot.types import Batch, Observation


def configuration(overrides):
    cfg = compose(overrides)
    with open_dict(cfg):
        cfg.run_dir, cfg.name = "unused", "unused"
    return OmegaConf.create(resolve(cfg))


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def train(cfg, steps: int = 3) -> int:
    """Peak bytes of real steps above what was there before."""
    spec, _, _ = robot_of(cfg)
    before = resident()
    framework = build_framework(cfg, spec).train()
    framework.normalizer.fit(unit_statistics(spec))
    size = cfg.data.batch_size
    batch = Batch(
        Observation(
            images={
                c.name: torch.randint(
                    256, (size, framework.obs_steps, 3, c.height, c.width), dtype=torch.uint8
                )
                for c in spec.cameras
            },
            image_mask={c.name: torch.ones(size, dtype=torch.bool) for c in spec.cameras},
            state=torch.zeros(size, framework.obs_steps, spec.state_dim),
            prompt=[PROMPT] * size,
        ),
        smooth(spec, framework.horizon, size),
        torch.ones(size, framework.horizon, dtype=torch.bool),
        {"rows": np.zeros(size, np.int64), "progress": torch.zeros(size, framework.horizon)},
    )
    clip = cfg.trainer.gradient_clip_val
    trained = [p for p in framework.parameters() if p.requires_grad]
    augment = build(cfg.data.augmentation, "data.augmentation")
    optimizer = build(cfg.optim, "optim")(framework.param_groups(framework, {}))
    precision = str(cfg.trainer.precision)
    mixed = precision.endswith("-mixed")
    for _ in range(steps):
        with torch.autocast("cpu", half_of(precision) or torch.bfloat16, enabled=mixed):
            loss, _ = framework.compute_loss(augment(batch, seed=(0, 0, 0)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        del loss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def allocated(cfg) -> int:
    """The most bytes that torch's allocator had given out at once during `train`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train(cfg, steps=2)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(live.max())


if __name__ == "__main__":
    cfg = configuration(sys.argv[1:])
    process = train(cfg)
    tensors = allocated(cfg)
    estimated = estimate(cfg).cost.peak
    print(f"process {process:,} tensors {tensors:,} estimated {estimated:,} ratio {estimated / tensors:.3f}")
