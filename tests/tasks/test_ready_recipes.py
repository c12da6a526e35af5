"""The recipes that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatewise.tasks import load_recipe
from gatewise.tasks.optim import learning_rate_scale

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_valid_and_goes_to_a_folder_of_its_own(path):
    recipe = load_recipe(path)
    assert recipe.output.startswith("runs/")
    assert [load_recipe(other).output for other in FILES].count(recipe.output) == 1


@pytest.mark.parametrize(
    ("name", "devices", "global_batch", "peak"),
    [
        ("focalnet/imagenet1k", 8, 1024, 1e-3),
        ("inception_next/imagenet1k", 8, 4096, 4e-3),
        ("hornet/imagenet1k", 8, 4096, 4e-3),
        ("moat/imagenet1k", 8, 4096, 3e-3),
        ("spartan/imagenet1k", 4, 2048, 2.5e-3),
        ("convit/imagenet1k", 4, 1024, 1e-3),
        ("pflayer/imagenet1k", 4, 1024, 0.2),
        ("evonorm/imagenet1k", 8, 1024, 0.4),
        ("overlock/imagenet1k", 8, 2048, 2e-3),
        ("vig/imagenet1k", 8, 1024, 2e-3),
        ("gated_swinrmt/imagenet1k", 8, 1024, 1e-3),
        ("vig/hierarchical_imagenet1k", 8, 1024, 1.6e-3),
        ("evonorm/small_batch", 8, 32, 0.0125),
        ("pflayer/deit_imagenet1k", 4, 1024, 1e-3),
        ("inceptionv4/imagenet1k", 8, 256, 0.045),
        ("gla/slimpajama_340m", 1, 256, 3e-4),
        ("gla/slimpajama_1_3b", 1, 1024, 3e-4),
        ("gated_attention/dense_1_7b", 1, 1024, 4e-3),
        ("inception_next/atto_imagenet1k", 8, 1280, 1e-3),
        ("inception_next/finetune_384", 8, 1024, 5e-5),
        ("mobilenetv2/imagenet1k", 16, 1536, 0.045 * 16),
        ("mobilenetv2/imagenet1k_torchvision", 8, 256, 0.045),
    ],
)
def test_published_recipes_reach_the_published_batch_and_rate(name, devices, global_batch, peak):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    batch = recipe.data.fields["batch_size"] * recipe.trainer.accumulate * devices
    assert batch == global_batch
    assert recipe.optim.lr * learning_rate_scale(recipe.optim, batch) == pytest.approx(peak)
