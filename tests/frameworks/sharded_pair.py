"""`python sharded_pair.py [NAME...]`: every framework's loss and gradients, whole and over two processes by
FSDP2.

Prints a JSON object: framework (and backbone) -> the largest differences, or what went wrong.
The second process builds the policy without weights, and gets its parts from the first one.
"""

import json
import os
import socket
import sys
import traceback
from contextlib import nullcontext


def compare(name: str, vlm: str, rank: int, mesh, **changes) -> dict[str, float]:
    import torch

    import tiny_models
    from librobot.frameworks.sharding import full, shard
    from librobot.nn.pretrained import weightless

    def built(**changes):
        made = tiny_models.build(name, vlm=vlm, **changes)
        if "fast" in name:  # fitted to data, which are the same everywhere
            torch.manual_seed(1)
            made.head.fit(torch.randn(64, made.horizon, made.action_width))
        return made

    data = tiny_models.batch()
    whole = built()
    expected = tiny_models.fixed_loss(whole, data)
    expected.backward()
    with nullcontext() if rank == 0 else weightless():
        spread = built(**changes)
    if rank:
        assert all(parameter.is_meta for parameter in spread.parameters())
    shard(spread, mesh, torch.device("cpu"))
    held = sum(getattr(p, "_local_tensor", p).numel() for p in spread.parameters())
    total = sum(p.numel() for p in whole.parameters())
    loss = tiny_models.fixed_loss(spread, data)
    loss.backward()
    theirs = dict(whole.named_parameters())
    worst, compared = 0.0, 0
    for parameter_name, parameter in spread.named_parameters():
        reference = theirs[parameter_name].grad
        if parameter.grad is None or reference is None:
            assert parameter.grad is None or full(parameter.grad).abs().max() == 0, parameter_name
            assert reference is None or reference.abs().max() == 0, parameter_name
            continue
        difference = (full(parameter.grad) - reference).abs().max() / reference.abs().max().clamp_min(1e-3)
        worst, compared = max(worst, float(difference)), compared + int(reference.abs().max() > 0)
    return {
        "loss": abs(float((loss - expected).detach())),
        "gradients": worst,
        "compared": compared,
        "held": held / total,
    }


PACKED = [("pi0_fast", "tiny"), ("openvla", "prismatic_tiny"), ("rt2", "qwen2vl_tiny")]


def main(rank: int, port: int, only: list[str]) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import tiny_models

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("replicate", "shard", "tensor"))
    found = {}
    pairs = [(name, "tiny") for name in tiny_models.options("framework")]
    pairs += [("pi0", "paligemma_tiny"), ("smolvla", "smolvlm2_tiny"), ("openvla", "prismatic_tiny")]
    runs = [(name, vlm, {}) for name, vlm in pairs]
    runs += [(name, vlm, {"pack": True}) for name, vlm in PACKED]  # beside padded rows in one process
    for name, vlm, changes in runs:
        title = " ".join((name, vlm, *changes))
        if only and title not in only:
            continue
        try:
            found[title] = compare(name, vlm, rank, mesh, **changes)
        except Exception:
            found[title] = traceback.format_exc()[-1500:]
    if rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    import tiny_models  # noqa: F401  once for both

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    child = os.fork()
    if child == 0:
        main(1, free, sys.argv[1:])
        os._exit(0)
    main(0, free, sys.argv[1:])
    sys.exit(int(os.waitpid(child, 0)[1] != 0))
