"""Lightning's trainer on our loaders: stopped anywhere and resumed, it sees what an uninterrupted run sees."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from gatewise.data.images.digits import Digits

EPOCHS, STEPS_PER_EPOCH = 2, 3


class Recorder(L.LightningModule):
    """One weight; writes down every batch that it is trained on, and how many images it validates with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, bytes]] = []
        self.validated = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append((self.current_epoch, images.numpy().tobytes() + labels.numpy().tobytes()))
        return self.weight * images.mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated += len(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InterruptionError(Exception):
    """Stands for whatever ends a run."""


class Interrupt(Callback):
    """Ends the run once the next batch after `step` has been fetched."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            raise InterruptionError


def data(workers: int) -> Digits:
    return Digits(batch_size=400, num_workers=workers)


def run(folder: Path, workers: int, *callbacks: Callback, resume: Path | None = None) -> Recorder:
    recorder = Recorder()
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
    )
    with suppress(InterruptionError):
        trainer.fit(recorder, data(workers), ckpt_path=resume)
    return recorder


@pytest.fixture(scope="module", params=[0, 2])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Recorder]:
    return request.param, run(tmp_path_factory.mktemp("whole"), request.param)


def test_a_run_trains_on_every_batch_and_validates_on_every_image(uninterrupted):
    workers, whole = uninterrupted
    module = data(workers)
    module.setup()
    assert len(whole.seen) == EPOCHS * STEPS_PER_EPOCH
    assert len(set(whole.seen)) == len(whole.seen)
    sanity_check = len(module.parts.val)
    assert whole.validated == EPOCHS * len(module.parts.val) + sanity_check


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_run_stopped_after_a_step_continues_with_the_next_batch(uninterrupted, tmp_path, step):
    workers, whole = uninterrupted
    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = run(tmp_path, workers, every_step, Interrupt(step))
    resumed = run(tmp_path, workers, resume=tmp_path / f"step={step}.ckpt")
    assert first.seen == whole.seen[:step]
    assert resumed.seen == whole.seen[step:]
    assert torch.equal(resumed.weight, whole.weight)


def test_a_run_stopped_between_epochs_continues_with_the_next_epoch(uninterrupted, tmp_path):
    workers, whole = uninterrupted
    every_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    run(tmp_path, workers, every_epoch, Interrupt(STEPS_PER_EPOCH + 2))
    resumed = run(tmp_path, workers, resume=tmp_path / "epoch=0.ckpt")
    assert resumed.seen == whole.seen[STEPS_PER_EPOCH:]
    assert torch.equal(resumed.weight, whole.weight)


TWO_PROCESSES = """
import sys
import lightning as L, torch
from gatewise.data.images.digits import Digits

class Count(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("buffer", torch.zeros(()))  # which makes the wrapper communicate in evaluation too
        self.trained, self.validated = [], []

    def training_step(self, batch, _):
        self.trained.append(batch[1].tolist())
        return self.weight * batch[0].mean()

    def validation_step(self, batch, _):
        self.validated += batch[1].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

module = Count()
trainer = L.Trainer(
    max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, Digits(batch_size=200, eval_batch_size=32, num_workers=0))
torch.save((module.trained, module.validated), f"{sys.argv[1]}/{trainer.global_rank}.pt")
"""


def test_lightning_leaves_the_order_of_two_processes_alone(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    subprocess.run(
        [sys.executable, script, tmp_path],
        check=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
    )
    (trained, validated), (trained_too, validated_too) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    module = data(0)
    module.setup()
    together = [first + second for first, second in zip(trained, trained_too, strict=True)]
    assert together == [labels.tolist() for _, labels in module.train_dataloader()]
    assert sorted(validated + validated_too) == sorted(module.parts.val.labels.tolist())
