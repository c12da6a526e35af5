"""A task that a head answers rarely: what it says otherwise has to be nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from gatewise.claims.lab.training import Batch
from gatewise.networks.sequence.gated_attention import GatedAttention

CONTENT, FLAG = 20, 4
"""Channels of a token's content, and of each of its three flags."""


class RareCopy:
    """Say a vector again when a rare trigger asks for it; say nothing, a vector of zeros, everywhere else.

    A token is a vector: content, a flag that it is an ordinary token or else a trigger, and one that it is marked.
    Contents of a sequence resemble each other, so that their mean is not nothing.

    Args:
        constant_first: whether all sequences begin with the same vector: a place to park attention on.
    """

    length, rarity, common = 32, 0.1, 0.5

    def __init__(self, constant_first: bool) -> None:
        self.constant_first = constant_first

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Inputs and targets (B, T, D), and whether a token is a trigger (B, T)."""
        shape = (size, self.length)
        own = torch.randn(*shape, CONTENT, generator=generator)
        shared = torch.randn(size, 1, CONTENT, generator=generator)
        content = self.common**0.5 * shared + (1 - self.common) ** 0.5 * own
        if self.constant_first:
            content[:, 0] = 1
        triggers = torch.rand(shape, generator=generator) < self.rarity
        triggers[:, :6] = False
        marked = torch.arange(self.length) == torch.randint(1, 5, (size, 1), generator=generator)
        asked_for = content[marked][:, None]
        # Flags of 2 in four channels each weigh as much as the content.
        flags = [2.0 * flag[..., None].expand(*shape, FLAG) for flag in (~triggers, marked, triggers)]
        targets = torch.zeros(*shape, CONTENT + 3 * FLAG)
        targets[..., :CONTENT] = asked_for * triggers[..., None]
        return torch.cat([content, *flags], dim=-1), targets, triggers

    def loss(self, model: GatedAttention, batch: Batch) -> Tensor:
        """Squared error of a token, summed over channels."""
        return (model(batch[0])[0] - batch[1]).square().sum(dim=-1).mean()
