"""What every language model promises."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency import count
from tests.conftest import SMALL_SEQUENCES, small_language_model

pytestmark = pytest.mark.parametrize("name", SMALL_SEQUENCES)

# Sums over time are taken in another order in pieces, and by Fourier transforms in some mixers.
TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


def tokens(model, *shape):
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 16), (1, 33)])
def test_logits_for_any_length(name, shape):
    model = small_language_model(name)
    logits = model(tokens(model, *shape))
    assert logits.shape == (*shape, model.config.vocab_size)
    assert logits.isfinite().all()


def test_nothing_looks_ahead(name):
    model = small_language_model(name)
    before = tokens(model, 2, 20)
    after = before.clone()
    after[:, 12:] = (after[:, 12:] + 1) % model.config.vocab_size
    torch.testing.assert_close(model(after)[:, :12], model(before)[:, :12], **TOLERANCE)


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 3), (16,), tuple(range(1, 24))])
def test_pieces_with_a_state_equal_the_whole(name, cuts):
    model = small_language_model(name)
    x = tokens(model, 2, 24)
    whole, _ = model.forward_features(x)
    pieces, state = [], None
    for piece in x.tensor_split(cuts, dim=1):
        hidden, state = model.forward_features(piece, state)
        pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **TOLERANCE)


def test_packed_sequences_equal_separate_ones(name):
    model = small_language_model(name)
    x = tokens(model, 1, 24)
    bounds = [0, 1, 9, 9, 24]
    packed, _ = model.forward_features(x, cu_seqlens=torch.tensor(bounds))
    separate = [model.forward_features(x[:, a:b])[0] for a, b in pairwise(bounds) if b > a]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), **TOLERANCE)


def test_logits_are_hidden_states_times_the_head(name):
    model = small_language_model(name)
    x = tokens(model, 2, 9)
    hidden, _ = model.forward_features(x)
    torch.testing.assert_close(model(x), hidden @ model.head_weight.T, **TOLERANCE)


def test_it_can_be_counted(name):
    model = small_language_model(name)
    assert count(model, tokens(model, 1, 8)).macs > 0


def test_gradient_checkpointing_changes_no_gradient(name):
    model = small_language_model(name)
    x = tokens(model, 2, 12)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        model(x).square().mean().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


def test_greedy_generation_takes_the_most_likely_token_each_time(name):
    model = small_language_model(name)
    prompt = tokens(model, 2, 5)
    generated = model.generate(prompt, 4, temperature=0.0)
    assert torch.equal(generated[:, :5], prompt)
    x = prompt
    for _ in range(4):
        x = torch.cat([x, model(x)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, x)


@pytest.mark.parametrize("layout", ["official"])
def test_weights_survive_the_published_names(name, layout):
    model, other = small_language_model(name), small_language_model(name)
    for parameter in other.parameters():
        parameter.data.zero_()
    load_state(other, export_state(model, layout))
    for (key, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3), r"integer tokens \(batch, time\), not torch.float32 of shape \(2, 3\)"),
        (torch.zeros(3, dtype=torch.long), r"integer tokens \(batch, time\)"),
        (torch.zeros(2, 0, dtype=torch.long), "at least one token"),
        (torch.zeros(0, 3, dtype=torch.long), r"at least one sequence, not a batch of shape \(0, 3\)"),
        (torch.full((1, 2), 10**6), r"tokens must be 0 to \d+ \(the vocabulary\), not 1000000"),
        (torch.full((1, 2), -1), "not -1"),
    ],
)
def test_wrong_tokens_are_refused(name, x, message):
    with pytest.raises(ValueError, match=message):
        small_language_model(name)(x)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [([1, 4], "must rise from 0 to the length 6"), ([0, 4], "length 6"), ([0, 5, 3, 6], "must rise"), ([0], "two or")],
)
def test_wrong_boundaries_are_refused(name, bounds, message):
    model = small_language_model(name)
    with pytest.raises(ValueError, match=message):
        model(tokens(model, 1, 6), cu_seqlens=torch.tensor(bounds))


def test_packing_needs_one_row_and_no_state(name):
    model = small_language_model(name)
    bounds = torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match="batch must be 1, not 2"):
        model(tokens(model, 2, 6), cu_seqlens=bounds)
    _, state = model.forward_features(tokens(model, 1, 3))
    with pytest.raises(ValueError, match="either a state or cu_seqlens"):
        model.forward_features(tokens(model, 1, 6), state, cu_seqlens=bounds)
