from __future__ import annotations

import pytest
import torch

import gatewise
from gatewise.errors import UserError
from gatewise.tasks import evaluate, train
from gatewise.tasks.sources import open_source

TINY = ["model.embed_dim=8", "model.depths=[1]", "model.focal_levels=[1]", "model.focal_windows=[3]"]


@pytest.fixture
def checkpoint(tiny_recipe):
    return train(tiny_recipe({"trainer.epochs": 1, "trainer.limit_train_batches": 2})).best


def test_a_checkpoint_brings_its_own_data(checkpoint):
    network, data = open_source(checkpoint=checkpoint)
    assert evaluate(network, data, device="cpu").images == 359


def test_fields_of_the_data_can_be_replaced(checkpoint):
    _, data = open_source(checkpoint=checkpoint, assignments=["data.batch_size=7"])
    assert data.batch_size == 7


def test_other_data_keep_the_preparation_of_the_images(checkpoint, tmp_path):
    _, data = open_source(checkpoint=checkpoint, assignments=["data.name=image_folder", f"data.root={tmp_path}"])
    _, own = open_source(checkpoint=checkpoint)
    assert data.input_size == (3, 32, 32)
    assert data.mean == own.mean


def test_a_recipe_is_evaluated_with_weights(checkpoint):
    recipe = str(checkpoint.with_name("recipe.yaml"))
    network, _ = open_source(recipe, weights=str(checkpoint))
    expected = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, expected[f"model.{name}"]) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match="names no weights to evaluate"):
        open_source(recipe)


def test_a_network_is_evaluated_on_data_by_name(tmp_path):
    fields = {"embed_dim": 8, "depths": (1,), "focal_levels": (1,), "focal_windows": (3,), "num_classes": 10}
    network = gatewise.create_model("focalnet_tiny_srf", **fields)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    words = [*TINY, "model.num_classes=10", "data.name=digits"]
    loaded, data = open_source("focalnet_tiny_srf", weights=str(tmp_path / "w.pth"), assignments=words)
    assert torch.equal(loaded.state_dict()["head.weight"], network.state_dict()["head.weight"])
    assert data.input_size == (3, 32, 32)


def test_a_network_prepares_images_as_its_published_weights_want(tmp_path):
    torch.save(gatewise.create_model("mobilenetv2_035").state_dict(), tmp_path / "w.pth")
    words = ["data.name=image_folder", f"data.root={tmp_path}"]
    _, data = open_source("mobilenetv2_035", weights=str(tmp_path / "w.pth"), assignments=words)
    assert data.input_size == (3, 224, 224)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "name either a MODEL or RECIPE"),
        ({"source": "focalnet_tiny_srf", "checkpoint": "x.ckpt"}, "name either a MODEL or RECIPE"),
        ({"checkpoint": "x.ckpt", "weights": "y.pth"}, "brings its own weights"),
        ({"source": "focalnet_tiny_srf"}, "say which weights"),
        ({"source": "focalnet_tiny_srf", "weights": "w.pth"}, "say what to evaluate on"),
        ({"source": "focalnet_tiny", "weights": "w.pth"}, "did you mean"),
        ({"checkpoint": "x.ckpt", "assignments": ["data.root"]}, "FIELD=VALUE"),
        ({"checkpoint": "x.ckpt"}, "no checkpoint at"),
    ],
)
def test_what_is_missing_or_contradictory_is_said(arguments, message):
    with pytest.raises(UserError, match=message):
        open_source(**arguments)
