"""Measuring attention and gates, and drawing what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gatewise.errors import UserError
from gatewise.fidelity.fingerprint import make_input
from gatewise.fidelity.verify import build_case
from gatewise.gates.attention import attention_diagnostics, attention_map, loss_by_position
from gatewise.gates.draw_attention import draw_attention_map, draw_context, draw_diagnostics
from gatewise.networks.sequence.gated_attention import Gate, GatedAttentionConfig, GatedAttentionDecoder
from tests.conftest import FINGERPRINTS, small_language_model

CONFIG = GatedAttentionConfig(
    vocab_size=61, dim=32, depth=3, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, gate=Gate()
)


def decoder(**changes):
    return GatedAttentionDecoder(replace(CONFIG, **changes)).eval()


def tokens(*shape):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["small_baseline", "small_headwise", "small_elementwise"])
def test_sinks_and_activations_are_those_of_the_reference(name):
    record = json.loads((FINGERPRINTS / "gated-attention" / f"{name}.json").read_text())
    model = build_case(record).module
    found = attention_diagnostics(model, make_input(**record["inputs"]["input_ids"]))
    stored = record["diagnostics"]
    for layer, attention, largest in zip(
        found.layers, stored["first_token_attention_per_layer"], stored["max_abs_hidden_per_layer"], strict=True
    ):
        assert float(layer.first_token_all.mean()) == pytest.approx(attention, rel=1e-5)
        assert layer.largest == pytest.approx(largest, rel=1e-5)
    assert found.first_token_attention_all == pytest.approx(stored["first_token_attention_mean"], rel=1e-5)


@torch.no_grad()
def test_every_number_by_its_definition():
    model, x = decoder(), tokens(2, 9)
    found = attention_diagnostics(model, x)
    hidden = model.embed(x)
    for block, layer in zip(model.blocks, found.layers, strict=True):
        inside = block.mixer_norm(hidden)
        weights = block.mixer.attention_weights(inside)
        torch.testing.assert_close(layer.first_token, weights[:, :, 1:, 0].mean(dim=(0, 2)))
        torch.testing.assert_close(layer.first_token_all, weights[..., 0].mean(dim=(0, 2)))
        entropy = torch.where(weights > 0, -weights * weights.log(), 0.0).sum(-1).mean(dim=(0, 2))
        torch.testing.assert_close(layer.entropy, entropy)
        scores = block.mixer.gate_proj(inside).sigmoid()
        assert layer.gate.mean == pytest.approx(float(scores.mean()), rel=1e-5)
        in_bin = (scores >= 0.48) & (scores < 0.5)
        assert float(layer.gate.histogram[24]) == pytest.approx(float(in_bin.float().mean()), abs=1e-3)
        assert float(layer.gate.histogram.sum()) == pytest.approx(1.0)
        outputs = block.mixer.attention_output(inside).abs()
        assert layer.near_zero[1e-2] == pytest.approx(float((outputs < 1e-2).float().mean()))
        assert layer.near_zero[1e-3] == pytest.approx(float((outputs < 1e-3).float().mean()))
        hidden, _ = block(hidden, None, None)
        position, channel = layer.largest_at
        assert layer.largest == pytest.approx(float(hidden.abs().max()))
        assert layer.largest == pytest.approx(float(hidden[:, position, channel].abs().max()))
    assert found.largest_activation == pytest.approx(sum(layer.largest for layer in found.layers) / 3)
    assert found.gate_score == pytest.approx(sum(layer.gate.mean for layer in found.layers) / 3)


def test_a_sink_is_seen():
    """Keys that all point away from the queries but the first one, which points along them."""
    model = decoder(qk_norm=False, rope_theta=None, gate=None, depth=1, qkv_bias=True)
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        for projection in (mixer.q_proj, mixer.k_proj):
            projection.weight.zero_()
        mixer.q_proj.bias.fill_(4.0)
        model.embedding.weight[0].fill_(1.0)
        model.embedding.weight[1:].fill_(-1.0)
        mixer.k_proj.weight.fill_(1.0)
    x = torch.ones(1, 8, dtype=torch.long)
    x[0, 0] = 0
    found = attention_diagnostics(model, x)
    assert found.first_token_attention > 0.999
    assert found.layers[0].gate is None
    assert math.isnan(found.gate_score)


def test_one_token_has_no_later_query():
    found = attention_diagnostics(decoder(), tokens(1, 1))
    assert found.layers[0].first_token is None
    assert found.first_token_attention_all == 1.0
    assert math.isnan(found.first_token_attention)


def test_scores_outside_of_zero_and_one_widen_the_histogram():
    found = attention_diagnostics(decoder(gate=Gate(activation="identity", bias_init=3.0)), tokens(1, 5))
    gate = found.layers[0].gate
    assert gate.edges[0] == 0.0
    assert gate.edges[-1] > 3.0
    assert gate.mean == pytest.approx(3.0, abs=0.2)


def test_the_table_has_a_row_per_layer():
    text = str(attention_diagnostics(decoder(depth=2), tokens(1, 5)))
    assert len(text.splitlines()) == 4
    assert "the first query left out" in text
    assert "-" in str(attention_diagnostics(decoder(gate=None), tokens(1, 5)))


def test_only_one_layer_is_held_at_a_time():
    """Maps are given up before the next layer makes its own."""
    model = decoder()
    alive, most = [], []
    for block in model.blocks:

        def watched(x, state=None, whole=block.mixer.attention_weights):
            import weakref

            most.append(sum(map_() is not None for map_ in alive))
            weights = whole(x, state)
            alive.append(weakref.ref(weights))
            return weights

        block.mixer.attention_weights = watched
    attention_diagnostics(model, tokens(1, 5))
    assert most == [0, 0, 0]


def test_the_model_is_left_as_it_was():
    model = decoder().train()
    attention_diagnostics(model, tokens(1, 4))
    attention_map(model, tokens(1, 4), 0)
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="vocabulary"):
        attention_diagnostics(model, torch.full((1, 4), 100))
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_model_without_attention_is_a_users_mistake():
    with pytest.raises(UserError, match="GLA has no mixer that shows its attention"):
        attention_diagnostics(small_language_model("gla_tiny"), tokens(1, 4))


def test_layers_without_attention_are_measured_for_what_they_have():
    model = decoder()
    model.blocks[1] = small_language_model("gla_tiny").blocks[0]
    found = attention_diagnostics(model, tokens(2, 6))
    assert found.layers[1].first_token is None
    assert found.layers[1].near_zero is None
    assert found.layers[1].largest > 0
    kept = [found.layers[0].first_token.mean(), found.layers[2].first_token.mean()]
    assert found.first_token_attention == pytest.approx(float(sum(kept) / 2))
    with pytest.raises(UserError, match="layer 1 is a GatedLinearAttention, which has no attention to show"):
        attention_map(model, tokens(1, 4), 1)
    draw_diagnostics({"hybrid": found})


def test_a_map_of_one_layer():
    model, x = decoder(), tokens(2, 6)
    weights = attention_map(model, x, -1)
    assert weights.shape == (2, 4, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
    assert torch.equal(weights, attention_map(model, x, 2))
    with pytest.raises(UserError, match="layers 0 to 2, not 3"):
        attention_map(model, x, 3)


@torch.no_grad()
def test_losses_by_position_are_means_of_token_losses(monkeypatch):
    model, x = decoder(), tokens(2, 12)
    losses = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(2, 11)
    monkeypatch.setattr("gatewise.gates.attention.POSITIONS_AT_A_TIME", 3)
    found = loss_by_position(model, x, [4, 5, 10])
    assert list(found) == [4, 5, 10]
    assert found[4] == pytest.approx(float(losses[:, :3].mean()), rel=1e-5)
    assert found[5] == pytest.approx(float(losses[:, 3].mean()), rel=1e-5)
    assert found[10] == pytest.approx(float(losses[:, 4:9].mean()), rel=1e-5)


@pytest.mark.parametrize("bounds", [[], [1], [4, 4], [5, 4], [4, 13]])
def test_bounds_that_do_not_rise_are_a_users_mistake(bounds):
    with pytest.raises(UserError, match="bounds must rise from 2 to the length 12"):
        loss_by_position(decoder(), tokens(1, 12), bounds)


def saved(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png")
    return (tmp_path / "figure.png").stat().st_size


def test_models_are_drawn_side_by_side(tmp_path):
    x = tokens(1, 6)
    figure = draw_diagnostics(
        {"plain": attention_diagnostics(decoder(gate=None), x), "gated": attention_diagnostics(decoder(), x)}
    )
    curves, heads = figure.axes[:4], figure.axes[4:6]
    assert [len(axis.lines) for axis in curves[:3]] == [2, 2, 2]
    assert heads[0].images[0].get_array().shape == (3, 4)
    assert saved(figure, tmp_path) > 10000
    with pytest.raises(UserError, match="nothing to draw"):
        draw_diagnostics({})


@pytest.mark.parametrize("heads", [1, 10])
def test_a_map_is_drawn_head_by_head(tmp_path, heads):
    figure = draw_attention_map(torch.rand(2, heads, 5, 5).softmax(-1), index=1)
    assert sum(len(axis.images) for axis in figure.axes) == heads
    assert saved(figure, tmp_path) > 2000


def test_contexts_are_drawn_as_perplexity(tmp_path):
    figure = draw_context({"plain": {4: 1.0, 8: 2.0}, "yarn": {4: 1.0, 8: 1.0}}, trained_length=4)
    assert figure.axes[0].lines[0].get_ydata()[1] == pytest.approx(math.exp(2.0))
    assert saved(figure, tmp_path) > 5000
