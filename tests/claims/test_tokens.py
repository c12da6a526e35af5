"""The tasks of tokens that claims train on; no training."""

from __future__ import annotations

import pytest
import torch

from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.tokens import IGNORED, ByteText, Recall, ResetRegisters, asked, corpus
from gatewise.networks.sequence.gla import GLA, GLAConfig


@pytest.fixture(scope="module")
def registers():
    return ResetRegisters().batch(200, generator(0))


def test_registers_answer_what_was_written_last_since_the_last_erasure(registers):
    task = ResetRegisters()
    tokens, targets = registers
    for row in range(50):
        held = [task.values] * task.registers
        for token, target in zip(tokens[row].tolist(), targets[row].tolist(), strict=True):
            if token == 0:
                held = [task.values] * task.registers
            elif token <= task.registers * task.values:
                held[(token - 1) // task.values] = (token - 1) % task.values
            if token > task.registers * task.values:
                assert target == held[token - 1 - task.registers * task.values]
            else:
                assert target == IGNORED


def test_registers_hold_every_kind_of_token_and_answer(registers):
    task = ResetRegisters()
    tokens, targets = registers
    assert set(tokens.unique().tolist()) == set(range(task.vocab_size))
    assert set(targets.unique().tolist()) == {IGNORED, *range(task.values + 1)}


def test_recall_asks_for_every_pair_once():
    task = Recall(pairs=3, length=16, vocab_size=32)
    tokens, targets = task.batch(20, generator(1))
    assert tokens.shape == targets.shape == (20, 16)
    assert ((targets != IGNORED).sum(dim=1) == 3).all()
    pairs = [dict(zip(row[0:6:2].tolist(), row[1:6:2].tolist(), strict=True)) for row in tokens]
    for row in range(20):
        places = (targets[row] != IGNORED).nonzero().flatten()
        assert all(pairs[row][int(tokens[row, place])] == targets[row, place] for place in places)


def test_batches_come_from_the_generator_alone():
    for task in (Recall(2, 16, 32), ResetRegisters()):
        first, second, other = (task.batch(4, generator(seed)) for seed in (3, 3, 4))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first[0], other[0])


def test_text_is_source_cut_into_training_and_validation():
    task = ByteText(length=16, limit=20_000)
    tokens, targets = task.batch(4, generator(0))
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    train, unseen = corpus(20_000)
    assert 15 < len(train) / len(unseen) < 25
    assert b"import" in bytes(train.tolist())
    batches = task.validation_batches(3, 2)
    assert [tuple(batch[0].shape) for batch in batches] == [(3, 16), (3, 16)]
    assert torch.equal(batches[0][0], task.validation_batches(3, 2)[0][0])


def test_loss_and_accuracy_look_at_the_places_that_ask_alone():
    task = Recall(2, 16, 32)
    model = GLA(GLAConfig(vocab_size=32, dim=32, depth=1, num_heads=2, hidden_dim=16)).eval()
    batch = task.batch(5, generator(0))
    logits = model(batch[0])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
    torch.testing.assert_close(task.loss(model, batch), expected)
    right = logits.argmax(-1)[batch[1] != IGNORED] == asked(batch)
    assert task.percent_right(model, batch) == pytest.approx(100 * right.float().mean().item())
