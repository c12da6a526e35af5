"""The identities, the tasks and the accounting of TVConv's claim; no training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims import tvconv
from gatewise.claims.lab.checks import generator, randomise
from gatewise.claims.lab.run import Run
from gatewise.efficiency.cost.count import count
from gatewise.layers.tvconv import TVConv, TVConvOptions


@pytest.mark.parametrize("setting", tvconv.SETTINGS)
def test_fixed_kernels_are_equal(setting):
    assert tvconv.fixed_form_error(*setting, seed=0) < 1e-5


def test_one_kernel_everywhere_is_depthwise(monkeypatch):
    assert tvconv.shared_kernel_error(0) < 1e-5
    plain = tvconv.translation_variant_conv
    monkeypatch.setattr(tvconv, "translation_variant_conv", lambda x, w: plain(x, w + 0.1 * torch.arange(8.0)))
    assert tvconv.shared_kernel_error(0) > 1e-2


def test_forms_are_shown_equal_in_cost(monkeypatch):
    small = TVConvOptions(hidden=4, hidden_layers=0)

    def make(name, seed):
        dim, last = 8, nn.Conv2d(8, 4, 1)
        stem = nn.Conv2d(3, dim, 3, 2, padding=1)
        plain = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        spatial = plain if name.endswith("_base") else TVConv(dim, (48, 48), options=small)
        return randomise(nn.Sequential(stem, spatial, last), seed)

    monkeypatch.setattr(tvconv, "make_network", make)
    found = tvconv.check_forms(Run(0, 100)).measured
    assert [one.verdict for one in found] == ["shown"] * 4 + [None]
    making = 48 * 48 * 9 * (4 * 4 + 4 * 72)
    assert found[-1].interval.value == pytest.approx(making / count(make("_base", 0), torch.zeros(1, 3, 96, 96)).macs)


def test_the_bound_is_what_the_best_shared_kernel_explains():
    task = tvconv.PlacedFilter.draw(3)
    student = tvconv.make_student(None)
    with torch.no_grad():
        student.weight.copy_(task.kernels.mean(dim=(3, 4))[:, None])
    # White noise of finite size, and the border, where taps are missing.
    assert task.r_squared(student) == pytest.approx(task.bound(), abs=0.05)
    assert 0.1 < task.bound() < 0.6


def test_a_perfect_student_explains_everything():
    task = tvconv.PlacedFilter.draw(0)

    class Teacher(nn.Module):
        def forward(self, x):
            return tvconv.translation_variant_conv(x, task.kernels)

    assert task.r_squared(Teacher()) == 1
    assert task.loss(nn.Identity(), task.batch(200, generator(0))).item() > 0.5


def test_kernels_of_the_teacher_are_smooth_and_differ():
    kernels = tvconv.PlacedFilter.draw(0).kernels
    assert kernels.shape == (8, 3, 3, 12, 12)
    steps = kernels.diff(dim=-1).abs().mean()
    assert steps < 0.5 * kernels.std()
    assert (kernels.std(dim=(-2, -1)) > 0.3).all()
    assert not torch.equal(kernels, tvconv.PlacedFilter.draw(1).kernels)


def test_flattening_maps_touches_those_alone():
    student = randomise(tvconv.make_student(TVConvOptions(hidden=4, hidden_layers=1)), 0)
    for of, other in (("affinity", "norm"), ("norm", "affinity")):
        flat = tvconv.without_layout(student, of)
        for name, tensor in flat.named_parameters():
            if of in name:
                assert tensor.std(dim=(-2, -1)).max() < 1e-6
            if other in name or "conv" in name:
                assert torch.equal(tensor, student.get_parameter(name))


def test_the_stroke_in_the_middle_is_alone_there_and_of_the_kind_asked_for():
    task = tvconv.CentralStroke(distractors=0)
    images, labels = task.batch(400, generator(0))
    assert (images.sum(dim=(1, 2, 3)) == 3).all()
    low = (task.side - task.middle) // 2
    inside = images[:, 0, low : low + task.middle, low : low + task.middle]
    assert (inside.sum(dim=(1, 2)) == 3).all()
    rows, columns = inside.sum(dim=2).ne(0).sum(1), inside.sum(dim=1).ne(0).sum(1)
    extents = torch.tensor([(1, 3), (3, 1), (3, 3), (3, 3)])[labels]
    assert torch.equal(torch.stack([rows, columns], 1), extents)
    assert set(labels.tolist()) == {0, 1, 2, 3}


def test_distractors_stay_out_of_the_middle():
    task = tvconv.CentralStroke()
    images, _ = task.batch(400, generator(0))
    low = (task.side - task.middle) // 2
    assert (images[:, 0, low : low + task.middle, low : low + task.middle].sum(dim=(1, 2)) == 3).all()
    assert images.sum(dim=(1, 2, 3)).min() > 6
    assert images[:, 0].sum(dim=0)[0].sum() > 0


def test_networks_differ_in_the_operator_alone():
    plain = tvconv.StrokeNetwork(18, None)
    placed = tvconv.StrokeNetwork(18, TVConvOptions(hidden=4, hidden_layers=0)).eval()
    x = torch.zeros(1, 1, 18, 18)
    with torch.no_grad():
        placed(x)
        assert count(placed, x).macs == count(plain, x).macs
    assert sum(isinstance(module, TVConv) for module in placed.modules()) == 2


def test_times_are_compared_in_the_right_direction(monkeypatch):
    times = {"made in each call": (6.0, 6.0, 6.0), "kept": (2.0, 2.0, 2.0), "depthwise": (1.0, 1.0, 1.0)}
    monkeypatch.setattr(tvconv, "time_by_turns", lambda calls, run, seconds: times)
    monkeypatch.setattr(tvconv, "make_network", lambda name, seed: nn.Identity())
    made, kept = tvconv.time_forms(Run(0, 100)).measured
    assert made.interval.value == 3
    assert kept.interval.value == 2
    assert made.verdict == "shown"
