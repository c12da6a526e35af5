"""Base class of all tasks: the training step, its methods, its optimizers and its random seeds.

A step draws its random numbers (drop path, mixing) from generators that are seeded from the recipe's seed, the epoch,
the batch and the process. Nothing depends on what ran before, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from gatewise.data.module import DataModule
from gatewise.data.randomness import seed_global_streams
from gatewise.errors import Failure
from gatewise.files import write_atomically
from gatewise.methods import LossTerm, Step, StepProcedure
from gatewise.tasks.optim import build_optimizer, build_scheduler, learning_rate_scale, parameter_groups
from gatewise.tasks.recipe import Recipe

Batch = tuple[Tensor, Tensor]


class Task(L.LightningModule, ABC):
    """Training and validation steps for any network. Batches are (inputs, targets).

    Args:
        model: network, with transforms already applied.
        recipe: complete recipe.
        data: data module that the network is trained on.
        description: description to store in checkpoints (plain data), see `gatewise.tasks.trained`.
        loss_terms: terms added to the loss of the task.
        procedure: replacement for the training step; None: one forward, one backward, one update.

    Attributes:
        settings: dataclass of the recipe's `task` section.
        takes: class of data modules whose batches the task accepts.
        monitor: logged metric that selects the best checkpoint.
        lower_is_better: whether the lowest value of the metric is best, as for a loss.
    """

    settings: type[Any]
    takes: type[DataModule]
    monitor: str
    lower_is_better = False

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: Any,
        description: dict[str, Any] | None = None,
        loss_terms: Sequence[LossTerm] = (),
        procedure: StepProcedure | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.data = data
        self.description = description or {}
        self.loss_terms = nn.ModuleList(loss_terms)
        self.procedure = procedure
        self.automatic_optimization = procedure is None
        # Validation uses the averaged weights if there are any; see `ema`.
        self.evaluated: Callable[[], nn.Module] = lambda: self.model

    @abstractmethod
    def task_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the network's outputs, a scalar."""

    @abstractmethod
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics with the outputs of `self.evaluated()`."""

    def prepare(self, batch: Batch) -> Batch:
        """Return a training batch as network input: memory format set, batch augmentation applied."""
        return batch

    def outputs(self, inputs: Tensor) -> Tensor:
        """Return the network's outputs for a batch, for `task_loss` and the loss terms."""
        return self.model(inputs)

    def own_loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the task's loss on a training batch (a scalar) and the network's outputs."""
        outputs = self.outputs(inputs)
        return self.task_loss(outputs, targets), outputs

    def compile_network(self) -> None:
        """Compile what `outputs` calls with torch.compile."""
        self.model.compile()

    # The training step

    @property
    def updates(self) -> int:
        """Number of weight updates so far. All that a step procedure does with a batch counts as one."""
        if self.procedure is None:
            return self.trainer.global_step
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return batches.processed

    @property
    def progress(self) -> float:
        """Fraction of the training that is done."""
        return min(1.0, self.updates / max(1, self.total_updates))

    @property
    def total_updates(self) -> int:
        """Number of weight updates in the whole run."""
        steps = self.recipe.trainer.steps
        return self.recipe.trainer.epochs * self._updates_per_epoch() if steps is None else steps

    @property
    def total_epochs(self) -> int:
        """Number of epochs in the whole run. The last one may be cut short."""
        return -(-self.total_updates // self._updates_per_epoch())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed_generators("step", self.recipe.seed, self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = self.prepare(batch)
        self._batch_in_work = (inputs, targets, batch_idx)
        if self.procedure is None:
            loss, _ = self.loss(inputs, targets)
            self._require_finite(loss)
        else:
            loss, _ = self.procedure.step(self, inputs, targets)
            for scheduler in self._schedulers():
                scheduler.step_update(self._schedule_time(self.updates + 1))
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True, batch_size=len(inputs))
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=len(inputs))
        return loss

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the task's loss and the loss terms (a scalar), and the network's outputs."""
        total, outputs = self.own_loss(inputs, targets)
        terms = [term for term in self.loss_terms if isinstance(term, LossTerm)]
        for term in terms:
            total = total * term.task_weight
        for term in terms:
            total = total + term(Step(inputs, targets, outputs, self.progress))
        return total, outputs

    def update(self, index: int, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Update parameter set `index` once, for step procedures; see `gatewise.methods.Engine`."""
        self._require_finite(loss)
        optimizers = self.optimizers()
        optimizer: Any = optimizers[index] if isinstance(optimizers, list) else optimizers
        optimizer.zero_grad()
        self.manual_backward(loss, retain_graph=retain_graph)
        if self.recipe.trainer.clip_grad is not None:
            self.clip_gradients(optimizer, self.recipe.trainer.clip_grad, gradient_clip_algorithm="norm")
        optimizer.step()

    def _require_finite(self, loss: Tensor) -> None:
        # Reading the value waits for the device once per step: the price of stopping before the weights are lost.
        if torch.isfinite(loss):
            return
        inputs, targets, batch_idx = self._batch_in_work
        rank = f"_rank{self.global_rank}" if self.global_rank else ""
        path = Path(self.trainer.default_root_dir) / f"nan_batch{rank}.pt"
        content = {
            "inputs": inputs.detach().cpu(),
            "targets": targets.detach().cpu(),
            "loss": loss.item(),
            "epoch": self.current_epoch,
            "batch": batch_idx,
            "step": self.updates,
            "seed": self.recipe.seed,
            "state_dict": {f"model.{key}": value.cpu() for key, value in self.model.state_dict().items()},
        }
        write_atomically(path, lambda file: torch.save(content, file))
        raise Failure(
            f"the loss is {loss.item()} at step {self.updates} (epoch {self.current_epoch}, batch {batch_idx}); that "
            f"batch and the weights are in {path}. Try a lower optim.lr, trainer.clip_grad 1, a longer "
            "optim.warmup_epochs, or trainer.precision 32"
        )

    # Optimization

    def configure_optimizers(self) -> Any:
        scale = learning_rate_scale(self.recipe.optim, self._global_batch())
        optimizers = []
        schedulers = []
        for index, parameters in enumerate(self._parameter_sets()):
            named = [*parameters, *(self.loss_terms.named_parameters() if index == 0 else ())]
            groups = parameter_groups(named, self.recipe.optim, self._without_decay())
            optimizer = build_optimizer(self.recipe.optim, groups, scale)
            scheduler = build_scheduler(
                self.recipe.optim, optimizer, self.total_updates, self._updates_per_epoch(), scale
            )
            optimizers.append(optimizer)
            schedulers.append({"scheduler": scheduler, "interval": "step"})
        return optimizers, schedulers

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self._schedule_time(self.updates))

    def _schedule_time(self, updates: int) -> int:
        """Return the schedule's time after a number of updates."""
        return updates - updates % self._updates_per_epoch() if self.recipe.optim.per_epoch else updates

    def _parameter_sets(self) -> Sequence[Any]:
        if self.procedure is None:
            return [list(self.model.named_parameters())]
        return self.procedure.parameter_sets(self.model)

    def _schedulers(self) -> list[Any]:
        return [config.scheduler for config in self.trainer.lr_scheduler_configs]

    def _without_decay(self) -> set[str]:
        names: Any = getattr(self.model, "no_weight_decay", set)
        return set(names())

    def _global_batch(self) -> int:
        return self.data.batch_size * self.trainer.world_size * self.recipe.trainer.accumulate

    def _updates_per_epoch(self) -> int:
        """Return the updates per epoch, counted on the data module: Lightning's count builds the loader too early."""
        if self._cached_updates is None:
            batches = len(self.data.train_dataloader())
            limit = self.recipe.trainer.limit_train_batches
            batches = min(batches, limit) if limit is not None else batches
            self._cached_updates = -(-batches // self.recipe.trainer.accumulate)
        return self._cached_updates

    _cached_updates: int | None = None

    # Several devices

    def configure_model(self) -> None:
        """Shard the network's blocks and then the rest over the devices, under the fsdp strategy."""
        if self.recipe.trainer.strategy != "fsdp":
            return
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None  # the strategy has set it up by now
        mesh = self.device_mesh["data_parallel"]
        for block in _blocks(self.model):
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gatewise"] = self.description
        # Weights of loss terms are stored separately, so that `state_dict` holds only the network. (Not under fsdp:
        # sharded weights are loaded before a hook could merge the two again.)
        if self.recipe.trainer.strategy != "fsdp":
            state = checkpoint["state_dict"]
            checkpoint["state_dict_terms"] = {k: state.pop(k) for k in list(state) if k.startswith("loss_terms.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].update(checkpoint.get("state_dict_terms", {}))


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a network, stage by stage if it has stages (OverLoCK has two series of stages)."""
    yield from getattr(model, "blocks", ())
    for stage in (*getattr(model, "stages", ()), *getattr(model, "focus", ())):
        yield from stage if isinstance(stage, nn.Sequential | nn.ModuleList) else getattr(stage, "blocks", ())


def seed_generators(purpose: str, *key: int) -> None:
    """Seed the generators of random, NumPy and PyTorch, on all devices, from a purpose and these numbers."""
    seed_global_streams(purpose, *key)
    torch.manual_seed(torch.initial_seed())
