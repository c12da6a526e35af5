"""Gates for decoders that were trained without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gatewise.networks.sequence.gated_attention import Gate, GatedAttentionConfig, GatedAttentionDecoder, insert_gate
from tests.networks.sequence.test_gated_attention import moved

CONFIG = GatedAttentionConfig(
    vocab_size=61, dim=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, qkv_bias=True
)
TOKENS = torch.arange(24).reshape(2, 12)


def ungated(**changes):
    return moved(GatedAttentionDecoder(replace(CONFIG, **changes)))


@pytest.mark.parametrize(
    "gate",
    [
        Gate(),
        Gate(granularity="headwise"),
        Gate(shared=True),
        Gate(activation="ns_sigmoid"),
        Gate(input_dependent=False),
        Gate(bias_init=-1.0),
        Gate(combine="add", activation="silu"),
        *(Gate(position) for position in ("G2", "G3", "G4", "G5")),
    ],
    ids=str,
)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "after_attention": "silu", "qkv_bias": False}])
def test_a_rescaled_decoder_computes_the_same_at_first(gate, changes):
    model = ungated(**changes)
    gated = insert_gate(model, gate)
    assert gated.config.gate == replace(gate, init="zeros")
    torch.testing.assert_close(gated(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-5)


def test_an_open_gate_keeps_the_weights_and_all_but_two_percent():
    model = ungated()
    gated = insert_gate(model, start="open")
    for key, weight in model.state_dict().items():
        assert torch.equal(gated.state_dict()[key], weight), key
    mixer, like = gated.blocks[0].mixer, model.blocks[0].mixer
    x = torch.randn(1, 5, 32)
    torch.testing.assert_close(mixer.attention_output(x), 0.982013762 * like.attention_output(x))


def test_the_gate_learns_and_the_original_stays():
    model = ungated()
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    gated = insert_gate(model).train()
    gated(TOKENS).square().mean().backward()
    assert all(block.mixer.gate_proj.weight.grad.abs().max() > 0 for block in gated.blocks)
    with torch.no_grad():
        for parameter in gated.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(model.state_dict()[key], weight) for key, weight in before.items())
    assert not model.training


def test_the_dtype_stays():
    assert next(insert_gate(ungated().double()).parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("gate", "start", "message"),
    [
        (Gate(activation="silu"), "rescaled", "its score is 0"),
        (Gate(activation="silu"), "open", "its score at rest is 3.93, where 1 is needed"),
        (Gate(combine="add"), "rescaled", "its score at rest is 0.5, where 0 is needed"),
        (Gate(bias_init=0.0), "open", "its score at rest is 0.5, where 1 is needed"),
    ],
)
def test_gates_that_cannot_start_without_effect_are_refused(gate, start, message):
    with pytest.raises(ValueError, match=message):
        insert_gate(ungated(), gate, start=start)


def test_a_second_gate_is_refused():
    with pytest.raises(ValueError, match="has a gate already, at G2"):
        insert_gate(ungated(gate=Gate("G2")))


@pytest.mark.untyped
def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="start must be rescaled or open, not 'shut'"):
        insert_gate(ungated(), start="shut")
