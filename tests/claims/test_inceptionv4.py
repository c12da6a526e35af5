"""The modules, stacks and data of Inception's claim; no training."""

from __future__ import annotations

import torch

from gatewise.claims import inceptionv4
from gatewise.claims.lab.run import Run


def test_the_modules_are_as_published():
    found = inceptionv4.check_modules(Run(0, 100))
    assert all(one.verdict == "shown" for one in found.measured)


def test_stacks_with_and_without_shortcuts_hold_the_same_weights():
    networks = [inceptionv4.DigitNetwork(0.2, shortcut) for shortcut in (True, False)]
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts[0] == counts[1]
    assert networks[0](torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_a_plain_block_drops_the_shortcut_alone():
    stack = inceptionv4.block_stack(24, 1, 1.0, 1 / 16).eval()
    plain = inceptionv4.Plain(stack[0])
    x = torch.randn(2, 24, 8, 8).relu()
    block = stack[0]
    branch = block.project(block.branches(x))
    torch.testing.assert_close(plain(x), branch.relu())
    torch.testing.assert_close(stack(x), (x + branch).relu())
