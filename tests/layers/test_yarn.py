"""Rotary frequencies of extended contexts."""

from __future__ import annotations

import math

import pytest
import torch

from gatewise.layers.rotary import inverse_frequencies, rotate, rotate_by, rotation
from gatewise.layers.yarn import Yarn, yarn_frequencies


def share_by_turns(turns, slow=1.0, fast=32.0):
    """The paper's ramp, eq. (18)."""
    return 0.0 if turns < slow else 1.0 if turns > fast else (turns - slow) / (fast - slow)


def test_the_blend_over_turns_is_that_of_the_paper():
    yarn = Yarn(8.0, 2048, blend="turns")
    expected = []
    for i in range(64):
        frequency = 10000.0 ** (-2 * i / 128)
        kept = share_by_turns(2048 * frequency / (2 * math.pi))
        expected.append((1 - kept) * frequency / 8.0 + kept * frequency)
    torch.testing.assert_close(yarn_frequencies(yarn, 128), torch.tensor(expected), rtol=1e-5, atol=0)


def test_the_blend_over_channels_rises_between_rounded_bounds():
    """A head of 128 channels trained on 4096 tokens: 32 turns at pair 20.9, one turn at pair 45.03."""
    plain = inverse_frequencies(128)
    found = yarn_frequencies(Yarn(4.0, 4096), 128) / plain
    torch.testing.assert_close(found[:21], torch.ones(21))
    torch.testing.assert_close(found[46:], torch.full((18,), 0.25))
    torch.testing.assert_close(found[33], torch.tensor(1 - 0.75 * (33 - 20) / (46 - 20)))
    assert (found.diff() <= 0).all()


def test_a_factor_of_one_changes_nothing():
    yarn = Yarn(1.0, 4096)
    torch.testing.assert_close(yarn_frequencies(yarn, 64, 500000.0), inverse_frequencies(64, 500000.0))
    assert yarn.rotary_magnitude == 1.0


def test_the_magnitude_follows_the_factor_unless_given():
    assert Yarn(4.0, 8).rotary_magnitude == pytest.approx(1.1386294)
    assert Yarn(4.0, 8, magnitude=1.0).rotary_magnitude == 1.0


def test_short_contexts_slow_every_pair_down():
    """Where even the fastest pair does not turn once, the whole embedding is interpolated."""
    torch.testing.assert_close(yarn_frequencies(Yarn(2.0, 6), 8)[1:], inverse_frequencies(8)[1:] / 2)


def test_a_rotation_can_be_shared():
    x, positions, frequencies = torch.randn(2, 5, 3, 8), torch.arange(5), inverse_frequencies(8)
    assert torch.equal(rotate_by(x, *rotation(positions, frequencies, 1.2)), rotate(x, positions, frequencies, 1.2))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 0.5, "original_length": 8}, "factor of at least 1, not 0.5"),
        ({"factor": 2.0, "original_length": 0}, "original_length must be positive, not 0"),
        ({"factor": 2.0, "original_length": 8, "slow_turns": 40.0}, "slow_turns 40.0 and fast_turns 32.0"),
        ({"factor": 2.0, "original_length": 8, "blend": "pairs"}, "blend must be channels or turns, not 'pairs'"),
    ],
)
def test_impossible_extensions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Yarn(**fields)
