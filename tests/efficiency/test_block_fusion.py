"""Blocks are found by what they compute, swapped where that is right, and the network computes what it did."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatewise
from gatewise.efficiency import fold
from gatewise.efficiency import optimize as optimize_at_length
from gatewise.efficiency.acceleration import block_fusion as module
from gatewise.efficiency.acceleration.block_fusion import FusedBlock, fuse_blocks, fused_blocks
from gatewise.efficiency.acceleration.plan import Plan, PlanContext
from gatewise.efficiency.acceleration.runners import NotApplicableError
from gatewise.efficiency.timing.measure import Timing
from gatewise.errors import Failure
from gatewise.layers.inverted_residual import InvertedResidual
from gatewise.networks.image.convfirst import BenchmarkStage, ConvFirst, MBConv
from gatewise.ops.block_fusion.plan import Tile
from tests.conftest import small_model
from tests.efficiency.conftest import settle

pytestmark = pytest.mark.untyped


def assert_equal_outputs(model, fused, x):
    with torch.no_grad():
        expected = model(x)
        # Folded norms and another order of float32 sums, layer after layer.
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def fused_modules(model):
    return [part for part in model.modules() if isinstance(part, FusedBlock)]


BLOCKS = {
    "conv first": lambda: ConvFirst(16, 16, expand_ratio=3),
    "conv first, stride 2": lambda: ConvFirst(16, 24, 2, kernel_size=5, activation="gelu"),
    "mbconv": lambda: MBConv(16, 16, activation="relu"),
    "mbconv, stride 2": lambda: MBConv(16, 8, 2, group_width=4, drop_path_rate=0.1),
    "inverted residual": lambda: InvertedResidual(16, 16, 1, 6),
    "inverted residual without expansion": lambda: InvertedResidual(16, 8, 1, 1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_gatewise_are_fused_exactly(name):
    block = settle(BLOCKS[name]())
    fused, report = fuse_blocks(nn.Sequential(block).eval())
    assert type(fused[0]) is FusedBlock
    assert [result.name for result in report.fused] == ["0"]
    assert_equal_outputs(block, fused, torch.randn(2, 16, 9, 7))


def test_a_network_that_is_one_block_is_fused_and_the_original_kept():
    block = settle(ConvFirst(16, 16))
    before = {key: value.clone() for key, value in block.state_dict().items()}
    fused, report = fuse_blocks(block)
    assert type(fused) is FusedBlock
    assert str(report).startswith("1 of 1 blocks fused\nfused  (the network): conv first, tiles planned per input")
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    assert_equal_outputs(block, fused, torch.randn(1, 16, 6, 6))


def test_the_benchmark_stage_of_the_paper_with_its_perceptrons_left_alone():
    stage = settle(BenchmarkStage(16, depth=2, extra_depth=3, expand_ratio=6))
    fused, report = fuse_blocks(stage)
    assert [result.name for result in report.blocks] == ["blocks.0", "blocks.1"]
    assert_equal_outputs(stage, fused, torch.randn(2, 16, 8, 8))


@pytest.mark.parametrize(("name", "count"), [("convfirstnet_small", 6), ("mobilenetv2_100", 17)])
def test_networks_of_gatewise(name, count):
    model = small_model(name) if name == "convfirstnet_small" else settle(gatewise.create_model(name, num_classes=4))
    fused, report = fuse_blocks(model)
    assert len(report.fused) == len(fused_modules(fused)) == count
    assert not report.kept
    assert_equal_outputs(model, fused, torch.randn(1, 3, 64, 64))


def test_blocks_of_torchvision():
    from torchvision.models import mnasnet0_5, mobilenet_v2

    for network, count in ((mobilenet_v2(num_classes=4), 17), (mnasnet0_5(num_classes=4), 16)):
        model = settle(network)
        fused, report = fuse_blocks(model)
        assert len(report.fused) == count
        assert_equal_outputs(model, fused, torch.randn(1, 3, 64, 64))


def test_blocks_of_timm_whose_norms_hold_activations():
    import timm

    for name, count in (("mobilenetv2_050", 17), ("efficientnet_lite0", 16)):
        model = settle(timm.create_model(name, num_classes=4))
        fused, report = fuse_blocks(model)
        assert len(report.fused) == count
        assert_equal_outputs(model, fused, torch.randn(1, 3, 64, 64))


def test_universal_bottlenecks_of_timm_are_fused_where_they_have_three_convolutions():
    import timm

    model = settle(timm.create_model("mobilenetv4_conv_small_050", num_classes=4))
    fused, report = fuse_blocks(model)
    assert {fused.get_submodule(result.name).form for result in report.fused} == {"conv first", "mbconv"}
    assert "4 convolutions where a block has two or three" in {result.note for result in report.kept}
    assert_equal_outputs(model, fused, torch.randn(1, 3, 64, 64))


class Chain(nn.Module):
    """Expansion, depthwise convolution, projection; with hooks for what makes it something else."""

    def __init__(self, spatial=None, act=nn.ReLU, last=nn.Identity):
        super().__init__()
        self.expand, self.project = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.spatial = nn.Conv2d(16, 16, 3, padding=1, groups=16) if spatial is None else spatial
        self.act, self.last = act(), last()

    def forward(self, x):
        return self.finish(x, self.last(self.project(self.act(self.spatial(self.act(self.expand(x)))))))

    def finish(self, x, y):
        return x + y


class Gated(Chain):
    def finish(self, x, y):
        return x * y


class AddedTwice(Chain):
    def finish(self, x, y):
        return x + y + x


class Scaled(Chain):
    def finish(self, x, y):
        return torch.add(x, y, alpha=2)


class Branching(Chain):
    def forward(self, x):
        return self.project(self.spatial(self.expand(x))) if x.sum() > 0 else x


class Inner(Chain):
    def forward(self, x):
        y = self.act(self.expand(x))
        return self.project(self.spatial(y) + y)


class Squeezed(Chain):
    def forward(self, x):
        y = self.spatial(self.act(self.expand(x)))
        return self.project(y * y.mean(dim=(2, 3), keepdim=True).sigmoid())


class DroppedAlways(Chain):
    def finish(self, x, y):
        return x + F.dropout(y, p=0.5, training=True, inplace=False)


class DroppedInTraining(Chain):
    def finish(self, x, y):
        return x + F.dropout(y, p=0.5, training=self.training)


class Functional(Chain):
    def forward(self, x):
        y = F.hardswish(self.spatial(F.relu6(self.expand(x))))
        return self.project(y).add(x)


class ReadsWeight(Chain):
    def forward(self, x):
        return F.conv2d(super().forward(x), self.project.weight.transpose(0, 1))


class Padded(nn.Conv2d):
    """A subclass, which might do anything."""


def kept(model):
    _, report = fuse_blocks(settle(model))
    assert len(report.blocks) == 1
    assert not report.blocks[0].fused
    return report.blocks[0].note


def spatial(**options):
    return nn.Conv2d(16, 16, **{"kernel_size": 3, "padding": 1, "groups": 16} | options)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Gated, "mul takes something other than the previous output"),
        (AddedTwice, "an addition that is not a shortcut around the block"),
        (Scaled, "an addition that is not a shortcut around the block"),
        (Branching, "its forward pass cannot be traced (TraceError)"),
        (Inner, "an addition that is not a shortcut around the block"),
        (Squeezed, "mean needs whole maps"),
        (DroppedAlways, "dropout in the chain"),
        (ReadsWeight, "transpose takes something other than the previous output"),
        (lambda: Chain(last=nn.ReLU), "an activation after the projection"),
        (lambda: Chain(act=nn.Tanh), "Tanh in the chain"),
        (lambda: Chain(act=lambda: nn.GELU(approximate="tanh")), "GELU in the chain"),
        (lambda: Chain(last=lambda: nn.GroupNorm(2, 8)), "GroupNorm in the chain"),
        (lambda: Chain(spatial(dilation=2, padding=2)), "a convolution with dilation (2, 2) and padding (2, 2)"),
        (lambda: Chain(spatial(padding=1, padding_mode="circular")), "a convolution with dilation (1, 1) and"),
        (lambda: Chain(spatial(kernel_size=(3, 1), padding=(1, 0))), "a convolution of (3, 1) with stride (1, 1)"),
        (lambda: Chain(Padded(16, 16, 3, padding=1)), "Padded is a convolution of another kind"),
        (lambda: Chain(nn.Sequential(spatial(), spatial())), "4 convolutions where a block has two or three"),
        (lambda: Chain(nn.MaxPool2d(3, 1, 1)), None),
    ],
)
def test_what_is_no_block_stays_and_the_reason_is_told(build, reason):
    model = build()
    if reason is None:
        # Nothing in it looks like a block: there is no spatial convolution.
        assert not fuse_blocks(settle(model)).report.blocks
    else:
        assert reason in kept(model)


def test_functions_and_methods_count_as_modules_do():
    model = settle(Functional())
    fused, _ = fuse_blocks(model)
    assert isinstance(fused, FusedBlock)
    assert (fused.activation, fused.spatial_activation, fused.residual) == ("relu6", "hardswish", True)
    assert_equal_outputs(model, fused, torch.randn(2, 8, 6, 5))


def test_what_acts_in_training_alone_is_left_out():
    model = settle(DroppedInTraining())
    fused, _ = fuse_blocks(model)
    assert isinstance(fused, FusedBlock)
    assert_equal_outputs(model, fused, torch.randn(2, 8, 6, 5))


def test_norms_that_folding_left_are_folded():
    class Norm(nn.Module):
        """A batch norm of its own kind, as timm's, which `fold` leaves alone."""

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.randn(16))
            self.register_buffer("var", 1 + torch.rand(16))
            self.scale = nn.Parameter(torch.randn(16))

        def forward(self, x):
            return F.silu(F.batch_norm(x, self.mean, self.var, self.scale, None, False, 0.1, 1e-3))

    model = settle(Chain(nn.Sequential(spatial(bias=False), Norm()), act=nn.Identity))
    fused, _ = fuse_blocks(model)
    assert isinstance(fused, FusedBlock)
    assert_equal_outputs(model, fused, torch.randn(2, 8, 6, 5))


def test_raw_layers_in_a_sequence_are_a_block_too():
    layers = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 1), layers))
    fused, report = fuse_blocks(model)
    assert [result.name for result in report.fused] == ["1"]
    assert_equal_outputs(model, fused, torch.randn(1, 3, 6, 6))


def test_a_block_with_hooks_stays():
    model = settle(Chain())
    model.register_forward_hook(lambda part, given, y: y)
    assert kept(model) == "it has hooks, which a fused block would not call"


def test_a_block_that_serves_twice_still_serves_twice():
    shared = Chain()
    model = settle(nn.Sequential(shared, nn.Sequential(shared)))
    fused, _ = fuse_blocks(model)
    assert fused[0] is fused[1][0]
    assert_equal_outputs(model, fused, torch.randn(1, 8, 5, 5))


def test_training_mode_is_refused_because_batch_statistics_need_whole_maps():
    model = settle(ConvFirst(16, 16))
    model.spatial.norm.train()
    with pytest.raises(ValueError, match=r"its part 'spatial.norm' is in training mode; call .eval\(\) first"):
        fuse_blocks(model)


@pytest.fixture
def timed(monkeypatch):
    """Measuring gives what the test says: seconds of the plain block, of fused ones, and how often it was asked."""
    clock = {"plain": 1.0, "fused": 0.5, "asked": 0, "candidates": []}

    def measure(candidates, example, **options):
        clock["asked"] += 1
        clock["candidates"].append(candidates)
        for candidate in candidates.values():
            assert candidate(example).isfinite().all()
        return [
            # The last tile is the fastest.
            Timing(name, 1, (clock["plain"] if name == "plain" else clock["fused"] - 0.01 * position,) * 3)
            for position, name in enumerate(candidates)
        ]

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "cache_bytes", lambda: 8192)
    return clock


def test_with_an_example_the_fastest_tile_is_kept_and_equal_blocks_are_measured_once(timed):
    stage = settle(BenchmarkStage(16, depth=3, extra_depth=0, group_width=4))
    x = torch.randn(1, 16, 16, 16)
    fused, report = fuse_blocks(stage, x)
    assert timed["asked"] == 1
    tiles = [part.tile for name, part in timed["candidates"][0].items() if name != "plain"]
    assert len(set(tiles)) == len(tiles) > 2
    assert [part.tile for part in fused_modules(fused)] == [tiles[-1]] * 3
    assert all(result.ratio.median > 2 for result in report.fused)
    assert f"tiles of {tiles[-1].rows} rows" in str(report)
    assert_equal_outputs(stage, fused, x)


def test_with_an_example_a_block_that_gains_nothing_stays_plain(timed):
    timed["fused"] = 1.0
    stage = settle(BenchmarkStage(16, depth=2, extra_depth=0))
    fused, report = fuse_blocks(stage, torch.randn(1, 16, 8, 8))
    assert not fused_modules(fused)
    assert [result.note for result in report.kept] == ["the plain block is as fast"] * 2
    assert all(0.9 < result.ratio.median < 1.05 for result in report.kept)


def test_a_block_that_does_not_run_is_said_to(timed):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = Chain(), Chain()

        def forward(self, x):
            return self.used(x).sigmoid()

    _, report = fuse_blocks(settle(Skips()), torch.randn(1, 8, 5, 5))
    assert [result.name for result in report.fused] == ["used"]
    assert [(result.name, result.note) for result in report.kept] == [("spare", "it does not run in this network")]


def test_measuring_for_real_gives_a_network_that_computes_the_same():
    stage = settle(BenchmarkStage(8, depth=1, extra_depth=1))
    x = torch.randn(2, 8, 12, 12)
    fused, report = fuse_blocks(stage, x, block_budget_s=0.01)
    assert report.blocks[0].ratio is not None
    assert_equal_outputs(stage, fused, x)


def test_a_network_that_uses_its_blocks_in_another_way_is_noticed(timed):
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Chain()

        def forward(self, x):
            y = self.block(x)
            return 2 * y if hasattr(self.block, "project") else y

    with pytest.raises(Failure, match="uses parts of its blocks in other ways"):
        fuse_blocks(settle(Doubles()), torch.randn(1, 8, 5, 5))


def test_the_plan_runs_any_batch_and_says_why_where_it_does_not_apply(timed):
    model = small_model("convfirstnet_small")
    example = torch.randn(2, 3, 64, 64)
    runner = fused_blocks(PlanContext(model, example))
    for size in (1, 2, 3):
        assert_equal_outputs(model, runner, torch.randn(size, 3, 64, 64))
    half = fused_blocks(PlanContext(model, example), torch.bfloat16)
    with torch.no_grad():
        expected, found = model(example), half(example)
    assert found.dtype == torch.float32
    # Eight bits of mantissa, rounded three times in each of six blocks.
    assert (found - expected).abs().max() < 5e-2 * expected.abs().max()
    timed["fused"] = 1.0
    with pytest.raises(NotApplicableError, match="none of 6 blocks gains by fusion: the plain block is as fast"):
        fused_blocks(PlanContext(model, example))
    with pytest.raises(NotApplicableError, match="no inverted residual in this network"):
        fused_blocks(PlanContext(settle(nn.Conv2d(3, 4, 3)), example))
    with pytest.raises(NotApplicableError, match="for images"):
        fused_blocks(PlanContext(settle(nn.Linear(3, 4)), torch.randn(2, 3)))


def test_optimize_takes_the_plan(timed):
    model = small_model("convfirstnet_small")
    plans = [Plan("blocks fused", fused_blocks)]
    fast = optimize_at_length(model, torch.randn(1, 3, 64, 64), budget_s=0.2, plans=plans)
    (plan,) = [plan for plan in fast.report.plans if plan.name == "blocks fused"]
    assert plan.status in ("chosen", "slower")
    assert plan.error < 1e-4


def test_a_fused_block_counts_and_exports_as_the_plain_one():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = fold(settle(ConvFirst(16, 16))), torch.randn(1, 16, 8, 8)
    fused = fuse_blocks(model).model
    counts = []
    for network in (model, fused):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    exported = torch.export.export(fused, (x,)).module()
    torch.testing.assert_close(exported(x), fused(x), rtol=1e-4, atol=1e-5)
    assert fused.path(x).name == "bands"
    assert "conv first, silu, residual=True, tile=None" in repr(fused)


def test_a_tile_of_another_image_size_serves_any():
    model = settle(MBConv(16, 16))
    fused = FusedBlock(module.read_block(fold(model)), Tile(5, 9, 32))
    for size in ((1, 1), (4, 13), (23, 3)):
        assert_equal_outputs(model, fused, torch.randn(2, 16, *size))
