"""Gated linear attention as users meet it: layouts, dtypes, compilers and wrong input."""

from __future__ import annotations

import re

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F

from gatewise.ops import bidirectional_gated_linear_attention, gated_linear_attention
from tests.ops.gated_linear_attention_cases import F64, error, errors, initial_state, inputs, with_gradients

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
    def under_autocast(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return gated_linear_attention(*tensors)

    tensors = [*inputs(time=time, dtype=torch.float32), torch.randn(2, 2, 5, 6)]
    expected = with_gradients(gated_linear_attention, tensors)
    found = with_gradients(under_autocast, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_float64_is_accumulated_in_float64_and_float32_states_are_returned_otherwise():
    q, k, v, g = inputs()
    assert gated_linear_attention(q, k, v, g)[1].dtype == F64
    assert gated_linear_attention(q.half(), k.half(), v.half(), g.half())[1].dtype == torch.float32


@pytest.fixture
def poisoned_memory():
    """Freshly allocated memory holds NaN: what is not written, or read too early, is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("per_head", [False, True])
def test_every_result_is_written(poisoned_memory, per_head):
    assert torch.empty(3).isnan().all()
    q, k, v, g = inputs(1, 75, 4, 2, per_head=per_head)
    state = initial_state(k, v, 3)
    bounds = torch.tensor([0, 0, 40, 75])
    results = with_gradients(gated_linear_attention, (q, k, v, g, state), cu_seqlens=bounds)
    results += with_gradients(bidirectional_gated_linear_attention, (q, k, v, g, g))
    assert all(result.isfinite().all() for result in results)


def test_memory_between_forward_and_backward_is_inputs_and_few_states():
    q, k, v, g = (x.float().requires_grad_() for x in inputs(1, 2048, 1, key_dim=16, value_dim=16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        gated_linear_attention(q, k, v, g)
    inputs_kept = sum(x.numel() for x in (q, k, v, g))
    # A state of 16 x 16 for every 1024 tokens and two more, where the recurrence would keep 2048 of them.
    assert sum(kept) - inputs_kept == 4 * 16 * 16


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
    # Graphs of earlier runs are kept on disk, and would be used although our operators have changed since.
    with torch._inductor.config.patch(force_disable_caches=True):
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
    "a multiple of those of k, but 3 is not a multiple of 2": {"q": X(2, 20, 3, 5, dtype=F64)},
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
