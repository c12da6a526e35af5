"""The generator of associative recall: bit by bit the published one, or as it in distribution."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.data.loading import Share
from gatewise.data.text.mqar import MQAR, Rules, Segment, exact_examples, fast_examples, segment_seeds
from gatewise.data.text.sequences import IGNORED
from gatewise.errors import UserError
from tests.conftest import FINGERPRINTS

CASES = json.loads((FINGERPRINTS / "zoology" / "mqar_generator.json").read_text())["cases"]


def digest(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"V{case['config']['vocab_size']}-s{case['config']['seed']}")
def test_the_exact_generator_is_the_published_one_bit_by_bit(case):
    config = case["config"]
    segment = Segment(config["num_kv_pairs"], config["input_seq_len"], config["num_examples"])
    rules = Rules(config["vocab_size"], config["power_a"], 1, config["random_non_queries"])
    filler = torch.Generator().manual_seed(config["torch_seed"]) if "torch_seed" in config else None
    inputs, targets = exact_examples(segment, rules, config["seed"], filler)
    assert digest(inputs) == case["inputs_sha256"]
    assert digest(targets) == case["labels_sha256"]
    if "inputs_all" in case:
        assert inputs.tolist() == case["inputs_all"]
        assert targets.tolist() == case["labels_all"]


def test_the_worked_example():
    inputs, targets = exact_examples(Segment(2, 16, 4), Rules(64), seed=0)
    assert inputs[0, :9].tolist() == [3, 45, 30, 44, 0, 0, 30, 0, 3]
    assert (targets[0, 6], targets[0, 8]) == (44, 45)


def test_neither_generator_touches_the_global_streams():
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    state = torch.get_rng_state()
    for generate in (exact_examples, fast_examples):
        generate(Segment(2, 16, 4), Rules(64, random_non_queries=True), 0)
    assert np.random.rand() == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seeds_of_segments_are_the_published_ones():
    assert segment_seeds(123, 3, 3) == (
        [843828734, 914636141, 1228959102],
        [3987752258, 3121803228, 2967327842],
    )


@settings(deadline=None, max_examples=50)
@given(st.data(), st.sampled_from([exact_examples, fast_examples]), st.integers(1, 3), st.booleans())
def test_every_question_names_a_key_and_its_value(data, generate, passes, random_fill):
    pairs = data.draw(st.integers(1, 5))
    context = 2 * pairs * passes
    length = context + 2 * pairs + 2 * data.draw(st.integers(0, 5))
    segment = Segment(pairs, length, 3)
    inputs, targets = generate(segment, Rules(64, 0.01, passes, random_fill), data.draw(st.integers(0, 99)))
    for row, asked in zip(inputs, targets, strict=True):
        assert (row[:context].reshape(passes, pairs, 2) == row[: 2 * pairs].reshape(pairs, 2)).all()
        value_of = dict(row[: 2 * pairs].reshape(pairs, 2).tolist())
        assert len(value_of) == pairs
        assert all(1 <= key < 32 for key in value_of)
        assert all(32 <= value < 64 for value in value_of.values())
        places = np.flatnonzero(asked != IGNORED)
        assert (places >= context).all()
        assert (places % 2 == 0).all()
        assert {int(row[place]): int(asked[place]) for place in places} == value_of
        if not random_fill:
            assert (np.delete(row, [*range(context), *places]) == 0).all()


def test_more_pairs_than_can_be_far_apart_still_fill_their_places():
    inputs, targets = fast_examples(Segment(8, 32, 5), Rules(64), 0)
    assert ((targets != IGNORED).sum(axis=1) == 8).all()
    assert (inputs[:, 16::2] != 0).all()


def gaps_of_first_two_keys(inputs, targets, pairs: int):
    """The even places, counted behind the pairs, where the first and the second key are asked for."""
    asked = np.where(targets[:, 2 * pairs :: 2] != IGNORED, inputs[:, 2 * pairs :: 2], -1)
    return [(asked == inputs[:, 2 * key, None]).argmax(axis=1) for key in (0, 1)]


@pytest.mark.parametrize("power", [0.01, 1.0])
@pytest.mark.parametrize("generate", [exact_examples, fast_examples])
def test_both_generators_draw_from_the_stated_distribution(generate, power):
    pairs, length, examples = 3, 22, 8000
    inputs, targets = generate(Segment(pairs, length, examples), Rules(24, power), 5)
    p = np.arange(1, 9) ** (power - 1)
    p = p / p.sum()
    # The second is drawn from what the first has left.
    second = np.array([sum(p[i] * p[j] / (1 - p[i]) for i in range(8) if i != j) for j in range(8)])
    for gaps, expected in zip(gaps_of_first_two_keys(inputs, targets, pairs), (p, second), strict=True):
        counts = np.bincount(gaps, minlength=8)
        # Five standard deviations of a count: a right generator fails once in a million.
        assert (np.abs(counts - examples * expected) < 5 * np.sqrt(examples * expected)).all()
    for column, low in ((0, 1), (4, 1), (1, 12), (5, 12)):
        counts = np.bincount(inputs[:, column] - low, minlength=24 - 12 - (low == 1))
        expected = examples / len(counts)
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def data(**fields) -> MQAR:
    arguments = {"train_segments": [(2, 16, 22), (4, 32, 13)], "val_segments": [(2, 16, 7), (4, 32, 5)]}
    module = MQAR(**{**arguments, "vocab_size": 64, "batch_size": 5, **fields})
    module.setup()
    return module


def test_a_batch_never_mixes_segments_and_stays_in_its_place():
    loader = data().train_dataloader()
    for number in (0, 1):
        loader.set_epoch(number)
        assert [tuple(tokens.shape) for tokens, _ in loader] == [(5, 16)] * 4 + [(5, 32)] * 2
    first = [tokens for tokens, _ in loader]
    assert all(torch.equal(a, b) for a, b in zip(first, [tokens for tokens, _ in loader], strict=True))


def test_shuffled_batches_are_still_of_one_segment_and_of_every_example_once():
    loader = data(shuffle=True).train_dataloader()
    loader.set_epoch(0)
    first = [tokens for tokens, _ in loader]
    loader.set_epoch(1)
    second = [tokens for tokens, _ in loader]
    rows = {tuple(row) for tokens in first for row in tokens.tolist()}
    assert len(rows) == 30
    assert [tokens.tolist() for tokens in first] != [tokens.tolist() for tokens in second]


def test_validation_has_every_example_once_in_batches_of_one_segment():
    module = data(eval_batch_size=4)
    shapes = [tuple(tokens.shape) for tokens, _ in module.val_dataloader()]
    assert sorted(shapes) == sorted([(4, 16), (3, 16), (4, 32), (1, 32)])


def test_two_processes_validate_on_every_example_in_as_many_batches(monkeypatch):
    module = data(eval_batch_size=2)
    seen = []
    lengths = []
    for rank in (0, 1):
        monkeypatch.setattr(module, "_share", lambda rank=rank: Share(rank, 2))
        loader = module.val_dataloader()
        lengths.append(len(loader))
        seen += [tuple(row) for tokens, _ in loader for row in tokens.tolist()]
    assert lengths[0] == lengths[1]
    assert len(seen) == len(set(seen)) == 12


def test_the_data_of_a_seed_are_the_published_examples():
    module = data(exact=True, seed=123)
    expected, _ = exact_examples(Segment(4, 32, 5), Rules(64), segment_seeds(123, 2, 2)[1][1])
    found = [row for tokens, _ in module.val_dataloader() if tokens.shape[1] == 32 for row in tokens.tolist()]
    assert found == expected.tolist()


def test_training_and_validation_examples_differ():
    module = data()
    train = {tuple(row) for tokens, _ in module.train_dataloader() for row in tokens.tolist()}
    assert not any(tuple(row) in train for tokens, _ in module.val_dataloader() for row in tokens.tolist())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_segments": [(2, 15, 4)]}, "input_seq_len must be even, not 15"),
        ({"vocab_size": 16}, "vocab_size must be larger than input_seq_len 16, not 16"),
        ({"train_segments": [(5, 16, 4)]}, r"2 \* num_kv_pairs \* num_passes \+ 2 \* num_kv_pairs is 20.*16"),
        ({"num_passes": 4}, "num_kv_pairs is 20, and input_seq_len is 16"),
        ({"power_a": 0.0}, "power_a must be positive, not 0.0"),
        ({"power_a": float("nan")}, "power_a must be positive, not nan"),
        ({"power_a": float("inf")}, "power_a must be finite"),
        ({"seed": 2**32}, r"seed must be below 2\^32"),
        ({"train_segments": [(2, 16)]}, r"a segment of train_segments is \(number of pairs, .*, not \(2, 16\)"),
        ({"train_segments": [(2, 16, 4.5)]}, r"a segment of train_segments is .*, not \(2, 16, 4\.5\)"),
        ({"val_segments": [(2, 16, 10**12)]}, "num_examples 1,000,000,000,000 of length 16 are more than the"),
        ({"train_segments": []}, "train_segments must name at least one segment"),
        ({"val_segments": [(0, 16, 4)]}, "num_kv_pairs of a segment must be at least 1, not 0"),
        ({"val_segments": [(2, 16, 0)]}, "num_examples of a segment must be at least 1, not 0"),
    ],
)
def test_impossible_examples_are_refused_with_the_rule(fields, message):
    with pytest.raises(UserError, match=message):
        data(**fields)
