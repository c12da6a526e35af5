"""Bounds equal the published numbers, whatever the network; blocks are found; times are held against them."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gatewise.efficiency.bounds.device import Device
from gatewise.efficiency.bounds.waterline import LEVELS, waterline

DIGESTS = Path(__file__).parents[1] / "fingerprints" / "convfirst"
CPU = Device("a CPU", {"float32": 100e9}, 20e9, noise=0.1)


class ConvFirst(nn.Module):
    """The block of arXiv:2404.03617 with its norms folded away."""

    def __init__(self, dim, expand, group_width):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim // group_width, bias=False)
        self.exp = nn.Conv2d(dim, dim * expand, 1, bias=False)
        self.prj = nn.Conv2d(dim * expand, dim, 1, bias=False)

    def forward(self, x):
        return self.prj(F.silu(self.exp(self.conv(x)))) + x


class MBConv(nn.Module):
    """The same for the inverted residual with groups."""

    def __init__(self, dim, expand, group_width, stride=1):
        super().__init__()
        hidden = dim * expand
        self.exp = nn.Conv2d(dim, hidden, 1, bias=False)
        self.conv = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden // group_width, bias=False)
        self.prj = nn.Conv2d(hidden, dim, 1, bias=False)
        self.stride = stride

    def forward(self, x):
        y = self.prj(F.silu(self.conv(F.silu(self.exp(x)))))
        return y + x if self.stride == 1 else y


class ConvNeXt(nn.Module):
    """Depthwise convolution, norm, perceptron over channels, layer scale."""

    def __init__(self, dim, expand, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.exp, self.prj = nn.Linear(dim, dim * expand), nn.Linear(dim * expand, dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.prj(F.gelu(self.exp(y)))).permute(0, 3, 1, 2)


def published(name):
    record = json.loads((DIGESTS / f"efficiency-{name}.json").read_text(encoding="utf-8"))
    config = record["config"]
    make = {
        "convfirst": lambda: ConvFirst(config["c"], config["er"], config["gw"]),
        "mbconv": lambda: MBConv(config["c"], config["er"], config["gw"]),
        "convnext": lambda: ConvNeXt(config["c"], config["er"], config["ks"]),
    }
    with torch.device("meta"):
        return record, make[name](), torch.empty(config["n"], config["c"], config["h"], config["h"])


@pytest.mark.parametrize("name", ["convfirst", "mbconv", "convnext"])
def test_bounds_equal_the_published_numbers(name):
    record, block, example = published(name)
    for processor, expected in record["processors"].items():
        device = Device(processor, {"float16": 1e12 * expected["peak_tflops"]}, 1e9 * expected["bw_gbs"])
        found = waterline(block, example, device, dtype="float16")
        for kernel, layer in zip(found.epilogues.kernels, record["layers"], strict=True):
            kernel = kernel.kernel
            assert kernel.module == layer["name"]
            assert kernel.ops / 2 == pytest.approx(layer["macs"], rel=1e-9)
            assert (kernel.bytes_read, kernel.bytes_written) == (layer["bytes_read"], layer["bytes_written"])
            assert kernel.weight_bytes == layer["weight_bytes"]
            assert kernel.intensity == pytest.approx(layer["op_byte"], rel=1e-9)
        (whole,) = found.blocks.kernels
        assert whole.kernel.ops / 2 == pytest.approx(record["fused"]["macs"], rel=1e-9)
        assert whole.kernel.bytes == record["fused"]["bytes"]
        assert whole.kernel.intensity == pytest.approx(record["fused"]["op_byte"], rel=1e-9)
        for bound, numbers in ((found.epilogues, expected["unfused"]), (found.blocks, expected["fused"])):
            assert bound.ridge == pytest.approx(numbers["ridge_op_byte"], rel=1e-9)
            assert 1e6 * bound.ideal_s == pytest.approx(numbers["ideal_us"], rel=1e-9)
            assert 1e6 * bound.min_s == pytest.approx(numbers["min_us"], rel=1e-9)
            assert bound.max_efficiency == pytest.approx(numbers["max_efficiency"], rel=1e-9)
            assert {entry.kernel.module for entry in bound.memory_bound} == set(numbers["memory_bound"])


def test_the_bound_is_the_sum_of_kernels_not_the_roofline_of_the_whole():
    # A product above the water and one below it: what the first leaves of the bandwidth does not help the second.
    network = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.Conv2d(64, 64, 3, groups=64, bias=False))
    found = waterline(network, torch.randn(1, 64, 16, 16), Device("x", {"float32": 1e12}, 1e11)).operators
    first, second = found.kernels
    assert not first.is_memory_bound
    assert second.is_memory_bound
    assert found.min_s == first.kernel.ops / 1e12 + second.kernel.bytes / 1e11
    shares = [entry.kernel.ops / found.ops * max(1, found.ridge / entry.kernel.intensity) for entry in found.kernels]
    assert found.max_efficiency == pytest.approx(1 / sum(shares), rel=1e-12)
    assert found.max_efficiency < min(1, found.ops / found.bytes / found.ridge)
    assert second.loss == pytest.approx(found.ridge / second.kernel.intensity, rel=1e-12)


def test_fewer_kernels_never_bound_lower_and_folding_moves_less():
    network = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(1, 8, 12, 12)
    plain, folded = waterline(network, x, CPU, fold=False), waterline(network, x, CPU)
    for found in (plain, folded):
        assert found.operators.min_s > found.epilogues.min_s >= found.blocks.min_s
    assert plain.operators.min_s > folded.operators.min_s
    assert [entry.kernel.name for entry in folded.operators.drops] == ["silu"]
    norm, act = (entry.kernel.name for entry in plain.operators.drops)
    assert "batch_norm" in norm
    assert act == "silu"
    assert not folded.epilogues.drops


def test_a_network_in_training_mode_is_bound_as_at_inference_and_left_alone():
    network = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).train()
    assert len(waterline(network, torch.randn(1, 8, 12, 12), CPU).operators.kernels) == 1
    assert network.training
    assert isinstance(network[1], nn.BatchNorm2d)


class PreNorm(nn.Module):
    """A transformer layer: two additions, the second to a sum."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def test_residual_blocks_are_found_by_what_they_compute():
    network = nn.Sequential(
        nn.Conv2d(3, 16, 1), MBConv(16, 2, 8), MBConv(16, 2, 8, stride=2), nn.Sequential(ConvFirst(16, 2, 8), nn.ReLU())
    )
    found = waterline(network, torch.randn(1, 3, 8, 8), CPU).blocks
    # The one of stride 2 adds nothing, but is of the same class; the ReLU rides along with the block before it.
    assert [entry.kernel.module for entry in found.kernels] == ["0", "1", "2", "3.0"]
    assert found.kernels[-1].kernel.operators[-1].name == "relu"
    found = waterline(nn.Sequential(nn.Linear(4, 8), PreNorm(), PreNorm()), torch.randn(2, 5, 4), CPU).blocks
    assert [(entry.kernel.module, entry.kernel.name) for entry in found.kernels] == [
        ("0", "addmm"),
        ("1", "block"),
        ("2", "block"),
    ]


@pytest.mark.parametrize(("family", "name"), [("Bottleneck", "resnet50"), ("InvertedResidual", "mobilenet_v2")])
def test_blocks_of_torchvision_are_found(family, name):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        network, example = getattr(models, name)(), torch.empty(1, 3, 64, 64)
    kinds = {path: type(module).__name__ for path, module in network.named_modules()}
    found = waterline(network, example, CPU).blocks
    blocks = [entry.kernel.module for entry in found.kernels if entry.kernel.name == "block"]
    assert blocks == [path for path, kind in kinds.items() if kind == family]


def test_sums_of_branches_and_attention_biases_are_no_residual_blocks():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.out = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x):
            return self.left(x) + self.right(x)

    class Inside(Branches):
        def forward(self, x):
            return self.out(self.left(x) + x)

    class Skip(Branches):
        def forward(self, x):
            return self.left(self.right(x[:, :4])) + x[:, 4:]

    with torch.no_grad():
        assert waterline(Skip(), torch.randn(1, 8, 5, 5), CPU).operators.kernels
    for network in (Branches(), Inside()):
        found = waterline(network, torch.randn(1, 4, 5, 5), CPU).blocks
        assert not [entry for entry in found.kernels if entry.kernel.name == "block"]


def test_blocks_are_what_is_asked_for():
    network = nn.Sequential(MBConv(16, 2, 8), MBConv(16, 2, 8), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    x = torch.randn(1, 16, 8, 8)

    def cut(blocks):
        kernels = waterline(network, x, CPU, blocks=blocks).blocks.kernels
        return [(entry.kernel.module, entry.kernel.name) for entry in kernels]

    plain = [("0.exp", "convolution"), ("0.conv", "convolution"), ("0.prj", "convolution")]
    rest = [("2", "convolution"), ("4", "convolution")]
    assert cut(["1"]) == [*plain, ("1", "block"), *rest]
    assert cut([MBConv]) == [("0", "block"), ("1", "block"), *rest]
    assert cut([MBConv, ("2", "3", "4")]) == [("0", "block"), ("1", "block"), ("2 + 3 + 4", "block")]
    assert cut([MBConv, "0.exp", nn.Conv2d])[:2] == [("0", "block"), ("1", "block")]
    for blocks, message in ((["9"], "no module at '9' ran"), ([nn.Linear], "no module of the class Linear ran")):
        with pytest.raises(ValueError, match=message):
            cut(blocks)


def test_a_block_that_is_called_twice_is_two_kernels():
    block = MBConv(16, 2, 8)
    found = waterline(nn.Sequential(block, nn.ReLU(), block), torch.randn(1, 16, 8, 8), CPU).blocks
    assert [entry.kernel.name for entry in found.kernels] == ["block", "block"]
    assert found.kernels[0].kernel.ops == found.kernels[1].kernel.ops


def test_tables_and_files_have_every_kernel(tmp_path):
    found = waterline(MBConv(16, 2, 8), torch.randn(1, 16, 8, 8), CPU)
    text = found.table()
    assert "ridge 5.0 op:byte" in text
    assert all(name in text for name in (*LEVELS, "e_max", "silu", "exp"))
    assert len(found.table(most=1).splitlines()) < len(text.splitlines())
    found.write_csv(tmp_path / "kernels.csv")
    with open(tmp_path / "kernels.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(found.at(level).kernels) for level in LEVELS)
    assert sum(float(row["min_s"]) for row in rows if row["level"] == "operators") == found.operators.min_s
    with pytest.raises(ValueError, match="level must be one of operators, epilogues, blocks, not 'layers'"):
        found.table("layers")


def test_plots_and_pages_show_every_kernel_and_fetch_nothing(tmp_path):
    found = waterline(MBConv(16, 2, 8), torch.randn(1, 16, 8, 8), Device("<a & b>", {"float32": 1e11}, 1e10))
    for level in LEVELS:
        found.plot(tmp_path / f"{level}.png", level)
        assert (tmp_path / f"{level}.png").read_bytes().startswith(b"\x89PNG")
    page = found.html()
    marks = Marks()
    marks.feed(page)
    assert marks.tips == sum(len(found.at(level).kernels) for level in LEVELS)
    assert marks.tags["svg"] == marks.tags["figure"] == 3
    assert marks.open == []
    assert "&lt;a &amp; b&gt;" in page
    assert not re.search(r"https?:|//|@import|url\(|src=|href=", page)


class Marks(HTMLParser):
    """Counts tags and tips, and checks that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.tips, self.open = {}, 0, []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.tips += any(name == "data-tip" for name, _ in attributes)
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tips += any(name == "data-tip" for name, _ in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_operators_are_timed_alone_and_held_against_their_bounds():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), MBConv(8, 2, 8), nn.Flatten(), nn.Linear(288, 4)
    ).eval()
    found = waterline(network, torch.randn(2, 3, 8, 8), CPU).measured(budget_s=0.01)
    names = [entry.bound.kernel.name for entry in found.times]
    assert names == ["convolution", "relu_", *["convolution", "silu"] * 2, "convolution", "add", "addmm"]
    assert all(len(entry.samples) >= 3 and min(entry.samples) > 0 for entry in found.times)
    assert found.total_s == sum(entry.median_s for entry in found.times)
    assert 0 < found.efficiency < 1
    assert -1 <= found.efficiency_correlation <= 1
    assert "rank correlation" in found.table()


class InOrder(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_caches_are_emptied_after_the_arguments_are_there():
    # An operator that works in place gets a fresh copy, which would otherwise wait for it in the cache.
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.SiLU(inplace=True))
    found = waterline(network, torch.randn(1, 3, 8, 8), CPU)
    with InOrder() as seen:
        found.measured(budget_s=0.001)
    timed = [position for position, name in enumerate(seen.names) if name in ("convolution", "relu_", "silu_")]
    assert len(timed) >= 3 * 4
    assert {seen.names[position - 1] for position in timed} == {"fill_"}


def test_work_in_place_is_held_against_its_own_bandwidth():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.SiLU())
    limits = Device("x", {"float32": 1e15}, 1e9, in_place_bandwidth=2e9)
    found = waterline(network, torch.randn(1, 3, 8, 8), limits)
    convolution, relu, silu = (entry.bound for entry in found.measured([1.0, 1.0, 1.0]).times)
    assert relu.memory_s == relu.kernel.bytes / 2e9
    assert silu.memory_s == silu.kernel.bytes / 1e9
    assert convolution.memory_s == convolution.kernel.bytes / 1e9
    # The analysis itself knows one bandwidth.
    assert [entry.memory_s for entry in found.operators.kernels] == [
        entry.kernel.bytes / 1e9 for entry in found.operators.kernels
    ]


def test_tokens_are_timed_by_their_values():
    network = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
    found = waterline(network, torch.randint(5, (2, 6)), CPU).measured(budget_s=0.01)
    assert [entry.bound.kernel.name for entry in found.times] == ["embedding", "addmm"]


def test_times_from_elsewhere_give_correlations_and_flags_by_arithmetic():
    network = nn.Sequential(*(nn.Conv2d(c, 2 * c, 3, groups=g) for c, g in ((4, 4), (8, 1), (16, 16), (32, 2))))
    found = waterline(network, torch.randn(1, 4, 32, 32), Device("x", {"float32": 1e11}, 1e9, noise=0.1))
    bounds = [entry.min_s for entry in found.operators.kernels]
    exact = found.measured(bounds)
    assert exact.efficiency_correlation == pytest.approx(1)
    assert exact.intensity_correlation == pytest.approx(1)
    assert exact.time_correlation == pytest.approx(1)
    assert exact.largest_excess == 1
    assert exact.exceeding == ()
    assert exact.efficiency == pytest.approx(found.operators.max_efficiency)
    quick = found.measured([bounds[0] / 1.05, bounds[1] / 3, bounds[2], bounds[3] * 2])
    assert [entry.bound.kernel.module for entry in quick.exceeding] == ["1"]
    assert quick.largest_excess == pytest.approx(3)
    assert "3.00 !" in quick.table()
    assert found.measured([bounds[0] / 1.05, *bounds[1:]], noise=0.01).exceeding
    with pytest.raises(ValueError, match="there are 4 operators, so 4 times, not 1"):
        found.measured([1.0])


def test_what_cannot_be_timed_or_bound_says_so():
    network, example = nn.Conv2d(4, 4, 1), torch.randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match="the network ran in float32 and its bounds are for int8"):
        waterline(network, example, Device("x", {"int8": 1e12}, 1e10), dtype="int8").measured()
    with pytest.raises(ValueError, match="peak of a CPU for bfloat16 is not known"):
        waterline(network, example, CPU, dtype="bf16")
    network, example = network.to("meta"), example.to("meta")
    with pytest.raises(ValueError, match="operators of a network on the meta device cannot be timed"):
        waterline(network, example, CPU).measured()
    with pytest.raises(ValueError, match="has no device to be bound by"):
        waterline(network, example)
    with pytest.raises(TypeError, match="must be one tensor"):
        waterline(network, [1.0], CPU)
