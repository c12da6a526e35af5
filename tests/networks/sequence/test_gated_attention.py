"""Gated attention: worked examples, positions of the gate, packing, masks, sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import gatewise
from gatewise.efficiency.acceleration.fold import fold
from gatewise.layers.yarn import Yarn
from gatewise.networks.sequence.gated_attention import (
    Gate,
    GatedAttention,
    GatedAttentionConfig,
    GatedAttentionDecoder,
    StackedGatedAttention,
)
from tests.conftest import FINGERPRINTS

SMALL = {
    "gated_attention_tiny_elementwise": {"vocab_size": 61, "dim": 32, "depth": 2, "head_dim": 8, "hidden_dim": 48},
    "gated_attention_tiny_headwise": {
        "vocab_size": 61,
        "dim": 32,
        "depth": 2,
        "head_dim": 8,
        "hidden_dim": 24,
        "num_experts": 4,
        "experts_per_token": 2,
        "sandwich_norm": True,
        "qkv_bias": True,
        "tie_embeddings": False,
    },
}

FOLDER = FINGERPRINTS / "gated-attention"
WORKED = json.loads((FOLDER / "gate_positions_worked.json").read_text())
BARE = GatedAttentionConfig(
    vocab_size=2, dim=12, depth=1, num_heads=4, num_kv_heads=2, head_dim=3, qk_norm=False, rope_theta=None
)
CONFIG = GatedAttentionConfig(
    vocab_size=61, dim=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, rope_theta=10000.0
)
EVERY_GATE = {
    "none": None,
    "G1 elementwise": Gate(),
    "G1 headwise": Gate(granularity="headwise"),
    "G2": Gate("G2"),
    "G3": Gate("G3"),
    "G4 headwise": Gate("G4", "headwise"),
    "G5": Gate("G5"),
    "shared": Gate(shared=True),
    "additive": Gate(combine="add", activation="silu"),
    "constant": Gate(input_dependent=False, bias_init=0.5),
    "biased": Gate(bias_init=1.0),
}


def moved(module, scale=0.1):
    """The module in eval mode with every parameter moved away from its first value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).float())
    return module.eval()


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("output", "gate", "weights", "changes"),
    [
        ("baseline", None, None, {}),
        ("G1_elementwise_sigmoid", Gate(), "G1e", {}),
        ("G1_headwise_sigmoid", Gate(granularity="headwise"), "G1h", {}),
        ("G1_elementwise_silu", Gate(activation="silu"), "G1e", {}),
        ("G1_additive_silu", Gate(activation="silu", combine="add"), "G1e", {}),
        ("G1_additive_identity", Gate(activation="identity", combine="add"), "G1e", {}),
        ("G1_headshared_sigmoid", Gate(shared=True), "G1e", {}),
        ("G1_ns_sigmoid", Gate(activation="ns_sigmoid"), "G1e", {}),
        ("G1_input_independent", Gate(input_dependent=False), "bias_param", {}),
        ("G2_elementwise_sigmoid", Gate("G2"), "G2e", {}),
        ("G2_headwise_sigmoid", Gate("G2", "headwise"), "G2h", {}),
        ("G3_elementwise_sigmoid", Gate("G3"), "G3e", {}),
        ("G4_elementwise_sigmoid", Gate("G4"), "G4e", {}),
        ("G5_dense_sigmoid", Gate("G5"), "G5", {}),
        ("sdpa_silu", None, None, {"after_attention": "silu"}),
        ("sdpa_groupnorm", None, None, {"after_attention": "rms_norm"}),
    ],
)
def test_worked_examples(output, gate, weights, changes):
    given = {name: tensor(values) for name, values in WORKED["weights"].items()}
    layer = GatedAttention(replace(BARE, gate=gate, **changes)).double()
    with torch.no_grad():
        for name, matrix in (("q_proj", "Wq"), ("k_proj", "Wk"), ("v_proj", "Wv"), ("o_proj", "Wo")):
            getattr(layer, name).weight.copy_(given[matrix])
        if layer.gate_proj is not None:
            layer.gate_proj.weight.copy_(given[weights])
        if layer.gate_logits is not None:
            layer.gate_logits.copy_(given[weights])
    y, _ = layer(given["x"])
    torch.testing.assert_close(y, tensor(WORKED["outputs"][output]), rtol=1e-10, atol=1e-12)


def test_every_worked_example_is_under_test():
    (marker,) = [m for m in test_worked_examples.pytestmark if m.name == "parametrize"]
    assert {case[0] for case in marker.args[1]} == set(WORKED["outputs"])


def test_a_gate_of_zeros_halves_what_goes_into_the_output_projection():
    plain = moved(GatedAttention(CONFIG))
    gated = GatedAttention(replace(CONFIG, gate=Gate(init="zeros"))).eval()
    gated.load_state_dict(plain.state_dict() | {"gate_proj.weight": gated.gate_proj.weight})
    x = torch.randn(2, 7, 32)
    assert torch.equal(gated.attention_output(x), 0.5 * plain.attention_output(x))
    torch.testing.assert_close(gated(x)[0], 0.5 * plain(x)[0])


def test_headwise_equals_elementwise_with_repeated_weights():
    headwise = moved(GatedAttention(replace(CONFIG, gate=Gate(granularity="headwise"))))
    elementwise = GatedAttention(replace(CONFIG, gate=Gate())).eval()
    repeated = headwise.gate_proj.weight.repeat_interleave(CONFIG.head_dim, dim=0)
    elementwise.load_state_dict(headwise.state_dict() | {"gate_proj.weight": repeated})
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(elementwise(x)[0], headwise(x)[0])


@pytest.mark.parametrize("gate", EVERY_GATE.values(), ids=EVERY_GATE)
@pytest.mark.parametrize("biased", [False, True])
def test_pieces_equal_the_whole_and_packed_sequences_separate_ones(gate, biased):
    layer = moved(GatedAttention(replace(CONFIG, gate=gate, qkv_bias=biased)))
    x = torch.randn(1, 11, 32)
    whole, cache = layer(x)
    assert cache.length == 11
    pieces, state = [], None
    for piece in x.split([4, 1, 1, 5], dim=1):
        y, state = layer(piece, state)
        pieces.append(y)
    # Float32 sums of other lengths are taken in another order.
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
    packed, none = layer(x, cu_seqlens=torch.tensor([0, 3, 3, 11]))
    assert none is None
    separate = torch.cat([layer(x[:, :3])[0], layer(x[:, 3:])[0]], dim=1)
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("gate", "linear"), [(None, True), (Gate("G3"), True), (Gate(), False), (Gate("G2"), False)])
def test_only_a_gate_between_value_and_output_makes_one_token_nonlinear(gate, linear):
    """With one token attention is the identity, and a head is what its value and output projection make of it."""
    layer = moved(GatedAttention(replace(CONFIG, gate=gate))).double()
    x, y = torch.randn(2, 3, 1, 32, dtype=torch.float64)
    together, apart = layer(x + 2 * y)[0], layer(x)[0] + 2 * layer(y)[0]
    assert torch.allclose(together, apart, rtol=1e-9, atol=1e-12) is linear


@pytest.mark.parametrize("gate", EVERY_GATE.values(), ids=EVERY_GATE)
def test_gradients_are_right(gate):
    config = replace(BARE, dim=6, num_heads=2, num_kv_heads=1, head_dim=2, gate=gate, rope_theta=100.0, qk_norm=True)
    layer = moved(GatedAttention(config)).double()
    x = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)


def test_attention_weights_are_those_of_the_output():
    layer = moved(GatedAttention(replace(CONFIG, gate=Gate("G3"))))
    x = torch.randn(2, 9, 32)
    weights = layer.attention_weights(x)
    assert weights.shape == (2, 4, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
    values = layer.v_proj(x).unflatten(-1, (2, 8)).repeat_interleave(2, dim=2)
    expected = torch.einsum("bhts,bshd->bthd", weights, values)
    torch.testing.assert_close(layer.attention_output(x), expected, atol=1e-5, rtol=1e-5)
    _, state = layer(x[:, :6])
    torch.testing.assert_close(layer.attention_weights(x[:, 6:], state), weights[:, :, 6:], atol=1e-5, rtol=1e-5)


def test_a_mask_narrows_what_is_seen():
    layer = moved(GatedAttention(replace(CONFIG, gate=Gate())))
    x = torch.randn(2, 6, 32)
    everything = torch.ones(6, 6, dtype=torch.bool)
    torch.testing.assert_close(layer(x, mask=everything)[0], layer(x)[0], atol=1e-5, rtol=1e-5)
    # Two left-out tokens in front are as if they were not there, but for where the others stand.
    padded = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    padded[1, :, :, :2] = False
    y = layer(x, mask=padded)[0]
    torch.testing.assert_close(y[1, 2:], layer(x[1:, 2:])[0][0], atol=1e-5, rtol=1e-5)
    assert torch.equal(y[1, :2], torch.zeros(2, 32))
    lowest = torch.zeros(2, 1, 1, 6).masked_fill(~padded, torch.finfo(torch.float32).min)
    assert torch.equal(layer(x, mask=lowest)[0], y)


def test_a_mask_spans_the_cache():
    layer = moved(GatedAttention(CONFIG))
    x = torch.randn(1, 6, 32)
    hide_second = torch.ones(6, dtype=torch.bool)
    hide_second[1] = False
    whole = layer(x, mask=hide_second)[0]
    _, state = layer(x[:, :4])
    torch.testing.assert_close(layer(x[:, 4:], state, mask=hide_second)[0], whole[:, 4:], atol=1e-5, rtol=1e-5)


def test_a_mask_does_not_go_with_packing():
    mask, bounds = torch.ones(4, 4, dtype=torch.bool), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match="either a mask or cu_seqlens"):
        GatedAttention(CONFIG)(torch.randn(1, 4, 32), cu_seqlens=bounds, mask=mask)


def test_gates_start_as_asked():
    decoder = GatedAttentionDecoder(replace(CONFIG, gate=Gate(init="zeros", bias_init=4.0)))
    x = torch.randn(1, 3, 32)
    for block in decoder.blocks:
        torch.testing.assert_close(block.mixer.gate_scores(x), torch.full((1, 3, 4, 8), 0.982013762))
    scores = GatedAttentionDecoder(replace(CONFIG, gate=Gate())).blocks[0].mixer.gate_scores(x)
    assert 0.4 < scores.mean() < 0.6
    assert scores.std() > 0


def test_gates_are_read_per_head():
    x = torch.randn(2, 5, 32)
    layer = moved(GatedAttention(replace(CONFIG, gate=Gate("G2"))))
    read = layer.read_gates(x, None, None)
    assert list(read) == ["gate of head 0", "gate of head 1"]
    torch.testing.assert_close(read["gate of head 1"], layer.gate_proj(x)[..., 8:].sigmoid().mean(-1))
    assert list(GatedAttention(replace(CONFIG, gate=Gate("G5"))).read_gates(x)) == ["gate"]
    assert GatedAttention(replace(CONFIG, gate=Gate(input_dependent=False))).read_gates(x)["gate of head 3"].shape == (
        2,
        5,
    )
    assert GatedAttention(CONFIG).read_gates(x) == {}


@pytest.mark.parametrize("gate", EVERY_GATE.values(), ids=EVERY_GATE)
def test_the_stacked_projection_computes_the_same(gate):
    model = moved(GatedAttentionDecoder(replace(CONFIG, gate=gate, qkv_bias=gate is None)))
    folded = fold(model)
    assert isinstance(folded.blocks[0].mixer, StackedGatedAttention)
    tokens = torch.randint(61, (2, 9))
    torch.testing.assert_close(folded(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in folded.parameters()) >= sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(fold(folded)(tokens), model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gated_attention_1_7b_28l_baseline", 1_720_574_976),
        ("gated_attention_1_7b_28l_headwise", 1_721_492_480),
        ("gated_attention_1_7b_28l_elementwise", 1_838_015_488),
        ("gated_attention_1_7b_48l_baseline", 1_705_735_680),
        ("gated_attention_1_7b_48l_headwise", 1_706_915_328),
        ("gated_attention_1_7b_48l_elementwise", 1_856_730_624),
    ],
)
def test_published_sizes(name, parameters):
    assert size(name) == parameters


def size(name):
    with torch.device("meta"):
        model = gatewise.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("variant", "millions"),
    [
        ("8_kv_heads", 50),
        ("48_heads", 201),
        ("elementwise", 201),
        ("value", 25),
        ("key", 25),
        ("query", 201),
        ("output", 100),
        ("headwise", 1.6),
        ("value_headwise", 0.2),
        ("shared", 201),
        ("value_shared", 25),
        ("additive", 201),
        ("silu", 201),
    ],
)
def test_added_parameters_are_those_of_table_1(variant, millions):
    added = (size(f"gated_attention_15a2b_{variant}") - size("gated_attention_15a2b_baseline")) / 1e6
    # The table cuts off behind the last figure that it prints.
    assert millions <= added < millions * 1.02 or added == pytest.approx(millions, abs=0.05)


def test_four_experts_more_are_453_million_parameters():
    """Four experts of three 768 x 2048 matrices, and their rows of the router, in 24 layers; Table 1 says 400."""
    added = size("gated_attention_15a2b_132_experts") - size("gated_attention_15a2b_baseline")
    assert added == 24 * 4 * (3 * 768 + 1) * 2048


def test_longer_contexts_keep_the_weights_and_leave_the_original_alone():
    model = moved(GatedAttentionDecoder(replace(CONFIG, gate=Gate())))
    tokens = torch.randint(61, (1, 12))
    before = model(tokens)
    longer = model.with_config(yarn=Yarn(4.0, 8))
    assert longer.config.yarn == Yarn(4.0, 8)
    assert not torch.allclose(longer(tokens), before)
    torch.testing.assert_close(longer.with_config(yarn=None)(tokens), before)
    longer.blocks[0].mixer.q_proj.weight.data.zero_()
    assert torch.equal(model(tokens), before)
    with pytest.raises(RuntimeError, match="gate_proj"):
        model.with_config(gate=None)


def test_rotation_starts_at_the_identity_times_the_magnitude():
    cos, sin = GatedAttention(replace(CONFIG, yarn=Yarn(4.0, 64)))._rotation(torch.arange(3))
    # 0.1 ln(4) + 1
    torch.testing.assert_close(cos[0], torch.full((4,), 1.138629436))
    assert torch.equal(sin[0], torch.zeros(4))


def test_sandwich_norms_bound_what_a_block_adds():
    model = moved(GatedAttentionDecoder(replace(CONFIG, sandwich_norm=True)), scale=0.0)
    for block in model.blocks:
        block.mixer.o_proj.weight.data.mul_(1e3)
        block.mlp.inner.down_proj.weight.data.mul_(1e3)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(model.blocks[0].mixer(x)[0].square().mean(-1), torch.ones(2, 5), atol=1e-3, rtol=0)
    torch.testing.assert_close(model.blocks[0].mlp(x).square().mean(-1), torch.ones(2, 5), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads, not 4 and 3"),
        ({"head_dim": 7}, "even head_dim, not 7"),
        ({"head_dim": 0}, "head_dim must be positive, not 0"),
        ({"rope_theta": 1.0}, "rope_theta must be greater than 1, not 1.0"),
        ({"rope_theta": None, "yarn": Yarn(2.0, 8)}, "needs a rope_theta"),
        ({"num_experts": 4}, "experts_per_token must be 1 to the number of experts, 4, not 8"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GatedAttentionDecoder(replace(CONFIG, **changes))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "G6"}, "position of a gate must be one of G1, G2, G3, G4, G5, not 'G6'"),
        ({"granularity": "blockwise"}, "granularity of a gate must be one of elementwise, headwise"),
        ({"combine": "subtract"}, "combine of a gate must be one of multiply, add"),
        ({"activation": "relu"}, "activation of a gate must be one of sigmoid, ns_sigmoid, silu, identity"),
        ({"init": "ones"}, "init of a gate must be one of normal, zeros"),
        ({"shared": True, "granularity": "headwise"}, "it is elementwise, not headwise"),
        ({"position": "G5", "granularity": "headwise"}, "no heads"),
        ({"position": "G5", "shared": True}, "no heads"),
    ],
)
def test_impossible_gates_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Gate(**fields)


@pytest.mark.untyped
def test_unknown_controls_are_refused():
    with pytest.raises(ValueError, match="after_attention must be None, silu or rms_norm, not 'relu'"):
        replace(CONFIG, after_attention="relu")


@pytest.mark.untyped
@pytest.mark.parametrize("experts", [None, 4])
def test_compiles_whole_and_exports(experts):
    config = replace(CONFIG, depth=1, gate=Gate(), num_experts=experts, experts_per_token=2)
    model = moved(GatedAttentionDecoder(config))
    tokens = torch.randint(61, (2, 6))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    exported = torch.export.export(model, (tokens,)).module()
    torch.testing.assert_close(exported(tokens), model(tokens), atol=1e-5, rtol=1e-5)
