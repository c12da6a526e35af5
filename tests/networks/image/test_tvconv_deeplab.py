"""The segmentation network of TVConv, beyond what the digest shows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.errors import CheckpointError
from gatewise.fidelity.verify import build_case
from gatewise.layers.tvconv import FixedTVConv, TVConv
from gatewise.networks.dense.tvconv_deeplab import PaddedInvertedResidual, TVConvDeepLabConfig
from gatewise.networks.image.mobilenetv2 import MobileNetV2Config

TINY = {"width_mult": 0.25, "pooling_dim": 8, "low_level_dim": 4, "operator": {"hidden": 4, "hidden_layers": 1}}


def small(atom="tvconv", **fields):
    """A small network in eval mode, every parameter and statistic off its initial value."""
    fields = {"input_size": (64, 48), "atom": atom} | TINY | fields
    model = gatewise.create_model("tvconv_deeplabv3plus", **fields).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=draw))
    return model


@pytest.mark.parametrize("atom", ["tvconv", "depthwise", "base"])
def test_logits_have_the_size_of_the_images_and_parts_their_strides(atom):
    model, x = small(atom), torch.randn(2, 3, 64, 48)
    assert model(x).shape == (2, 2, 64, 48)
    levels = model.forward_pyramid(x)
    assert [info.stride for info in model.feature_info] == [2, 4, 8, 16, 16]
    assert [level.shape[1] for level in levels] == [info.channels for info in model.feature_info]
    assert [tuple(level.shape[2:]) for level in levels] == [(31, 23), (16, 12), (8, 6), (4, 3), (4, 3)]


@pytest.mark.parametrize("size", [(3, 3), (33, 70), (65, 64)])
def test_plain_networks_take_any_size(size):
    assert small("base")(torch.randn(1, 3, *size)).shape == (1, 2, *size)


def test_output_stride_eight_doubles_dilations():
    model = small("base", output_stride=8)
    assert [branch.conv.dilation for branch in list(model.pooling.branches)[1:4]] == [(12, 12), (24, 24), (36, 36)]
    assert [info.stride for info in model.feature_info] == [2, 4, 8, 8, 8]
    assert tuple(model.forward_pyramid(torch.randn(1, 3, 64, 64))[-1].shape[2:]) == (8, 8)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_blocks_pad_their_input_and_not_what_they_filter(stride, dilation):
    block = PaddedInvertedResidual(3, 5, stride, 6, dilation).eval()
    nn.init.ones_(block.expand.norm.bias)
    x = torch.randn(2, 3, 7, 6)
    hidden = block.expand(F.pad(x, [dilation] * 4))
    assert torch.allclose(hidden[..., 0, 0], torch.ones(2, 18))
    filtered = F.conv2d(hidden, block.spatial.conv.weight, None, stride, 0, dilation, 18)
    expected = block.project(block.spatial.act(block.spatial.norm(filtered)))
    assert torch.allclose(block(x), expected, atol=1e-6)
    assert block(x).shape[2:] == (-(-7 // stride), -(-6 // stride))


def test_away_from_the_border_blocks_are_those_of_mobilenetv2():
    block = PaddedInvertedResidual(3, 3, 1, 6).eval()
    nn.init.ones_(block.expand.norm.bias)
    x = torch.randn(1, 3, 8, 8)
    padded = block(x)
    block.margin, block.spatial.conv.padding = 0, (1, 1)
    plain = block(x)
    assert torch.allclose(padded[..., 1:-1, 1:-1], plain[..., 1:-1, 1:-1], atol=1e-6)
    assert not torch.allclose(padded, plain, atol=1e-3)


def test_weights_of_an_imagenet_backbone_leave_the_rest_fresh():
    model = small(width_mult=1.0)
    theirs = gatewise.create_model("mobilenetv2_100")
    written = export_state(theirs, "torchvision")
    with pytest.raises(CheckpointError, match="unfilled"):
        load_state(model, written)
    head = model.head.weight.clone()
    assert load_state(model, written, replace_head=True).name == "torchvision"
    assert torch.equal(model.stages[5][2].project.conv.weight, theirs.stages[5][2].project.conv.weight)
    assert torch.equal(model.head.weight, head)


def test_the_published_layout_is_written_and_read():
    for atom in ("tvconv", "depthwise", "base"):
        source, x = small(atom), torch.randn(1, 3, 64, 48)
        written = export_state(source, "official")
        prefix = "classifier.aspp.convs.2."
        inside = {key.removeprefix(prefix) for key in written if key.startswith(prefix)}
        expected = "0.weight" if atom == "base" else "0.conv.0.0.weight"
        assert expected in inside
        other = gatewise.create_model("tvconv_deeplabv3plus", **{"input_size": (64, 48), "atom": atom} | TINY).eval()
        load_state(other, written)
        assert torch.equal(other(x), source(x))


def test_networks_for_other_sizes_take_interpolated_weights():
    source, wide = small(), small(input_size=(80, 96))
    load_state(wide, export_state(source, "official"), adapt=True)
    assert wide(torch.randn(1, 3, 80, 96)).shape == (1, 2, 80, 96)


@pytest.mark.parametrize(("atom", "ours"), [("base", "base"), ("DW", "depthwise"), ("TVConv", "tvconv")])
def test_the_published_factory_is_understood(atom, ours):
    config = {"factory": "deeplabv3plus_mobilenet", "atom": atom, "num_classes": 2, "output_stride": 16}
    name = "tvconv_deeplabv3plus" + ("" if ours == "tvconv" else f"_{ours}")
    network = gatewise.create_model(name, input_size=(32, 32))
    keys = {key: list(t.shape) for key, t in export_state(network, "official").items() if t.ndim}
    record = {"system": "tvconv", "source": "od_oc_segmentation/networks/baseline.py", "config": config, "keys": keys}
    case = build_case(record | {"inputs": {"x": {"shape": [1, 3, 32, 32]}}})
    assert case.module.config == network.config
    assert case.tap_path("backbone.low_level_features")[0] == "stages.1"
    assert case.tap_path("classifier.aspp")[0] == "pooling"


def test_folding_leaves_neither_norms_nor_generators():
    for atom in ("tvconv", "depthwise", "base"):
        model, x = small(atom), torch.randn(2, 3, 64, 48)
        folded = fold(model)
        assert torch.allclose(folded(x), model(x), atol=1e-4 * model(x).abs().max().item())
        assert not any(isinstance(module, nn.BatchNorm2d | TVConv) for module in folded.modules())
    assert sum(isinstance(module, FixedTVConv) for module in fold(small()).modules()) == 3


def test_it_trains():
    model = small().train()
    model(torch.randn(2, 3, 64, 48)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_start_as_published():
    torch.manual_seed(0)
    model = gatewise.create_model("tvconv_deeplabv3plus_base")
    fan_in = model.decoder.conv.weight
    assert fan_in.std().item() == pytest.approx((2 / fan_in[0].numel()) ** 0.5, rel=0.02)
    fan_out = model.stages[6][0].project.conv.weight
    assert fan_out.std().item() == pytest.approx((2 / fan_out.shape[0]) ** 0.5, rel=0.02)


@pytest.mark.untyped
def test_it_compiles_and_agrees_in_onnx(tmp_path):
    model, x = small(), torch.randn(2, 3, 64, 48)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), model(x), atol=1e-4)
    assert export_onnx(model, tmp_path / "network.onnx", x).error < 1e-4


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 64, 48), r"images \(batch, 3, height, width\), not torch.float32 of shape \(3, 64, 48\)"),
        (torch.zeros(0, 3, 64, 48), "at least one sample, not a batch"),
        (torch.zeros(1, 3, 64, 48, dtype=torch.uint8), "floating-point images .*, not torch.uint8"),
        (torch.zeros(1, 4, 64, 48), r"of shape \(1, 4, 64, 48\)"),
        (torch.zeros(1, 3, 64, 2), "at least 3, not 64 x 2"),
        (torch.zeros(1, 3, 96, 48), r"built for images of 64x48, got 96x48: .*input_size=\(96, 48\)"),
    ],
)
def test_wrong_input_is_told(x, message):
    with pytest.raises(ValueError, match=message):
        small()(x)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 0}, "num_classes must be positive, not 0"),
        ({"atom": "dw"}, "atom must be one of tvconv, depthwise, base, not 'dw'"),
        ({"operator": None}, "atom tvconv needs an operator"),
        ({"output_stride": 32}, "output_stride must be 8 or 16, not 32"),
        ({"width_mult": 0.01}, "at least 1/16, not 0.01"),
        ({"input_size": (2, 256)}, r"at least 3, not \(2, 256\)"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TVConvDeepLabConfig(**fields)


def test_the_plan_of_strides_is_that_of_mobilenetv2():
    assert TVConvDeepLabConfig().backbone.plan() == MobileNetV2Config(output_stride=16).plan()
