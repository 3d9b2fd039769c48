from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from librobot.data.augment import ImageAugmentation
from librobot.data.datamodule import DataModule
from librobot.data.sources.lerobot import LeRobotSource
from librobot.errors import LibrobotError
from librobot.types import Batch


class Recorder(lightning.LightningModule):
    """Notes which rows and pixels each step saw, and in which stage."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.interrupt_at = interrupt_at
        self.steps: list[tuple[list[int], int]] = []
        self.validated: list[tuple[list[int], int]] = []

    def _note(self, batch: Batch) -> tuple[list[int], int]:
        front = batch.observation.images["front"].long()
        return batch.extra["rows"].tolist(), int((front * torch.arange(front.shape[-1])).sum())

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.interrupt_at is not None and len(self.steps) == self.interrupt_at:
            raise RuntimeError("interrupted")
        self.steps.append(self._note(batch))
        return self.layer(batch.observation.state[:, 0]).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(self._note(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def trainer(folder: Path, callbacks: list[Any] | None = None, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=callbacks is not None,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"num_sanity_val_steps": 0, **options},
    )


def data(source: Any, **options: Any) -> DataModule:
    module = DataModule(source, **{"batch_size": 3, "seed": 5, **options})
    module.configure(horizon=2)
    return module


@pytest.fixture
def straight(array_source: Callable, tmp_path: Path) -> list[tuple[list[int], int]]:
    """Twelve uninterrupted steps of five batches an epoch."""
    model = Recorder()
    module = data(array_source([6, 4, 7]), augmentation=ImageAugmentation())
    trainer(tmp_path, max_steps=12).fit(model, datamodule=module)
    return model.steps


@pytest.mark.parametrize("first", [1, 2, 5, 7, 10])
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("limits", [{}, {"max_epochs": 20}])
def test_resuming_gives_the_batches_of_the_uninterrupted_run(
    array_source: Callable,
    tmp_path: Path,
    straight: list[tuple[list[int], int]],
    first: int,
    num_workers: int,
    limits: dict[str, int],
) -> None:
    """Stopped by max_steps: mid-epoch (1, 2, 7) and at an epoch's end (5, 10). Pixels are augmented
    equally."""
    if num_workers and (first not in (2, 5) or limits):
        pytest.skip("workers are tried on two positions")
    source = array_source([6, 4, 7])
    options = {"augmentation": ImageAugmentation(), "num_workers": num_workers}
    start = trainer(tmp_path, max_steps=first, **limits)
    start.fit(Recorder(), datamodule=data(source, **options))
    start.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed = Recorder()
    trainer(tmp_path, max_steps=12, **limits).fit(
        resumed, datamodule=data(source, **options), ckpt_path=tmp_path / "last.ckpt"
    )
    assert resumed.steps == straight[first:]


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 3), (1, 2)])
def test_resuming_with_another_number_of_workers(
    array_source: Callable,
    tmp_path: Path,
    straight: list[tuple[list[int], int]],
    before: int,
    after: int,
) -> None:
    source = array_source([6, 4, 7])
    start = trainer(tmp_path, max_steps=3)
    start.fit(Recorder(), datamodule=data(source, augmentation=ImageAugmentation(), num_workers=before))
    start.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Recorder()
    trainer(tmp_path, max_steps=7).fit(
        resumed,
        datamodule=data(source, augmentation=ImageAugmentation(), num_workers=after),
        ckpt_path=tmp_path / "last.ckpt",
    )
    assert resumed.steps == straight[3:7]


class KilledWorker(Recorder):
    """Kills a data worker when it has made some steps."""

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if len(self.steps) == 2:
            worker = multiprocessing.active_children()[0]
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def test_a_killed_worker_stops_the_run_which_goes_on_exactly(
    array_source: Callable, tmp_path: Path, straight: list[tuple[list[int], int]]
) -> None:
    source = array_source([6, 4, 7])
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = trainer(tmp_path, [saving], max_steps=12)
    model = KilledWorker()
    with pytest.raises(RuntimeError, match=r"(?i)worker.*(killed|exited)"):
        first.fit(
            model, datamodule=data(source, augmentation=ImageAugmentation(), num_workers=1, prefetch_factor=1)
        )
    done = len(model.steps)
    assert model.steps == straight[:done]
    assert 2 <= done < 12
    resumed = Recorder()
    trainer(tmp_path, max_steps=12).fit(
        resumed,
        datamodule=data(source, augmentation=ImageAugmentation()),
        ckpt_path=tmp_path / f"step={first.global_step}.ckpt",
    )
    assert resumed.steps == straight[first.global_step :]


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_both_loaders_say_that_a_worker_was_lost_while_it_handed_over(
    array_source: Callable, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    def lost(self: Any) -> Iterator[Batch]:
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    monkeypatch.setattr(DataLoader, "__iter__", lost)
    module = data(array_source([6, 4, 7, 5]), val_fraction=0.5)
    with pytest.raises(RuntimeError, match=r"worker exited or was killed.* lower data\.num_workers"):
        next(iter(getattr(module, loader)()))


@pytest.mark.parametrize("step", [2, 5, 7])
def test_resuming_from_a_checkpoint_taken_during_training(
    array_source: Callable, tmp_path: Path, straight: list[tuple[list[int], int]], step: int
) -> None:
    source = array_source([6, 4, 7])
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = trainer(tmp_path, [saving], max_steps=9)
    first.fit(Recorder(), datamodule=data(source, augmentation=ImageAugmentation()))
    resumed = Recorder()
    trainer(tmp_path, max_steps=12).fit(
        resumed,
        datamodule=data(source, augmentation=ImageAugmentation()),
        ckpt_path=tmp_path / f"step={step}.ckpt",
    )
    assert resumed.steps == straight[step:]


def test_resuming_repeats_a_step_that_was_interrupted(
    array_source: Callable, tmp_path: Path, straight: list[tuple[list[int], int]]
) -> None:
    source = array_source([6, 4, 7])
    first = trainer(tmp_path, max_steps=12)
    with pytest.raises(RuntimeError, match="interrupted"):
        first.fit(Recorder(interrupt_at=3), datamodule=data(source, augmentation=ImageAugmentation()))
    first.save_checkpoint(tmp_path / "interrupted.ckpt")
    resumed = Recorder()
    trainer(tmp_path, max_steps=12).fit(
        resumed,
        datamodule=data(source, augmentation=ImageAugmentation()),
        ckpt_path=tmp_path / "interrupted.ckpt",
    )
    assert resumed.steps == straight[3:]


def test_resuming_after_epochs_that_a_limit_cut_short(array_source: Callable, tmp_path: Path) -> None:
    source = array_source([6, 4, 7])
    whole, resumed = Recorder(), Recorder()
    limits = {"limit_train_batches": 2, "max_epochs": -1}
    trainer(tmp_path, max_steps=7, **limits).fit(whole, datamodule=data(source))
    first = trainer(tmp_path, max_steps=4, **limits)
    first.fit(Recorder(), datamodule=data(source))
    first.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, max_steps=7, **limits).fit(
        resumed, datamodule=data(source), ckpt_path=tmp_path / "last.ckpt"
    )
    assert resumed.steps == whole.steps[4:]


def test_no_warning_that_the_loader_cannot_resume(
    array_source: Callable, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    source = array_source([6, 4, 7])
    first = trainer(tmp_path, max_steps=2)
    first.fit(Recorder(), datamodule=data(source))
    first.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, max_steps=3).fit(Recorder(), datamodule=data(source), ckpt_path=tmp_path / "last.ckpt")
    assert not [str(w.message) for w in recwarn if "resumable" in str(w.message)]


def test_augmentation_is_for_training_only(array_source: Callable, tmp_path: Path) -> None:
    source = array_source([6, 4, 7, 5])
    module = data(source, val_fraction=0.25, augmentation=ImageAugmentation(brightness=0.9))
    model = Recorder()
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=1).fit(model, datamodule=module)
    weights = np.arange(48).sum() * 3 * 32

    def plain(rows: list[int]) -> int:
        return int(sum(rows) * weights)

    assert model.validated
    assert all(pixels == plain(rows) for rows, pixels in model.validated)
    assert all(pixels != plain(rows) for rows, pixels in model.steps)
    predictions = trainer(tmp_path).predict(PredictsPixels(), dataloaders=module.val_dataloader())
    assert predictions is not None
    assert all(pixels == plain(rows) for rows, pixels in predictions)


class PredictsPixels(Recorder):
    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[list[int], int]:
        return self._note(batch)


def test_validation_episodes_are_never_trained_on(array_source: Callable, tmp_path: Path) -> None:
    source = array_source([6, 4, 7, 5])
    module = data(source, val_fraction=0.3)
    train, held_out = module.split()
    assert sorted([*train, *held_out]) == [0, 1, 2, 3]
    assert len(held_out) == 1
    model = Recorder()
    trainer(tmp_path, max_epochs=2).fit(model, datamodule=module)
    owner = np.repeat(np.arange(4), source.episode_lengths)
    trained = {row for rows, _ in model.steps for row in rows}
    validated = [row for rows, _ in model.validated for row in rows]
    assert set(owner[list(trained)]) <= set(train)
    assert sorted(validated) == sorted(np.flatnonzero(np.isin(owner, held_out)).tolist() * 2)


def test_a_factory_is_called_with_the_common_options(image_dataset: Path) -> None:
    from functools import partial

    module = DataModule(
        partial(LeRobotSource, image_dataset), cameras=["wrist"], image_size=[16, 16], batch_size=4
    )
    module.configure(horizon=3, obs_steps=2)
    batch = next(iter(module.train_dataloader()))
    assert {name: tuple(image.shape) for name, image in batch.observation.images.items()} == {
        "wrist": (4, 2, 3, 16, 16)
    }
    assert module.spec.camera_names == ("wrist",)
    assert set(module.statistics) == {"state", "action"}


def test_workers_read_video(video_dataset: Path) -> None:
    """Decoders of the parent are not shared with forked workers."""
    plain, workers = (
        data(LeRobotSource(video_dataset), num_workers=num, batch_size=8, drop_last=False) for num in (0, 2)
    )
    expected, found = list(plain.train_dataloader()), list(workers.train_dataloader())
    assert len(expected) == len(found) == 3
    for a, b in zip(expected, found, strict=True):
        assert a.extra["rows"].tolist() == b.extra["rows"].tolist()
        torch.testing.assert_close(a.observation.images, b.observation.images)


def test_too_large_a_batch(array_source: Callable) -> None:
    with pytest.raises(LibrobotError, match="hold 10 samples, fewer than one batch of 16"):
        data(array_source([6, 4]), batch_size=16).train_dataloader()
    assert len(data(array_source([6, 4]), batch_size=16, drop_last=False).train_dataloader()) == 1


def test_it_has_to_be_configured(array_source: Callable) -> None:
    with pytest.raises(LibrobotError, match="configure"):
        DataModule(array_source([3])).train_dataloader()


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"val_fraction": 1.0}, {"num_workers": -1}, {"cache": "memmap"}]
)
def test_bad_arguments(array_source: Callable, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        DataModule(array_source([3]), **wrong)
