"""Training, evaluation and prediction from recipes, built on Lightning.

    recipe = load_recipe("focalnet/demo", {"trainer.epochs": 2})
    result = train(recipe)
    load_trained(result.best).model

Names load on first use, so importing this module imports neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewise.tasks.evaluation import Evaluation, Prediction, evaluate, predict
    from gatewise.tasks.generation import generate
    from gatewise.tasks.reading import load_recipe, parse_recipe
    from gatewise.tasks.recipe import Recipe
    from gatewise.tasks.sequence_evaluation import LanguageEvaluation, RecallEvaluation
    from gatewise.tasks.sweep import sweep
    from gatewise.tasks.sweep_outcome import Sweep
    from gatewise.tasks.trained import Trained, load_trained
    from gatewise.tasks.training import Result, train

_HOME = {
    "Evaluation": "evaluation",
    "LanguageEvaluation": "sequence_evaluation",
    "Prediction": "evaluation",
    "RecallEvaluation": "sequence_evaluation",
    "Recipe": "recipe",
    "Result": "training",
    "Sweep": "sweep_outcome",
    "Trained": "trained",
    "evaluate": "evaluation",
    "generate": "generation",
    "load_recipe": "reading",
    "load_trained": "trained",
    "parse_recipe": "reading",
    "predict": "evaluation",
    "sweep": "sweep",
    "train": "training",
}

__all__ = [
    "Evaluation",
    "LanguageEvaluation",
    "Prediction",
    "RecallEvaluation",
    "Recipe",
    "Result",
    "Sweep",
    "Trained",
    "evaluate",
    "generate",
    "load_recipe",
    "load_trained",
    "parse_recipe",
    "predict",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gatewise.tasks' has no attribute {name!r}")
    return getattr(import_module(f"gatewise.tasks.{_HOME[name]}"), name)
