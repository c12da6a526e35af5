"""NiNformer, beyond what the digests show."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.networks.image.ninformer import MixerBlock, MixerGate, NinformerConfig, TokenMlp
from tests.conftest import small_model

# With dropout, PyTorch's "aot_eager" tracing mistakes the layout of a gradient; inductor does not.
SMALL = {
    "ninformer_cifar10": {
        "embed_dim": 16,
        "hidden_dim": 24,
        "depth": 2,
        "num_classes": 5,
        "num_tokens": 48,
        "drop_rate": 0.0,
    },
}

CARDS = {
    "ninformer_cifar10": (2_652_170, 218_892_800),
    "ninformer_cifar100": (2_675_300, 218.92e6),
    "ninformer_mnist": (2_582_478, 167.19e6),
}

SIZES = {"ninformer_cifar10": [(24, 32), (32, 24), (4, 192), (48, 16)]}

STRIDES = {"ninformer_cifar10": (4,)}


def test_tokens_are_mixed_as_if_they_were_channels():
    mlp = TokenMlp(7, 9)
    x = torch.randn(2, 7, 5)
    transposed = mlp.fc2(nn.functional.gelu(mlp.fc1(x.transpose(1, 2)))).transpose(1, 2)
    torch.testing.assert_close(mlp(x), transposed)


def test_the_gate_is_a_product_with_a_mixer():
    gate = MixerGate(8, 6, 10)
    assert isinstance(gate.mixer, MixerBlock)
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(gate(x), gate.project(x) * gate.mixer(x))
    nn.init.zeros_(gate.project.weight)
    nn.init.ones_(gate.project.bias)
    torch.testing.assert_close(gate(x), gate.mixer(x))


def test_the_order_of_patches_matters():
    model = small_model("ninformer_cifar10")
    x = torch.randn(1, 3, 24, 32)
    assert not torch.allclose(model(x.flip(3)), model(x), atol=1e-3)


def test_one_norm_serves_both_sublayers():
    block = small_model("ninformer_cifar10").blocks[0]
    x = torch.randn(2, 48, 16)
    first = x + block.gate(block.norm(x))
    torch.testing.assert_close(block(x), first + block.mlp(block.norm(first)))


def test_weights_go_both_ways_under_the_published_names():
    model, other = small_model("ninformer_cifar10"), small_model("ninformer_cifar10")
    state = export_state(model, "official")
    assert {"model.0.mgu.Mixer.token_mix.2.net.3.weight", "model.1.mgu.proj.bias", "model.0.ffn.net.0.weight"} <= set(
        state
    )
    for parameter in other.parameters():
        parameter.data.zero_()
    load_state(other, state)
    x = torch.randn(1, 3, 24, 32)
    assert torch.equal(other(x), model(x))


@pytest.mark.untyped
def test_exports_to_onnx(tmp_path):
    report = export_onnx(small_model("ninformer_cifar10"), tmp_path / "network.onnx", torch.randn(2, 3, 24, 32))
    assert report.error < 1e-5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NinformerConfig(num_tokens=0), "num_tokens must be positive, not 0"),
        (
            lambda: small_model("ninformer_cifar10")(torch.zeros(1, 3, 32, 32)),
            "32 x 32 pixels in patches of 4 make 64 tokens; the matrices over tokens were made for 48",
        ),
        (lambda: small_model("ninformer_cifar10")(torch.zeros(1, 3, 24, 33)), "width 33 is not a multiple of patch"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
