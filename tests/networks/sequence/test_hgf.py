"""HGF's own: differential attention, what is ternary, packing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import gatewise
from gatewise.layers.ternary import HybridGatedLinear, TernaryLinear
from gatewise.methods import pack_ternary
from gatewise.networks.sequence.hgf import DifferentialAttention, HGFConfig
from tests.conftest import FINGERPRINTS, small_language_model

SMALL = {
    "hgf_tiny": {"vocab_size": 61, "dim": 32, "depth": 2, "hidden_dim": 48, "rank": 4},
    "hgf_tiny_softmax": {"vocab_size": 61, "dim": 32, "depth": 2, "hidden_dim": 48, "rank": 4, "activation_bits": 8},
}


def worked_attention():
    record = json.loads((FINGERPRINTS / "hgf" / "differential_attention_worked.json").read_text())
    inputs = {name: torch.tensor(value, dtype=torch.float64) for name, value in record["inputs"].items()}
    return [(case, inputs) for case in record["cases"]]


@pytest.mark.parametrize(("case", "inputs"), worked_attention(), ids=lambda value: str(value.get("depth", "")))
def test_worked_differential_attention(case, inputs):
    mixer = DifferentialAttention(HGFConfig(dim=16, num_heads=4, weights="full"), case["depth"]).double()
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        getattr(mixer, name).data.copy_(inputs[name])
    assert mixer.lambda_init == pytest.approx(case["lambda_init"])
    assert mixer.difference.item() == pytest.approx(case["lambda"], rel=1e-6)
    q, k = (torch.stack([inputs[f"{what}1"], inputs[f"{what}2"]], dim=2).flatten(1, 2).transpose(1, 2) for what in "qk")
    v = inputs["v"].transpose(1, 2)
    expected = torch.tensor(case["after_headnorm"], dtype=torch.float64).transpose(1, 2)
    # lambda is formed in float32.
    torch.testing.assert_close(mixer._attend(q, k, v, None), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("hgf_tiny", HybridGatedLinear, TernaryLinear),
        ("hgf_tiny_softmax", HybridGatedLinear, TernaryLinear),
        ("hgf_tiny_baseline", nn.Linear, nn.Linear),
        ("hgf_tiny_bitnet", TernaryLinear, TernaryLinear),
        ("hgf_tiny_diff_only", nn.Linear, nn.Linear),
    ],
)
def test_what_is_ternary_in_the_five_models(name, attention, mlp):
    block = gatewise.create_model(name).blocks[0]
    assert {type(m) for m in (block.mixer.q_proj, block.mixer.o_proj)} == {attention}
    assert {type(m) for m in (block.mlp.gate_proj, block.mlp.down_proj)} == {mlp}
    assert isinstance(block.mixer, DifferentialAttention) == (name in ("hgf_tiny", "hgf_tiny_diff_only"))


def test_the_perceptron_is_corrected_on_request():
    block = gatewise.create_model("hgf_tiny", correct_mlp=True).blocks[0]
    assert isinstance(block.mlp.up_proj, HybridGatedLinear)


def test_embedding_and_head_stay_in_full_precision():
    model = gatewise.create_model("hgf_tiny", tie_embeddings=False)
    assert type(model.head) is nn.Linear
    assert type(model.embedding) is nn.Embedding


def test_parameters_of_the_tiny_models():
    counts = {
        name: sum(p.numel() for p in gatewise.create_model(name, vocab_size=128, hidden_dim=344).parameters())
        for name in ("hgf_tiny_baseline", "hgf_tiny_bitnet", "hgf_tiny_softmax")
    }
    assert counts["hgf_tiny_baseline"] == counts["hgf_tiny_bitnet"]
    # Four projections per block, each with rank 8 from and to 128 channels, and a gate.
    assert counts["hgf_tiny_softmax"] - counts["hgf_tiny_bitnet"] == 3 * 4 * (2 * 8 * 128 + 1)


def test_packed_network_gives_the_same_and_is_small():
    model = small_language_model("hgf_tiny")
    packed = pack_ternary(model)
    x = torch.arange(24).reshape(2, 12)
    # The corrections are kept in float16: 11 bits, through two blocks.
    torch.testing.assert_close(packed(x), model(x), rtol=2e-2, atol=2e-2)
    assert isinstance(model.blocks[0].mixer.q_proj, HybridGatedLinear)
    kept = sum(b.numel() * b.element_size() for b in packed.blocks.buffers())
    before = sum(p.numel() * p.element_size() for p in model.blocks.parameters())
    assert kept < before / 4


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "linear"}, "attention must be one of softmax, differential, not 'linear'"),
        ({"weights": "binary"}, "weights must be one of full, ternary, hybrid, not 'binary'"),
        ({"dim": 30, "num_heads": 4}, "dim 30 must give 4 heads of an even width"),
        ({"dim": 48, "num_heads": 3}, "num_heads must be even, not 3"),
        ({"dim": 32, "num_heads": 4, "rank": 64}, r"rank must be 1 to 32 \(the smaller width\), not 64"),
    ],
)
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HGFConfig(**fields)


def test_attention_can_be_measured():
    from gatewise.gates import attention_diagnostics

    model = small_language_model("hgf_tiny_softmax")
    found = attention_diagnostics(model, torch.arange(24).reshape(2, 12))
    assert len(found.layers) == 2
    assert all(0 < layer.first_token.mean() < 1 for layer in found.layers)
