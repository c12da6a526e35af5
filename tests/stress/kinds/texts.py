"""Recipes and digest records."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from tests.conftest import FINGERPRINTS
from tests.stress.kinds.base import Case, Kind
from tests.stress.kinds.weights import TrainedCheckpoints
from tests.stress.mutations import damaged, misshapen
from tests.stress.worker import Wrong

RECIPES = {
    "images": TrainedCheckpoints.RECIPE,
    "text": {
        "model": {"name": "gla_tiny", "dim": 16, "depth": 1, "num_heads": 2, "gate_rank": 4, "hidden_dim": 16},
        "data": {"name": "text", "context": 16, "batch_size": 4},
        "optim": {"name": "adamw", "lr": 1e-2, "options": {"betas": [0.9, 0.95]}},
        "trainer": {"epochs": 2, "clip_grad": 1.0},
    },
    "folder": {
        "task": {"name": "classification", "label_smoothing": 0.1, "mixing": {"mixup_alpha": 0.8}},
        "model": {"name": "convit_tiny", "drop_path_rate": 0.1},
        "data": {"name": "image_folder", "root": "flowers", "image_size": 64, "augment": {"auto_augment": "rand-m5"}},
        "methods": [{"name": "freeze_batch_norm"}],
        "optim": {"schedule": "step", "decay_epochs": 3, "warmup_epochs": 1},
        "trainer": {"epochs": 3, "ema": 0.99, "precision": "bf16-mixed"},
    },
}


class Recipes(Kind):
    """Recipe files with wrong values or damaged text."""

    name = "recipes"
    weight = 9.0

    @classmethod
    def prepare(cls, folder: Path) -> None:
        for name, content in RECIPES.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    def case(self, rng: random.Random, folder: Path) -> Case:
        good = rng.choice(sorted(self.corpus.iterdir()))
        path = folder / good.name
        if rng.random() < 0.3:
            path.write_bytes(damaged(rng, good.read_bytes()))
            what = "text"
        else:
            content = misshapen(rng, RECIPES[good.stem])
            path.write_text(yaml.safe_dump(content), encoding="utf-8")
            what = "values"

        def read() -> str:
            from gatewise.tasks import load_recipe
            from gatewise.tasks.training import build_data

            recipe = load_recipe(path)
            again = folder / "again.yaml"
            again.write_text(recipe.to_yaml(), encoding="utf-8")
            if load_recipe(again) != recipe:
                raise Wrong("a resolved recipe reads as another one")
            build_data(recipe)
            return "changed"

        return Case(f"{what} of {good.name}", read)


class Digests(Kind):
    """Digest records for `gatewise verify`."""

    name = "digests"
    weight = 4.0

    FILES = ("focalnet/small.json", "convit/small_custom.json", "gla/model_small.json")

    @classmethod
    def prepare(cls, folder: Path) -> None:
        for name in cls.FILES:
            source = FINGERPRINTS / name
            if source.exists():
                (folder / name.replace("/", "-")).write_bytes(source.read_bytes())

    def case(self, rng: random.Random, folder: Path) -> Case:
        good = rng.choice(sorted(self.corpus.iterdir()))
        path = folder / good.name
        if rng.random() < 0.3:
            path.write_bytes(damaged(rng, good.read_bytes()))
        else:
            path.write_text(json.dumps(misshapen(rng, json.loads(good.read_text("utf-8")))), encoding="utf-8")

        def read() -> str:
            from gatewise.fidelity.verify import verify

            report = verify(path)
            if len(report.results) != 1 or "\n" in report.results[0].reason:
                raise Wrong("the report is not one line")
            return "changed"

        return Case(good.name, read)
