"""The moving average of the weights: its definition, resuming, and who acts with it."""

import pytest
import torch
from small_runs import fit, rows

from librobot.errors import LibrobotError
from librobot.policy import Policy
from librobot.training.callbacks.ema import EMA

LAST = "checkpoints/last.ckpt"
WITH = ["callbacks=[default,ema]"]
EVERY = ["callbacks.checkpoints.keep_every_n_steps=1", "optim.lr=1e-2"]


def load(run_dir, name=LAST):
    return torch.load(run_dir / name, weights_only=True)


def test_the_decay_warms_up_as_in_diffusion_policy():
    ema = EMA(decay=0.9999, power=0.75)
    assert [ema.decay_of(n) for n in (0, 1)] == [0.0, 0.0]
    assert ema.decay_of(2) == pytest.approx(1 - 2**-0.75)
    assert ema.decay_of(10_000) == pytest.approx(0.999)  # the figures of the published code's docstring
    assert ema.decay_of(215_444) == pytest.approx(0.9999, abs=1e-7)
    assert ema.decay_of(10**7) == 0.9999
    assert EMA(decay=0.99, power=None).decay_of(0) == 0.99


@pytest.mark.parametrize(
    ("options", "decays"),
    [
        ([], [0.0, 0.0, 1 - 2**-0.75, 1 - 3**-0.75]),
        (["callbacks.ema.power=null", "callbacks.ema.decay=0.9"], [0.9] * 4),
        (
            ["callbacks.ema.decay=0.5", "callbacks.ema.start_step=2", "callbacks.ema.power=null"],
            [0, 0, 0.5, 0.5],
        ),
        (
            ["callbacks.ema.decay=0.5", "callbacks.ema.every_n_steps=2", "callbacks.ema.power=null"],
            [1, 0.5, 1, 0.5],
        ),
    ],
)
def test_the_average_is_the_definition(options, decays, dataset, tmp_path):
    fit(
        dataset,
        tmp_path / "start",
        *WITH,
        *EVERY,
        "trainer.max_steps=1",
        "callbacks.ema.decay=1",
        "callbacks.ema.power=null",
    )
    expected = {n: w.double() for n, w in load(tmp_path / "start")["average"]["weights"].items()}
    fit(dataset, tmp_path / "run", *WITH, *EVERY, *options, "trainer.max_steps=4")
    for step, decay in enumerate(decays, start=1):
        saved = load(tmp_path / "run", f"checkpoints/step={step:08d}.ckpt")
        for name in expected:
            expected[name] = decay * expected[name] + (1 - decay) * saved["state_dict"][name].double()
            torch.testing.assert_close(
                saved["average"]["weights"][name].double(), expected[name], rtol=1e-5, atol=1e-6
            )


def test_a_resumed_average_goes_on(dataset, tmp_path):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    fit(dataset, straight, *WITH, "trainer.max_steps=4")
    fit(dataset, parts, *WITH, "trainer.max_steps=2")
    fit(dataset, parts, *WITH, "trainer.max_steps=4", "ckpt=last")
    assert rows(parts) == rows(straight)  # validation included, which the average gives
    ours, theirs = load(parts), load(straight)
    assert ours["average"]["updates"] == theirs["average"]["updates"] == 4
    for part in (lambda c: c["state_dict"], lambda c: c["average"]["weights"]):
        assert [
            name for name, value in part(ours).items() if not torch.equal(value, part(theirs)[name])
        ] == []


def test_the_policy_acts_with_the_average_unless_told(dataset, tmp_path):
    fit(dataset, tmp_path, *WITH, *EVERY, "trainer.max_steps=4")
    stored = load(tmp_path)
    averaged, trained = stored["average"]["weights"], stored["state_dict"]
    for weights, expected in ((None, averaged), ("average", averaged), ("trained", trained)):
        policy = Policy.from_checkpoint(tmp_path, "cpu", weights=weights)
        assert all(torch.equal(policy.framework.state_dict()[name], expected[name]) for name in averaged)
    assert any(not torch.equal(averaged[name], trained[name]) for name in averaged)
    fit(dataset, tmp_path / "other", *WITH, "callbacks.ema.policy=trained", "trainer.max_steps=3")
    policy = Policy.from_checkpoint(tmp_path / "other", "cpu").framework.state_dict()
    assert all(
        torch.equal(policy[name], value) for name, value in load(tmp_path / "other")["state_dict"].items()
    )


def test_validation_sees_the_average_and_training_does_not(dataset, tmp_path):
    held = ["callbacks.ema.decay=1", "callbacks.ema.power=null", "trainer.max_steps=6", "data.batch_size=16"]
    options = [*EVERY, "data.val_fraction=0.25"]
    fit(dataset, tmp_path / "ema", *WITH, *options, *held)
    fit(dataset, tmp_path / "plain", *options, "trainer.max_steps=6", "data.batch_size=16")
    ours, plain = rows(tmp_path / "ema"), rows(tmp_path / "plain")
    seen = {row["val/loss"] for row in ours if row["val/loss"]}
    assert len(seen) == 1  # of weights that never move
    assert len({row["val/loss"] for row in plain if row["val/loss"]}) >= 2
    assert [row["train/loss"] for row in ours] == [row["train/loss"] for row in plain]


def test_frozen_parameters_are_not_copied_and_bfloat16_is_averaged_in_float32(dataset, tmp_path):
    fit(
        dataset,
        tmp_path,
        *WITH,
        "framework.freeze=[vlm]",
        "trainer.precision=bf16-true",
        "trainer.max_steps=3",
    )
    stored = load(tmp_path)
    averaged = stored["average"]["weights"]
    assert averaged
    assert not [name for name in averaged if name.startswith("vlm.")]
    assert {value.dtype for value in averaged.values()} == {torch.float32}
    assert {stored["state_dict"][name].dtype for name in averaged} == {torch.bfloat16}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in averaged.values())


def test_bad_options_say_what_is_wanted(dataset, tmp_path):
    with pytest.raises(LibrobotError, match=r"callbacks\.ema.*decay must lie in \[0, 1\], found 2"):
        fit(dataset, tmp_path, *WITH, "callbacks.ema.decay=2")
    fit(dataset, tmp_path, "trainer.max_steps=1")
    with pytest.raises(
        LibrobotError, match=r"no average of the weights; train with callbacks=\[default,ema\]"
    ):
        Policy.from_checkpoint(tmp_path, "cpu", weights="average")
