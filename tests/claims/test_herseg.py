"""The checks, networks and pictures of HER-Seg's claim; no training."""

from __future__ import annotations

import math

import pytest
import torch

from gatewise.claims import herseg
from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.run import Run


def test_what_can_be_computed_is_as_stated():
    assert all(one.verdict == "shown" for one in herseg.check_attention(Run(0, 100)).measured)


def test_memory_at_small_sizes(monkeypatch):
    monkeypatch.setattr(herseg, "SIDES", (64, 128, 256))
    found = herseg.measure_memory(Run(0, 100)).measured
    assert found[1].interval.value > 4
    assert found[2].interval.value == pytest.approx(16, rel=0.06)


def test_the_published_loss_by_hand():
    logits = torch.zeros(1, 1, 2, 2)
    masks = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    expected = 0.8 * 0.5 + 0.2 * 0.8 * 0.25 * math.log(2)
    assert herseg.segmentation_loss(logits, masks).item() == pytest.approx(expected)


def test_networks_give_a_logit_per_pixel():
    x = torch.randn(2, 3, 64, 64)
    assert herseg.Segmenter()(x).shape == (2, 1, 64, 64)
    assert herseg.UNet()(x).shape == (2, 1, 64, 64)
    assert sum(p.numel() for p in herseg.UNet().parameters()) == pytest.approx(1.93e6, rel=0.02)


def test_pictures_show_what_their_masks_say():
    images, masks = herseg.draw_ellipses(50, 64, generator(0))
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert 0.02 < masks.mean() < 0.3
    inside = (images.mean(dim=1, keepdim=True) * masks).sum() / masks.sum()
    assert inside.item() == pytest.approx(1.0, abs=0.05)
    # Strokes are as bright.
    outside = images.mean(dim=1, keepdim=True)[masks == 0]
    assert (outside > 0.8).float().mean() > 0.02
    again, _ = herseg.draw_ellipses(50, 64, generator(0))
    assert torch.equal(images, again)
