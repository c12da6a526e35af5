"""The decoder in which sequence mixers are compared, beyond what every language model promises."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from gatewise.catalog.checkpoint import export_state, load_checkpoint
from gatewise.fidelity.cases.zoology import reference_case
from gatewise.fidelity.verify import compare_case, fill_case
from gatewise.networks.sequence.zoology import MIXERS, ZoologyConfig, ZoologyNet
from tests.conftest import FINGERPRINTS, small_language_model

SMALL = {
    "zoology_attention": {"vocab_size": 29, "dim": 16, "max_positions": 40, "num_heads": 2, "state_mixer": "mlp"},
    "zoology_sliding": {"vocab_size": 29, "dim": 16, "mixers": "sliding", "window": 3, "state_mixer": "glu"},
    "zoology_base_conv": {"vocab_size": 29, "dim": 16, "max_length": 40, "use_act": True},
    "zoology_base_conv+explicit": {
        "vocab_size": 29,
        "dim": 16,
        "max_length": 40,
        "kernel_size": -1,
        "implicit_filter": False,
        "tie_embeddings": False,
    },
    "zoology_hyena": {"vocab_size": 29, "dim": 16, "max_length": 40, "filter_dim": 8, "filter_layers": 1},
    "zoology_h3": {"vocab_size": 29, "dim": 16, "h3_state": 8},
    "zoology_rwkv": {"vocab_size": 29, "dim": 16},
    "zoology_retnet": {"vocab_size": 29, "dim": 16},
    "zoology_based": {"vocab_size": 29, "dim": 16, "feature_dim": 4, "linear_heads": 2},
    "zoology_mamba": {"vocab_size": 29, "dim": 16, "mamba_state": 4},
    "zoology_gla": {"vocab_size": 29, "dim": 16},
    "zoology_base_conv_attention": {"vocab_size": 29, "dim": 16, "depth": 3},
    "zoology_sparse_programmatic": {"vocab_size": 29, "dim": 16},
    "zoology_sparse_learned": {"vocab_size": 29, "dim": 16, "mixers": "sparse_learned,sparse_programmatic"},
}
_OPTIONS = {
    "vocab_size": 29,
    "dim": 16,
    "num_heads": 2,
    "linear_heads": 2,
    "window": 3,
    "feature_dim": 4,
    "h3_state": 8,
    "mamba_state": 4,
}
LANGUAGE_MODELS = sorted((FINGERPRINTS / "zoology").glob("lm_*.json"))


@pytest.fixture(params=MIXERS)
def network(request):
    config = ZoologyConfig(**_OPTIONS | {"max_length": 96, "mixers": request.param, "kernel_size": (3, -1)})
    model = ZoologyNet(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape):
    return torch.randint(29, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("path", LANGUAGE_MODELS, ids=lambda path: path.stem)
def test_reference_outputs_and_trained_parameters(path):
    record = json.loads(path.read_text())
    case = reference_case(record)
    fill_case(case, record["keys"])
    # The digests hold seven digits.
    assert max(compare_case(case, record).values()) < 5e-6
    assert sum(p.numel() for p in case.module.parameters() if p.requires_grad) == record["params"]
    assert set(export_state(case.module, "official")) == set(record["keys"])


@pytest.mark.parametrize("name", ["zoology_hyena", "zoology_base_conv_attention", "zoology_base_conv+explicit"])
def test_files_of_the_harness_are_read(tmp_path, name):
    model, other = small_language_model(name), small_language_model(name)
    state = export_state(model, "official")
    load_checkpoint(other, saved(tmp_path, state))
    # The harness stores tied and shared weights under each of their names, and what it computes too.
    state["lm_head.weight"] = model.head_weight
    for key in [key for key in state if key.endswith("implicit_filter.1.freq")]:
        state[key.replace(".1.freq", ".3.freq")] = state[key]
        state[key.replace("implicit_filter.1.freq", "modulation.deltas")] = torch.zeros(1, 1, 16)
    load_checkpoint(other, saved(tmp_path, {f"module.{key}": value for key, value in state.items()}))
    x = tokens(2, 20)
    assert torch.equal(other(x), model(x))


def saved(folder, state):
    torch.save({key: value.detach().clone() for key, value in state.items()}, folder / "weights.pt")
    return folder / "weights.pt"


def test_every_digest_is_there():
    assert len(LANGUAGE_MODELS) == 10


@pytest.mark.parametrize("sizes", [[1] * 80, [47, 33], [1, 70, 9]])
def test_pieces_equal_the_whole_in_double_precision(network, sizes):
    x = tokens(2, 80)
    whole, _ = network.forward_features(x)
    pieces, state = [], None
    for piece in x.split(sizes, dim=1):
        hidden, state = network.forward_features(piece, state)
        pieces.append(hidden)
    assert torch.allclose(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)


def test_packed_equals_separate_in_double_precision(network):
    x, bounds = tokens(1, 80), [0, 1, 9, 9, 80]
    packed, _ = network.forward_features(x, cu_seqlens=torch.tensor(bounds))
    separate = [network.forward_features(x[:, a:b])[0] for a, b in ((0, 1), (1, 9), (9, 80))]
    assert torch.allclose(packed, torch.cat(separate, dim=1), rtol=0, atol=1e-10)


def test_nothing_looks_ahead_in_double_precision(network):
    x = tokens(2, 80)
    changed = x.clone()
    changed[:, 50:] = (changed[:, 50:] + 1) % 29
    before, after = network.forward_features(x)[0], network.forward_features(changed)[0]
    # Transforms mix rounding of all positions, and what is selected decides how many rows a product has.
    rounded = ("base_conv", "hyena", "h3", "sparse_programmatic", "sparse_learned")
    tolerance = 1e-12 if network.config.mixers in rounded else 0.0
    assert (before - after)[:, :50].abs().max() <= tolerance
    assert (before - after)[:, 50:].abs().max() > 1e-3


def test_every_trained_parameter_gets_a_gradient(network):
    network.train()
    (network(tokens(2, 24)).square().mean() + network.auxiliary_loss()).backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and not p.grad.any()]
    assert without == []


def test_half_precision_runs(network):
    logits = network.bfloat16()(tokens(2, 24))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_trains_under_autocast(network):
    network.float().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(tokens(2, 24)).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.untyped
def test_a_compiled_network_computes_the_same_in_one_graph(network):
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = tokens(2, 20)
    assert torch.allclose(compiled(x), network(x), rtol=0, atol=1e-10)
    exported = torch.export.export(network, (x,)).module()
    assert torch.allclose(exported(x), network(x), rtol=0, atol=1e-10)


def kept(state) -> int:
    """Elements in a state, those of long filters aside, which no sequence adds to."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    return sum(kept(part) for part in state if part is not None and not isinstance(part, int)) if state else 0


@pytest.mark.parametrize("mixer", ["sliding", "rwkv", "retnet", "based", "mamba", "gla", "h3"])
def test_recurrences_keep_as_much_however_long_the_text(mixer):
    model = ZoologyNet(ZoologyConfig(**_OPTIONS | {"mixers": mixer})).eval()
    _, state = model.forward_features(tokens(1, 20))
    sizes = []
    for token in tokens(1, 12).split(1, dim=1):
        _, state = model.forward_features(token, state)
        sizes.append(kept(state))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("mixers", "fields", "floats"),
    [
        ("attention", {}, 2 * 64 * 100),
        ("sliding", {"window": 8}, 2 * 8 * 64),
        ("base_conv", {"kernel_size": 3}, 3 * 64),
        ("base_conv", {"kernel_size": -1}, 64 * 100),
        ("hyena", {}, 64 * 100),
        ("h3", {"h3_state": 16}, 64 * 16),
        ("based", {"feature_dim": 8, "linear_heads": 2}, 2 * 33 * (36 + 9)),
        ("mamba", {"mamba_state": 8}, 128 * 8),
        ("rwkv", {}, 4 * 64),
        ("gla", {"linear_heads": 2}, 2 * 16 * 32),
        ("retnet", {"linear_heads": 2}, 2 * 32 * 64),
    ],
)
def test_size_of_the_state(mixers, fields, floats):
    network = ZoologyNet(ZoologyConfig(mixers=mixers, depth=2, **fields))
    assert network.state_bytes(100) == 2 * 4 * floats


def test_the_norm_is_added_where_there_is_no_state_mixer():
    model = small_language_model("zoology_sliding", state_mixer="identity", depth=1)
    block = model.blocks[0]
    r = torch.randn(2, 5, 16)
    mixed, _ = block.mixer(F.layer_norm(r, (16,), block.mixer_norm.weight, block.mixer_norm.bias))
    r2 = r + mixed
    h = F.layer_norm(r2, (16,), block.state_norm.weight, block.state_norm.bias)
    out, _ = model.mix(r, [None], None)
    assert torch.allclose(out, F.layer_norm(h + r2, (16,), model.norm.weight, model.norm.bias), atol=1e-5)


def test_nothing_follows_the_mixer_where_the_state_mixer_is_none():
    model = small_language_model("zoology_sliding", state_mixer="none", depth=1)
    block, r = model.blocks[0], torch.randn(2, 5, 16)
    assert not hasattr(block, "state_norm")
    mixed, _ = block.mixer(block.mixer_norm(r))
    assert torch.allclose(model.mix(r, [None], None)[0], model.norm(mixed + r), atol=1e-5)


def test_the_gated_state_mixer():
    glu = small_language_model("zoology_sliding").blocks[0].state_mixer
    x = torch.randn(3, 16)
    assert glu.fc1.out_features == 64
    assert torch.allclose(glu(x), glu.fc3(glu.fc1(x) * F.gelu(glu.fc2(x))))


def test_layers_take_the_mixers_in_turn():
    config = ZoologyConfig(mixers="base_conv, attention,hyena", depth=5)
    assert config.layer_mixers == ["base_conv", "attention", "hyena", "base_conv", "attention"]


def test_a_mixer_of_ones_own(monkeypatch):
    from gatewise.networks.sequence.mixers.attention import Attention

    monkeypatch.setitem(MIXERS, "mine", lambda config, layer: Attention(config.dim, window=2 + layer))
    model = ZoologyNet(ZoologyConfig(mixers="mine"))
    assert [block.mixer.window for block in model.blocks] == [2, 3]


def test_programmatic_attention_sees_which_tokens_came_back():
    model = small_language_model("zoology_sparse_programmatic")
    mixer = model.blocks[1].mixer
    heard = []
    mixer.register_forward_hook(lambda module, inputs, output: heard.append(output[0]))
    model(torch.tensor([[4, 7, 4, 9, 7, 7]]))
    assert (heard[0].abs().sum(-1) > 0).tolist() == [[False, False, True, False, True, True]]


def test_penalties_reach_the_loss_in_training_alone():
    model = small_language_model("zoology_sparse_learned", mixers="sparse_learned", selected=1)
    x = tokens(2, 24)
    model(x)
    assert model.auxiliary_loss() == 0
    model.train()
    model(x)
    total = sum(block.mixer.penalty for block in model.blocks)
    assert total > 0
    assert model.auxiliary_loss() == total
    assert small_language_model("zoology_hyena").auxiliary_loss() == 0


def test_positions_start_anew_in_packed_sequences_and_go_on_with_a_state():
    model = small_language_model("zoology_attention")
    x = tokens(1, 40)
    model.forward_features(x)
    _, state = model.forward_features(x)
    with pytest.raises(ValueError, match="at most max_positions=40 tokens, not 41"):
        model.forward_features(x[:, :1], state)
    with pytest.raises(ValueError, match="not 41"):
        model.forward_features(tokens(1, 41))
    model.forward_features(tokens(1, 60), cu_seqlens=torch.tensor([0, 20, 60]))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": "attention,atention"}, "names from attention, .*, not 'atention'"),
        ({"mixers": "hyena,"}, "not ''"),
        ({"state_mixer": "moe"}, "one of identity, mlp, glu, none, not 'moe'"),
        ({"kernel_size": (3,)}, "an entry for each of 2 layers"),
        ({"max_length": 1}, "max_length must be 2 or more, not 1"),
        ({"max_positions": -1}, "0 or more, not -1"),
        ({"dim": 0}, "dim must be positive"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ZoologyConfig(**fields)


def test_weights_start_as_published():
    model = ZoologyNet(ZoologyConfig(dim=64, depth=8, mixers="attention,hyena", state_mixer="mlp"))
    small = 0.02 / (2 * 8) ** 0.5
    block = model.blocks[0]
    assert block.mixer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mixer.out_proj.weight.std().item() == pytest.approx(small, rel=0.05)
    assert block.state_mixer.fc2.weight.std().item() == pytest.approx(small, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.mixer.qkv.bias.any()
    assert block.drop1.p == 0.1
    assert model.blocks[1].drop1.p == block.drop2.p == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_mixer": {"name": "zoology.mixers.rwkv.Unknown", "kwargs": {}}},
        {"sequence_mixer": {"name": "zoology.mixers.attention.MHA", "kwargs": {"bias": False}}},
        {"sequence_mixer": {"name": "zoology.mixers.attention.MHA", "kwargs": {"color": 1}}},
        {"state_mixer": {"name": "zoology.mixers.moe.MoE", "kwargs": {}}},
        {"block_type": "OtherBlock"},
        {"drop_path": 0.1},
    ],
)
def test_records_without_a_counterpart_have_no_case(change):
    record = json.loads((FINGERPRINTS / "zoology" / "lm_small_attention.json").read_text())
    record["config"] |= change
    assert reference_case(record) is None


def test_a_hybrid_of_kernels_has_one_per_layer():
    record = json.loads((FINGERPRINTS / "zoology" / "lm_small_base_conv.json").read_text())
    kernels = [{"l_max": 24, "kernel_size": kernel} for kernel in (5, -1)]
    configs = [{"name": "zoology.mixers.base_conv.BaseConv", "kwargs": kwargs} for kwargs in kernels]
    record["config"] |= {"sequence_mixer": {"name": "Hybrid", "kwargs": {"configs": configs}}, "n_layers": 3}
    assert reference_case(record).module.config.kernel_size == (5, -1, 5)
