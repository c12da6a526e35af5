"""What a checkpoint says about itself is checked field by field, whoever wrote it."""

from __future__ import annotations

import math

import pytest
import torch

from gatewise.cli import main
from gatewise.errors import CheckpointError
from gatewise.tasks import load_trained, parse_recipe, train
from gatewise.tasks.checkpoint import AtomicCheckpointIO
from gatewise.tasks.recipe import deep_set
from tests.tasks.conftest import text_content, tiny_content

SHORT = {"trainer.epochs": 1, "trainer.limit_train_batches": 2}
DELETED = object()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return train(parse_recipe(tiny_content(SHORT, tmp_path_factory.mktemp("images") / "run"))).last


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return train(parse_recipe(text_content(SHORT, tmp_path_factory.mktemp("texts") / "run"))).last


def rewritten(source, target, field, value):
    """The checkpoint with one field changed, by its dotted name."""
    content = torch.load(source, weights_only=True)
    *sections, last = field.split(".")
    inner = content
    for section in sections:
        inner = inner[section]
    if value is DELETED:
        del inner[last]
    else:
        inner[last] = value
    torch.save(content, target)
    return target


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gatewise", [1], "its gatewise must be fields by name, not a list|not \\[1\\]"),
        ("gatewise.recipe", DELETED, "gatewise.recipe must be sections by name, not None"),
        ("gatewise.recipe", "text", "gatewise.recipe must be sections by name, not 'text'"),
        ("gatewise.recipe.trainer", {1: 2}, "gatewise.recipe.trainer must be fields whose names are texts, not 1"),
        ("gatewise.recipe.seed", torch.zeros(2), "gatewise.recipe.seed must be a number, .* not a tensor"),
        ("gatewise.recipe.model.embed_dim", "wide", "because of the recipe in it: the recipe: model.embed_dim"),
        ("gatewise.recipe.model.name", "nothing", "because of the recipe in it: unknown model 'nothing'"),
        ("gatewise.recipe.data.name", "nothing", "because of the recipe in it: unknown data 'nothing'"),
        ("gatewise.recipe.model.embed_dim", 10**9, "does not fit its own network|cannot be built"),
        ("gatewise.recipe.model.depths", [1, 1, 1], "does not fit its own network|refused|cannot be built"),
        ("gatewise.input_size", DELETED, "gatewise.input_size must be 3 positive integers, not None"),
        ("gatewise.input_size", 7, "gatewise.input_size must be 3 positive integers, not 7"),
        ("gatewise.input_size", [3, 32], "gatewise.input_size must be 3 positive integers, not \\[3, 32\\]"),
        ("gatewise.input_size", [3, 32, "x"], "gatewise.input_size must be 3 positive integers"),
        ("gatewise.input_size", [1, 32, 32], "must be 1 finite number|has 1 channels, and the network 3"),
        ("gatewise.class_names", DELETED, "gatewise.class_names must be a list of texts, not None"),
        ("gatewise.class_names", "0123456789", "gatewise.class_names must be a list of texts, not '0123456789'"),
        ("gatewise.class_names", list(range(10)), "gatewise.class_names must be a list of texts"),
        ("gatewise.class_names", ["a"], "gatewise.class_names has 1 names, and the network 10 classes"),
        ("gatewise.mean", [0.5], "gatewise.mean must be 3 finite numbers, one per channel, not \\[0.5\\]"),
        ("gatewise.mean", [0.5, 0.5, math.nan], "gatewise.mean must be 3 finite numbers"),
        ("gatewise.std", [1.0, 1.0, 0.0], "gatewise.std must be 3 finite numbers above 0"),
        ("gatewise.std", None, "gatewise.std must be 3 finite numbers above 0, one per channel, not None"),
        ("gatewise.tokenizer", {"kind": "magic"}, "gatewise.tokenizer must be a description of kind"),
        ("gatewise.tokenizer", {"kind": "huggingface"}, "gatewise.tokenizer.content must be a text, not None"),
        ("state_dict", DELETED, "state_dict must be tensors by name, not None"),
        ("state_dict", [1], "state_dict must be tensors by name"),
        ("state_dict_ema", 3, "state_dict_ema must be tensors by name, not 3"),
        ("state_dict", {1: torch.zeros(1)}, "state_dict must be tensors by name"),
        ("state_dict", {"model.head.weight": 3}, "expected ordinary tensors, not a int at head.weight"),
        ("state_dict", {}, r"does not fit its own network \(missing: "),
    ],
)
def test_a_wrong_field_is_named(images, tmp_path, field, value, message):
    path = rewritten(images, tmp_path / "x.ckpt", field, value)
    with pytest.raises(CheckpointError, match=message) as told:
        load_trained(path)
    assert str(told.value).startswith(str(path))
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 700


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gatewise.tokenizer", DELETED, "gatewise.tokenizer must be a description of the tokenizer, not None"),
        (
            "gatewise.tokenizer",
            {"kind": "huggingface", "content": "{}", "end_of_text": "x"},
            "because of the tokenizer in it: this is not a tokenizer.json",
        ),
        ("gatewise.input_size", [3, 32, 32], "gatewise.input_size must be 1 positive integer"),
    ],
)
def test_a_wrong_field_of_a_language_model_is_named(texts, tmp_path, field, value, message):
    with pytest.raises(CheckpointError, match=message):
        load_trained(rewritten(texts, tmp_path / "x.ckpt", field, value))


def diverged(source, target):
    content = torch.load(source, weights_only=True)
    content["state_dict"]["model.head.weight"][0, 0] = math.nan
    torch.save(content, target)
    return target


def test_diverged_weights_load_only_when_asked(images, tmp_path):
    path = diverged(images, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="x.ckpt is refused: NaN or infinity in head.weight"):
        load_trained(path)
    assert load_trained(path, allow_nonfinite=True).model.head.weight.isnan().any()
    assert AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["model.head.weight"].isnan().any()


def test_predict_refuses_diverged_weights(images, tmp_path, capsys):
    assert main(["predict", "a.png", "--checkpoint", str(diverged(images, tmp_path / "x.ckpt"))]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "NaN or infinity" in captured.err
    assert captured.err.count("\n") == 1


def test_weights_of_another_kind_of_number_are_refused(images, tmp_path):
    content = torch.load(images, weights_only=True)
    content["state_dict"]["model.head.weight"] = content["state_dict"]["model.head.weight"].to(torch.complex64)
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="head.weight must be float16, .* not complex64"):
        load_trained(tmp_path / "x.ckpt")


def test_a_recipe_is_not_asked_for_places_to_read(images, tmp_path):
    content = torch.load(images, weights_only=True)
    deep_set(content["gatewise"]["recipe"], "model.checkpoint", "/nowhere/start.pth")
    torch.save(content, tmp_path / "x.ckpt")
    assert load_trained(tmp_path / "x.ckpt").recipe.model.checkpoint == "/nowhere/start.pth"
