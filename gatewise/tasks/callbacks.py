"""Callbacks that write checkpoints, interrupt a run and stop it early.

A run is resumed from `last.ckpt`. It is written after each epoch's validation, every `checkpoint_every` updates in
between, and when the run is interrupted. `best.ckpt` is the checkpoint with the best validation score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar

from gatewise.tasks._base import Task
from gatewise.tasks.interruption import Interruption


class InterruptedRun(Exception):  # noqa: N818 (it is not an error)
    """The user stopped the run, and everything up to the current step is saved."""


class Checkpoints(Checkpoint):
    """Write `last.ckpt` and `best.ckpt` at points from which the run can be resumed exactly.

    Args:
        folder: folder to write to.
        monitor: logged metric that selects the best checkpoint.
        lower_is_better: whether the lowest value is best, as for a loss.
        every: updates between two writes within an epoch; None: only at the end of epochs.
        interruption: handler of the signals; None: nothing interrupts the run.
    """

    def __init__(
        self,
        folder: Path,
        monitor: str,
        *,
        lower_is_better: bool = False,
        every: int | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.last = folder / "last.ckpt"
        self.best = folder / "best.ckpt"
        self.monitor = monitor
        self.lower_is_better = lower_is_better
        self.every = every
        self.best_score: float | None = None
        self.best_metrics: dict[str, float] = {}
        self._saved_at = 0
        self._updates_seen = 0
        self._interruption = interruption or Interruption()

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_metrics": self.best_metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]
        self.best_metrics = state_dict["best_metrics"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Task)
        updated = pl_module.updates > self._updates_seen
        self._updates_seen = pl_module.updates
        # Between updates there are gradients that no checkpoint holds. After the last batch of an epoch or of the run,
        # validation comes first, because a run resumed from before it would skip it.
        if not updated or trainer.is_last_batch or trainer.should_stop:
            return
        stop = self._stop_everywhere(trainer)
        if stop or (self.every is not None and pl_module.updates % self.every == 0):
            self._save_last(trainer, pl_module)
        if stop:
            raise InterruptedRun

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        score = metrics[self.monitor]
        if self.best_score is None or is_better(score, self.best_score, self.lower_is_better):
            self.best_score = score
            self.best_metrics = {**metrics, "epoch": trainer.current_epoch}
            trainer.save_checkpoint(self.best)
        self._save_last(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if self._saved_at != pl_module.updates:
            self._save_last(trainer, pl_module)
        if self._stop_everywhere(trainer):
            raise InterruptedRun

    def _save_last(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        self._saved_at = pl_module.updates
        trainer.save_checkpoint(self.last)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        self._updates_seen = self._saved_at = pl_module.updates
        self._interruption.begin_training()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._interruption.end_training()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._interruption.end_training()

    def _stop_everywhere(self, trainer: L.Trainer) -> bool:
        """Return whether any process was asked to stop, because all must stop at the same step."""
        asked = self._interruption.asked is not None
        if trainer.world_size == 1:
            return asked
        return trainer.strategy.reduce_boolean_decision(asked, all=False)


class Stopping(L.Callback):
    """End a run before its epochs are over.

    Args:
        steps: number of weight updates after which the run ends with a validation.
        stop_at: score to beat; the run ends once the validation score is better.
    """

    def __init__(self, steps: int | None = None, stop_at: float | None = None) -> None:
        self.steps = steps
        self.stop_at = stop_at
        self.reached = False

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reached = state_dict["reached"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        trainer.fit_loop.max_epochs = pl_module.total_epochs
        self._stop_where_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_where_due(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if self.stop_at is not None:
            score = trainer.callback_metrics[pl_module.monitor].item()
            self.reached = is_better(score, self.stop_at, pl_module.lower_is_better)
        self._stop_where_due(trainer, pl_module)

    def _stop_where_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if self.reached or (self.steps is not None and pl_module.updates >= self.steps):
            trainer.should_stop = True


def is_better(score: float, other: float, lower_is_better: bool) -> bool:
    """Return whether a score beats another. NaN never does."""
    return score < other if lower_is_better else score > other


class Progress(RichProgressBar):
    """Lightning's progress bar without the version number of the logger."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
