from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from torch import nn

from gatewise.data import data_class
from gatewise.errors import UserError
from gatewise.tasks import evaluate, predict


@pytest.fixture(scope="module")
def digits():
    data = data_class("digits")(batch_size=50)
    data.setup()
    return data


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 8 * 8, 10))


def test_figures_agree_with_scikit_learn(digits, network):
    result = evaluate(network, digits, device="cpu")
    batches = list(digits.test_dataloader())
    labels = torch.cat([batch[1] for batch in batches]).numpy()
    with torch.inference_mode():
        scores = torch.cat([network(batch[0]) for batch in batches]).softmax(dim=1).double().numpy()
    scores /= scores.sum(axis=1, keepdims=True)
    assert result.images == len(labels)
    assert result.top1 == pytest.approx(accuracy_score(labels, scores.argmax(axis=1)))
    assert result.top5 == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    assert result.loss == pytest.approx(log_loss(labels, scores), rel=1e-5)
    assert np.array_equal(result.confusion, confusion_matrix(labels, scores.argmax(axis=1)))
    recall = np.diag(result.confusion) / np.sum(result.confusion, axis=1)
    assert list(result.per_class) == digits.class_names
    assert list(result.per_class.values()) == pytest.approx(recall.tolist())


def test_a_part_can_be_chosen(digits, network):
    assert evaluate(network, digits, "val", device="cpu").images < evaluate(network, digits, device="cpu").images


def test_another_number_of_classes_is_refused(digits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))
    with pytest.raises(UserError, match="has 7 classes, the data has 10"):
        evaluate(network, digits, device="cpu")


def test_predictions_are_the_likeliest_classes_in_order(digits, network, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    transform = digits.transform_for_eval()
    [prediction] = predict(network, [path], transform, digits.class_names, top=3, device="cpu")
    expected = network(transform(Image.open(path))[None])[0].softmax(dim=0)
    assert [name for name, _ in prediction.classes] == [str(i) for i in expected.topk(3).indices.tolist()]
    assert [score for _, score in prediction.classes] == pytest.approx(expected.topk(3).values.tolist())


def test_an_unreadable_file_is_named_and_the_rest_still_done(digits, network, tmp_path):
    good, bad, missing = tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "missing.png"
    Image.new("L", (20, 20)).save(good)
    bad.write_text("no image")
    predictions = list(
        predict(network, [bad, missing, good], digits.transform_for_eval(), digits.class_names, device="cpu")
    )
    assert [prediction.error is None for prediction in predictions] == [False, False, True]
    assert "bad.png" in predictions[0].error
    assert len(predictions[2].classes) == 5


def test_no_more_classes_are_given_than_there_are(digits, network, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 20)).save(path)
    [prediction] = predict(network, [path], digits.transform_for_eval(), digits.class_names, top=50, device="cpu")
    assert len(prediction.classes) == 10
    assert sum(score for _, score in prediction.classes) == pytest.approx(1.0)
