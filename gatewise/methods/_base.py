"""The three kinds of method, and the table of their names.

A method is anything that changes how a network learns without being a network: distillation, frozen layers,
adversarial experts. A file here holds one and says which kind it is:

- a *transform* takes a module and gives a module back, before training starts: `tract(model)`;
- a *loss term* adds to the task's loss in every step and may hold parameters and state of its own;
- a *step procedure* decides what happens with a batch: which passes, which losses, which updates, in which order.

Tasks know these three kinds and no method by name. A recipe lists methods as `{name: ..., field: value}`; fields are
the keyword arguments of what was registered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor, nn

from gatewise.errors import unknown_name

Kind = Literal["transform", "loss term", "step procedure"]
NamedParameters = Sequence[tuple[str, nn.Parameter]]
_Registered = TypeVar("_Registered", bound=Callable[..., Any])


@dataclass(frozen=True)
class Step:
    """What a loss term may look at in one training step.

    Args:
        inputs: what the network was given: (B, C, H, W) for images, after mixing.
        targets: class indices (B,), or class probabilities (B, classes) where targets are soft.
        outputs: what the network answered: logits (B, classes).
        progress: the fraction of training that is done, from 0 to 1, for terms that fade in or out.
    """

    inputs: Tensor
    targets: Tensor
    outputs: Tensor
    progress: float


class LossTerm(nn.Module, ABC):
    """Adds to the loss of a task. Parameters that require gradients are trained with the network's.

    Subclasses take the network as first constructor argument, after all transforms, and may place hooks on it. What
    must not be saved in every checkpoint (a frozen teacher) is kept out of the registered submodules.

    Attributes:
        task_weight: factor on the task's own loss while this term is in use.
    """

    task_weight: float = 1.0

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """The term's value for one step, a scalar with its weight included."""


class Engine(Protocol):
    """What a step procedure may ask of the task that runs it."""

    model: nn.Module

    @property
    def progress(self) -> float:
        """The fraction of training that is done, from 0 to 1."""

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The task's loss (a scalar, loss terms included) and the network's outputs, from one forward pass."""

    def update(self, index: int, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Back-propagate `loss`, clip, and step the optimizer of parameter set `index`; other sets stay as they are."""


class StepProcedure(ABC):
    """Decides what happens with one batch. A recipe may name one at most."""

    def parameter_sets(self, model: nn.Module) -> Sequence[NamedParameters]:
        """The disjoint sets of the network's parameters that get an optimizer each, all with the recipe's settings."""
        return [list(model.named_parameters())]

    @abstractmethod
    def step(self, engine: Engine, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Run one training step; returns the loss to report (a scalar) and the outputs (B, classes)."""


@dataclass(frozen=True)
class Method:
    """A registered method: its kind, and what makes it from the network and the recipe's fields."""

    name: str
    kind: Kind
    build: Callable[..., Any]


_methods: dict[str, Method] = {}


def register_transform(function: _Registered) -> _Registered:
    """Make a function `(model, *, fields) -> module` known under its own name."""
    return _register(function.__name__, "transform", function)


def register_loss_term(name: str) -> Callable[[_Registered], _Registered]:
    """Make a `LossTerm` class known under `name`; it is built as `cls(model, **fields)`."""
    return lambda cls: _register(name, "loss term", cls)


def register_step_procedure(name: str) -> Callable[[_Registered], _Registered]:
    """Make a `StepProcedure` class known under `name`; it is built as `cls(model, **fields)`."""
    return lambda cls: _register(name, "step procedure", cls)


def _register(name: str, kind: Kind, build: _Registered) -> _Registered:
    if name in _methods:
        raise ValueError(f"a method named {name!r} is registered already")
    _methods[name] = Method(name, kind, build)
    return build


def find_method(name: str) -> Method:
    """The method registered under `name`.

    Raises:
        UnknownNameError: if there is none; suggests the closest.
    """
    if name not in _methods:
        raise unknown_name("method", name, _methods)
    return _methods[name]


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_methods)
