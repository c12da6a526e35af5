"""The three kinds of methods, and the registry of their names.

A method changes how a network learns without being a network itself: distillation, frozen layers, adversarial experts.
Each file here holds one method and says which kind it is:

- a *transform* takes a module and returns a module, before training starts: `tract(model)`;
- a *loss term* adds to the task's loss in every step and may hold its own parameters and state;
- a *step procedure* decides what happens with a batch: which passes, which losses, which updates, in which order.

Tasks know these three kinds, but no method by name. A recipe lists methods as `{name: ..., field: value}`; fields are
the keyword arguments of the registered function or class.
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
    """Data of one training step that a loss term may use.

    Args:
        inputs: the network's inputs: (B, C, H, W) for images, after mixing.
        targets: class indices (B,), or class probabilities (B, classes) for soft targets.
        outputs: the network's outputs: logits (B, classes).
        progress: fraction of training completed, from 0 to 1, for terms that fade in or out.
    """

    inputs: Tensor
    targets: Tensor
    outputs: Tensor
    progress: float


class LossTerm(nn.Module, ABC):
    """A term added to the loss of a task. Its parameters that require gradients are trained with the network's.

    Subclasses take the network, after all transforms, as first constructor argument, and may place hooks on it.
    Anything that should not be saved in every checkpoint (a frozen teacher) is kept out of the registered submodules.

    Attributes:
        task_weight: factor on the task's own loss while this term is active.
    """

    task_weight: float = 1.0

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """Return the term's value for one step, a scalar that includes its weight."""


class Engine(Protocol):
    """The interface of the running task that a step procedure may use."""

    model: nn.Module

    @property
    def progress(self) -> float:
        """Fraction of training completed, from 0 to 1."""

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the task's loss (a scalar including loss terms) and the network's outputs, from one forward pass."""

    def update(self, index: int, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Back-propagate `loss`, clip, and step the optimizer of parameter set `index`. Other sets do not change."""


class StepProcedure(ABC):
    """Decides what happens with one batch. A recipe may name at most one."""

    def parameter_sets(self, model: nn.Module) -> Sequence[NamedParameters]:
        """Return disjoint sets of the network's parameters. Each gets its own optimizer, all with the same settings."""
        return [list(model.named_parameters())]

    @abstractmethod
    def step(self, engine: Engine, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Run one training step, and return the loss to report (a scalar) and the outputs (B, classes)."""


@dataclass(frozen=True)
class Method:
    """A registered method: its kind, and the function that builds it from the network and the recipe's fields."""

    name: str
    kind: Kind
    build: Callable[..., Any]


_methods: dict[str, Method] = {}


def register_transform(function: _Registered) -> _Registered:
    """Register a function `(model, *, fields) -> module` under its own name."""
    return _register(function.__name__, "transform", function)


def register_loss_term(name: str) -> Callable[[_Registered], _Registered]:
    """Register a `LossTerm` class under `name`; it is built as `cls(model, **fields)`."""
    return lambda cls: _register(name, "loss term", cls)


def register_step_procedure(name: str) -> Callable[[_Registered], _Registered]:
    """Register a `StepProcedure` class under `name`; it is built as `cls(model, **fields)`."""
    return lambda cls: _register(name, "step procedure", cls)


def _register(name: str, kind: Kind, build: _Registered) -> _Registered:
    if name in _methods:
        raise ValueError(f"a method named {name!r} is already registered")
    _methods[name] = Method(name, kind, build)
    return build


def find_method(name: str) -> Method:
    """Return the method registered under `name`.

    Raises:
        UnknownNameError: if the name is unknown. The message suggests the closest one.
    """
    if name not in _methods:
        raise unknown_name("method", name, _methods)
    return _methods[name]


def list_methods() -> list[str]:
    """Return the names of all registered methods, sorted."""
    return sorted(_methods)
