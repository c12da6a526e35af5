"""GLA's own: sizes, layouts, gates and grouped keys."""

from __future__ import annotations

import pytest
import torch

from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.networks.sequence.gla import GatedLinearAttention, GLAConfig, fixed_log_decay
from tests.conftest import small_language_model

SMALL = {
    "gla_tiny": {"vocab_size": 61, "dim": 32, "depth": 2, "hidden_dim": 48},
    "gla_tiny+conv": {
        "vocab_size": 61,
        "dim": 64,
        "depth": 2,
        "hidden_dim": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "conv_width": 4,
        "feature_map": "relu",
        "tie_embeddings": False,
    },
}

CARDS = {
    "gla_340m": (341_707_776, None),
    "gla_1_3b": (1_365_514_240, None),
    "gla_7b": (7_244_390_400, None),
}
"""Parameters of the published sizes."""


@pytest.mark.parametrize(("fields", "parameters"), [({"dim": 1024}, 4_219_648), ({"dim": 2048}, 16_827_904)])
def test_published_sizes_of_a_layer(fields, parameters):
    with torch.device("meta"):
        layer = GatedLinearAttention(GLAConfig(**fields))
    assert sum(parameter.numel() for parameter in layer.parameters()) == parameters


def test_both_names_of_the_head_norm_and_joined_perceptrons_are_read():
    model = small_language_model("gla_tiny")
    state = export_state(model, "official")
    assert "model.layers.0.attn.g_norm_swish_gate.weight" in state
    older = {}
    for key, tensor in state.items():
        if key.endswith("mlp.up_proj.weight"):
            continue
        if key.endswith("mlp.gate_proj.weight"):
            tensor = torch.cat([tensor, state[key.replace("gate_proj", "up_proj")]])
        older[key.replace("g_norm_swish_gate", "g_norm")] = tensor
    other = small_language_model("gla_tiny")
    for parameter in other.parameters():
        parameter.data.zero_()
    load_state(other, older)
    x = torch.arange(12).reshape(2, 6)
    assert torch.equal(other(x), model(x))


def test_the_first_published_layout_goes_both_ways():
    fields = {"head_norm": "layer_norm", "gate_bias": True, "scale_keys": True, "tie_embeddings": False}
    model, other = (small_language_model("gla_tiny", **fields) for _ in range(2))
    state = export_state(model, "first")
    assert {"transformer.h.0.attn.k_gate.1.bias", "transformer.h.1.w3.weight", "lm_head.weight"} <= set(state)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert load_state(other, state).name == "first"
    x = torch.arange(12).reshape(2, 6)
    assert torch.equal(other(x), model(x))


def test_fixed_decay_is_that_of_retention():
    decay = fixed_log_decay(3).exp()
    torch.testing.assert_close(decay, torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]))
    model = small_language_model("gla_tiny", fixed_decay=True)
    assert model.blocks[0].mixer.log_gates(torch.randn(2, 5, 32)).shape == (2, 5, 2, 1)
    assert model(torch.arange(12).reshape(2, 6)).isfinite().all()


def test_fixed_decay_equals_the_same_gates_on_every_channel():
    model = small_language_model("gla_tiny", fixed_decay=True)
    x = torch.arange(24).reshape(2, 12)
    expected = model(x)
    for block in model.blocks:
        gates = block.mixer.log_gates
        block.mixer.log_gates = lambda x, gates=gates: gates(x).expand(*x.shape[:2], -1, 8)
    torch.testing.assert_close(model(x), expected)


def test_gates_are_bounded_where_asked():
    model = small_language_model("gla_tiny", clamp_min=-0.01)
    gates = model.blocks[0].mixer.log_gates(torch.randn(2, 5, 32))
    assert gates.min() >= -0.01
    assert gates.max() <= 0


def test_read_gates_gives_a_decay_between_0_and_1_per_head():
    mixer = small_language_model("gla_tiny").blocks[0].mixer
    gates = mixer.read_gates(torch.randn(2, 5, 32))
    assert set(gates) == {"decay of head 0", "decay of head 1"}
    assert all(((gate > 0) & (gate < 1)).all() and gate.shape == (2, 5) for gate in gates.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 192, "num_heads": 5}, "key width 96 is not divisible by 5 heads"),
        ({"dim": 64, "num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads, not 4 and 3"),
        ({"feature_map": "exp"}, "feature_map must be one of identity, relu, not 'exp'"),
        ({"clamp_min": 0.5}, "cannot be 0.5"),
        ({"depth": 0}, "depth must be positive, not 0"),
    ],
)
@pytest.mark.untyped
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GLAConfig(**fields)
