"""Gated linear attention: every form against the recurrence, values and gradients."""

from __future__ import annotations

import json
import re
from itertools import pairwise

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
from gatewise.ops.gated_linear_attention import chunked as chunked
from tests.conftest import FINGERPRINTS
from tests.ops.gated_linear_attention_cases import (
    F64,
    chunked_form,
    error,
    errors,
    initial_state,
    inputs,
    with_gradients,
)

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
    arguments, _, _, record = digest_case("op_worked", F64)
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
@pytest.mark.parametrize(
    "bounds", [[0, 150], [0, 1, 64, 64, 130, 150], [0, 0, 50, 150, 150], [0, 30, 60, 90, 120, 150]]
)
def test_packed_sequences_equal_separate_calls(bounds, reverse, per_head):
    q, k, v, g = inputs(1, 150, 4, 2, per_head=per_head)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    tensors = (q, k, v, g, initial_state(k, v, len(bounds) - 1))

    def separately(q, k, v, g, state):
        outputs, states = [], []
        for sequence, (begin, end) in enumerate(pairwise(bounds)):
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
