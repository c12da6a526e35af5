"""The identities, the accounting and the variants of MobileNetV2's claim; no training."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gatewise.claims import mobilenetv2
from gatewise.claims.lab.checks import generator, randomise
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import build
from gatewise.networks.image.mobilenetv2 import MobileNetV2, MobileNetV2Config


@pytest.fixture(scope="module")
def network():
    rows = ((1, 8, 1, 1), (6, 8, 2, 2), (6, 16, 2, 2))
    return randomise(MobileNetV2(MobileNetV2Config(rows=rows, num_classes=3)), 0)


def test_split_blocks_are_equal_to_whole_ones(network):
    images = torch.randn(2, 3, 31, 40)
    assert mobilenetv2.split_error(network, images) < 1e-5
    assert mobilenetv2.split_error(network.double(), images.double()) < 1e-12
    network.float()


def test_a_wrong_split_would_be_noticed(network, monkeypatch):
    class Off(mobilenetv2.SplitInvertedResidual):
        def forward(self, x):
            return super().forward(x) + 1e-2

    monkeypatch.setattr(mobilenetv2, "SplitInvertedResidual", Off)
    assert mobilenetv2.split_error(network, torch.randn(1, 3, 32, 32)) > 1e-4


def test_the_largest_tensor_shrinks_with_the_parts():
    block = mobilenetv2.InvertedResidual(16, 24, 2, 6).eval()
    x = torch.randn(1, 16, 112, 112)
    whole = mobilenetv2.largest_tensor(block, x)
    split = mobilenetv2.largest_tensor(mobilenetv2.SplitInvertedResidual(block, 4), x)
    assert whole == 4 * 96 * 112 * 112
    assert split == whole / 4


@pytest.mark.parametrize(("dim", "low", "high"), [(2, 0.3, 0.7), (3, 0.1, 0.5), (15, 1e-6, 1e-3), (30, 1e-8, 1e-5)])
def test_a_relu_loses_much_in_few_dimensions(dim, low, high):
    draw = generator(0)
    errors = [mobilenetv2.readout_error(dim, draw) for _ in range(20)]
    assert low < sum(errors) / len(errors) < high
    assert 0 <= min(errors) <= max(errors) <= 1


def test_the_bottleneck_figure_repeats_itself():
    first, second = (mobilenetv2.measure_bottleneck(Run(4, 100)) for _ in range(2))
    assert first.measured == second.measured
    assert all(one.verdict in (None, "shown") for one in first.measured)


def test_bytes_are_those_of_the_published_network():
    blocks = mobilenetv2.count_bytes(MobileNetV2(MobileNetV2Config()), 224)
    assert len(blocks) == 17
    # Channels and side of the first two blocks, two bytes a value.
    assert blocks[0] == mobilenetv2.BlockBytes(2 * 32 * 112**2, 2 * 32 * 112**2, 2 * 16 * 112**2)
    assert blocks[1] == mobilenetv2.BlockBytes(2 * 16 * 112**2, 2 * 96 * 112**2, 2 * 24 * 56**2)
    assert max(block.output for block in blocks) == 401_408


def test_parts_divide_the_inner_tensor_alone():
    block = mobilenetv2.BlockBytes(input=10, hidden=61, output=5)
    assert [block.materialized(parts) for parts in (1, 4)] == [76, 31]


def test_memory_is_accounted_without_computing():
    found = mobilenetv2.account_memory(Run(0, 100))
    assert found.measured[0].interval.value == pytest.approx(401.408)
    assert [one.verdict for one in found.measured] == ["shown", None, None, "shown"]


def test_variants_are_equal_but_for_one_thing():
    networks = {
        name: build(0, partial(mobilenetv2.make_network, change)).eval()
        for name, change in mobilenetv2.VARIANTS.items()
    }
    linear, relu6, cut = networks.values()
    weights = [torch.cat([p.flatten() for p in one.parameters()]) for one in networks.values()]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    x = torch.randn(2, 8, 7, 7)
    blocks = [next(b for b in mobilenetv2.blocks_of(one) if b.expand is not None) for one in (linear, relu6, cut)]
    with torch.no_grad():
        y, bounded, alone = (block(x) for block in blocks)
    torch.testing.assert_close(y, alone + x)
    torch.testing.assert_close(bounded, alone.clamp(0, 6) + x)


def test_clothes_are_normalized_pictures_with_labels():
    task = mobilenetv2.Clothes()
    images, labels = task.batch(64, generator(0))
    again, _ = task.batch(64, generator(0))
    assert images.shape == (64, 1, 28, 28)
    assert torch.equal(images, again)
    assert abs(images.mean()) < 0.3
    assert len(labels.unique()) == 10
    assert (len(task.train[1]), len(task.test[1])) == (10_000, 2_000)


def test_accuracy_counts_the_test_images():
    task = mobilenetv2.Clothes()

    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.eye(10)[3].expand(len(x), -1)

    assert task.percent_right(Always()) == 10
