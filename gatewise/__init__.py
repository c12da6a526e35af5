"""gatewise: gated and efficient neural networks, from a name to a trained, measured, shipped network.

Names are imported on first use, so that `import gatewise` and the command line stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gatewise import efficiency, gates
    from gatewise.catalog.checkpoint import load_checkpoint
    from gatewise.catalog.factory import create_model
    from gatewise.catalog.papers import papers
    from gatewise.catalog.registry import list_models
    from gatewise.claims import reproduce
    from gatewise.efficiency.acceleration.optimize import optimize
    from gatewise.efficiency.card import model_card
    from gatewise.fidelity.verify import verify

_HOME = {
    "create_model": "gatewise.catalog.factory",
    "list_models": "gatewise.catalog.registry",
    "load_checkpoint": "gatewise.catalog.checkpoint",
    "model_card": "gatewise.efficiency.card",
    "optimize": "gatewise.efficiency.acceleration.optimize",
    "papers": "gatewise.catalog.papers",
    "reproduce": "gatewise.claims",
    "verify": "gatewise.fidelity.verify",
}
_ROOMS = ("efficiency", "gates")

__all__ = [
    "create_model",
    "efficiency",
    "gates",
    "list_models",
    "load_checkpoint",
    "model_card",
    "optimize",
    "papers",
    "reproduce",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _ROOMS:
        value = import_module(f"gatewise.{name}")
    else:
        raise AttributeError(f"module 'gatewise' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
