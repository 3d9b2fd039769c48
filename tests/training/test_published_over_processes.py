"""A run over published weights in two processes, each of which reads its slices of them: the losses of one
process that reads them whole, and a run that goes on."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from small_runs import losses
from together import stage, together

import tiny_models
from librobot.config.build import build
from librobot.errors import LibrobotError
from librobot.frameworks.checkpoint import fit_state_dict
from librobot.nn.pretrained import unread_weights

LAST = "checkpoints/last.ckpt"
VLM = "qwen2vl_tiny"
COMMON = ["data.augmentation=null", "optim.lr=1e-2", "callbacks=[default,ema]"]
PARTS = "trainer.strategy.sharded_checkpoints=true"
BATCH, STEPS = 8, 4


def job(run_dir, folder, trainer, *overrides, steps=STEPS):
    given = [f"trainer={trainer}", f"vlm.checkpoint={folder}", "vlm.pretrained=true", *COMMON]
    given += [f"trainer.max_steps={steps}", f"data.batch_size={BATCH // (1 if trainer == 'cpu' else 2)}"]
    return {"framework": f"pi0:{VLM}", "run_dir": str(run_dir), "overrides": [*given, *overrides]}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What save_pretrained writes of a small Qwen2-VL with weights that no seed of a run draws."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(1234)
    vlm = build(OmegaConf.create(tiny_models.node("vlm", VLM)), "vlm")
    vlm.model.save_pretrained(folder, max_shard_size="200KB")
    for part in (vlm.tokenizer, vlm.picture_processor):
        part.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def runs(dataset, published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    drawn = job(folder / "drawn", published, "cpu", "vlm.pretrained=false", "vlm.checkpoint=null")
    first = [job(folder / "cpu", published, "cpu"), drawn]
    both = [job(folder / name, published, name) for name in ("fsdp2", "tp")]
    both[1]["overrides"][-1] = f"data.batch_size={BATCH}"  # its processes share their samples
    for more in ([], ["ckpt=last"]):
        steps = STEPS if more else STEPS // 2
        both += [
            job(folder / "resumed", published, "fsdp2", *more, steps=steps),
            job(folder / "resumed_parts", published, "fsdp2", PARTS, *more, steps=steps),
        ]
    together(dataset, folder, [stage(1, first), stage(2, both)])
    return folder


def curve(run_dir):
    error = run_dir / "error0.txt"
    assert not error.exists(), error.read_text()
    return np.array([float(value) for value in losses(run_dir)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "tp", "resumed", "resumed_parts"])
def test_two_processes_train_published_weights_as_one(name, runs):
    ours, theirs = curve(runs / name), curve(runs / "cpu")
    print(name, np.abs(ours - theirs).max(), theirs)
    assert len(theirs) == STEPS
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert np.abs(theirs - curve(runs / "drawn"))[0] > 1e-3  # the weights are those of the folder


def test_a_checkpoint_is_compared_with_weights_that_are_still_in_their_files(published):
    node = tiny_models.node("vlm", VLM, checkpoint=str(published), pretrained=True)
    with unread_weights():
        waiting = build(OmegaConf.create(node), "vlm")
    whole = build(OmegaConf.create(node), "vlm").state_dict()
    fit_state_dict(waiting, whole)  # each process reads its part later
    with pytest.raises(LibrobotError, match=r"1 of another shape: model\.lm_head\.weight"):
        fit_state_dict(waiting, whole | {"model.lm_head.weight": torch.zeros(2, 2)})
