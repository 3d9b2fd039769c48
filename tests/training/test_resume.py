"""Training goes on where it stopped, with the losses and weights of a run that never did."""

import pytest
import torch
from small_runs import FRAMES, fit, losses, rows

from librobot.errors import LibrobotError

LAST = "checkpoints/last.ckpt"
# Batch sizes: the stop after two steps lies in the middle of an epoch; and the resumed run crosses into the
# next one; the stop lies at an epoch's end.
MIDDLE, ACROSS, END = 4, FRAMES // 3, FRAMES // 2


def tensors(run_dir):
    """Weights and the optimiser's moments of the last checkpoint."""
    checkpoint = torch.load(run_dir / LAST, weights_only=True)
    moments = checkpoint["optimizer_states"][0]["state"]
    found = {f"{index}.{name}": value for index, own in moments.items() for name, value in own.items()}
    return checkpoint["state_dict"] | found


@pytest.mark.parametrize("batch_size", [MIDDLE, ACROSS, END])
@pytest.mark.parametrize("framework", ["act", "pi0"])
def test_two_steps_and_two_more_are_four(framework, batch_size, dataset, tmp_path):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    overrides = [f"data.batch_size={batch_size}"]
    fit(dataset, straight, *overrides, "trainer.max_steps=4", framework=framework)
    fit(dataset, parts, *overrides, "trainer.max_steps=2", framework=framework)
    assert torch.load(parts / LAST, weights_only=True)["global_step"] == 2
    final = fit(dataset, parts, *overrides, "trainer.max_steps=4", "ckpt=last", framework=framework)
    assert final["step"] == 4
    assert len(set(losses(straight))) == 4
    assert rows(parts) == rows(straight)
    ours, theirs = tensors(parts), tensors(straight)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_seed_decides_the_loss_curve(dataset, tmp_path):
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        fit(dataset, tmp_path / name, f"seed={seed}", "trainer.max_steps=3")
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
    assert not set(losses(tmp_path / "first")) & set(losses(tmp_path / "other"))


def test_a_checkpoint_that_does_not_fit_names_its_tensors(dataset, tmp_path):
    first, other = tmp_path / "first", tmp_path / "other"
    fit(dataset, first, "trainer.max_steps=1")
    with pytest.raises(LibrobotError, match=r"of another shape: .*model \(16.*checkpoint \(32") as caught:
        fit(dataset, other, "framework.width=16", f"ckpt={first}")
    assert f"{first / LAST}: " in str(caught.value)
    with pytest.raises(LibrobotError, match=r"missing: .*unexpected: "):
        fit(dataset, other, f"ckpt={first}", framework="pi0")
    assert not (other / LAST).exists()


def test_a_file_that_is_no_checkpoint_says_so(dataset, tmp_path):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(LibrobotError, match=r"broken\.ckpt: expected a checkpoint of librobot"):
        fit(dataset, tmp_path / "run", f"ckpt={broken}")
