"""MobileNetV5's encoder, beyond what the digests show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.layers.norm import RmsNorm2d
from gatewise.networks.image.mobilenetv5 import (
    EdgeResidual,
    MobileNetV5Config,
    MultiQueryAttention,
    UniversalInvertedResidual,
    parse_block,
    round_to_eights,
)
from tests.conftest import small_model

SMALL = {
    "mobilenetv5_300m_enc": {
        "blocks": (
            ("er_k3_s2_e2_c8", "er_k3_s1_e2_c8"),
            ("uir_a3_k5_s2_e3_c16", "uir_a5_k0_s1_e2_c16"),
            ("uir_a5_k5_s2_e3_c24", "mqa_h2_v2_d8_c24", "uir_a0_k0_s1_e2_c24"),
            ("uir_a5_k5_s2_e3_c32", "mqa_h4_d8_c32", "uir_a0_k0_s1_e2_c32"),
        ),
        "stem_dim": 8,
        "fused_dim": 48,
        "grid_size": 2,
        "num_classes": 5,
    },
}

CARDS = {"mobilenetv5_300m_enc": (294_126_912, 435.7e9)}

pytestmark = pytest.mark.filterwarnings("ignore:images whose sides are not multiples")


def test_stages_of_the_published_encoder():
    with torch.device("meta"):
        model = gatewise.create_model("mobilenetv5_300m_enc")
    assert [len(stage) for stage in model.stages] == [3, 5, 37, 39]
    assert [info.channels for info in model.feature_info] == [128, 256, 640, 1280]
    # Parameters by part.
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (*model.stages, model.fusion)]
    assert counts == pytest.approx([1.49, 2.44, 63.4, 211.5, 15.2], rel=0.01)


@pytest.mark.parametrize("size", [(64, 64), (32, 33), (75, 50), (256, 64)])
def test_the_grid_is_fixed_whatever_the_image(size):
    model = small_model("mobilenetv5_300m_enc", grid_size=4)
    assert model.forward_features(torch.randn(1, 3, *size)).shape == (1, 48, 4, 4)


def test_resampling_is_said():
    model = small_model("mobilenetv5_300m_enc", grid_size=4)
    with pytest.warns(UserWarning, match="not multiples of 64 are resampled to 4 x 4"):
        model(torch.randn(1, 3, 96, 64))


def test_multiples_of_the_grid_are_averaged():
    model = small_model("mobilenetv5_300m_enc", grid_size=2)
    x = torch.randn(1, 48, 8, 4)
    torch.testing.assert_close(model._to_grid(x), F.avg_pool2d(x, (4, 2)))


def test_norms_divide_by_the_root_mean_square_of_channels():
    norm = RmsNorm2d(6)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 6, 3, 4)
    expected = x * (x.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt() * norm.weight[:, None, None]
    torch.testing.assert_close(norm(x), expected)
    # 300 squared is beyond the range of half precision.
    assert norm(300 * x.half().abs() + 300).isfinite().all()


def test_heads_share_keys_and_values():
    attention = MultiQueryAttention(12, num_heads=3, head_dim=4, stride=2).double()
    nn.init.normal_(attention.gamma)
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    y = attention.norm(x)
    q = attention.query(y).unflatten(1, (3, 4))
    k = attention.key.proj(attention.key.down(y)).flatten(2)
    v = attention.value.proj(attention.value.down(y)).flatten(2)
    assert k.shape == (2, 4, 12)
    weights = torch.einsum("bhdyx,bdm->bhyxm", q, k).mul(0.5).softmax(-1)
    mixed = torch.einsum("bhyxm,bdm->bhdyx", weights, v).flatten(1, 2)
    expected = x + attention.output(mixed) * attention.gamma[:, None, None]
    torch.testing.assert_close(attention(x), expected)
    torch.testing.assert_close(attention.merged()(x), expected)


@pytest.mark.parametrize(("start", "middle", "stride"), [(3, 5, 2), (5, 0, 2), (5, 0, 1), (0, 3, 1), (0, 0, 1)])
def test_the_stride_is_the_last_depthwise_convolutions(start, middle, stride):
    block = UniversalInvertedResidual(16, 16, stride, 2, start_kernel=start, middle_kernel=middle).double()
    nn.init.normal_(block.gamma)
    x = torch.randn(1, 16, 7, 9, dtype=torch.float64)
    assert block(x).shape[2:] == ((4, 5) if stride == 2 else (7, 9))
    if start and middle:
        assert (block.start.conv.stride, block.middle.conv.stride) == ((1, 1), (stride, stride))
    assert block.residual is (stride == 1)
    torch.testing.assert_close(block.merged()(x), block(x))


def test_edge_residuals_have_no_factors():
    block = EdgeResidual(8, 8, 1, 4)
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(block(x), x + block.shrink(block.spatial(x)))
    assert not EdgeResidual(8, 8, 2, 4).residual


@pytest.mark.parametrize(("channels", "rounded"), [(6, 8), (20, 24), (11, 16), (1536, 1536), (90, 88)])
def test_widths_are_rounded_to_eights(channels, rounded):
    assert round_to_eights(channels) == rounded


def test_repeats_are_written_out():
    short = MobileNetV5Config(blocks=(("er_s2_c8", "er_r2_c8"),), fused_stages=(-1,), out_indices=(0,))
    long = MobileNetV5Config(blocks=(("er_s2_c8", "er_c8", "er_c8"),), fused_stages=(-1,), out_indices=(0,))
    network = type(small_model("mobilenetv5_300m_enc"))
    assert network(short).state_dict().keys() == network(long).state_dict().keys()


@pytest.mark.parametrize("layout", ["timm", "gemma3n"])
def test_weights_go_both_ways_under_the_published_names(layout):
    model, other = (small_model("mobilenetv5_300m_enc", num_classes=0) for _ in range(2))
    state = export_state(model, layout)
    tower = "model.vision_tower.timm_model." if layout == "gemma3n" else ""
    expected = ("blocks.0.0.conv_exp.weight", "blocks.2.1.attn.key.down_conv.weight", "msfa.ffn.pw_exp.bn.weight")
    assert {tower + key for key in expected} <= set(state)
    for parameter in other.parameters():
        parameter.data.zero_()
    if layout == "gemma3n":
        state["model.language_model.embed_tokens.weight"] = torch.zeros(3)
    load_state(other, state)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))


def test_timms_encoder_has_the_same_tensors():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model("mobilenetv5_300m_enc").state_dict()
        ours = export_state(gatewise.create_model("mobilenetv5_300m_enc"), "timm")
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.untyped
def test_exports_to_onnx(tmp_path):
    report = export_onnx(small_model("mobilenetv5_300m_enc"), tmp_path / "network.onnx", torch.randn(2, 3, 64, 64))
    assert report.error < 1e-5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_block("conv_c8"), "a block is er, uir or mqa with options such as k3 and c128, not 'conv_c8'"),
        (lambda: parse_block("er_k3"), "a block is er, uir or mqa"),
        (lambda: parse_block("er_s3_c8"), "strides must be 1 or 2"),
        (lambda: parse_block("mqa_c8"), "attention needs heads h and their width d"),
        (lambda: MobileNetV5Config(fused_stages=(4,)), "fused_stages must be of 4 stages"),
        (lambda: MobileNetV5Config(out_indices=(4,)), "out_indices must be stages 0..3"),
        (lambda: MobileNetV5Config(grid_size=0), "grid_size must be positive, not 0"),
        (lambda: UniversalInvertedResidual(8, 8, 2), "with a stride needs a depthwise convolution"),
        (lambda: small_model("mobilenetv5_300m_enc")(torch.zeros(1, 3, 31, 64)), "at least 32, not 31 x 64"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
