"""The checks of Activator's claim; no training."""

from __future__ import annotations

import pytest
import torch

from gatewise.claims import activator
from gatewise.claims.lab.run import Run


@pytest.mark.parametrize("check", [activator.check_order, activator.count_cost])
def test_what_can_be_computed_is_as_stated(check):
    assert all(one.verdict == "shown" for one in check(Run(0, 100)).measured)


def test_patches_are_moved_whole():
    x = torch.arange(2 * 8 * 12.0).reshape(1, 2, 8, 12)
    moved = activator.permute_patches(x, torch.tensor([5, 1, 2, 3, 4, 0]))
    assert torch.equal(moved[:, :, :4, :4], x[:, :, 4:, 8:])
    assert torch.equal(moved[:, :, :4, 4:], x[:, :, :4, 4:])
    assert torch.equal(activator.permute_patches(x, torch.arange(6)), x)
