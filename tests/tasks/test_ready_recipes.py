"""The recipes that come with the project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import gatewise.recipes
from gatewise.errors import UnknownNameError, UserError
from gatewise.recipes import find_recipe, list_recipes
from gatewise.tasks import load_recipe
from gatewise.tasks.optim import learning_rate_scale

RECIPES = Path(gatewise.recipes.__file__).parent
FILES = sorted(RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_valid(name):
    assert load_recipe(name).output.startswith("runs/")


def test_every_recipe_goes_to_a_folder_of_its_own():
    outputs = [yaml.safe_load(path.read_text())["output"] for path in FILES]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("name", list_recipes())
def test_commands_in_a_recipe_name_recipes_that_exist(name):
    text = find_recipe(name).read_text()
    for named in re.findall(r"gatewise (?:train|sweep) (\S+)", text):
        assert named in list_recipes()


def test_an_existing_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("focalnet/demo").data.name == "fashion"
    Path("focalnet").mkdir()
    Path("focalnet/demo").write_text("{model: {name: focalnet_tiny_srf}, data: {name: digits}}")
    assert load_recipe("focalnet/demo").data.name == "digits"


def test_an_unknown_name_suggests_the_closest():
    with pytest.raises(UnknownNameError, match="unknown recipe 'focalnet/finetun'; did you mean 'focalnet/finetune'"):
        load_recipe("focalnet/finetun")


def test_what_looks_like_a_file_and_is_none_is_told_as_one():
    with pytest.raises(UserError, match=r"no recipe at 'focalnet/finetun\.yaml'.*gatewise recipes"):
        load_recipe("focalnet/finetun.yaml")


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
