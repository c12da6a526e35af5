"""Gated linear attention over maps against the recurrence, values and gradients, in each of its forms."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gatewise.ops import gated_linear_attention_2d as module
from gatewise.ops.gated_linear_attention_2d import both_ways as both_ways
from gatewise.ops.gated_linear_attention_2d import gated_linear_attention_2d, gated_linear_attention_2d_reference
from tests.conftest import FINGERPRINTS

F64 = torch.float64


def inputs(batch=2, height=5, width=4, heads=2, key_dim=3, value_dim=4, hard=False, dtype=F64):
    """q, k, v and both gates: soft ones, or ones that erase nearly all."""
    shape = (batch, height, width, heads)
    q, k, v = (torch.randn(*shape, n, dtype=dtype) for n in (key_dim, key_dim, value_dim))
    gates = [F.logsigmoid(torch.randn(*shape, key_dim, dtype=dtype)) * (40 if hard else 1 / 16) for _ in range(2)]
    return q, k, v, *gates


def by_matrices(q, k, v, g_forward, g_backward, scale=None):
    """The form of ONNX files."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = (x.flatten(1, 2) for x in (q, k, v, g_forward, g_backward))
    return module._by_matrices(*rows, scale / 2).unflatten(1, q.shape[1:3])


FORMS = [gated_linear_attention_2d, by_matrices]


def takes_gentle_gates(*gates):
    return both_ways.gentle(*(g.flatten(1, 2) for g in gates))


def with_gradients(function, tensors, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    o = function(*leaves, **options)
    cotangent = torch.sin(torch.arange(o.numel(), dtype=o.dtype)).view_as(o)
    return [o, *torch.autograd.grad(o, leaves, cotangent)]


def largest_error(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in pairs)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 6),
    value_dim=st.integers(1, 6),
    hard=st.booleans(),
)
def test_any_map_equals_the_recurrence(form, batch, height, width, heads, key_dim, value_dim, hard):
    torch.manual_seed(0)
    tensors = inputs(batch, height, width, heads, key_dim, value_dim, hard)
    expected = with_gradients(gated_linear_attention_2d_reference, tensors, scale=0.3)
    assert largest_error(with_gradients(form, tensors, scale=0.3), expected) < 1e-11


@pytest.mark.parametrize("form", [*FORMS, gated_linear_attention_2d_reference])
def test_the_worked_example(form):
    record = json.loads((FINGERPRINTS / "vig" / "gla_operator.json").read_text())

    def rows(name, width):
        """(1, heads, tokens, width), as six positions of a 2 x 3 map."""
        values = torch.tensor(record[name], dtype=F64).view(1, 2, 6, width)
        return values.transpose(1, 2).unflatten(1, (2, 3))

    q, k, v = rows("q", 2), rows("k", 2), rows("v", 3)
    forward, backward, strong = (rows(f"log_gate_{name}", 2) for name in ("forward", "backward", "strong"))
    # The record has twelve digits.
    torch.testing.assert_close(form(q, k, v, forward, backward), rows("out_mean", 3), rtol=0, atol=1e-11)
    # Gates that are shut leave the present position alone to the scan backwards.
    shut = torch.full_like(backward, -1e3)
    own = (q * k).sum(-1, keepdim=True) * v * 2**-0.5
    expected = (rows("out_forward_strong", 3) + own) / 2
    torch.testing.assert_close(form(q, k, v, strong, shut), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_a_larger_map_in_float32(form):
    tensors = inputs(1, 14, 14, 2, 32, 64)
    expected = with_gradients(gated_linear_attention_2d_reference, tensors)
    single = with_gradients(form, [x.float() for x in tensors])
    # Sums over some 200 positions in float32.
    assert largest_error([x.double() for x in single], expected) < 5e-6


@pytest.mark.parametrize("form", FORMS)
def test_a_hard_gate_among_soft_ones_keeps_what_is_behind_it(form):
    q, k, v, forward, backward = inputs(1, 12, 5, key_dim=3)
    forward[:, 3] = -1e4
    backward[:, 8, 2] = -torch.inf
    tensors = (q, k, v, forward, backward)
    found = form(*(x.float() for x in tensors)).double()
    expected = gated_linear_attention_2d_reference(*tensors)
    assert ((found - expected).abs().max() / expected.abs().max()) < 2e-6


def test_gates_are_gentle_while_chunks_keep_something_of_every_channel():
    assert takes_gentle_gates(*inputs(height=14, width=14)[3:])
    assert not takes_gentle_gates(*inputs(height=14, width=14, hard=True)[3:])
    g = torch.full((1, 8, 8, 1, 1), both_ways.LEAST_SUM / 64 * 0.999)
    assert takes_gentle_gates(g, g)
    assert not takes_gentle_gates(g, g * 1.01)
    assert not takes_gentle_gates(g, g.index_fill(1, torch.tensor([2]), -torch.inf))


@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_gates_at_the_limit_are_computed_as_well_as_others(factor):
    """Either side of the limit, where factors of e^60 stand beside their inverses."""
    q, k, v, *_ = inputs(1, 10, 16, key_dim=8)
    g = torch.full((1, 10, 16, 2, 8), both_ways.LEAST_SUM / 54 * factor, dtype=F64)
    tensors = (q, k, v, g, g)
    expected = with_gradients(gated_linear_attention_2d_reference, tensors)
    assert takes_gentle_gates(g, g) == (factor < 1)
    found = with_gradients(gated_linear_attention_2d, [x.float() for x in tensors])
    # Log decays of up to 60 are known to 4e-6 in float32, and so are the factors.
    assert largest_error([x.double() for x in found], expected) < 1e-5


@pytest.mark.parametrize("numbers", [1, 2000, 6000])
def test_more_rows_than_are_worked_on_at_a_time(numbers, monkeypatch):
    monkeypatch.setattr(both_ways, "GROUP_NUMBERS", numbers)
    tensors = inputs(3, 5, 4, heads=3)
    expected = with_gradients(gated_linear_attention_2d_reference, tensors)
    assert largest_error(with_gradients(gated_linear_attention_2d, tensors), expected) < 1e-12


def test_only_the_inputs_are_kept_for_the_backward_pass():
    tensors = [x.requires_grad_() for x in inputs(1, 20, 20)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        gated_linear_attention_2d(*tensors)
    assert sum(kept) == sum(x.numel() for x in tensors)


def test_costs_are_those_of_both_recurrences():
    q, k, v, *gates = inputs(2, 5, 4, 3, 16, 32)
    with FlopCounterMode(display=False) as counter:
        gated_linear_attention_2d(q, k, v, *gates)
    # Per position, head and direction: an outer product and a reading, a multiplication and an addition each.
    assert counter.get_total_flops() == 2 * (2 * 5 * 4 * 3) * 2 * (16 * 32) * 2


def test_turning_the_map_around_and_swapping_the_gates_turns_the_output_around():
    q, k, v, forward, backward = inputs()
    straight = gated_linear_attention_2d(q, k, v, forward, backward)
    turned = gated_linear_attention_2d(*(x.flip(1, 2) for x in (q, k, v, backward, forward)))
    torch.testing.assert_close(turned.flip(1, 2), straight, rtol=0, atol=1e-14)


def test_the_first_position_sees_the_last():
    q, k, v, forward, backward = inputs(1, 9, 9)
    v.requires_grad_()
    o = gated_linear_attention_2d(q, k, v, forward, backward)
    assert torch.autograd.grad(o[:, 0, 0].sum(), v)[0][:, -1, -1].abs().min() > 0


def test_gradcheck():
    tensors = [x.requires_grad_() for x in inputs(1, 3, 2, 1, 2, 3)]
    assert torch.autograd.gradcheck(gated_linear_attention_2d, tensors)


def test_tensors_that_are_not_contiguous():
    tensors = inputs()
    strange = [x.permute(4, 3, 0, 2, 1).contiguous().permute(2, 4, 3, 1, 0) for x in tensors]
    assert not any(x.is_contiguous() for x in strange)
    assert torch.equal(gated_linear_attention_2d(*strange), gated_linear_attention_2d(*tensors))


def test_half_precision_rounds_inputs_and_results_alone():
    q, k, v, *gates = inputs(dtype=torch.float32)
    half = [x.bfloat16() for x in (q, k, v)]
    found = gated_linear_attention_2d(*half, *gates)
    assert found.dtype == torch.bfloat16
    expected = gated_linear_attention_2d(*(x.float() for x in half), *gates)
    assert (found.float() - expected).abs().max() < 2**-8 * expected.abs().max()


@pytest.mark.untyped
@pytest.mark.parametrize("hard", [False, True])
def test_the_operator_keeps_what_it_promises_to_torch(hard):
    tensors = [x.flatten(1, 2).requires_grad_() for x in inputs(1, 4, 3, hard=hard)]
    torch.library.opcheck(torch.ops.gatewise.gated_linear_attention_2d.default, (*tensors, 0.5))


@pytest.mark.untyped
def test_compiles_into_one_graph():
    tensors = inputs(height=6)
    compiled = torch.compile(gated_linear_attention_2d, fullgraph=True, backend="aot_eager")
    expected = with_gradients(gated_linear_attention_2d, tensors)
    assert largest_error(with_gradients(compiled, tensors), expected) < 1e-13


@pytest.mark.untyped
def test_onnx_files_hold_matrix_products_instead(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, f, r):
            return gated_linear_attention_2d(q, k, v, f, r)

    tensors = inputs(height=9, dtype=torch.float32)
    names = ["q", "k", "v", "f", "r"]
    program = torch.onnx.export(Layer(), tensors, dynamo=True, input_names=names, verbose=False)
    program.save(tmp_path / "layer.onnx")
    graph = onnx.load(tmp_path / "layer.onnx").graph
    assert not any(node.op_type in ("Loop", "Scan") for node in graph.node)
    session = onnxruntime.InferenceSession(str(tmp_path / "layer.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, tensors, strict=True)})
    torch.testing.assert_close(torch.from_numpy(found), gated_linear_attention_2d(*tensors))


X = torch.zeros


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": X(2, 20, 2, 3)}, "q must be (batch, height, width, heads, width of a head), not (2, 20, 2, 3)"),
        ({"v": X(2, 4, 5, 2, 4)}, "v must have the batch, height, width and heads of q, (2, 5, 4, 2, 3), not (2, 4"),
        ({"k": X(2, 5, 4, 2, 2, dtype=F64)}, "k must have the width of q, 3, not 2"),
        (
            {"v": X(2, 5, 4, 2, 4, dtype=torch.int64)},
            "v must have a floating-point dtype on cpu, as q, not torch.int64",
        ),
        ({"g_forward": X(2, 5, 4, 2, 3, device="meta")}, "g_forward must have a floating-point dtype on cpu"),
        ({"g_forward": torch.full((2, 5, 4, 2, 3), torch.nan)}, "g_forward reaches nan"),
        (dict.fromkeys(("q", "k", "v", "g_forward", "g_backward"), X(2, 0, 4, 2, 3)), "at least one position"),
        ({"g_backward": torch.ones(2, 5, 4, 2, 3, dtype=F64)}, "g_backward reaches 1.0"),
    ],
)
def test_wrong_input_is_refused(changes, message):
    arguments = dict(zip(("q", "k", "v", "g_forward", "g_backward"), inputs(), strict=True)) | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_linear_attention_2d(**arguments)
