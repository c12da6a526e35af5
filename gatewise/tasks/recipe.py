"""Recipes: everything that defines a training run, in one YAML file.

A recipe names a task, a network, data, methods, an optimizer and a trainer. In sections that choose by name (task,
model, data, each method), the other keys are fields of the chosen thing:

    task: {name: classification, label_smoothing: 0.1}
    model: {name: focalnet_tiny_srf, drop_path_rate: 0.2}     # num_classes, in_chans, vocab_size: the data's if absent
    data: {name: image_folder, root: flowers, batch_size: 64}
    methods: [{name: freeze_batch_norm}]
    optim: {name: adamw, lr: 1e-3, weight_decay: 0.05, warmup_epochs: 5}
    trainer: {epochs: 30, precision: bf16-mixed, ema: 0.9999}
    seed: 0
    output: runs/flowers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from gatewise.errors import UserError


def _require(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{name} must be {rule}, not {value!r}")


@dataclass(frozen=True)
class Part:
    """Section that chooses by name, with the fields of what it chooses."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.fields}


@dataclass(frozen=True)
class ModelPart(Part):
    """Registered network to train.

    Args:
        fields: fields of the network's configuration.
        pretrained: start from the published weights, with a new head if the classes differ.
        checkpoint: weights to start from instead (path, URL or hub id).
        replace_head: keep a new head if the classes of the checkpoint differ.
    """

    pretrained: bool = False
    checkpoint: str | None = None
    replace_head: bool = False

    def __post_init__(self) -> None:
        if self.pretrained and self.checkpoint is not None:
            raise UserError("model.pretrained and model.checkpoint both give the initial weights; leave one out")

    def to_dict(self) -> dict[str, Any]:
        own = {"pretrained": self.pretrained, "checkpoint": self.checkpoint, "replace_head": self.replace_head}
        return {"name": self.name, **own, **self.fields}


@dataclass(frozen=True)
class OptimRecipe:
    """Optimizer and learning-rate schedule. One update is one step of the optimizer.

    Args:
        name: timm optimizer, such as adamw, lamb, sgd or rmsproptf.
        lr: peak learning rate.
        reference_batch: global batch size that `lr`, `warmup_lr` and `min_lr` are stated for. They are scaled in
            proportion to the actual batch size. None: no scaling.
        weight_decay: weight decay. Biases, one-dimensional parameters and those that the network excludes get none.
        decay_all: apply weight decay to every parameter.
        options: further arguments of the optimizer, such as betas, eps or momentum.
        schedule: learning-rate schedule after the warm-up, advanced at every update.
        per_epoch: advance the schedule only between epochs.
        warmup_epochs: epochs of linear warm-up; they are part of the epochs of the run.
        warmup_steps: updates of linear warm-up, instead of `warmup_epochs`.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: final learning rate of the cosine and poly schedules.
        decay_epochs: epochs between two multiplications by `decay_rate` in the step schedule.
        decay_rate: factor of the step schedule, or power of the poly schedule.
    """

    name: str = "adamw"
    lr: float = 1e-3
    reference_batch: int | None = None
    weight_decay: float = 0.05
    decay_all: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    schedule: Literal["cosine", "step", "poly", "constant"] = "cosine"
    per_epoch: bool = False
    warmup_epochs: float = 0.0
    warmup_steps: int | None = None
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    decay_epochs: float = 30.0
    decay_rate: float = 0.1

    def __post_init__(self) -> None:
        _require("optim.lr", self.lr, self.lr > 0, "positive")
        for name in ("weight_decay", "warmup_epochs", "warmup_lr", "min_lr"):
            _require(f"optim.{name}", getattr(self, name), getattr(self, name) >= 0, "at least 0")
        _require("optim.decay_epochs", self.decay_epochs, self.decay_epochs > 0, "positive")
        if self.reference_batch is not None:
            _require("optim.reference_batch", self.reference_batch, self.reference_batch > 0, "positive")
        if self.warmup_steps is not None:
            _require("optim.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
            if self.warmup_epochs:
                raise UserError("optim.warmup_epochs and optim.warmup_steps both set the warm-up; leave one out")


@dataclass(frozen=True)
class TrainerRecipe:
    """Length, precision, devices and logging of a run.

    Args:
        epochs: number of passes over the training data.
        steps: number of weight updates after which the run ends with a validation, instead of `epochs`.
        stop_at: score at which the run ends early: it stops once the monitored validation score is better.
        precision: precision of the arithmetic; parameters stay in float32.
        accumulate: number of batches per update (gradient accumulation).
        clip_grad: maximum gradient norm; None: no clipping.
        ema: decay per update of an exponential moving average of the weights. Validation and the choice of the best
            checkpoint then use the average. None: no average.
        ema_warmup: increase the decay to `ema` over the first updates; short runs need this.
        compile: compile the network with torch.compile.
        channels_last: keep images and feature maps in channels-last memory order.
        accelerator: kind of device to run on.
        devices: number of devices (processes) per machine; under torchrun, the number that it started.
        num_nodes: number of machines.
        strategy: how devices share the work. ddp keeps the whole network on each device; fsdp shards parameters,
            gradients and optimizer state.
        sync_batch_norm: compute batch norm statistics over the batches of all devices.
        deterministic: use only deterministic kernels. On a GPU, a resumed run is bit-identical only with this.
        checkpoint_every: updates between two writes of last.ckpt within an epoch; None: only at the end of epochs.
        log_every: updates between two log entries.
        validate_every: epochs between two validations.
        limit_train_batches: maximum number of training batches per epoch, to try a recipe out.
        limit_val_batches: maximum number of validation batches.
        progress: show a progress bar.
    """

    epochs: int = 10
    steps: int | None = None
    stop_at: float | None = None
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    accumulate: int = 1
    clip_grad: float | None = None
    ema: float | None = None
    ema_warmup: bool = False
    compile: bool = False
    channels_last: bool = False
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    sync_batch_norm: bool = False
    deterministic: bool = False
    checkpoint_every: int | None = None
    log_every: int = 10
    validate_every: int = 1
    limit_train_batches: int | None = None
    limit_val_batches: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "num_nodes", "log_every", "validate_every"):
            _require(f"trainer.{name}", getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("steps", "checkpoint_every", "limit_train_batches", "limit_val_batches"):
            value = getattr(self, name)
            _require(f"trainer.{name}", value, value is None or value >= 1, "at least 1")
        _require("trainer.devices", self.devices, self.devices == "auto" or self.devices >= 1, "at least 1")
        _require("trainer.clip_grad", self.clip_grad, self.clip_grad is None or self.clip_grad > 0, "positive")
        _require("trainer.ema", self.ema, self.ema is None or 0 <= self.ema < 1, "from 0 to below 1")
        if self.ema is not None and self.strategy == "fsdp":
            raise UserError(
                "trainer.ema needs the whole network on each device: use trainer.strategy ddp or leave ema out"
            )


@dataclass(frozen=True)
class Recipe:
    """Complete, validated recipe: every field has a value, defaults included."""

    model: ModelPart
    data: Part
    task: Part = Part("classification")
    methods: Sequence[Part] = ()
    optim: OptimRecipe = OptimRecipe()
    trainer: TrainerRecipe = TrainerRecipe()
    seed: int = 0
    output: str = "runs/run"

    def __post_init__(self) -> None:
        _require("seed", self.seed, self.seed >= 0, "at least 0")
        _require("output", self.output, bool(self.output) and "\0" not in self.output, "the name of a folder")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, which `parse_recipe` reads back."""
        return plain(
            {
                "task": self.task.to_dict(),
                "model": self.model.to_dict(),
                "data": self.data.to_dict(),
                "methods": [method.to_dict() for method in self.methods],
                "optim": asdict(self.optim),
                "trainer": asdict(self.trainer),
                "seed": self.seed,
                "output": self.output,
            }
        )

    def to_yaml(self) -> str:
        """Return the recipe as a YAML document."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def with_model_fields(self, **fields: Any) -> Recipe:
        """Return the recipe with these fields of the model set."""
        return replace(self, model=replace(self.model, fields={**self.model.fields, **fields}))

    def without_start(self) -> Recipe:
        """Return the recipe without its initial weights, for callers that already have later ones."""
        return replace(self, model=replace(self.model, pretrained=False, checkpoint=None))


def plain(value: Any) -> Any:
    """Convert nested mappings and sequences to dictionaries and lists of numbers, strings and None (paths: strings)."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def deep_set(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `content["a"]["b"]` for the name "a.b", creating missing sections."""
    *sections, last = dotted.split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"cannot set {dotted}: the recipe's {section} is {inner!r}, not a section")
        content = inner
    content[last] = value
