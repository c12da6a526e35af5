from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gatewise.cli import main
from gatewise.tasks import parse_recipe, train
from tests.tasks.conftest import recall_content, text_content, tiny_content


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    fields = {"trainer.epochs": 1, "trainer.limit_train_batches": 2}
    return train(parse_recipe(tiny_content(fields, tmp_path_factory.mktemp("run")))).best


def test_evaluate_prints_scores_and_classes(checkpoint, capsys):
    assert main(["evaluate", "--checkpoint", str(checkpoint), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "359 (test)" in printed
    for title in ("top-1", "top-5", "loss", "most often taken for"):
        assert title in printed


def test_evaluate_writes_all_figures_as_json(checkpoint, tmp_path):
    target = tmp_path / "new" / "scores.json"
    assert main(["evaluate", "--checkpoint", str(checkpoint), "--json", str(target), "--split", "val"]) == 0
    scores = json.loads(target.read_text())
    assert np.sum(scores["confusion"]) == scores["images"]
    assert set(scores["per_class"]) == {str(digit) for digit in range(10)}


def test_json_alone_is_json_alone(checkpoint, capsys):
    assert main(["evaluate", "--checkpoint", str(checkpoint), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 359


def test_evaluate_without_anything_to_evaluate_is_a_users_mistake(capsys):
    assert main(["evaluate"]) == 2
    assert "MODEL or RECIPE.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "shown", "fields"),
    [
        (text_content, ("bits per byte", "perplexity", "tokens"), {"loss", "perplexity", "bits_per_byte", "tokens"}),
        (recall_content, ("accuracy", "pairs 2", "distance 1 to 4"), {"accuracy", "slices", "examples"}),
    ],
    ids=["text", "recall"],
)
def test_evaluate_shows_what_a_language_model_is_worth(tmp_path, capsys, content, shown, fields):
    recipe = parse_recipe(content({"trainer.epochs": 1, "trainer.limit_train_batches": 2}, tmp_path / "run"))
    checkpoint = str(train(recipe).best)
    assert main(["evaluate", "--checkpoint", checkpoint, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in shown)
    assert main(["evaluate", "--checkpoint", checkpoint, "--device", "cpu", "--split", "val", "--json", "-"]) == 0
    assert fields <= set(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("content", [tiny_content, text_content, recall_content], ids=["images", "text", "recall"])
def test_a_loss_that_is_not_finite_is_told_and_not_written(tmp_path, capsys, content):
    recipe = parse_recipe(content({"trainer.epochs": 1, "trainer.limit_train_batches": 2}, tmp_path / "run"))
    best = train(recipe).best
    saved = torch.load(best, weights_only=True)
    # Finite weights after the last gate, and products beyond the range of float32.
    for key, tensor in saved["state_dict"].items():
        if key == "model.norm.weight":
            tensor.fill_(3e38)
        elif key in ("model.head.weight", "model.embedding.weight"):
            tensor.mul_(1e10)
    torch.save(saved, best)
    target = tmp_path / "scores.json"
    assert main(["evaluate", "--checkpoint", str(best), "--device", "cpu", "--json", str(target)]) == 1
    assert "the network's loss" in capsys.readouterr().err
    assert not target.exists()
