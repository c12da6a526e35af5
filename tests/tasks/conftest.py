"""Recipes that train in seconds, and what tests compare runs by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewise.tasks import Recipe, parse_recipe
from gatewise.tasks.recipe import deep_set

TINY = {
    "task": {"name": "classification", "label_smoothing": 0.1},
    "model": {
        "name": "focalnet_tiny_srf",
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "focal_levels": [1, 1],
        "focal_windows": [3, 3],
    },
    "data": {"name": "digits", "batch_size": 16, "num_workers": 0},
    "optim": {"name": "adamw", "lr": 1e-3},
    "trainer": {
        "epochs": 2,
        "accelerator": "cpu",
        "log_every": 1,
        "progress": False,
        "limit_train_batches": 5,
        "limit_val_batches": 2,
    },
}

NETWORK = {"name": "gla_tiny", "dim": 16, "depth": 1, "num_heads": 2, "gate_rank": 4, "hidden_dim": 16}
OPTIM = {"name": "adamw", "lr": 1e-2}
TRAINER = {"epochs": 2, "accelerator": "cpu", "log_every": 1, "progress": False}
TINY_TEXT = {
    "task": {"name": "language_modeling"},
    "model": NETWORK,
    "data": {"name": "text", "context": 16, "batch_size": 4, "val_fraction": 0.1, "test_fraction": 0.1},
    "optim": OPTIM,
    "trainer": {**TRAINER, "limit_train_batches": 5, "limit_val_batches": 2},
}
TINY_RECALL = {
    "task": {"name": "associative_recall"},
    "model": NETWORK,
    "data": {
        "name": "mqar",
        "vocab_size": 32,
        "train_segments": [[2, 8, 24], [3, 16, 16]],
        "val_segments": [[2, 8, 11], [3, 16, 9]],
        "batch_size": 8,
    },
    "optim": OPTIM,
    "trainer": TRAINER,
}

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Test workers share the cores: threads that wait for each other cost more than they bring on these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> MakeRecipe:
    """Makes the tiny recipe with fields replaced: `tiny_recipe({"trainer.epochs": 1}, output="a")`."""

    def make(overrides: dict[str, Any] | None = None, output: str = "run") -> Recipe:
        return parse_recipe(tiny_content(overrides, tmp_path / output))

    return make


@pytest.fixture
def text_recipe(tmp_path: Path) -> MakeRecipe:
    """The same for a tiny language model, on a corpus of its own."""

    def make(overrides: dict[str, Any] | None = None, output: str = "run") -> Recipe:
        return parse_recipe(text_content(overrides, tmp_path / output))

    return make


@pytest.fixture
def recall_recipe(tmp_path: Path) -> MakeRecipe:
    """The same for associative recall."""

    def make(overrides: dict[str, Any] | None = None, output: str = "run") -> Recipe:
        return parse_recipe(recall_content(overrides, tmp_path / output))

    return make


def text_content(overrides: dict[str, Any] | None, output: Path) -> dict[str, Any]:
    """The tiny language model's recipe; its corpus and cache are written beside the output."""
    corpus = output.parent / "corpus"
    corpus.mkdir(exist_ok=True)
    for number in range(12):
        words = " ".join(f"{number} times {other} is {number * other}." for other in range(10))
        (corpus / f"{number}.txt").write_text(words)
    places = {"data.root": str(corpus), "data.cache_dir": str(output.parent / "cache")}
    return tiny_content({**places, **(overrides or {})}, output, TINY_TEXT)


def recall_content(overrides: dict[str, Any] | None, output: Path) -> dict[str, Any]:
    return tiny_content(overrides, output, TINY_RECALL)


def tiny_content(
    overrides: dict[str, Any] | None, output: Path, base: dict[str, dict[str, Any]] = TINY
) -> dict[str, Any]:
    content = {key: dict(section) for key, section in base.items()} | {"output": str(output)}
    for name, value in (overrides or {}).items():
        deep_set(content, name, value)
    return content


def weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their place in it: weights, averages, optimizer state."""
    return dict(_tensors(torch.load(path, weights_only=True), ""))


def _tensors(content: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        return [(name, content)]
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    else:
        return []
    return [found for key, value in items for found in _tensors(value, f"{name}/{key}")]


def assert_same_checkpoint(left: Path, right: Path) -> None:
    """Every tensor of the two checkpoints is the same, bit by bit."""
    first, second = weights(left), weights(right)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
