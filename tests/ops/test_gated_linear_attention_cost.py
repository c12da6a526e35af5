"""What counters see of gated linear attention."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

import gatewise
from gatewise.ops import bidirectional_gated_linear_attention, gated_linear_attention


def flops(run) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def inputs(device="cpu"):
    q, k, v = (torch.randn(2, 20, 3, width, device=device, requires_grad=True) for width in (16, 16, 32))
    return q, k, v, torch.zeros(2, 20, 3, 16, device=device)


RECURRENCE = 2 * 2 * (2 * 20 * 3 * 16 * 32)


def test_flops_are_those_of_the_recurrence():
    q, k, v, g = inputs()
    assert flops(lambda: gated_linear_attention(q, k, v, g)) == RECURRENCE
    assert flops(lambda: bidirectional_gated_linear_attention(q, k, v, g, g)) == 2 * RECURRENCE
    assert flops(lambda: gated_linear_attention(q, k, v, g)[0].sum().backward()) == 3 * RECURRENCE


def test_grouped_keys_cost_their_own_outer_products_alone():
    q, k, v, g = (x[:, :, :1] if name != "q" else x for name, x in zip("qkvg", inputs(), strict=True))
    assert flops(lambda: gated_linear_attention(q, k, v, g)) == RECURRENCE * 2 // 3


def test_nothing_is_looked_at_without_storage():
    q, k, v, g = inputs("meta")
    assert gated_linear_attention(q, k, v, g)[0].shape == (2, 20, 3, 32)


def test_a_card_counts_it():
    card = gatewise.model_card("gla_tiny")
    config = gatewise.create_model("gla_tiny").config
    recurrence = 2 * config.depth * 256 * config.key_dim * config.value_dim // config.num_heads
    weights = card.parameters - sum(p.numel() for p in gatewise.create_model("gla_tiny").parameters() if p.ndim < 2)
    # Every weight matrix, the tied head included, meets every token once.
    assert card.macs == 256 * weights + recurrence
