"""How blocks compute changes nothing of what they compute; what a machine lacks is said."""

import pytest
import torch
from small_runs import fit, losses

from librobot.errors import LibrobotError
from librobot.training.callbacks import compute
from librobot.vlms.blocks import Recomputed

WITH = "callbacks=[default,compute]"


@pytest.mark.parametrize("framework", ["act", "pi0"])
def test_recomputed_blocks_give_the_same_run(framework, dataset, tmp_path, monkeypatch):
    made, own = [], compute.recompute
    monkeypatch.setattr(compute, "recompute", lambda blocks: (own(blocks), made.extend(blocks)))
    fit(dataset, tmp_path / "plain", "trainer.max_steps=3", framework=framework)
    before = torch.get_float32_matmul_precision()
    fit(
        dataset,
        tmp_path / "again",
        WITH,
        "callbacks.compute.recompute=true",
        "trainer.max_steps=3",
        framework=framework,
    )
    assert torch.get_float32_matmul_precision() == before
    ours, theirs = ([float(x) for x in losses(tmp_path / name)] for name in ("again", "plain"))
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert len(made) >= 2
    assert all(isinstance(block, Recomputed) for block in made)


def test_the_precision_of_products_is_set_for_the_run(monkeypatch):
    callback, framework = compute.Compute(matmul="high"), object.__new__(compute.Framework)
    before = torch.get_float32_matmul_precision()
    callback.setup(None, framework, "fit")
    assert torch.get_float32_matmul_precision() == "high"
    callback.teardown(None, framework, "fit")
    assert torch.get_float32_matmul_precision() == before


def test_eight_bits_need_a_gpu_that_has_them(dataset, tmp_path, monkeypatch):
    with pytest.raises(
        LibrobotError, match=r"callbacks\.compute\.fp8: .*8\.9 or later.*found a CPU; set it to false"
    ):
        fit(dataset, tmp_path, WITH, "callbacks.compute.fp8=true", "trainer.max_steps=1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(LibrobotError, match=r"found NVIDIA A100 \(8\.0\)"):
        compute.to_fp8([], torch.device("cuda"))
    with pytest.raises(ValueError, match="matmul must be null, highest, high or medium, found 'low'"):
        compute.Compute(matmul="low")
