"""Drawing tokens."""

from __future__ import annotations

import pytest
import torch

from gatewise.networks.sequence._sampling import Sampling
from tests.conftest import small_language_model


@pytest.fixture
def model():
    return small_language_model("gla_tiny")


def draws(sampling, logits, count=400):
    generator = torch.Generator().manual_seed(0)
    return {int(sampling.draw(logits, generator)) for _ in range(count)}


LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def test_all_tokens_are_drawn_without_limits():
    assert draws(Sampling(), LOGITS) == {0, 1, 2, 3}


def test_top_k_keeps_the_most_likely():
    assert draws(Sampling(top_k=2), LOGITS) == {0, 1}


def test_top_p_keeps_the_fewest_that_reach_it():
    assert draws(Sampling(top_p=0.75), LOGITS) == {0, 1}
    assert draws(Sampling(top_p=0.85), LOGITS) == {0, 1, 2}
    assert draws(Sampling(top_p=0.01), LOGITS) == {0}


def test_temperature_sharpens():
    generator = torch.Generator().manual_seed(0)
    cold = [int(Sampling(temperature=0.1).draw(LOGITS, generator)) for _ in range(200)]
    assert sum(token == 0 for token in cold) > 190


def test_temperature_zero_takes_the_most_likely():
    assert draws(Sampling(temperature=0.0), LOGITS, 3) == {0}


def test_same_generator_same_text(model):
    prompt = torch.tensor([[1, 2, 3]])
    texts = [model.generate(prompt, 6, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], model.generate(prompt, 6, generator=torch.Generator().manual_seed(6)))


def test_rows_that_stopped_are_filled_up_and_all_stopped_ends(model):
    prompt = torch.tensor([[1, 2], [3, 4]])
    free = model.generate(prompt, 8, temperature=0.0)
    stop = int(free[0, 2])
    stopped = model.generate(prompt, 8, temperature=0.0, stop_tokens=[stop])
    assert (stopped[0, 2:] == stop).all()
    both = model.generate(prompt[:1], 8, temperature=0.0, stop_tokens=[stop])
    assert both.shape == (1, 3)


def test_streaming_gives_the_same_tokens_one_by_one(model):
    prompt = torch.tensor([[1, 2, 3]])
    whole = model.generate(prompt, 5, temperature=0.0)
    assert torch.equal(torch.stack(list(model.stream(prompt, 5, temperature=0.0)), dim=1), whole[:, 3:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0 .* finite, not nan"),
        ({"temperature": float("inf")}, "temperature must be 0 .* finite, not inf"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, not nan"),
        ({"top_k": 0}, "top_k must be positive, not 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, not 1.5"),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[1]]), 2, **options)


def test_at_least_one_new_token(model):
    with pytest.raises(ValueError, match="max_new_tokens must be positive, not 0"):
        model.generate(torch.tensor([[1]]), 0)
