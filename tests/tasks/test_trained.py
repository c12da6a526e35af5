from __future__ import annotations

import pytest
import torch

import gatewise
from gatewise.errors import CheckpointError
from gatewise.tasks import load_trained, train

ONE_EPOCH = {"trainer.epochs": 1, "trainer.limit_train_batches": 2}


def test_a_checkpoint_says_all_about_its_network(tiny_recipe):
    result = train(tiny_recipe(ONE_EPOCH))
    trained = load_trained(result.best)
    assert trained.class_names == [str(digit) for digit in range(10)]
    assert trained.input_size == (3, 32, 32)
    assert len(trained.mean) == len(trained.std) == 3
    assert trained.model.variant == "focalnet_tiny_srf"
    assert trained.model.config.num_classes == 10
    assert not trained.model.training
    saved = torch.load(result.best, weights_only=True)["state_dict"]
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, saved[f"model.{name}"])


def test_gatewise_load_checkpoint_reads_it_too(tiny_recipe):
    result = train(tiny_recipe({**ONE_EPOCH, "trainer.ema": 0.5}))
    trained = load_trained(result.best)
    other = gatewise.create_model(trained.recipe.model.name, **trained.recipe.model.fields)
    gatewise.load_checkpoint(other, result.best)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_it_does_not_need_the_weights_that_training_started_from(tiny_recipe, tmp_path):
    first = train(tiny_recipe(ONE_EPOCH, output="first"))
    start = tmp_path / "start.ckpt"
    start.write_bytes(first.last.read_bytes())
    second = train(tiny_recipe({**ONE_EPOCH, "model.checkpoint": str(start)}, output="second"))
    start.unlink()
    assert load_trained(second.best).class_names == load_trained(first.best).class_names


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="was not written by `gatewise train`"):
        load_trained(path)


def test_a_checkpoint_that_was_tampered_with_is_refused(tiny_recipe, tmp_path):
    content = torch.load(train(tiny_recipe(ONE_EPOCH)).best, weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, tmp_path / "short.ckpt")
    with pytest.raises(CheckpointError, match="does not fit its own network"):
        load_trained(tmp_path / "short.ckpt")
