"""Gated linear attention: every form against the recurrence, values and gradients."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatewise.fidelity.fingerprint import make_input, relative_error
from gatewise.ops import (
    bidirectional_gated_linear_attention,
    bidirectional_gated_linear_attention_reference,
    gated_linear_attention,
    gated_linear_attention_reference,
)
from gatewise.ops import _gla_chunked as chunked
from tests.conftest import FINGERPRINTS

F64 = torch.float64


def inputs(
    batch: int = 2,
    time: int = 20,
    heads: int = 2,
    kv_heads: int | None = None,
    key_dim: int = 5,
    value_dim: int = 6,
    per_head: bool = False,
    dtype: torch.dtype = F64,
    hard: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and gates; hard gates reach a sum of about -10 per token."""
    kv_heads = kv_heads or heads
    q = torch.randn(batch, time, heads, key_dim, dtype=F64)
    k = torch.randn(batch, time, kv_heads, key_dim, dtype=F64)
    v = torch.randn(batch, time, kv_heads, value_dim, dtype=F64)
    raw = torch.randn(batch, time, kv_heads, 1 if per_head else key_dim, dtype=F64)
    g = F.logsigmoid(8 * raw - 8) if hard else F.logsigmoid(raw) / 4
    return tuple(x.to(dtype) for x in (q, k, v, g))


def initial_state(k: Tensor, v: Tensor, sequences: int | None = None) -> Tensor:
    return torch.randn(sequences or k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=k.dtype)


def with_gradients(function, tensors, **options) -> list[Tensor]:
    """Results, and gradients of a random combination of all of them (the same one for equal shapes)."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    results = function(*leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=F64).to(r.dtype)).sum() for r in results)
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, leaves)]


def error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return ((ours.to(F64) - reference.to(F64)).abs().max() / reference.to(F64).abs().max().clamp_min(1e-30)).item()


def errors(ours: list[Tensor], reference: list[Tensor]) -> list[float]:
    assert len(ours) == len(reference)
    return [error(a, b) for a, b in zip(ours, reference, strict=True)]


def chunked_form(chunk: int, reverse: bool = False):
    """The chunked form with chunks of any length as one differentiable function of q, k, v, g and state."""

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, g, state):
            scale = k.shape[-1] ** -0.5
            o, final, kept = chunked.chunked_forward(q, k, v, g, state, None, scale, reverse, chunk)
            ctx.save_for_backward(q, k, v, g, state, kept)
            return o, final

        @staticmethod
        def backward(ctx, do, dfinal):
            q, k, v, g, state, kept = ctx.saved_tensors
            scale = k.shape[-1] ** -0.5
            return tuple(
                chunked.chunked_backward(do, dfinal, q, k, v, g, state, None, kept, scale, reverse, chunk)
            )

    return Chunked.apply


# Digests of the definition evaluated in float64


def digest_case(name: str, dtype: torch.dtype):
    """q, k, v, g and the initial state (or None), cotangents of both results, and the record."""
    record = json.loads((FINGERPRINTS / "gla" / f"{name}.json").read_text())
    tensors = {
        key: make_input(spec["name"], spec["shape"], spec["kind"]).to(F64) for key, spec in record["inputs"].items()
    }
    factor, shift, divisor = map(
        float, re.match(r"logsigmoid\(([-\d.]+)\*gk_raw\+\(([-\d.]+)\)\)/(\d+)", record["config"]["g"]).groups()
    )
    tensors["g"] = F.logsigmoid(factor * tensors.pop("gk_raw") + shift) / divisor
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    arguments = [tensors[key] for key in ("q", "k", "v", "g")] + ([tensors["h0"]] if "h0" in tensors else [])
    return arguments, tensors["do"], tensors.get("dht"), record


def digest_results(function, name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict]:
    arguments, do, dht, record = digest_case(name, dtype)
    leaves = [x.requires_grad_() for x in arguments]
    o, final = function(*leaves)
    loss = (o * do).sum() + (0 if dht is None else (final * dht).sum())
    names = ["dq", "dk", "dv", "dg", "dh0"][: len(leaves)]
    gradients = torch.autograd.grad(loss, leaves)
    return {"o": o, "ht": final} | dict(zip(names, gradients, strict=True)), record


DIGESTS = ("op_worked", "op_soft", "op_hard_gates", "op_no_state")


@pytest.mark.parametrize("function", [gated_linear_attention, gated_linear_attention_reference])
@pytest.mark.parametrize("name", DIGESTS)
def test_digests_in_float64(function, name):
    results, record = digest_results(function, name, F64)
    # Digests keep seven digits.
    assert {key: relative_error(tensor, record["outputs"][key]) for key, tensor in results.items()} == pytest.approx(
        dict.fromkeys(results, 0.0), abs=1e-6
    )


@pytest.mark.parametrize("name", DIGESTS)
def test_digests_in_float32(name):
    results, record = digest_results(gated_linear_attention, name, torch.float32)
    worst = {key: relative_error(tensor, record["outputs"][key]) for key, tensor in results.items()}
    # Sums of 130 terms, and differences of such sums in dg, in float32.
    assert max(worst.values()) < 5e-6, worst


def test_worked_example_to_all_digits():
    arguments, do, dht, record = digest_case("op_worked", F64)
    stated = {key: torch.tensor(value, dtype=F64) for key, value in record["values"].items()}
    assert error(arguments[3], stated["g"]) < 1e-14
    results, _ = digest_results(gated_linear_attention, "op_worked", F64)
    assert {key: error(tensor, stated[key]) for key, tensor in results.items()} == pytest.approx(
        dict.fromkeys(results, 0.0), abs=1e-13
    )


def test_keys_divided_by_their_decay_overflow_under_hard_gates_and_ours_do_not():
    (q, k, v, g, state), _, _, record = digest_case("op_hard_gates", torch.float32)
    sums = g.cumsum(1)
    scores = torch.einsum("bihk,bjhk->bhij", q * sums.exp(), k * (-sums).exp()).tril()
    naive = torch.einsum("bhij,bjhv->bihv", scores, v) + torch.einsum("bihk,bhkv->bihv", q * sums.exp(), state)
    assert not naive.isfinite().all()
    o, final = gated_linear_attention(q, k, v, g, state)
    assert relative_error(o, record["outputs"]["o"]) < 2e-6
    assert relative_error(final, record["outputs"]["ht"]) < 2e-6


def test_bidirectional_worked_example():
    record = json.loads((FINGERPRINTS / "vig" / "gla_operator.json").read_text())

    def tensor(name: str, width: int) -> Tensor:
        return torch.tensor(record[name], dtype=F64).view(1, 2, 6, width).transpose(1, 2)

    q, k, v = tensor("q", 2), tensor("k", 2), tensor("v", 3)
    forward, backward, strong = (tensor(f"log_gate_{name}", 2) for name in ("forward", "backward", "strong"))
    expected = {name: tensor(f"out_{name}", 3) for name in ("forward", "backward", "mean", "forward_strong")}
    found = {
        "forward": gated_linear_attention(q, k, v, forward)[0],
        "backward": gated_linear_attention(q, k, v, backward, reverse=True)[0],
        "mean": bidirectional_gated_linear_attention(q, k, v, forward, backward) / 2,
        "forward_strong": gated_linear_attention(q, k, v, strong)[0],
    }
    # The record has twelve digits.
    assert {name: error(found[name], expected[name]) for name in found} == pytest.approx(
        dict.fromkeys(found, 0.0), abs=1e-10
    )
    for chunk in (1, 2, 4, 6, 16):
        state = torch.zeros(1, 2, 2, 3, dtype=F64)
        assert error(chunked_form(chunk)(q, k, v, forward, state)[0], expected["forward"]) < 1e-10
        assert error(chunked_form(chunk, reverse=True)(q, k, v, backward, state)[0], expected["backward"]) < 1e-10


# Forms against the recurrence


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunks_of_any_length_equal_the_recurrence(chunk, time, per_head):
    q, k, v, g = inputs(time=time, heads=4, kv_heads=2, key_dim=4, value_dim=3, per_head=per_head)
    state = initial_state(k, v)
    reference = with_gradients(gated_linear_attention_reference, (q, k, v, g, state))
    assert max(errors(with_gradients(chunked_form(chunk), (q, k, v, g, state)), reference)) < 1e-12
    single = [x.float() for x in (q, k, v, g, state)]
    assert max(errors(with_gradients(chunked_form(chunk), single), reference)) < 3e-6


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 150),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    per_head=st.booleans(),
    hard=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_recurrence(
    batch, time, kv_heads, groups, key_dim, value_dim, per_head, hard, reverse, seed
):
    torch.manual_seed(seed)
    q, k, v, g = inputs(batch, time, kv_heads * groups, kv_heads, key_dim, value_dim, per_head, hard=hard)
    tensors = (q, k, v, g, initial_state(k, v))
    ours = with_gradients(gated_linear_attention, tensors, reverse=reverse, scale=0.3)
    reference = with_gradients(gated_linear_attention_reference, tensors, reverse=reverse, scale=0.3)
    assert max(errors(ours, reference)) < 1e-11


@pytest.mark.parametrize("per_head", [False, True])
def test_sequences_longer_than_a_segment(per_head):
    q, k, v, g = inputs(1, 1300, 2, 1, 3, 2, per_head)
    tensors = (q, k, v, g / 50, initial_state(k, v))
    ours = with_gradients(gated_linear_attention, tensors)
    assert max(errors(ours, with_gradients(gated_linear_attention_reference, tensors))) < 1e-11


def test_more_rows_than_are_worked_on_at_a_time(monkeypatch):
    q, k, v, g = inputs(3, 70, 6, 3)
    tensors = (q, k, v, g, initial_state(k, v))
    reference = with_gradients(gated_linear_attention_reference, tensors)
    for rows in (1, 2, 3, 6):
        monkeypatch.setattr(chunked, "ROW_BUDGET", rows * 70 * 12)
        assert max(errors(with_gradients(gated_linear_attention, tensors), reference)) < 1e-12


@pytest.mark.parametrize("split", [1, 2, 63, 64, 99])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_split_anywhere_with_the_state_passed_on(split, reverse):
    q, k, v, g = inputs(time=100)
    whole, final = gated_linear_attention(q, k, v, g, reverse=reverse)
    parts = [[x[:, :split] for x in (q, k, v, g)], [x[:, split:] for x in (q, k, v, g)]]
    outputs, state = [], None
    for part in reversed(parts) if reverse else parts:
        o, state = gated_linear_attention(*part, state, reverse=reverse)
        outputs.append(o)
    assert error(torch.cat(outputs[::-1] if reverse else outputs, dim=1), whole) < 1e-13
    assert error(state, final) < 1e-13


def test_decoding_token_by_token_equals_one_call():
    q, k, v, g = (x.float() for x in inputs(time=70, heads=4, kv_heads=2))
    whole, final = gated_linear_attention(q, k, v, g)
    state, outputs = None, []
    for t in range(70):
        o, state = gated_linear_attention(*(x[:, t : t + 1] for x in (q, k, v, g)), state)
        outputs.append(o)
    assert error(torch.cat(outputs, dim=1), whole) < 2e-6
    assert error(state, final) < 2e-6


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [[0, 150], [0, 1, 64, 64, 130, 150], [0, 0, 50, 150, 150], [0, 30, 60, 90, 120, 150]])
def test_packed_sequences_equal_separate_calls(bounds, reverse, per_head):
    q, k, v, g = inputs(1, 150, 4, 2, per_head=per_head)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    tensors = (q, k, v, g, initial_state(k, v, len(bounds) - 1))

    def separately(q, k, v, g, state):
        outputs, states = [], []
        for sequence, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            own = state[sequence : sequence + 1]
            if end > begin:
                tokens = (x[:, begin:end] for x in (q, k, v, g))
                o, own = gated_linear_attention_reference(*tokens, own, reverse=reverse)
                outputs.append(o)
            states.append(own)
        return torch.cat(outputs, 1), torch.cat(states)

    ours = with_gradients(gated_linear_attention, tensors, cu_seqlens=cu_seqlens, reverse=reverse)
    assert max(errors(ours, with_gradients(separately, tensors))) < 1e-12
    reference = with_gradients(gated_linear_attention_reference, tensors, cu_seqlens=cu_seqlens, reverse=reverse)
    assert max(errors(ours, reference)) < 1e-12


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 40, 41, 90]])
def test_both_directions_equal_the_sum_of_two_scans(bounds, per_head):
    q, k, v, g = inputs(1, 90, 4, 2, per_head=per_head)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    tensors = (q, k, v, g, 2 * g.flip(1))
    ours = with_gradients(bidirectional_gated_linear_attention, tensors, cu_seqlens=cu_seqlens)
    reference = with_gradients(bidirectional_gated_linear_attention_reference, tensors, cu_seqlens=cu_seqlens)
    assert max(errors(ours, reference)) < 1e-12


def test_flipped_tokens_with_exchanged_gates_give_flipped_outputs():
    q, k, v, g = inputs(time=77)
    other = g.roll(3, dims=1)
    straight = bidirectional_gated_linear_attention(q, k, v, g, other)
    flipped = bidirectional_gated_linear_attention(*(x.flip(1) for x in (q, k, v, other, g)))
    assert error(flipped.flip(1), straight) < 1e-14


def test_one_gate_per_head_equals_equal_gates_per_channel():
    q, k, v, g = inputs(time=90, per_head=True, hard=True)
    o, final = gated_linear_attention(q, k, v, g)
    expanded, final_of_expanded = gated_linear_attention(q, k, v, g.expand(k.shape).contiguous())
    assert error(o, expanded) < 1e-13
    assert error(final, final_of_expanded) < 1e-13


def test_a_closed_gate_forgets_everything():
    q, k, v, g = inputs(time=70)
    g[:, 40] = -torch.inf
    tensors = [x.requires_grad_() for x in (q, k, v, g)]
    o, final = gated_linear_attention(*tensors)
    fresh, final_of_fresh = gated_linear_attention(*(x[:, 40:] for x in tensors))
    assert torch.allclose(o[:, 40:], fresh, rtol=0, atol=1e-13)
    assert torch.allclose(final, final_of_fresh, rtol=0, atol=1e-13)
    gradients = torch.autograd.grad(o[:, 40:].sum() + final.sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all((gradient[:, :40] == 0).all() for gradient in gradients[1:3])


# Memory layouts and dtypes


def test_tensors_that_are_not_contiguous():
    q, k, v, g = inputs(time=70)
    tensors = (q, k, v, g, initial_state(k, v))
    strange = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:3]]
    strange.append(torch.stack([g, g], dim=-1)[..., 0])
    strange.append(tensors[4].mT.contiguous().mT)
    assert not any(x.is_contiguous() for x in strange)
    for ours, reference in zip(gated_linear_attention(*strange), gated_linear_attention(*tensors), strict=True):
        assert torch.equal(ours, reference)
    broadcast = g[:, :1].expand_as(g)
    ours = gated_linear_attention(q, k, v, broadcast)[0]
    assert torch.equal(ours, gated_linear_attention(q, k, v, broadcast.contiguous())[0])


def test_gradients_of_expanded_outputs():
    tensors = [x.requires_grad_() for x in inputs(time=70)]
    o, _ = gated_linear_attention(*tensors)
    expected = torch.autograd.grad((o * torch.ones_like(o)).sum(), tensors)
    o, _ = gated_linear_attention(*tensors)
    # The gradient that `sum` passes on is a number expanded to the shape.
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(o.sum(), tensors), expected, strict=True))


@pytest.mark.parametrize("time", [1, 100])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_rounds_inputs_and_results_alone(dtype, rounding, time):
    tensors = [x.to(dtype) for x in inputs(time=time)[:3]]
    g, state = inputs(time=time, dtype=torch.float32)[3], torch.randn(2, 2, 5, 6)
    tensors += [g, state]
    ours = with_gradients(gated_linear_attention, tensors)
    reference = with_gradients(gated_linear_attention, [x.float() for x in tensors])
    assert [x.dtype for x in ours] == [dtype, torch.float32, dtype, dtype, dtype, torch.float32, torch.float32]
    # Cotangents are rounded to half precision too, so gradients see twice the rounding.
    assert max(errors(ours, reference)) < 2 * rounding
    assert error(ours[1], reference[1]) < 1e-6


def test_both_directions_in_half_precision():
    q, k, v, g = inputs(time=100, dtype=torch.float32)
    half = [x.bfloat16() for x in (q, k, v)]
    ours = bidirectional_gated_linear_attention(*half, g, g)
    assert ours.dtype == torch.bfloat16
    assert error(ours, bidirectional_gated_linear_attention(*(x.float() for x in half), g, g)) < 2**-8


@pytest.mark.parametrize("time", [1, 70])
def test_autocast_leaves_gates_states_and_sums_alone(time):
    tensors = [x.float() for x in inputs(time=time)]
    tensors.append(torch.randn(2, 2, 5, 6))
    expected = with_gradients(gated_linear_attention, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(gated_linear_attention, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_float64_is_accumulated_in_float64_and_float32_states_are_returned_otherwise():
    q, k, v, g = inputs()
    assert gated_linear_attention(q, k, v, g)[1].dtype == F64
    assert gated_linear_attention(q.half(), k.half(), v.half(), g.half())[1].dtype == torch.float32


def test_memory_between_forward_and_backward_is_inputs_and_few_states():
    q, k, v, g = (x.float().requires_grad_() for x in inputs(1, 2048, 1, key_dim=16, value_dim=16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        gated_linear_attention(q, k, v, g)
    inputs_kept = sum(x.numel() for x in (q, k, v, g))
    # Four states of 16 x 16 and one of slack, where the recurrence would keep 2048.
    assert sum(kept) - inputs_kept <= 5 * 16 * 16


# Gradients


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_with_states(per_head, reverse):
    q, k, v, g = inputs(1, 18, 2, 1, 2, 3, per_head)
    tensors = [x.requires_grad_() for x in (q, k, v, g - 0.01, initial_state(k, v))]
    assert torch.autograd.gradcheck(lambda *x: gated_linear_attention(*x, reverse=reverse), tensors)


def test_gradcheck_of_outputs_alone_and_of_one_token():
    for time in (7, 1):
        tensors = [x.requires_grad_() for x in inputs(1, time, 2, 2, 2, 3)]
        assert torch.autograd.gradcheck(lambda *x: gated_linear_attention(*x)[0], tensors)


def test_gradcheck_of_the_final_state_alone():
    q, k, v, g = inputs(1, 7, 2, 2, 2, 3)
    tensors = [x.requires_grad_() for x in (q, k, v, g, initial_state(k, v))]
    assert torch.autograd.gradcheck(lambda *x: gated_linear_attention(*x)[1], tensors)


def test_gradcheck_of_both_directions():
    q, k, v, g = inputs(1, 7, 2, 1, 2, 3)
    tensors = [x.requires_grad_() for x in (q, k, v, g, 2 * g)]
    assert torch.autograd.gradcheck(bidirectional_gated_linear_attention, tensors)


def test_only_what_asks_for_gradients_gets_them():
    q, k, v, g = inputs(time=30)
    o, _ = gated_linear_attention(q, k.requires_grad_(), v, g)
    o.sum().backward()
    assert k.grad is not None
    assert q.grad is v.grad is g.grad is None


def test_first_tokens_see_last_tokens_in_the_reverse_scan():
    q, k, v, g = inputs(time=150)
    v.requires_grad_()
    o = bidirectional_gated_linear_attention(q, k, v, g, g / 100)
    assert torch.autograd.grad(o[:, 0].sum(), v)[0][:, -1].abs().min() > 0


# Compilers


@pytest.mark.untyped
@pytest.mark.parametrize("time", [1, 70])
def test_compiles_into_one_graph(time):
    q, k, v, g = inputs(time=time)
    tensors = (q, k, v, g, initial_state(k, v))
    compiled = torch.compile(gated_linear_attention, fullgraph=True, backend="aot_eager")
    assert max(errors(with_gradients(compiled, tensors), with_gradients(gated_linear_attention, tensors))) < 1e-13


@pytest.mark.untyped
def test_both_directions_and_packed_sequences_compile_into_one_graph():
    q, k, v, g = inputs(1, 70)
    bounds = torch.tensor([0, 20, 70])
    compiled = torch.compile(bidirectional_gated_linear_attention, fullgraph=True, backend="aot_eager")
    tensors = (q, k, v, g, g)
    ours = with_gradients(compiled, tensors, cu_seqlens=bounds)
    assert max(errors(ours, with_gradients(bidirectional_gated_linear_attention, tensors, cu_seqlens=bounds))) < 1e-13


@pytest.mark.untyped
def test_compiles_with_inductor():
    q, k, v, g = inputs(time=70, dtype=torch.float32)

    def block(q, k, v, raw):
        return gated_linear_attention(q.relu(), k, v, F.logsigmoid(raw))[0].tanh()

    tensors = (q, k, v, g)
    ours = with_gradients(torch.compile(block, fullgraph=True), tensors)
    assert max(errors(ours, with_gradients(block, tensors))) < 1e-5


@pytest.mark.untyped
def test_exports_with_any_length():
    class Mixer(torch.nn.Module):
        def forward(self, q, k, v, g):
            o, state = gated_linear_attention(q, k, v, g)
            return o + bidirectional_gated_linear_attention(q, k, v, g, g), state

    time = torch.export.Dim("time", min=2, max=5000)
    program = torch.export.export(Mixer(), inputs(time=70), dynamic_shapes=({1: time},) * 4)
    for length in (2, 70, 131, 600):
        tensors = inputs(time=length)
        for ours, expected in zip(program.module()(*tensors), Mixer()(*tensors), strict=True):
            assert error(ours, expected) < 1e-14


@pytest.mark.untyped
@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 20]])
def test_operators_keep_what_they_promise_to_torch(bounds):
    q, k, v, g = (x.requires_grad_() for x in inputs(1, 20))
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    state = initial_state(k, v, 1 if bounds is None else 3).detach().requires_grad_()
    torch.library.opcheck(
        torch.ops.gatewise.gated_linear_attention.default, (q, k, v, g, state, cu_seqlens, 0.5, bounds is None)
    )
    torch.library.opcheck(
        torch.ops.gatewise.bidirectional_gated_linear_attention.default, (q, k, v, g, g, cu_seqlens, 0.5)
    )


# Wrong input


def call(**changes):
    q, k, v, g = inputs(heads=4, kv_heads=2)
    arguments = {"q": q, "k": k, "v": v, "g": g} | changes
    return gated_linear_attention(**arguments)


X = torch.zeros

WRONG = {
    "q must be (batch, time, heads, width)": {"q": X(2, 20, 5, dtype=F64)},
    "k must have a floating-point dtype, not torch.int64": {"k": X(2, 20, 2, 5, dtype=torch.int64)},
    "v must be on the device of q, cpu, not on meta": {"v": X(2, 20, 2, 6, dtype=F64, device="meta")},
    "k must have the batch and time of q, (2, 20), not (2, 19)": {"k": X(2, 19, 2, 5, dtype=F64)},
    "q and k must have one width, not 5 and 4": {"k": X(2, 20, 2, 4, dtype=F64)},
    "v must have the heads of k, 2, not 3": {"v": X(2, 20, 3, 6, dtype=F64)},
    "g must have the heads of k, 2, not 4": {"g": X(2, 20, 4, 5, dtype=F64)},
    "a multiple of those of k, but 3 is none of 2": {"q": X(2, 20, 3, 5, dtype=F64)},
    "g must have the width of k, 5, or 1, not 2": {"g": X(2, 20, 2, 2, dtype=F64)},
    "log gates must be at most 0, but g reaches 0.5": {"g": torch.full((2, 20, 2, 5), 0.5, dtype=F64)},
    "log gates must be at most 0, but g reaches nan": {"g": torch.full((2, 20, 2, 5), torch.nan, dtype=F64)},
    "(2, 2, 5, 6), not (2, 4, 5, 6)": {"state": X(2, 4, 5, 6, dtype=F64)},
    "the state must be on the device of k, cpu, not on meta": {"state": X(2, 2, 5, 6, dtype=F64, device="meta")},
    "the state must have a floating-point dtype": {"state": X(2, 2, 5, 6, dtype=torch.int32)},
    "a batch of 1, not of 2": {"cu_seqlens": torch.tensor([0, 20])},
}


@pytest.mark.untyped
@pytest.mark.parametrize("message", WRONG)
def test_wrong_tensors_are_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**WRONG[message])


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 20], "must run from 0 to the time, 20, not from 1 to 20"),
        ([0, 19], "must run from 0 to the time, 20, not from 0 to 19"),
        ([0, 12, 10, 20], "must not decrease: [0, 12, 10, 20]"),
        ([0], "at least two integers"),
        ([[0, 20]], "at least two integers"),
        ([0.0, 20.0], "at least two integers"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(bounds, message):
    q, k, v, g = inputs(1)
    for function, gates in ((gated_linear_attention, (g,)), (bidirectional_gated_linear_attention, (g, g))):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(q, k, v, *gates, cu_seqlens=torch.tensor(bounds))


@pytest.mark.untyped
def test_states_of_another_number_of_sequences_are_refused():
    q, k, v, g = inputs(1)
    with pytest.raises(ValueError, match=re.escape("(2, 2, 5, 6), not (1, 2, 5, 6)")):
        gated_linear_attention(q, k, v, g, initial_state(k, v), cu_seqlens=torch.tensor([0, 10, 20]))


@pytest.mark.untyped
def test_nothing_to_scan_is_refused():
    with pytest.raises(ValueError, match="at least one token, but the time of q is 0"):
        gated_linear_attention(*inputs(time=0))


@pytest.mark.untyped
def test_wrong_backward_gates_are_refused():
    q, k, v, g = inputs()
    with pytest.raises(ValueError, match="g_backward reaches 1.0"):
        bidirectional_gated_linear_attention(q, k, v, g, torch.ones_like(g))
    with pytest.raises(ValueError, match="g_forward and g_backward must have one shape"):
        bidirectional_gated_linear_attention(q, k, v, g, g[..., :1])
