"""Exponential moving average of the weights, which is validated, chosen as best and shipped.

timm's `ModelEmaV3` holds the average. This callback updates it after every weight update, passes it to validation, and
saves it under `state_dict_ema`, beside the weights that training continues with.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from timm.utils.model_ema import ModelEmaV3

from gatewise.errors import CheckpointError
from gatewise.tasks._base import Task

_PREFIX = "model."


class WeightAverage(L.Callback):
    """Keep an average of the parameters and buffers of `task.model`.

    Args:
        decay: fraction of the average that is kept at each update.
        warmup: increase the decay from 0 to `decay` over the first updates.
    """

    def __init__(self, decay: float, warmup: bool = False) -> None:
        self.decay = decay
        self.warmup = warmup
        self._average: ModelEmaV3 | None = None
        self._updates_seen = 0

    @property
    def average(self) -> ModelEmaV3:
        if self._average is None:
            raise RuntimeError("the average exists only once fitting has started")
        return self._average

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self._average is not None:
            return
        self._average = ModelEmaV3(_task(pl_module).model, decay=self.decay, use_warmup=self.warmup)
        _task(pl_module).evaluated = lambda: self.average.module

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average.to(pl_module.device)
        self._updates_seen = _task(pl_module).updates

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        updates = _task(pl_module).updates
        if updates > self._updates_seen:
            self.average.update(_task(pl_module).model, step=updates)
            self._updates_seen = updates

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Running statistics differ between devices, because each sees its own batches. Those of rank 0 are saved.
        if trainer.world_size > 1:
            for buffer in self.average.module.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = self.average.module.state_dict()
        checkpoint["state_dict_ema"] = {_PREFIX + key: value for key, value in state.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if "state_dict_ema" not in checkpoint:
            raise CheckpointError("the checkpoint holds no averaged weights; it was written without trainer.ema")
        state = checkpoint["state_dict_ema"]
        self.average.module.load_state_dict({key.removeprefix(_PREFIX): value for key, value in state.items()})


def _task(module: L.LightningModule) -> Task:
    if not isinstance(module, Task):
        raise TypeError(f"WeightAverage works on a gatewise Task, not {type(module).__name__}")
    return module
