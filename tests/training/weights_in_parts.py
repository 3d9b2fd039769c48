"""`python weights_in_parts.py RANK PORT CHECKPOINT OUT.json`: one of two processes that share a policy whose
backbone is in CHECKPOINT. It compares each of its parts with the whole, and writes what it read and held."""

import ctypes
import gc
import json
import os
import sys

import torch
import torch.distributed as dist
from lightning import seed_everything
from small_runs import SPEC
from torch.distributed.device_mesh import init_device_mesh

from librobot.config.build import build_framework
from librobot.config.compose import compose
from librobot.frameworks.sharding import own_part, shard
from librobot.nn import stored
from librobot.training.strategies import built_in_parts

CPU = torch.device("cpu")
MESHES = {"fsdp2": (1, 2, 1), "tp": (1, 1, 2)}
VISION = {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2}
TEXT = {"vocab_size": 320, "num_attention_heads": 8, "num_key_value_heads": 2}
SMALL = {**TEXT, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
LARGE = {**TEXT, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}


def configuration(trainer: str, checkpoint: str | None):
    text = SMALL if checkpoint is None else LARGE
    section = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [section // 2, section // 4, section // 4]
    sizes = {**text, "rope_parameters.mrope_section": sections}
    given = [f"vlm.config.text_config.{key}={value}" for key, value in sizes.items()]
    given += [f"vlm.config.vision_config.{key}={value}" for key, value in VISION.items()]
    given += [f"vlm.config.vision_config.hidden_size={text['hidden_size']}", f"trainer={trainer}"]
    given += [f"vlm.checkpoint={checkpoint}", "vlm.pretrained=true"] if checkpoint else []
    given += ["framework.max_state_dim=null", "framework.max_action_dim=null", "framework.expert_width=32"]
    return compose(["framework=pi0", "vlm=qwen2vl_tiny", "framework.horizon=4", *given])


def memory(what: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))


def count_reads(sizes: list[int]) -> None:
    read = stored.read_part

    def counted(*place):
        part = read(*place)
        sizes.append(part.nbytes)
        return part

    stored.read_part = counted


def shared(trainer: str, checkpoint: str | None):
    cfg = configuration(trainer, checkpoint)
    seed_everything(0, verbose=False)
    with built_in_parts(cfg):
        framework = build_framework(cfg, SPEC)
    mesh = init_device_mesh("cpu", MESHES[trainer], mesh_dim_names=("replicate", "shard", "tensor"))
    shard(framework, mesh, CPU)
    return framework, cfg


def main(rank: str, port: str, checkpoint: str, out: str) -> None:
    os.environ.update(LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=int(rank), world_size=2)
    found, sizes = {}, []
    count_reads(sizes)
    for trainer in MESHES:
        shared(trainer, None)  # all code that is loaded late
        sizes.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or free memory that the process has kept would be filled first
        before = memory("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is counted from here
        framework, cfg = shared(trainer, checkpoint)
        held = memory("VmHWM") - before
        numbers = {"read": sum(sizes), "held": held}
        seed_everything(0, verbose=False)
        whole = dict(build_framework(cfg, SPEC).named_parameters())
        differ = []
        for name, parameter in framework.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not torch.equal(local, own_part(whole.pop(name).detach(), parameter)):
                differ.append(name)
        backbone = list(framework.vlm.parameters())
        numbers["whole"] = sum(p.numel() for p in backbone) * 4
        numbers["largest"] = max(p.numel() for p in backbone) * 4
        found[trainer] = numbers | {"differ": differ, "left": list(whole)}
        del framework
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
