"""Questions are answered at the cells that ask."""

from __future__ import annotations

import torch

from gatewise.claims.lab.symbols import SymbolTask
from gatewise.networks.image._base import ImageConfig, ImageNetwork


class Echo(ImageNetwork):
    """Features are the picture itself, logits are ten times the features."""

    def forward_features(self, x):
        return x

    def forward_head(self, features):
        return 10 * features.mean(dim=(2, 3))


class Two(SymbolTask):
    symbols, planes, side = 3, 3, 4


def test_logits_are_those_of_single_cells():
    task, network = Two(), Echo(ImageConfig())
    pictures = torch.rand(2, 3, 4, 4)
    cells = torch.tensor([[0, 5], [15, 6]])
    logits = task.logits(network, (pictures, cells))
    assert logits.shape == (2, 2, 3)
    torch.testing.assert_close(logits[1, 1], 10 * pictures[1, :, 1, 2])


def test_percent_right_of_all_and_of_some():
    task, network = Two(), Echo(ImageConfig())
    pictures = task.empty(1)
    pictures[0, 2, 5] = pictures[0, 1, 9] = 1
    batch = (task.as_images(pictures), torch.tensor([[5, 9]]), torch.tensor([[2, 0]]))
    assert task.percent_right(network, batch) == 50
    assert task.percent_right(network, batch, of=torch.tensor([[True, False]])) == 100
    assert task.loss(network, batch) > 1


def test_cells_are_counted_row_by_row():
    assert Two().cell(torch.tensor([[0, 3], [2, 1]])).tolist() == [3, 9]
    assert Two().as_images(Two().empty(2)).is_contiguous(memory_format=torch.channels_last)
