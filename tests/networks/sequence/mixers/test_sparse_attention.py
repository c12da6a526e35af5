"""Attention from a few positions."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from gatewise.layers.causal_attention import KeyValueCache, causal_attention
from gatewise.networks.sequence.mixers.sparse_attention import (
    LearnedSelectionAttention,
    ProgrammaticAttention,
    attend_from,
    occurred_before,
)


@pytest.fixture
def x():
    return torch.randn(2, 12, 8, dtype=torch.float64)


def learned(**options) -> LearnedSelectionAttention:
    mixer = LearnedSelectionAttention(8, 2, dropout=0.0, **options).double().eval()
    mixer.score.weight.data.mul_(5)
    return mixer


def test_tokens_that_occurred_before():
    tokens = torch.tensor([[3, 1, 3, 1, 2, 3], [0, 1, 2, 3, 4, 4]])
    expected = [[False, False, True, True, False, True], [False, False, False, False, False, True]]
    assert occurred_before(tokens).tolist() == expected


def test_tokens_of_another_sequence_do_not_count():
    tokens = torch.tensor([[3, 1, 3, 3, 1, 3]])
    packed = occurred_before(tokens, torch.tensor([0, 3, 3, 6]))
    assert packed.tolist() == [[False, False, True, False, False, True]]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("earlier", [0, 5])
def test_selected_queries_get_what_all_would(share, earlier):
    q = torch.randn(3, 12, 2, 4, dtype=torch.float64)
    cache = KeyValueCache(*torch.randn(2, 3, 12 + earlier, 2, 4, dtype=torch.float64))
    selected = torch.rand(3, 12) < share
    everywhere = causal_attention(q, cache.keys, cache.values).flatten(2)
    assert torch.allclose(attend_from(q, cache, selected), everywhere * selected[..., None], atol=1e-12)


def test_positions_that_are_not_selected_hand_on_nothing(x):
    mixer = ProgrammaticAttention(8, 2, dropout=0.0).double()
    selected = torch.rand(2, 12) < 0.4
    y, _ = mixer(x, selected=selected)
    assert torch.allclose(y, mixer(x)[0] * selected[..., None], atol=1e-12)


def test_in_training_every_position_attends_by_its_score(x):
    mixer = learned().train()
    q, k, v = mixer.project(x)
    attended = mixer.out_proj(causal_attention(q, k, v).flatten(2))
    score = torch.sigmoid(x @ mixer.score.weight.t())
    assert torch.allclose(mixer(x)[0], attended * score + x, atol=1e-12)


@pytest.mark.parametrize("k", [None, 3])
def test_looking_ahead_the_best_of_the_sequence_attend(x, k):
    mixer = learned(k=k, look_ahead=True)
    everywhere = deepcopy(mixer).train()(x)[0]
    scores = torch.sigmoid(x @ mixer.score.weight.t()).squeeze(-1)
    best = scores >= scores.sort(dim=1, descending=True).values[:, [3 if k is None else k - 1]]
    assert best.sum().item() == 2 * (4 if k is None else k)
    assert torch.allclose(mixer(x)[0], torch.where(best[..., None], everywhere, x), atol=1e-12)


@pytest.mark.parametrize("k", [None, 3])
def test_otherwise_the_best_so_far_attend(x, k):
    mixer = learned(k=k)
    everywhere = deepcopy(mixer).train()(x)[0]
    scores = torch.sigmoid(x @ mixer.score.weight.t()).squeeze(-1)
    y = mixer(x)[0]
    for row in range(2):
        for t in range(12):
            count = k or -int(-((t + 1) ** 0.5) // 1)
            best = scores[row, : t + 1].sort(descending=True).values[min(count, t + 1) - 1]
            expected = everywhere[row, t] if scores[row, t] >= best else x[row, t]
            assert torch.allclose(y[row, t], expected, atol=1e-12)


def test_penalty_is_what_scores_exceed_their_share(x):
    mixer = learned(k=3).train()
    mixer(x)
    mean = torch.sigmoid(x @ mixer.score.weight.t()).mean()
    assert torch.allclose(mixer.penalty, 0.001 * (mean - 3 / 12).clamp(min=0))
    mixer(x[:1], cu_seqlens=torch.tensor([0, 5, 12]))
    mean = torch.sigmoid(x[:1] @ mixer.score.weight.t()).mean()
    assert torch.allclose(mixer.penalty, 0.001 * (mean - 6 / 12).clamp(min=0))
    mixer.eval()(x)
    assert mixer.penalty is None


def test_a_copy_leaves_the_penalty_behind(x):
    mixer = learned().train()
    mixer(x)
    assert deepcopy(mixer).penalty is None
    assert mixer.penalty is not None


def test_packed_sequences_choose_by_themselves_when_looking_ahead(x):
    mixer = learned(look_ahead=True)
    packed, _ = mixer(x[:1], cu_seqlens=torch.tensor([0, 4, 12]))
    separate = torch.cat([mixer(x[:1, :4])[0], mixer(x[:1, 4:])[0]], dim=1)
    assert torch.allclose(packed, separate, atol=1e-12)


def test_a_choice_that_looks_ahead_cannot_be_continued(x):
    mixer = learned(look_ahead=True)
    _, state = mixer(x[:, :6])
    with pytest.raises(ValueError, match="cannot be continued: pass look_ahead=False"):
        mixer(x[:, 6:], state)


def test_the_number_of_positions_is_positive():
    with pytest.raises(ValueError, match="must be positive, not 0"):
        LearnedSelectionAttention(8, k=0)
