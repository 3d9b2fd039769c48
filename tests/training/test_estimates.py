"""Estimates of memory and time, against what torch's allocator counted and numbers worked out by hand."""

import pytest
import torch
from measured_memory import allocated, configuration
from omegaconf import open_dict
from torch import nn

from librobot.config.compose import compose
from librobot.errors import LibrobotError
from librobot.training.estimates import before
from librobot.training.estimates.chips import CHIPS, chip_of, parse_devices
from librobot.training.estimates.estimate import Estimate, advice, estimate, on_device
from librobot.training.estimates.ledger import Ledger
from librobot.training.estimates.report import warnings_of
from librobot.training.estimates.sharding import shares_of
from librobot.training.estimates.step import StepCost
from librobot.training.estimates.weightless import weightless

ACT = ["framework=act", "framework.width=64", "framework.num_heads=2", "framework.feedforward_width=128"]
ACT += ["framework.num_encoder_layers=1", "framework.num_vae_layers=1", "framework.horizon=16"]
PI0 = ["framework=pi0", "framework.horizon=16", "vlm.hidden_size=64", "vlm.tower.channels=16"]


@pytest.mark.parametrize("overrides", [ACT, PI0], ids=["act", "pi0"])
@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_the_peak_is_what_the_allocator_counts(overrides, precision):
    """Activations dominate: 32 samples beside less than a million parameters."""
    cfg = configuration([*overrides, "data.batch_size=32", f"trainer.precision={precision}"])
    cost = estimate(cfg).cost
    assert cost.activations > 2 * (cost.weights + cost.gradients + cost.optimizer)
    assert cost.peak == pytest.approx(allocated(cfg), rel=0.1)


SEVERAL = [
    "pi0_fast",
    "pi0_fast head=vq",
    "groot_n16",
    "octo",
    "diffusion_policy",
    "smolvla",
    "openvla_oft",
    "helix",
]


@pytest.mark.parametrize(
    "framework", ["rt2", *(pytest.param(name, marks=pytest.mark.slow) for name in SEVERAL)]
)
def test_frameworks_of_every_kind(framework):
    small = ["data.batch_size=2", "framework.horizon=4"]
    if framework == "octo":
        small.append("framework.text_pretrained=true")  # of which an estimate downloads nothing
    cost = estimate(configuration([*f"framework={framework}".split(), *small])).cost
    assert cost.trainable <= cost.parameters
    assert cost.peak > cost.weights + cost.gradients + cost.optimizer
    assert cost.optimizer == pytest.approx(2 * 4 * cost.trainable, rel=0.01)  # AdamW's moments
    assert cost.flops > 6 * cost.batch


@pytest.mark.slow
def test_true_16_bit_weights_are_half_the_size():
    full, half = (
        estimate(configuration([*PI0, "data.batch_size=2", f"trainer.precision={precision}"])).cost
        for precision in ("32-true", "bf16-true")
    )
    for kind in ("gradients", "optimizer"):
        assert getattr(half, kind) == pytest.approx(getattr(full, kind) / 2, rel=0.05)


@pytest.mark.slow
def test_a_published_backbone_is_not_downloaded():
    """PaliGemma 3B at its own size: 2.92e9 parameters of its own, and pi0's expert."""
    options = ["framework=pi0", "vlm=paligemma", "trainer=gpu", "data.batch_size=8"]
    plain, again = (
        estimate(configuration([*options, *more]), parse_devices("h100:8"))
        for more in ([], ["vlm.gradient_checkpointing=true"])
    )
    assert 3.0e9 < plain.cost.parameters < 3.5e9
    assert again.cost.activations < plain.cost.activations / 3
    assert plain.cost.recomputed == 0 < again.cost.recomputed
    # What runs again goes to its end; otherwise the last layer ends with its keys and values.
    assert plain.cost.flops < again.cost.flops < (1 + 1 / 18) * plain.cost.flops
    assert "not read from google/paligemma" in plain.notes[0]


def test_operations_and_memory_of_one_layer():
    with weightless() as mode:
        layer = nn.Linear(512, 256, bias=False)
        mode.strip(layer)
        ledger = Ledger()
        x = mode.without_memory(torch.empty(8, 512))
        with ledger:
            layer(x).sum().backward()
        del x
        assert ledger.flops == 2 * (2 * 8 * 512 * 256)  # forward, and the weight's gradient
        size = 4 * 512 * 256
        assert layer.weight.grad.untyped_storage().nbytes() == size
        assert ledger.live == 2 * size  # the weight and its gradient; x and the output are gone


def test_attention_on_a_cpu_counts():
    q = torch.randn(2, 4, 64, 16)
    with Ledger() as ledger:
        nn.functional.scaled_dot_product_attention(q, q, q)
    assert ledger.flops == 2 * 2 * (2 * 4 * 64 * 64 * 16)


COST = StepCost(
    parameters=10, trainable=10, weights=800, gradients=800, optimizer=1600, activations=4000, batch=0,
    peak=8000, flops=10**12, recomputed=0, block=100,
)  # fmt: skip


@pytest.mark.parametrize(
    ("trainer", "count", "held"),
    [
        ("ddp", 4, (800, 800, 1600, 8000)),
        ("fsdp", 4, (200, 200, 400, 8000 - 2400 + 200)),
        ("fsdp2", 8, (100, 100, 200, 8000 - 2800 + 200)),
        ("hsdp", 8, (200, 200, 400, 8000 - 2400 + 200)),
    ],
)
def test_what_strategies_share_out(trainer, count, held):
    cfg = compose([f"trainer={trainer}", "trainer.precision=32-true"])
    device = on_device(COST, None, count, cfg.trainer, 2, 0.4)
    assert (device.weights, device.gradients, device.optimizer, device.peak) == held
    assert device.shares.known


def test_deepspeed_keeps_a_32_bit_copy_and_may_use_the_host():
    cfg = compose(["trainer=deepspeed_zero2", "+trainer.strategy.offload_optimizer=true"][:1])
    with open_dict(cfg):
        cfg.trainer.strategy.offload_optimizer = True
    device = on_device(COST, None, 4, cfg.trainer, 2, 0.4)
    assert (device.weights, device.gradients) == (400, 100)
    assert device.host == device.optimizer == (1600 + 4 * 10) / 4
    assert not shares_of({"_target_": "some.Other"}, 2).known


def test_devices_are_named_and_checked():
    assert parse_devices("h100:8, a100") == [(CHIPS["h100"], 8), (CHIPS["a100"], 1)]
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    with pytest.raises(LibrobotError, match=r"did you mean 'h100'"):
        parse_devices("h10")
    with pytest.raises(LibrobotError, match=r"h100:0: expected NAME:NUMBER"):
        parse_devices("h100:0")


def test_a_batch_that_does_not_fit_is_said_before_training(monkeypatch):
    cfg = compose([*ACT, "data.batch_size=4"])
    device = on_device(COST, None, 1, cfg.trainer, 4, 0.4)
    found = Estimate(COST, 4, "32-true", 0.4, (device,), ())
    assert device.peak == COST.peak
    assert device.fits
    assert warnings_of(found, cfg) == []
    asked = []

    def estimated(cfg, devices, mfu):
        asked.append(devices)
        return Estimate(COST, 4, "32-true", mfu, (on_device(COST, *devices[0], cfg.trainer, 4, mfu),), ())

    monkeypatch.setattr(before, "estimate", estimated)
    monkeypatch.setattr(before, "host_memory", lambda: 1e-9 * 7000)
    policy = nn.Linear(100, 4)
    with pytest.warns(
        UserWarning, match=r"a step takes 8e-06 GB on each cpu, which has 7e-06 GB; what helps"
    ):
        before.warn_of_misfit(cfg, policy)
    assert advice(cfg, COST)[0] == "data.batch_size=2 trainer.accumulate_grad_batches=2"
    asked.clear()
    before.warn_of_misfit(cfg, nn.Linear(1, 1))  # too small to be worth an estimate
    assert asked == []
