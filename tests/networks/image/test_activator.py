"""Activator, beyond what the digests show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.networks.image.activator import ActivatorBlock, ActivatorConfig, GatingUnit
from tests.conftest import small_model

# With dropout, PyTorch's "aot_eager" tracing mistakes the layout of a gradient; inductor does not.
SMALL = {
    "activator_cifar10": {"embed_dim": 16, "hidden_dim": 24, "depth": 2, "num_classes": 5, "drop_rate": 0.0},
    "activator_glu_cifar10": {"embed_dim": 16, "hidden_dim": 24, "depth": 2, "num_classes": 5, "act": "silu"},
}

CARDS = {
    "activator_cifar10": (2_650_890, 168_561_152),
    "activator_glu_cifar10": (1_599_242, None),
    "activator_cifar100": (2_674_020, 168.58e6),
}

SIZES = {
    "activator_cifar10": [(32, 32), (32, 48), (4, 4), (36, 20)],
    "activator_glu_cifar10": [(32, 32), (20, 36)],
}

STRIDES = {"activator_cifar10": (4,), "activator_glu_cifar10": (4,)}


@pytest.mark.parametrize("act", ["gelu", "silu", "relu"])
def test_the_unit_is_its_formula(act):
    unit = GatingUnit(6, 10, act).double()
    nn.init.normal_(unit.norm.weight)
    nn.init.normal_(unit.norm.bias)
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    def norm(y):
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * unit.norm.weight + unit.norm.bias

    gate = norm(getattr(F, act)(x @ unit.gate.weight.T + unit.gate.bias))
    value = norm(x @ unit.value.weight.T + unit.value.bias)
    torch.testing.assert_close(unit(x), (gate * value) @ unit.project.weight.T + unit.project.bias)
    torch.testing.assert_close(unit.merged()(x), unit(x))


def test_one_norm_serves_both_sublayers():
    block = ActivatorBlock(8, 12)
    assert sum(isinstance(module, nn.LayerNorm) for module in block.modules()) == 2
    x = torch.randn(2, 5, 8)
    first = x + block.unit(block.norm(x))
    torch.testing.assert_close(block(x), first + block.mlp(block.norm(first)))


@pytest.mark.parametrize("name", SMALL)
def test_the_order_of_patches_changes_nothing(name):
    model = small_model(name)
    x = torch.randn(1, 3, 8, 12)
    patches = list(x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).unbind(2))
    order = [3, 0, 5, 1, 4, 2]
    rows = [torch.cat([patches[i] for i in order[start : start + 3]], dim=3) for start in (0, 3)]
    torch.testing.assert_close(model(torch.cat(rows, dim=2)), model(x))


def test_truncation_is_asked_for():
    model = small_model("activator_cifar10", truncate=True)
    x = torch.randn(1, 3, 35, 33)
    assert torch.equal(model(x), model(x[:, :, :32, :32]))


def test_weights_go_both_ways_under_the_published_names():
    model, other = small_model("activator_cifar10"), small_model("activator_cifar10")
    state = export_state(model, "official")
    assert {"patcher.weight", "model.1.actgu.proj_3.bias", "model.0.ffn.net.3.weight", "classifier.bias"} <= set(state)
    for parameter in other.parameters():
        parameter.data.zero_()
    load_state(other, state)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(x), model(x))


@pytest.mark.untyped
def test_exports_to_onnx(tmp_path):
    report = export_onnx(small_model("activator_cifar10"), tmp_path / "network.onnx", torch.randn(2, 3, 32, 32))
    assert report.error < 1e-5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivatorConfig(block="mlp_only"), "block must be full or glu_only, not 'mlp_only'"),
        (lambda: ActivatorConfig(act="tanh"), "act must be one of gelu, silu, relu, not 'tanh'"),
        (lambda: GatingUnit(4, 8, "tanh"), "act must be one of gelu, silu, relu, not 'tanh'"),
        (lambda: ActivatorConfig(depth=0), "depth must be positive, not 0"),
        (lambda: small_model("activator_cifar10")(torch.zeros(1, 3, 3, 8)), "at least 4, not 3 x 8"),
        (
            lambda: small_model("activator_cifar10")(torch.zeros(1, 3, 32, 30)),
            "width 30 is not a multiple of patch size 4",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dropout_acts_in_training():
    model = gatewise.create_model("activator_cifar10", embed_dim=16, hidden_dim=24).train()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
