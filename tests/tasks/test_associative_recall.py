"""Associative recall from a recipe to accuracies."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gatewise.data.text.mqar import Rules, Segment, exact_examples
from gatewise.errors import UserError
from gatewise.tasks import RecallEvaluation, evaluate, train
from gatewise.tasks.associative_recall import RecallAccuracy, distance_bounds, distances
from gatewise.tasks.logs import read_log
from gatewise.tasks.sequences import likeliest
from gatewise.tasks.sources import open_source
from gatewise.tasks.trained import build_model
from gatewise.tasks.training import _build_task, build_data, with_data
from tests.tasks.conftest import assert_same_checkpoint
from tests.tasks.test_language_modeling import without_speed
from tests.tasks.test_resume import Crash

SEGMENTS = [Segment(2, 16, 6), Segment(4, 32, 5)]


def examples(segment, seed=0, **rules):
    inputs, targets = exact_examples(segment, Rules(64, **rules), seed)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


@pytest.fixture
def make_task(recall_recipe):
    def make(overrides=None):
        recipe = recall_recipe(overrides)
        data = build_data(recipe)
        data.setup()
        recipe = with_data(recipe, data)
        return _build_task(recipe, build_model(recipe), data)

    return make


def test_the_loss_is_the_cross_entropy_where_something_is_asked(make_task):
    task = make_task()
    inputs, targets = next(iter(task.data.train_dataloader()))
    expected = F.cross_entropy(task.model(inputs).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(task.loss(inputs, targets)[0], expected)


def test_only_what_is_asked_meets_the_vocabulary(make_task, monkeypatch):
    from gatewise.tasks import associative_recall

    seen = []
    original = associative_recall.chunked_cross_entropy
    monkeypatch.setattr(
        associative_recall, "chunked_cross_entropy", lambda h, *rest: seen.append(len(h)) or original(h, *rest)
    )
    task = make_task()
    inputs, targets = next(iter(task.data.train_dataloader()))
    task.loss(inputs, targets)
    assert inputs.numel() == 64
    assert seen == [8 * 2]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("random_fill", [False, True])
def test_distances_reach_back_to_the_nearest_pair(passes, random_fill):
    inputs, targets = examples(Segment(3, 32, 20), num_passes=passes, random_non_queries=random_fill)
    expected = []
    for row, asked in zip(inputs.tolist(), targets.tolist(), strict=True):
        for place in [place for place, target in enumerate(asked) if target != -100]:
            found = [i for i in range(place) if (row[i], row[i + 1]) == (row[place], asked[place])]
            expected.append(place - max(found))
    assert distances(inputs, targets).tolist() == expected


def test_a_question_without_a_pair_is_as_far_as_the_sequence_is_long():
    inputs = torch.tensor([[5, 9, 3, 0, 5, 0]])
    targets = torch.tensor([[-100, -100, -100, -100, 7, -100]])
    assert distances(inputs, targets).tolist() == [6]


def test_distance_buckets_double_until_all_fit():
    assert distance_bounds(4) == [4]
    assert distance_bounds(33) == [4, 8, 16, 32, 64]


def test_accuracy_is_the_mean_over_examples_of_the_share_of_right_answers():
    metric = RecallAccuracy(SEGMENTS)
    right = {}
    for segment in SEGMENTS:
        inputs, targets = examples(segment)
        correct = torch.rand(segment.num_examples * segment.num_kv_pairs) < 0.6
        metric.update(correct, inputs, targets)
        right[segment] = correct.view(segment.num_examples, -1).float().mean(dim=1), distances(inputs, targets), correct
    found = {name: value.item() for name, value in metric.compute().items()}
    shares = [right[segment][0] for segment in SEGMENTS]
    assert found.pop("accuracy") == pytest.approx(torch.cat(shares).mean().item())
    assert found.pop("accuracy_pairs_2") == found.pop("accuracy_length_16") == pytest.approx(shares[0].mean().item())
    assert found.pop("accuracy_pairs_4") == found.pop("accuracy_length_32") == pytest.approx(shares[1].mean().item())
    away = torch.cat([right[segment][1] for segment in SEGMENTS])
    hits = torch.cat([right[segment][2] for segment in SEGMENTS]).float()
    for low, high in ((1, 4), (5, 8), (9, 16), (17, 32)):
        inside = (away >= low) & (away <= high)
        if inside.any():
            assert found.pop(f"accuracy_distance_{low}_{high}") == pytest.approx(hits[inside].mean().item())
    assert found == {}


def test_what_did_not_occur_has_no_accuracy():
    metric = RecallAccuracy(SEGMENTS)
    inputs, targets = examples(SEGMENTS[0])
    metric.update(torch.ones(12, dtype=torch.bool), inputs, targets)
    found = metric.compute()
    assert "accuracy_pairs_4" not in found
    assert found["accuracy"] == found["accuracy_pairs_2"] == 1


def test_the_likeliest_token_is_the_same_in_pieces(monkeypatch):
    hidden, weight = torch.randn(10, 4), torch.randn(7, 4)
    monkeypatch.setattr("gatewise.tasks.sequences.CHUNK_ELEMENTS", 21)
    assert torch.equal(likeliest(hidden, weight), (hidden @ weight.T).argmax(dim=1))


def test_a_run_logs_accuracies_and_the_best_is_the_highest(recall_recipe):
    result = train(recall_recipe())
    log = [row for row in read_log(result.folder / "metrics.csv") if "val/accuracy" in row]
    assert len(log) == 2
    assert {"val/accuracy_pairs_2", "val/accuracy_length_16", "val/loss"} <= set(log[0])
    assert result.metrics["val/accuracy"] == max(row["val/accuracy"] for row in log)
    assert result.steps == 2 * (3 + 2)


def test_an_easy_task_is_learnt(recall_recipe):
    """One pair: the value is whichever upper token stands in the sequence."""
    easy = {
        "data.train_segments": [[1, 4, 2048]],
        "data.val_segments": [[1, 4, 64]],
        "data.batch_size": 64,
        "data.vocab_size": 16,
        "model.dim": 32,
        "trainer.epochs": 10,
        "trainer.stop_at": 0.9,
    }
    result = train(recall_recipe(easy))
    assert result.metrics["val/accuracy"] > 0.9
    log = [row["val/accuracy"] for row in read_log(result.folder / "metrics.csv") if "val/accuracy" in row]
    assert [accuracy > 0.9 for accuracy in log] == [False] * (len(log) - 1) + [True]
    assert result.epochs == len(log) < 10
    again = train(recall_recipe(easy), resume=True)
    assert (again.steps, again.metrics) == (result.steps, result.metrics)


def test_the_rate_can_move_between_epochs_only(recall_recipe):
    result = train(recall_recipe({"optim.per_epoch": True, "trainer.epochs": 3}))
    rates = [row["train/lr"] for row in read_log(result.folder / "metrics.csv") if "train/lr" in row]
    expected = [1e-2 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3) for _ in range(5)]
    assert rates == pytest.approx(expected)


def test_a_resumed_run_ends_as_an_uninterrupted_one(recall_recipe):
    fields = {"data.shuffle": True, "trainer.checkpoint_every": 2, "model.dim": 16}
    whole = train(recall_recipe(fields, output="whole"))
    recipe = recall_recipe(fields, output="parts")
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, callbacks=[Crash(7)])
    parts = train(recipe, resume=True)
    assert_same_checkpoint(whole.last, parts.last)
    assert parts.metrics == whole.metrics
    logs = [without_speed(run.folder / "metrics.csv") for run in (parts, whole)]
    assert logs[0] == logs[1]


def test_an_evaluation_is_what_validation_said(recall_recipe):
    result = train(recall_recipe())
    network, data = open_source(checkpoint=result.best)
    found = evaluate(network, data, device="cpu")
    assert isinstance(found, RecallEvaluation)
    assert found.accuracy == pytest.approx(result.metrics["val/accuracy"])
    assert found.loss == pytest.approx(result.metrics["val/loss"], rel=1e-5)
    assert found.examples == 20
    assert found.slices["accuracy_pairs_2"] == pytest.approx(result.metrics["val/accuracy_pairs_2"])


def test_segments_that_cannot_be_are_refused_before_anything_is_written(recall_recipe):
    recipe = recall_recipe({"data.val_segments": [[2, 9, 4]]})
    with pytest.raises(UserError, match="input_seq_len must be even, not 9"):
        train(recipe)
    assert not Path(recipe.output).exists()
