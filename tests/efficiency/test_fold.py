"""Folding changes the modules, never the outputs, never the network that was given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.efficiency import fold
from tests.conftest import SMALL, small_model
from tests.efficiency.conftest import settle
from tests.networks.image.test_contract import images as images_for


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in model.modules())


def assert_equal_outputs(model, folded, x):
    with torch.no_grad():
        expected = model(x)
        # Folding reorders float32 products; a layer moves by a few units in the last place.
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", SMALL)
def test_every_network_folds_exactly(name):
    model = small_model(name)
    folded = fold(model)
    assert_equal_outputs(model, folded, images_for(name))
    assert norms(folded) == 0


def test_a_norm_behind_a_convolution_is_folded_and_the_original_kept(tiny, images):
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    folded = fold(tiny)
    assert isinstance(folded.norm, nn.Identity)
    assert folded.conv.bias is not None
    assert_equal_outputs(tiny, folded, images)
    assert isinstance(tiny.norm, nn.BatchNorm2d)
    assert all(torch.equal(before[key], value) for key, value in tiny.state_dict().items())


def test_merged_is_asked_of_the_outermost_module_first_and_then_of_what_it_returned():
    asked = []

    class Inner(nn.Module):
        def merged(self):
            asked.append("inner")
            return nn.Identity()

        def forward(self, x):
            return x

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def merged(self):
            asked.append("outer")
            return nn.Sequential(self.inner)

        def forward(self, x):
            return self.inner(x)

    folded = fold(nn.Sequential(Outer(Inner())).eval())
    assert asked == ["outer", "inner"]
    assert isinstance(folded[0], nn.Sequential)
    assert isinstance(folded[0][0], nn.Identity)


def test_a_module_that_serves_twice_is_merged_once_and_still_shared():
    class Shared(nn.Linear):
        def merged(self):
            plain = nn.Linear(self.in_features, self.out_features)
            plain.load_state_dict(self.state_dict())
            return plain

    shared = Shared(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    folded = fold(model)
    assert type(folded[0]) is nn.Linear
    assert folded[0] is folded[2]
    assert_equal_outputs(model, folded, torch.randn(3, 4))


def test_what_cannot_be_traced_is_taken_apart():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.outside = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.unit(x)
            return self.outside(y) if x.sum() > 0 else y

    model = settle(Branches())
    folded = fold(model)
    assert isinstance(folded.unit[1], nn.Identity)
    assert isinstance(folded.outside, nn.BatchNorm2d)
    assert_equal_outputs(model, folded, torch.rand(2, 3, 4, 4))


class ConvTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x)


class NormTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.norm(self.conv(x)))


class Tapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class WeightRead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.conv.weight.sum()


@pytest.mark.parametrize("network", [ConvTwice, NormTwice, Tapped, WeightRead])
def test_a_norm_stays_where_folding_it_would_change_something_else(network):
    model = settle(network())
    folded = fold(model)
    assert norms(folded) == 1
    assert_equal_outputs(model, folded, torch.randn(2, 3, 4, 4))


def test_a_norm_behind_a_linear_map_is_folded_for_rows_of_features():
    model = settle(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    folded = fold(model)
    assert norms(folded) == 0
    assert_equal_outputs(model, folded, torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"not for shape \(2, 6, 6\)"):
        folded(torch.randn(2, 6, 4))


def test_training_mode_is_refused_by_part(tiny):
    tiny.norm.train()
    with pytest.raises(ValueError, match=r"its part 'norm' is in training mode; call .eval\(\) first"):
        fold(tiny)


def test_merged_must_return_a_module():
    class Wrong(nn.Module):
        def merged(self):
            return None

    with pytest.raises(TypeError, match="must return a module, not NoneType"):
        fold(Wrong().eval())
