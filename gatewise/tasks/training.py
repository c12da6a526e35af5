"""Training from a recipe: build the parts, train with Lightning and write a run folder.

runs/flowers/
    recipe.yaml      the resolved recipe, every field filled in
    best.ckpt        checkpoint with the best validation score; contains all that `gatewise predict` needs
    last.ckpt        checkpoint that `--resume` starts from
    metrics.csv      the log; tensorboard/ has the same for TensorBoard
    summary.json     the result
    samples.jsonl    texts that a language model generated after epochs, if the recipe asks for them
    nan_batch.pt     batch and weights of a loss that was not finite; only after such a loss
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from gatewise.data import data_class
from gatewise.data.module import DataModule
from gatewise.errors import UserError
from gatewise.files import finite_or_null, write_text
from gatewise.tasks._base import Task, seed_generators
from gatewise.tasks.callbacks import Checkpoints, InterruptedRun, Progress, Stopping
from gatewise.tasks.checkpoint import AtomicCheckpointIO
from gatewise.tasks.ema import WeightAverage
from gatewise.tasks.interruption import BEFORE_TRAINING, Interruption
from gatewise.tasks.logs import CsvLog, TensorBoardLog
from gatewise.tasks.reading import parse_recipe
from gatewise.tasks.recipe import Recipe, TrainerRecipe
from gatewise.tasks.run_folder import RunFolder
from gatewise.tasks.schema import arguments_of, task_class
from gatewise.tasks.trained import build_model, describe, methods_of_kind

# Fields that may differ between a run and its resumption: they change where and how fast it runs, not the result. (The
# loaders reject another global batch size themselves.)
_FREE_ON_RESUME = {
    "output",
    "data.batch_size",
    "data.cache_dir",
    "data.num_workers",
    "data.root",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.compile",
    "trainer.deterministic",
    "trainer.progress",
    "trainer.checkpoint_every",
    "trainer.log_every",
}
# Warnings of Lightning and PyTorch about things that are intended here.
_NOISE = (
    r".*isinstance\(treespec, LeafSpec\)",  # inside Lightning
    r".*is smaller than the logging interval",
    r"Found \d+ module\(s\) in eval mode",  # frozen layers
    r"Grad strides do not match bucket view strides",  # depthwise kernels under DDP, one copy per step
)


@dataclass(frozen=True)
class Result:
    """Result of a finished run.

    Attributes:
        folder: run folder.
        best: path of best.ckpt; None if nothing was validated.
        last: path of last.ckpt.
        metrics: validation metrics of the best epoch, and its number under "epoch".
        parameters: number of trained parameters of the network.
        epochs: number of finished epochs.
        steps: number of weight updates.
        seconds: run time of this process; a resumed run counts from its resumption.
        state_bytes: size of the state that the network keeps of a sequence of the data's length; None if the network
            does not report it.
    """

    folder: Path
    best: Path | None
    last: Path
    metrics: dict[str, float]
    parameters: int
    epochs: int
    steps: int
    seconds: float
    state_bytes: int | None = None


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, callbacks: Sequence[L.Callback] = ()
) -> Result:
    """Train a network from a recipe.

    Args:
        recipe: recipe from `load_recipe`.
        resume: resume from the run's `last.ckpt`. The result is bit-identical to that of an uninterrupted run on the
            same machine with the same number of devices (on a GPU with `trainer.deterministic`). A run that was
            stopped before its first checkpoint starts from the beginning.
        overwrite: replace an earlier run in the same folder.
        callbacks: further Lightning callbacks.
    Raises:
        UserError: if the folder already holds a run (without `resume` or `overwrite`) or holds none to resume, or if
            the recipe does not fit the data.
        FolderInUseError: if another process uses the folder.
        Failure: if the loss is not finite or a file cannot be written.
        Interrupted: after a signal. During training the current step is finished and saved first.
    """
    started = time.perf_counter()
    folder = Path(recipe.output)
    with (
        Interruption(BEFORE_TRAINING) as interruption,
        RunFolder(folder, resume=resume, overwrite=overwrite) as run,
    ):
        data = build_data(recipe)
        data.prepare_data()
        data.setup("fit")
        recipe = with_data(recipe, data)
        first_step = 0
        resumed = run.checkpoint is not None
        if run.checkpoint is not None:
            _require_same(recipe, run.checkpoint["gatewise"]["recipe"])
            first_step = run.checkpoint["global_step"]
        seed_generators("initial weights", recipe.seed)
        task = _build_task(recipe, build_model(recipe.without_start() if resumed else recipe), data)
        checkpoints = Checkpoints(
            folder,
            task.monitor,
            lower_is_better=task.lower_is_better,
            every=recipe.trainer.checkpoint_every,
            interruption=interruption,
        )
        with _quiet():
            run.prepare()
            # Lightning reads it again when training begins, so it need not stay in memory.
            run.checkpoint = None
            trainer = _build_trainer(recipe, folder, [*callbacks, checkpoints], first_step)
            if trainer.is_global_zero:
                write_text(folder / "recipe.yaml", recipe.to_yaml())
            _fit(trainer, task, data, checkpoints.last if resumed else None, interruption)
        result = Result(
            folder=folder,
            best=checkpoints.best if checkpoints.best_metrics else None,
            last=checkpoints.last,
            metrics=checkpoints.best_metrics,
            parameters=sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad),
            epochs=trainer.current_epoch,
            steps=task.updates,
            seconds=time.perf_counter() - started,
            state_bytes=_state_bytes(task.model, data),
        )
        if trainer.is_global_zero:
            summary = finite_or_null(asdict(result))
            write_text(folder / "summary.json", json.dumps(summary, indent=2, default=str) + "\n")
    return result


def build_data(recipe: Recipe) -> DataModule:
    """Return the data module of the recipe, without reading any data."""
    source = data_class(recipe.data.name)
    return source(**arguments_of(source, recipe.data.fields))


def with_data(recipe: Recipe, data: DataModule) -> Recipe:
    """Return the recipe with missing model fields filled from the data: classes, channels, vocabulary size.

    Raises:
        UserError: if the recipe contradicts the data. Its vocabulary may be larger, because some sizes are faster.
    """
    told = data.model_fields
    for name, value in told.items():
        given = recipe.model.fields.get(name, value)
        if given < value or (given != value and name != "vocab_size"):
            raise UserError(f"model.{name} is {given}, but the data ({recipe.data.name}) has {value}; leave it out")
    return recipe.with_model_fields(**{name: recipe.model.fields.get(name, value) for name, value in told.items()})


def _build_task(recipe: Recipe, model: nn.Module, data: DataModule) -> Task:
    if recipe.trainer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    terms = [build(model, **fields) for build, fields in methods_of_kind(recipe, "loss term")]
    procedures = [build(model, **fields) for build, fields in methods_of_kind(recipe, "step procedure")]
    kind = task_class(recipe.task.name)
    task: Task = kind(
        model,
        recipe,
        settings=kind.settings(**arguments_of(kind.settings, recipe.task.fields)),
        data=data,
        description=describe(recipe, model, data),
        loss_terms=terms,
        procedure=procedures[0] if procedures else None,
    )
    if recipe.trainer.compile:
        task.compile_network()
    return task


def _state_bytes(model: Any, data: DataModule) -> int | None:
    ask = getattr(model, "state_bytes", None)
    return None if ask is None else ask(data.input_size[0])


def _build_trainer(recipe: Recipe, folder: Path, callbacks: Sequence[L.Callback], first_step: int) -> L.Trainer:
    settings = recipe.trainer
    own: list[L.Callback] = [WeightAverage(settings.ema, settings.ema_warmup)] if settings.ema is not None else []
    if settings.steps is not None or settings.stop_at is not None:
        own.append(Stopping(settings.steps, settings.stop_at))
    if settings.progress:
        own.append(Progress())
    devices, nodes = _devices(settings)
    # A step procedure clips gradients itself, in each of its updates.
    clips = not methods_of_kind(recipe, "step procedure")
    try:
        return L.Trainer(
            default_root_dir=folder,
            accelerator=settings.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=_strategy(settings.strategy, devices, nodes),
            precision="32-true" if settings.precision == "32" else settings.precision,
            # The number of epochs that `steps` takes is known only once this process has its part of the data.
            max_epochs=settings.epochs if settings.steps is None else -1,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip_grad if clips else None,
            sync_batchnorm=settings.sync_batch_norm,
            deterministic=settings.deterministic or None,
            log_every_n_steps=settings.log_every,
            check_val_every_n_epoch=settings.validate_every,
            limit_train_batches=settings.limit_train_batches,
            limit_val_batches=settings.limit_val_batches,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=settings.progress,
            use_distributed_sampler=False,  # the data modules distribute the samples themselves
            plugins=[AtomicCheckpointIO()],
            logger=[
                CsvLog(folder / "metrics.csv", first_step),
                TensorBoardLog(folder, "", "tensorboard", default_hp_metric=False, purge_step=first_step),
            ],
            callbacks=[*own, *callbacks],
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise UserError(f"the recipe's trainer section is refused: {' '.join(str(error).split())}") from error


def _devices(settings: TrainerRecipe) -> tuple[int | str, int]:
    """Return the numbers of processes per machine and of machines; torchrun's if it started this process."""
    if torch.distributed.is_torchelastic_launched():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return per_node, int(os.environ["WORLD_SIZE"]) // per_node
    if settings.devices == "auto" and settings.strategy == "fsdp":
        return max(1, torch.accelerator.device_count()), settings.num_nodes
    return settings.devices, settings.num_nodes


def _strategy(name: str, devices: int | str, nodes: int) -> str | Strategy:
    if name != "fsdp":
        return name
    # FSDP2 with unsharded checkpoints, so that the network can be used without the devices that trained it.
    return ModelParallelStrategy(
        data_parallel_size=int(devices) * nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def _fit(trainer: L.Trainer, task: Task, data: Any, checkpoint: Path | None, interruption: Interruption) -> None:
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except InterruptedRun:
        recipe = Path(trainer.default_root_dir) / "recipe.yaml"
        if trainer.is_global_zero:
            print(f"gatewise: saved; resume with: gatewise train {recipe} --resume", file=sys.stderr)
        raise interruption.error() from None
    except SystemExit:
        # Lightning turns a KeyboardInterrupt into this.
        raise interruption.error() from None


def _require_same(recipe: Recipe, before: Mapping[str, Any]) -> None:
    """Refuse to resume with a recipe that differs in a field that affects the result."""
    now, then = flat(parse_recipe(recipe.to_dict()).to_dict()), flat(parse_recipe(before).to_dict())
    changed = [name for name in sorted({*now, *then} - _FREE_ON_RESUME) if now.get(name) != then.get(name)]
    if changed:
        told = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise UserError(
            f"cannot resume with another recipe: {told}. Restore it, or start a new run from the weights with "
            "--model.checkpoint and another --output"
        )


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one with dotted names."""
    if not isinstance(content, Mapping):
        return {prefix[:-1]: content}
    return {name: value for key, inner in content.items() for name, value in flat(inner, f"{prefix}{key}.").items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's messages about its internals. Warnings that a user can act on stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
