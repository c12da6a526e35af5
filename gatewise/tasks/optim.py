"""Optimizers and learning-rate schedules of timm, built from a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from typing import Any

import timm.optim
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from gatewise.errors import UserError, unknown_name
from gatewise.tasks.recipe import OptimRecipe


def check_optimizer(recipe: OptimRecipe) -> None:
    """Reject an unknown optimizer, or an option that the optimizer does not accept.

    Raises:
        UnknownNameError: if a name is unknown. The message suggests the closest one.
    """
    known = [str(name) for name in timm.optim.list_optimizers()]
    if recipe.name not in known:
        raise unknown_name("optimizer", recipe.name, known)
    parameters = inspect.signature(timm.optim.get_optimizer_class(recipe.name, bind_defaults=False)).parameters
    taken = {"params", "lr", "weight_decay"}
    for option in recipe.options:
        if not isinstance(option, str):
            raise UserError(f"optim.options must have option names as keys, not {option!r}")
        if option in taken or option not in parameters:
            raise unknown_name(f"option of {recipe.name}", option, set(parameters) - taken)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], recipe: OptimRecipe, excluded: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Split parameters into a group with weight decay and one without: biases, one-dimensional and excluded parameters.

    Frozen parameters are in neither group. With `decay_all` in the recipe, every parameter decays.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        without = parameter.ndim <= 1 or name.endswith(".bias") or name in excluded
        (plain if without and not recipe.decay_all else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(recipe: OptimRecipe, groups: list[dict[str, Any]], scale: float = 1.0) -> Optimizer:
    """Return the recipe's optimizer for these parameter groups, with learning rates multiplied by `scale`.

    Raises:
        UserError: if nothing is left to train, or the optimizer refuses a value.
    """
    if not groups:
        raise UserError("there is nothing to train: every parameter is frozen")
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in recipe.options.items()
    }
    try:
        return timm.optim.create_optimizer_v2(groups, opt=recipe.name, lr=recipe.lr * scale, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{recipe.name} refuses the recipe's optim.options {recipe.options}: {error}") from error


def build_scheduler(
    recipe: OptimRecipe, optimizer: Optimizer, updates: int, updates_per_epoch: int, scale: float = 1.0
) -> Scheduler:
    """Return the learning-rate schedule for a run of `updates` updates, advanced by `scheduler.step_update(done)`."""
    warmup = recipe.warmup_steps
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.schedule,
        num_epochs=updates,
        decay_epochs=recipe.decay_epochs * updates_per_epoch,
        decay_rate=recipe.decay_rate,
        min_lr=recipe.min_lr * scale,
        warmup_lr=recipe.warmup_lr * scale,
        # May be a fraction of an epoch, which timm's annotation does not allow.
        warmup_epochs=recipe.warmup_epochs * updates_per_epoch if warmup is None else warmup,  # type: ignore[arg-type]
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


def learning_rate_scale(recipe: OptimRecipe, global_batch: int) -> float:
    """Return the factor on the recipe's learning rates for updates of `global_batch` samples."""
    return global_batch / recipe.reference_batch if recipe.reference_batch else 1.0
