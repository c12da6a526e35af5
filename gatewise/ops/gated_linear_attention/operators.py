"""Gated linear attention as `torch.library` operators: fake implementations, gradients and choice of the form.

`gated_linear_attention` documents and checks the arguments.
"""

# No `from __future__ import annotations`: schemas are inferred from the annotations, which must be types, not strings.
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd
from torch.utils.flop_counter import register_flop_formula

from gatewise.ops._backend import suits_triton
from gatewise.ops.gated_linear_attention import chunked as chunked
from gatewise.ops.gated_linear_attention.chunked import accumulation_dtype
from gatewise.ops.precision import without_autocast


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Process one token."""
    tensors = (q, k, v, g) if state is None else (q, k, v, g, state)
    if suits_triton(q) and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return _fused_step(q, k, v, g, state, scale)
    dtype = accumulation_dtype(q)
    with without_autocast(q):
        new = k[:, 0, :, :, None].to(dtype) * v[:, 0, :, None, :].to(dtype)
        if state is not None:
            new = torch.addcmul(new, state.to(dtype), g[:, 0, :, :, None].to(dtype).exp())
        queries = scale * q[:, 0].to(dtype).unflatten(1, (k.shape[2], -1))
        return (queries @ new).flatten(1, 2)[:, None].to(q.dtype), new


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return outputs and final states of one direction."""
    o, final, _ = _scan(q, k, v, g, state, cu_seqlens, scale, reverse)
    return o, final


def scan_both_ways(
    q: Tensor, k: Tensor, v: Tensor, g_forward: Tensor, g_backward: Tensor, cu_seqlens: Tensor | None, scale: float
) -> Tensor:
    """Return the sum of the outputs of both directions."""
    return _scan_both_ways(q, k, v, g_forward, g_backward, cu_seqlens, scale)[0]


@custom_op("gatewise::gated_linear_attention", mutates_args=())
def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, final states and what the backward pass needs."""
    if suits_triton(q):
        gates = (None, g) if reverse else (g, None)
        o, final = _kernels().forward(q, k, v, *gates, state, cu_seqlens, scale)
        return o, final, final.new_empty(0)
    with without_autocast(q):
        return chunked.chunked_forward(q, k, v, g, state, cu_seqlens, scale, reverse)


@custom_op("gatewise::gated_linear_attention_backward", mutates_args=())
def _scan_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if suits_triton(q):
        gates = (None, g) if reverse else (g, None)
        dq, dk, dv, dgates, dstate = _kernels().backward(do, dfinal, q, k, v, *gates, state, cu_seqlens, scale)
        return dq, dk, dv, dgates[reverse], dstate
    with without_autocast(q):
        return chunked.chunked_backward(do, dfinal, q, k, v, g, state, cu_seqlens, kept, scale, reverse)


@custom_op("gatewise::bidirectional_gated_linear_attention", mutates_args=())
def _scan_both_ways(
    q: Tensor, k: Tensor, v: Tensor, g_forward: Tensor, g_backward: Tensor, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return outputs, and what the backward pass needs."""
    if suits_triton(q):
        o, final = _kernels().forward(q, k, v, g_forward, g_backward, None, cu_seqlens, scale)
        return o, final.new_empty(0)
    with without_autocast(q):
        return chunked.chunked_forward_both_ways(q, k, v, g_forward, g_backward, cu_seqlens, scale)


@custom_op("gatewise::bidirectional_gated_linear_attention_backward", mutates_args=())
def _scan_both_ways_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_forward: Tensor,
    g_backward: Tensor,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if suits_triton(q):
        dq, dk, dv, dgates, _ = _kernels().backward(do, None, q, k, v, g_forward, g_backward, None, cu_seqlens, scale)
        return dq, dk, dv, *dgates
    with without_autocast(q):
        return chunked.chunked_backward_both_ways(do, q, k, v, g_forward, g_backward, cu_seqlens, kept, scale)


@custom_op("gatewise::gated_linear_attention_step", mutates_args=())
def _fused_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _kernels().step(q, k, v, g, state, scale)


@_scan.register_fake
def _(q, k, v, g, state, cu_seqlens, scale, reverse):
    return _fake_outputs(q, v), _fake_states(q, k, v, cu_seqlens), _fake_kept(q, k, v, cu_seqlens)


@_scan_backward.register_fake
def _(do, dfinal, q, k, v, g, state, cu_seqlens, kept, scale, reverse):
    return *(x.new_empty(x.shape) for x in (q, k, v, g)), _fake_states(q, k, v, cu_seqlens)


@_scan_both_ways.register_fake
def _(q, k, v, g_forward, g_backward, cu_seqlens, scale):
    kept = _fake_kept(q, k, v, cu_seqlens)
    return _fake_outputs(q, v), kept if suits_triton(q) else kept.new_empty(2, *kept.shape)


@_scan_both_ways_backward.register_fake
def _(do, q, k, v, g_forward, g_backward, cu_seqlens, kept, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g_forward, g_backward))


@_fused_step.register_fake
def _(q, k, v, g, state, scale):
    return _fake_outputs(q, v), _fake_states(q, k, v, None)


def _fake_outputs(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _fake_states(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty(sequences, *k.shape[2:], v.shape[-1], dtype=accumulation_dtype(q))


def _fake_kept(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    shape = (0,) if suits_triton(q) else chunked.checkpoints_shape(k, v, cu_seqlens)
    return k.new_empty(shape, dtype=accumulation_dtype(q))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, g, state, cu_seqlens, kept = ctx.saved_tensors
    if do is None:
        do = q.new_zeros(*q.shape[:-1], v.shape[-1])
    *gradients, dstate = _scan_backward(do, dfinal, q, k, v, g, state, cu_seqlens, kept, ctx.scale, ctx.reverse)
    return *gradients, None if state is None else dstate.to(state.dtype), None, None, None


def _keep_both_ways(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate_both_ways(ctx: Any, do: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 7
    return *_scan_both_ways_backward(do, *ctx.saved_tensors, ctx.scale), None, None


register_autograd("gatewise::gated_linear_attention", _differentiate, setup_context=_keep)
register_autograd(
    "gatewise::bidirectional_gated_linear_attention", _differentiate_both_ways, setup_context=_keep_both_ways
)


def _kernels() -> Any:
    from gatewise.ops.gated_linear_attention import triton as gated_linear_attention

    return gated_linear_attention


def _flops(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    """Count the recurrence: an outer product and a read of the state per token and head. Chunks change some of it."""
    batch, time, heads, key_dim = q_shape
    return 2 * batch * time * (heads + k_shape[2]) * key_dim * v_shape[-1]


def _backward_flops(do_shape: Any, _: Any, q_shape: Any, k_shape: Any, v_shape: Any, *__: Any, **___: Any) -> int:
    return 2 * _flops(q_shape, k_shape, v_shape)


def _flops_both_ways(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(q_shape, k_shape, v_shape)


def _backward_flops_both_ways(do_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    return 4 * _flops(q_shape, k_shape, v_shape)


register_flop_formula(torch.ops.gatewise.gated_linear_attention)(_flops)
register_flop_formula(torch.ops.gatewise.gated_linear_attention_step)(_flops)
register_flop_formula(torch.ops.gatewise.gated_linear_attention_backward)(_backward_flops)
register_flop_formula(torch.ops.gatewise.bidirectional_gated_linear_attention)(_flops_both_ways)
register_flop_formula(torch.ops.gatewise.bidirectional_gated_linear_attention_backward)(_backward_flops_both_ways)
