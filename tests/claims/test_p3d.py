"""The identities, the accounting and the task of P3D's claim; no training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims import p3d
from gatewise.claims.lab.checks import generator, randomise
from gatewise.claims.lab.run import Run
from gatewise.networks.video.p3d import WIRINGS, Pseudo3dConv


@pytest.mark.parametrize("check", [p3d.check_identities, p3d.count_parameters])
def test_what_can_be_computed_is_as_stated(check):
    assert all(one.verdict in ("shown", None) for one in check(Run(0, 100)).measured)


def test_what_passes_on_and_what_is_silent():
    temporal = randomise(Pseudo3dConv(4, "A"), 0).temporal
    x = torch.randn(1, 4, 5, 2, 3)
    p3d.pass_through(temporal)
    torch.testing.assert_close(temporal(x), x.relu())
    p3d.silence(temporal)
    assert not temporal(x).any()


def test_a_wrong_wiring_would_be_noticed(monkeypatch):
    monkeypatch.setitem(WIRINGS, "C", lambda spatial, temporal, x: spatial(x))
    assert p3d.wiring_error("C", 0) == pytest.approx(0.5)


def test_full_kernels_are_counted_from_the_widths():
    widths = [64] * 3 + [128] * 4 + [256] * 6
    more = sum(15 * width**2 - 2 * width for width in widths)
    assert p3d.with_full_kernels("p3d63") == p3d.parameters("p3d63") + more


def test_the_forms_agree(monkeypatch):
    monkeypatch.setattr(p3d, "SHAPES", {"a stage": (8, 4, 6, 5)})
    monkeypatch.setattr(p3d, "time_by_turns", lambda calls, run, seconds: dict.fromkeys(calls, (1.0, 2.0, 1.0)))
    difference, *speeds = p3d.time_forms(Run(0, 100)).measured
    assert difference.verdict == "shown"
    assert all(one.interval.value == 1 for one in speeds)


@pytest.fixture(scope="module")
def batch():
    return p3d.MovingSquare().batch(64, generator(0))


def test_squares_move_two_pixels_a_frame_and_come_back(batch):
    clips, answers = batch
    assert clips.shape == (64, 3, 16, 48, 48)
    assert set(answers.tolist()) == {0, 1, 2, 3}
    for clip, answer in zip(clips, answers.tolist(), strict=True):
        down, right = p3d.MovingSquare.directions[answer]
        torch.testing.assert_close(clip[:, 1:], clip[:, :-1].roll((2 * down, 2 * right), dims=(2, 3)))


def test_every_frame_has_one_square_of_one_color(batch):
    clips, _ = batch
    assert ((clips > 0).flatten(3).sum(dim=3) == 144).all()
    colors = clips.flatten(2).amax(dim=2)
    torch.testing.assert_close(clips.sum(dim=(3, 4)), (144 * colors)[:, :, None].expand(-1, -1, 16))


def test_networks_differ_in_what_sees_time():
    networks = {name: p3d.make_network(*options) for name, options in p3d.NETWORKS.items()}
    letters = {name: "".join(middle.wiring for middle in p3d.middles(network)) for name, network in networks.items()}
    assert letters == {"A, B, C mixed": "ABC", "A": "AAA", "B": "BBB", "C": "CCC", "frames alone": "ABC"}
    alone = p3d.middles(networks["frames alone"])
    assert all(isinstance(middle.temporal, nn.Identity) for middle in alone)


def test_confusions_are_shares_by_direction():
    class Left(nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(len(x), 4)

    answers = torch.tensor([0, 1, 1, 3])
    confusion = p3d.MovingSquare().confusion(Left(), (torch.zeros(4, 1), answers))
    assert confusion[:, 1].tolist() == [0.25, 0.5, 0, 0.25]
    assert p3d.axis_right(confusion) == 75
