from __future__ import annotations

import pytest
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional as F

from gatewise.errors import UserError
from gatewise.tasks import parse_recipe, train
from gatewise.tasks.logs import read_log
from gatewise.tasks.trained import build_model
from gatewise.tasks.training import _build_task, build_data, with_data
from tests.tasks.conftest import tiny_content


@pytest.fixture
def make_task(tmp_path):
    def make(**fields):
        recipe = parse_recipe(tiny_content({"task": {"name": "classification", **fields}}, tmp_path))
        data = build_data(recipe)
        data.setup()
        recipe = with_data(recipe, data)
        return _build_task(recipe, build_model(recipe), data)

    return make


@pytest.fixture
def logits_and_labels():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 10, generator=generator), torch.randint(10, (6,), generator=generator)


def test_smoothed_cross_entropy_is_timms_for_labels_and_for_soft_targets(make_task, logits_and_labels):
    logits, labels = logits_and_labels
    task = make_task(label_smoothing=0.1)
    expected = LabelSmoothingCrossEntropy(0.1)(logits, labels)
    torch.testing.assert_close(task.task_loss(logits, labels), expected)
    torch.testing.assert_close(task.task_loss(logits, F.one_hot(labels, 10).float()), expected)


def test_binary_cross_entropy_is_timms_for_labels_and_for_soft_targets(make_task, logits_and_labels):
    logits, labels = logits_and_labels
    task = make_task(loss="binary_cross_entropy", label_smoothing=0.1)
    expected = BinaryCrossEntropy(smoothing=0.1)(logits, labels)
    torch.testing.assert_close(task.task_loss(logits, labels), expected)
    torch.testing.assert_close(task.task_loss(logits, F.one_hot(labels, 10).float()), expected)


def test_mixed_targets_stay_probabilities_and_give_timms_soft_loss(make_task, logits_and_labels):
    logits, labels = logits_and_labels
    task = make_task(mixing={"mixup_alpha": 0.8, "cutmix_alpha": 1.0})
    images, soft = task.mix(torch.rand(6, 3, 8, 8), labels)
    assert images.shape == (6, 3, 8, 8)
    assert soft.shape == (6, 10)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(6))
    torch.testing.assert_close(task.task_loss(logits, soft), SoftTargetCrossEntropy()(logits, soft))


def test_without_mixing_batches_are_left_alone(make_task, logits_and_labels):
    _, labels = logits_and_labels
    images = torch.rand(6, 3, 8, 8)
    assert make_task().mix(images, labels) == (images, labels)


def test_loss_is_computed_in_float32_whatever_the_network_answers_in(make_task, logits_and_labels):
    logits, labels = logits_and_labels
    assert make_task().task_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_top5_is_measured_where_there_are_five_classes(make_task):
    assert make_task().top5 is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"trainer.precision": "bf16-mixed"},
        {"trainer.channels_last": True},
        {"trainer.accumulate": 2, "trainer.clip_grad": 1.0},
        {"task.loss": "binary_cross_entropy", "optim.name": "lamb"},
        {"model.name": "mobilenetv2_035", "methods": [{"name": "freeze_batch_norm"}]},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_options_train(tiny_recipe, fields):
    if "model.name" in fields:
        fields = {"model": {"name": fields["model.name"]}, "methods": fields["methods"]}
    result = train(tiny_recipe({"trainer.epochs": 1, **fields}))
    log = read_log(result.folder / "metrics.csv")
    assert all(0 < row["train/loss"] < 10 for row in log if "train/loss" in row)
    assert 0 <= result.metrics["val/top1"] <= result.metrics["val/top5"] <= 1


def test_an_update_of_accumulated_batches_is_the_update_of_one_large_batch(tiny_recipe):
    small = {"trainer.epochs": 1, "trainer.limit_train_batches": 4, "optim.schedule": "constant"}
    parts = train(tiny_recipe({**small, "data.batch_size": 8, "trainer.accumulate": 2}, output="parts"))
    whole = train(tiny_recipe({**small, "data.batch_size": 16, "trainer.limit_train_batches": 2}, output="whole"))
    assert parts.steps == whole.steps == 2
    left, right = (torch.load(run.last, weights_only=True)["state_dict"] for run in (parts, whole))
    for name in left:
        # Adam divides by the gradient's size, so that rounding shows where that is next to nothing.
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.untyped
def test_compiled_networks_keep_their_keys(tiny_recipe, monkeypatch):
    compiled = []
    original = torch.nn.Module.compile

    def compile_eagerly(self, *args, **kwargs):
        compiled.append(self)
        return original(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    fields = {"trainer.epochs": 1, "trainer.limit_train_batches": 2, "trainer.compile": True, "trainer.ema": 0.5}
    result = train(tiny_recipe(fields))
    assert len(compiled) == 1
    content = torch.load(result.best, weights_only=True)
    for key in ("state_dict", "state_dict_ema"):
        assert all("_orig_mod" not in name for name in content[key])


class TwoClassifiers(torch.nn.Module):
    """Logits that are the means of images, and twice that."""

    def forward(self, x):
        return x.mean(dim=(2, 3)).repeat(1, 4)[:, :10]

    def forward_with_auxiliary(self, x):
        return {"main": self(x), "aux": 2 * self(x)}


def test_a_second_classifier_adds_its_weighted_loss(make_task, logits_and_labels):
    _, labels = logits_and_labels
    images = torch.rand(6, 3, 8, 8)
    task = make_task()
    task.model, task.auxiliary_weight = TwoClassifiers(), 0.4
    total, outputs = task.own_loss(images, labels)
    torch.testing.assert_close(outputs, task.model(images))
    expected = F.cross_entropy(outputs, labels) + 0.4 * F.cross_entropy(2 * outputs, labels)
    torch.testing.assert_close(total, expected)
    task.auxiliary_weight = 0.0
    torch.testing.assert_close(task.own_loss(images, labels)[0], F.cross_entropy(outputs, labels))


@pytest.mark.parametrize(("weight", "message"), [(0.4, "has no auxiliary classifier"), (-1.0, "must be at least 0")])
def test_an_auxiliary_weight_needs_a_second_classifier(make_task, weight, message):
    with pytest.raises(UserError, match=message):
        make_task(auxiliary_weight=weight)
