"""Recipes: what to train on what and how, in one YAML file.

A recipe names a task, a network, data, methods, an optimizer and a trainer. Where something is chosen by name (task,
model, data, each method) the other keys of its section are fields of what was named:

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
    """Something chosen by name, with the fields that are its own."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.fields}


@dataclass(frozen=True)
class ModelPart(Part):
    """A registered network.

    Args:
        fields: fields of its configuration.
        pretrained: start from the published weights, with a fresh head for other classes.
        checkpoint: or from these: a path, URL or hub id.
        replace_head: leave the head fresh where the checkpoint has other classes.
    """

    pretrained: bool = False
    checkpoint: str | None = None
    replace_head: bool = False

    def __post_init__(self) -> None:
        if self.pretrained and self.checkpoint is not None:
            raise UserError("model.pretrained and model.checkpoint both say what to start from; leave one out")

    def to_dict(self) -> dict[str, Any]:
        own = {"pretrained": self.pretrained, "checkpoint": self.checkpoint, "replace_head": self.replace_head}
        return {"name": self.name, **own, **self.fields}


@dataclass(frozen=True)
class OptimRecipe:
    """The optimizer and how its learning rate moves; one update is one step of the optimizer.

    Args:
        name: an optimizer of timm: adamw, lamb, sgd, rmsproptf, ...
        lr: the peak learning rate.
        reference_batch: the global batch that `lr`, `warmup_lr` and `min_lr` are stated for; they are scaled in
            proportion to the batch that is used. None: they are used as they are.
        weight_decay: applied to no bias and no one-dimensional parameter, nor to what the network excludes.
        decay_all: apply it to every parameter.
        options: further arguments of the optimizer, such as betas, eps, momentum.
        schedule: how the rate moves after the warm-up, update by update.
        per_epoch: keep the rate within an epoch; the schedule moves between epochs only.
        warmup_epochs: epochs of linear warm-up, counted in the run's epochs.
        warmup_steps: the same in updates, instead of `warmup_epochs`.
        warmup_lr: the rate at which warm-up begins.
        min_lr: where cosine and poly end.
        decay_epochs: step: the rate is multiplied by `decay_rate` each time that many epochs have passed.
        decay_rate: step: the factor; poly: the power.
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
                raise UserError("optim.warmup_epochs and optim.warmup_steps both say how long; leave one out")


@dataclass(frozen=True)
class TrainerRecipe:
    """How the run is carried out.

    Args:
        epochs: passes over the training data.
        steps: updates of the weights after which the run ends, with a validation, instead of `epochs`.
        stop_at: end the run when the score that chooses the best checkpoint gets better than this.
        precision: of the arithmetic; parameters stay in float32.
        accumulate: batches per update.
        clip_grad: the largest norm of the gradient; None: not limited.
        ema: decay per update of an exponential moving average of the weights, which is then what is validated and
            chosen as best; None: no average.
        ema_warmup: let the decay grow towards `ema` over the first updates; short runs need it.
        compile: compile the network with torch.compile.
        channels_last: keep images and feature maps in channels-last memory order.
        accelerator: the kind of device.
        devices: devices (processes) per machine; under torchrun what it started.
        num_nodes: machines.
        strategy: ddp holds the network on each device, fsdp shards parameters, gradients and optimizer state.
        sync_batch_norm: batch norms use the statistics of all devices' batches.
        deterministic: only deterministic kernels; on a GPU a resumed run is bit-identical only with it.
        checkpoint_every: updates between two writes of last.ckpt within an epoch; None: at the end of epochs only.
        log_every: updates between two log entries.
        validate_every: epochs between two validations.
        limit_train_batches: stop each epoch after that many batches (to try a recipe out).
        limit_val_batches: likewise for validation.
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
            raise UserError("trainer.ema needs whole weights on each device: choose trainer.strategy ddp, or no ema")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, validated: every field has its value, defaults included."""

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
        """The recipe as plain data, which `parse_recipe` reads back."""
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
        """The recipe as a YAML document."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def with_model_fields(self, **fields: Any) -> Recipe:
        """The recipe with these fields of the model set."""
        return replace(self, model=replace(self.model, fields={**self.model.fields, **fields}))

    def without_start(self) -> Recipe:
        """The recipe without the weights that training starts from: whoever uses this has later ones."""
        return replace(self, model=replace(self.model, pretrained=False, checkpoint=None))


def plain(value: Any) -> Any:
    """Nested mappings and sequences as dictionaries and lists of numbers, texts and nulls (paths become texts)."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def deep_set(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `content["a"]["b"]` for the name "a.b", making sections that are not there yet."""
    *sections, last = dotted.split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"cannot set {dotted}: the recipe's {section} is {inner!r}, not a section")
        content = inner
    content[last] = value
