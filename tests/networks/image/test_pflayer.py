"""PfLayer's residual networks, beyond what the digests show."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_checkpoint, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.errors import CheckpointError, UserError
from gatewise.fidelity.verify import build_case
from gatewise.networks.image.pflayer import SPATIAL, Bottleneck, PfResNet, PfResNetConfig, SpatialMaxPool
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "resnet50": {"depths": (1, 2, 1, 1), "width_mult": 0.125, "num_classes": 5},
    "resnet50_max": {"depths": (1, 2, 1, 1), "width_mult": 0.125, "num_classes": 5},
    "resnet50_hybrid": {"depths": (1, 2, 1, 1), "width_mult": 0.125, "num_classes": 5},
    "resnet50_hybrid+ceil": {"depths": (1, 1, 1, 1), "width_mult": 0.125, "ceil_mode": True, "num_classes": 5},
}

SIZES = {"resnet50_hybrid": [(64, 64), (64, 96), (61, 125), (32, 160)]}

CARDS = {
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet50_max": (14_232_232, 2_239_496_192),
    "resnet50_hybrid": (17_330_600, 2_586_312_704),
}
"""Parameters and MACs at 224 pixels of the published code, exact."""


def test_a_max_block_is_a_regular_block_with_the_largest_of_every_window():
    """Bit by bit, against windows laid out with minus infinity around the map."""

    class LargestOfWindows(nn.Module):
        def forward(self, x):
            padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
            return padded.unfold(2, 3, 1).unfold(3, 3, 1).amax(dim=(4, 5))

    block = Bottleneck(12, 8, 12, SpatialMaxPool()).eval()
    # Without the ReLU in front of it the pool meets negative numbers, which padding by zeros would hide.
    block.reduce.act = nn.Identity()
    other = Bottleneck(12, 8, 12, LargestOfWindows()).eval()
    other.reduce.act = nn.Identity()
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, 12, 7, 5)
    assert torch.equal(block(x), other(x))


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_follows_its_equation(spatial, stride):
    config = PfResNetConfig(spatial=spatial)
    block = Bottleneck(16, 8, 32, SPATIAL[spatial](config, 8, stride, 1), stride).eval()
    x = torch.randn(2, 16, 8, 6)
    y = block.spatial(F.relu(block.reduce.norm(block.reduce.conv(x))))
    y = block.expand.norm(block.expand.conv(y))
    expected = F.relu(y + block.shortcut.norm(block.shortcut.conv(x)))
    torch.testing.assert_close(block(x), expected)
    assert expected.shape == (2, 32, 8 // stride, 6 // stride)


def test_the_hybrid_keeps_three_trained_convolutions():
    model = gatewise.create_model("resnet50_hybrid")
    found = {
        name: module.stride
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    }
    assert found == {f"stages.{stage}.0.spatial.1.conv": (1, 1) for stage in (1, 2, 3)}


def test_widths_shrink_but_not_the_stem():
    model = PfResNet(PfResNetConfig(width_mult=0.3, depths=(1, 1, 1, 1)))
    assert model.config.widths == (19, 38, 76, 153)
    assert model.config.embed_dims == (76, 152, 304, 612)
    assert model.stem.conv.out_channels == 64
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 1000)


def test_weights_start_as_pytorch_starts_them():
    model = gatewise.create_model("resnet50", depths=(1, 1, 1, 1), width_mult=0.25)
    bound = 1 / 64**0.5
    weight = model.stages[0][0].reduce.conv.weight
    assert bound * 0.9 < weight.abs().max() <= bound
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("spatial", ["conv", "max", "depthwise", "average"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 50), (61, 33)])
def test_any_size_is_legal_but_for_the_hybrid(spatial, size):
    model = PfResNet(PfResNetConfig(spatial=spatial, width_mult=0.0625, depths=(1, 1, 1, 1), num_classes=5)).eval()
    levels = model.forward_pyramid(torch.randn(1, 3, *size))
    for level, stride in zip(levels, (4, 8, 16, 32), strict=True):
        assert tuple(level.shape[2:]) == tuple(-(-side // stride) for side in size)


@pytest.mark.parametrize("size", [224, 256, 32, 29, 253])
def test_legal_sizes_of_the_hybrid_do_not_depend_on_its_rounding(size):
    exact = small_model("resnet50_hybrid")
    rounding = PfResNet(PfResNetConfig(**{**vars(exact.config), "ceil_mode": True})).eval()
    rounding.load_state_dict(exact.state_dict())
    x = torch.randn(1, 3, size, 32)
    assert torch.equal(exact(x), rounding(x))


@pytest.mark.parametrize(("size", "odd"), [(193, 49), (200, 25), (225, 57), (250, 63), (232, 29)])
@pytest.mark.parametrize("side", ["height", "width"])
def test_the_hybrid_names_the_side_that_it_cannot_halve(size, odd, side):
    model = small_model("resnet50_hybrid")
    x = torch.zeros(1, 3, size, 32) if side == "height" else torch.zeros(1, 3, 32, size)
    message = rf"resnet50_hybrid cannot halve {odd}, which {side} {size} .*must be divisible by 8, .*multiples of 32"
    with pytest.raises(ValueError, match=message):
        model(x)
    assert small_model("resnet50_hybrid+ceil")(x).shape == (1, 5)


def test_a_dilated_hybrid_needs_fewer_halvings():
    model = small_model("resnet50_hybrid", dilated_stages=(False, True, True))
    assert [info.stride for info in model.feature_info] == [4, 8, 8, 8]
    levels = model.forward_pyramid(torch.randn(1, 3, 40, 24))
    assert [tuple(level.shape[2:]) for level in levels] == [(10, 6), (5, 3), (5, 3), (5, 3)]
    # Stages that do not halve have no trained convolution left.
    assert [isinstance(stage[0].spatial, SpatialMaxPool) for stage in model.stages] == [True, False, True, True]


def test_dilation_holds_from_the_first_block_on_and_keeps_the_size():
    model = small_model("resnet50", depths=(1, 2, 2, 2), dilated_stages=(False, True, True))
    dilations = [[block.spatial.conv.dilation[0] for block in stage] for stage in model.stages]
    assert dilations == [[1], [1, 1], [2, 2], [4, 4]]
    levels = model.forward_pyramid(torch.randn(1, 3, 64, 48))
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 12), (8, 6), (8, 6), (8, 6)]


def test_dilated_max_pooling_is_max_pooling():
    plain = small_model("resnet50_max")
    dilated = small_model("resnet50_max", dilated_stages=(False, False, True))
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert dilated.forward_features(x).shape == (1, 256, 4, 4)
    assert torch.equal(dilated.forward_pyramid(x)[2], plain.forward_pyramid(x)[2])


def test_groups_and_base_width_shape_the_convolutions():
    model = PfResNet(PfResNetConfig(spatial="conv", groups=32, base_width=4, depths=(1, 1, 1, 1)))
    assert model.config.widths == (128, 256, 512, 1024)
    assert model.stages[0][0].spatial.conv.weight.shape == (128, 4, 3, 3)
    assert model.config.embed_dims == (256, 512, 1024, 2048)


def test_chosen_levels():
    model = small_model("resnet50_max", out_indices=(1, 3))
    assert model.feature_info == [(64, 8), (256, 32)]
    assert [level.shape[1] for level in model.forward_pyramid(torch.randn(1, 3, 64, 64))] == [64, 256]


@pytest.mark.parametrize("name", ["resnet50_max", "resnet50_hybrid"])
@pytest.mark.parametrize("file", ["resnet_max_small", "resnet_hybrid_small"])
def test_weights_go_out_under_the_published_names(name, file):
    record = json.loads((FINGERPRINTS / "pflayer" / f"{file}.json").read_text())
    kind = "max" if "max" in file else "hybrid"
    if not name.endswith(kind):
        with pytest.raises(CheckpointError, match="does not fit"):
            load_state(small_model(name), build_case(record).module.state_dict())
        return
    model = build_case(record).module
    theirs = export_state(model, "official")
    counters = {key for key in theirs if key.endswith("num_batches_tracked")}
    assert {key: list(value.shape) for key, value in theirs.items() if key not in counters} == record["keys"]
    other = PfResNet(model.config)
    assert load_state(other, theirs).name == "official"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda state: {"state_dict": state}, lambda state: {"model": state}])
def test_wrapped_and_prefixed_files_load(wrap, tmp_path):
    model = small_model("resnet50_hybrid")
    state = {f"module.{key}": value for key, value in export_state(model, "official").items()}
    torch.save(wrap(state), tmp_path / "weights.pth")
    other = small_model("resnet50_hybrid", num_classes=5)
    with torch.no_grad():
        other.head.weight.zero_()
    assert load_checkpoint(other, tmp_path / "weights.pth").name == "official"
    assert torch.equal(other.head.weight, model.head.weight)


def test_resnet_50_takes_weights_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet50(num_classes=7).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = gatewise.create_model("resnet50", num_classes=7).eval()
    assert load_state(model, theirs.state_dict()).name == "torchvision"
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert export_state(model, "torchvision").keys() == theirs.state_dict().keys()


def test_dilation_differs_from_torchvision_in_the_first_block_alone():
    """Same weights; torchvision's first block of a dilated stage still has the dilation of the stage before."""
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    ours = gatewise.create_model("resnet50", dilated_stages=(False, False, True))
    load_state(ours, theirs.state_dict())
    assert [block.conv2.dilation[0] for block in theirs.layer4] == [1, 2, 2]
    assert [block.spatial.conv.dilation[0] for block in ours.stages[3]] == [2, 2, 2]


def test_no_weights_are_to_be_had_by_name():
    with pytest.raises(UserError, match="no weights are published for 'resnet50_max'"):
        gatewise.create_model("resnet50_max", pretrained=True)


def test_training_keeps_a_byte_per_output_of_a_pool():
    block = Bottleneck(16, 8, 16, SpatialMaxPool())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        block(torch.randn(2, 16, 8, 8, requires_grad=True))
    assert [tensor.shape for tensor in kept if tensor.dtype == torch.uint8] == [(2, 8, 8, 8)]
    assert not any(tensor.dtype == torch.int64 and tensor.numel() > 1 for tensor in kept)


@pytest.mark.untyped
@pytest.mark.parametrize("name", SMALL)
def test_exports_to_onnx(name, tmp_path):
    report = export_onnx(small_model(name), tmp_path / "network.onnx", torch.randn(2, 3, 64, 96))
    assert report.error < 1e-5
    import onnx

    kinds = [node.op_type for node in onnx.load(tmp_path / "network.onnx").graph.node]
    pools = sum(isinstance(module, SpatialMaxPool) for module in small_model(name).modules())
    assert kinds.count("MaxPool") == pools
    assert "BatchNormalization" not in kinds


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spatial": "min"}, "conv, max, hybrid, depthwise, average, not 'min'"),
        ({"drop_rate": 0.1}, "no dropout: drop_rate must be 0, not 0.1"),
        ({"depths": (3, 4, 6)}, r"depths must have 4 entries, not \(3, 4, 6\)"),
        ({"depths": (3, 0, 6, 3)}, "every stage needs a block"),
        ({"dilated_stages": (True,)}, r"dilated_stages must have 3 entries, not \(True,\)"),
        ({"width_mult": 0.01}, r"leave no channels: bottleneck widths are \(0, 1, 2, 5\)"),
        ({"groups": 2}, "with spatial='max' they must be 1 and 64, not 2 and 64"),
        ({"spatial": "hybrid", "base_width": 128}, "with spatial='hybrid' they must be 1 and 64, not 1 and 128"),
        ({"spatial": "conv", "groups": 0}, "must be positive, not 0 and 64"),
        ({"out_indices": (0, 4)}, r"stages 0..3, not \(0, 4\)"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PfResNetConfig(**fields)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"zero_init_residual": True}, {}),
        ({"replace_stride_with_dilation": None, "num_classes": 3}, {"num_classes": 3}),
        ({"replace_stride_with_dilation": [False, True, True]}, {"dilated_stages": (False, True, True)}),
        ({"groups": 8, "width_per_group": 16}, {"groups": 8, "base_width": 16}),
    ],
)
def test_options_of_the_published_code_are_understood(options, fields):
    keys = {key: list(value.shape) for key, value in _reference_state(fields).items() if "num_batches" not in key}
    record = {
        "system": "pflayer",
        "variant": "resnet50",
        "config": {"factory": "resnet50", "layer_setting": [1, 1, 1, 1], "width_mult": 0.125} | options,
        "keys": keys,
    }
    config = build_case(record).module.config
    assert all(getattr(config, name) == value for name, value in fields.items())
    assert config.spatial == "conv"


def _reference_state(fields):
    shape = {"depths": (1, 1, 1, 1), "width_mult": 0.125}
    return export_state(gatewise.create_model("resnet50", **shape, **fields), "official")
