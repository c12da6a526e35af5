"""Published names of gated attention: packed queries, experts, configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.errors import CheckpointError
from gatewise.fidelity.cases.gated_attention import reference_case
from gatewise.fidelity.verify import fill_case
from gatewise.layers.yarn import Yarn
from gatewise.networks.sequence.gated_attention import (
    Gate,
    GatedAttentionConfig,
    GatedAttentionDecoder,
    PackedQueries,
    config_from_reference,
    layouts,
)
from tests.networks.sequence.test_gated_attention import CONFIG, moved


def test_the_official_packing_keeps_queries_and_gates_of_a_key_head_together():
    packed = PackedQueries(num_heads=4, num_kv_heads=2, head_dim=3)
    queries, gates = packed.split(torch.arange(16))
    assert queries.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]
    assert gates.tolist() == [6, 7, 14, 15]
    assert torch.equal(packed.join(queries, gates), torch.arange(16))


def test_the_packing_of_qwen3_next_alternates_by_query_head():
    packed = PackedQueries(num_heads=4, num_kv_heads=2, head_dim=2, packing="per_head")
    queries, gates = packed.split(torch.arange(16))
    assert queries.tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert gates.tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    assert torch.equal(packed.join(queries, gates), torch.arange(16))


@pytest.mark.parametrize("name", ["official", "qwen3_next"])
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@pytest.mark.parametrize("biased", [False, True])
def test_both_packings_go_both_ways(name, granularity, biased):
    config = replace(CONFIG, gate=Gate(granularity=granularity), qkv_bias=biased, tie_embeddings=False)
    model = moved(GatedAttentionDecoder(config))
    stored = export_state(model, name)
    assert not any("self_attn.gate_proj" in key for key in stored)
    rows = 32 + (4 if granularity == "headwise" else 32)
    assert stored["model.layers.1.self_attn.q_proj.weight"].shape == (rows, 32)
    layout = {layout.name: layout for layout in layouts(config)}[name]
    ours = layout.unpack({layout.to_ours(key): value for key, value in stored.items()})
    assert ours.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(ours[key], value), key


def test_the_two_packings_are_one_where_every_head_has_its_own_keys():
    model = moved(GatedAttentionDecoder(replace(CONFIG, num_kv_heads=4, gate=Gate())))
    official, other = export_state(model, "official"), export_state(model, "qwen3_next")
    assert all(torch.equal(official[key], other[key]) for key in official)


def test_a_gate_with_a_bias_of_its_own_survives_the_published_names():
    config = replace(CONFIG, gate=Gate(bias_init=4.0))
    model, other = moved(GatedAttentionDecoder(config)), GatedAttentionDecoder(config)
    stored = export_state(model, "official")
    assert stored["model.layers.0.self_attn.gate_proj.bias"].shape == (32,)
    assert load_state(other, stored).name == "official"
    assert torch.equal(other.blocks[1].mixer.gate_proj.weight, model.blocks[1].mixer.gate_proj.weight)


def test_gates_at_other_positions_keep_a_projection_of_their_own():
    stored = export_state(GatedAttentionDecoder(replace(CONFIG, gate=Gate("G2"))), "official")
    assert stored["model.layers.0.self_attn.q_proj.weight"].shape == (32, 32)
    assert stored["model.layers.0.self_attn.gate_proj.weight"].shape == (16, 32)


def test_experts_are_stored_one_by_one():
    config = replace(CONFIG, num_experts=4, experts_per_token=2)
    model, other = moved(GatedAttentionDecoder(config)), GatedAttentionDecoder(config)
    stored = export_state(model, "official")
    assert stored["model.layers.0.mlp.gate.weight"].shape == (4, 32)
    assert stored["model.layers.1.mlp.experts.3.down_proj.weight"].shape == (32, 48)
    load_state(other, stored)
    tokens = torch.randint(61, (2, 5))
    assert torch.equal(other.eval()(tokens), model(tokens))


def test_a_tied_file_may_repeat_the_embedding_but_hold_no_other_head():
    model = moved(GatedAttentionDecoder(CONFIG))
    stored = export_state(model, "official")
    load_state(GatedAttentionDecoder(CONFIG), stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()})
    with pytest.raises(CheckpointError, match=r"unused \(1\): lm_head.weight"):
        load_state(GatedAttentionDecoder(CONFIG), stored | {"lm_head.weight": torch.zeros(61, 32)})


def test_queries_of_an_unexpected_width_are_refused_with_the_legal_ones():
    model = GatedAttentionDecoder(replace(CONFIG, gate=Gate()))
    stored = export_state(model, "official")
    stored["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(40, 32)
    legal = r"with 40 rows \(legal: 32 without a gate, 36 headwise, 64 elementwise\)"
    with pytest.raises(CheckpointError, match=legal):
        load_state(model, stored)


def test_weights_with_another_gate_are_refused():
    stored = export_state(GatedAttentionDecoder(replace(CONFIG, gate=Gate(granularity="headwise"))), "official")
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight \(4, 32\) for blocks.0.mixer.gate_proj.weight \(32, 32\)"
    ):
        load_state(GatedAttentionDecoder(replace(CONFIG, gate=Gate())), stored)
    with pytest.raises(CheckpointError, match=r"unused \(2\): blocks.0.mixer.gate_proj.weight"):
        load_state(GatedAttentionDecoder(CONFIG), stored)


def test_configurations_of_published_files_are_read():
    published = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "headwise_attn_output_gate": False,
        "elementwise_attn_output_gate": True,
        "use_qk_norm": True,
        "attention_bias": True,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        "tie_word_embeddings": True,
    }
    assert config_from_reference(published) == GatedAttentionConfig(
        gate=Gate(), rope_theta=1e6, yarn=Yarn(4.0, 32768), tie_embeddings=True
    )
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    config = config_from_reference(published | experts)
    assert (config.num_experts, config.experts_per_token, config.hidden_dim) == (128, 8, 768)
    with pytest.raises(ValueError, match="either headwise_attn_output_gate or elementwise_attn_output_gate"):
        config_from_reference(published | {"headwise_attn_output_gate": True})
    for other in ({"use_sliding_window": True}, {"rope_scaling": {"type": "linear"}}, {"hidden_act": "gelu"}):
        with pytest.raises(ValueError, match="another kind of network"):
            config_from_reference(published | other)


@pytest.mark.parametrize(("part", "prefix"), [("mixer", "model.layers.0.self_attn."), ("", "model.layers.0.")])
def test_digests_of_parts_are_understood(part, prefix):
    config = replace(CONFIG, gate=Gate(granularity="headwise"))
    stored = export_state(GatedAttentionDecoder(config), "official")
    shapes = {key.removeprefix(prefix): list(value.shape) for key, value in stored.items() if key.startswith(prefix)}
    record = {
        "config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "headwise_attn_output_gate": True,
        },
        "inputs": {"x": {"name": "x", "shape": [1, 5, 32], "kind": "normal"}},
        "outputs": {"output": {}},
        "keys": shapes,
    }
    case = reference_case(record)
    fill_case(case, shapes)
    whole = GatedAttentionDecoder(replace(config, depth=1))
    inside = whole.blocks[0].get_submodule(part)
    inside.load_state_dict(case.module.state_dict())
    x = torch.randn(1, 5, 32)
    (found,) = outputs if isinstance(outputs := case.run(case.module, x), list) else [outputs]
    assert torch.equal(found, inside(x, None, None)[0])
