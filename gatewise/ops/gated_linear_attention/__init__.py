"""Gated linear attention: a linear recurrence with a matrix-valued state that decays channel by channel.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t        S: (key_dim, value_dim) per head, g_t <= 0
    o_t = scale * q_t S_t

The current token enters without decay, since its gate only acts on the past. Scanned from the end (`reverse`), S_{t-1}
becomes S_{t+1}. With one gate for all channels of a head this is simple GLA and, if the gate is constant, RetNet.

Four forms give the same results: the recurrence (`*_reference`, the definition), a chunked form in PyTorch for any
device and dtype, chunked kernels for CUDA, and a single step for decoding. The public functions choose automatically.

Source: Yang et al. 2023, arXiv:2312.06635, eq. (3) and section 4; both directions at once: Liao et al. 2024,
arXiv:2405.18425, section 3.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatewise.ops.gated_linear_attention import operators as operators

Queries = Float[Tensor, "batch time heads key_dim"]
Keys = Float[Tensor, "batch time kv_heads key_dim"]
Values = Float[Tensor, "batch time kv_heads value_dim"]
Gates = Float[Tensor, "batch time kv_heads key_dim"] | Float[Tensor, "batch time kv_heads 1"]
States = Float[Tensor, "sequences kv_heads key_dim value_dim"]
Outputs = Float[Tensor, "batch time heads value_dim"]
Boundaries = Int[Tensor, "boundaries"]


def gated_linear_attention(
    q: Queries,
    k: Keys,
    v: Values,
    g: Gates,
    state: States | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Boundaries | None = None,
    reverse: bool = False,
) -> tuple[Outputs, States]:
    """Return outputs in q's dtype, and the final state in float32 (float64 for float64 inputs).

    Gates, sums and states are accumulated at least in float32, also under autocast. Gradients flow from both results to
    all tensors. Differentiable once.

    Args:
        g: natural logarithm of the decay, at most 0; one per key channel, or one per head (width 1, which is cheaper).
        state: initial states of the sequences, zero if None. `sequences` is the batch, or the number of packed
            sequences.
        scale: scale of the queries; key_dim ** -0.5 if None.
        cu_seqlens: boundaries 0 = b_0 <= b_1 <= ... <= b_n = time of n sequences that are packed along the time of a
            batch of one; each starts with its own state.
        reverse: scan from the last token to the first; the final state is then the one after the first token.

    k, v, g and the state may have fewer heads than q: head h of q reads head h // (heads // kv_heads) of theirs.

    Raises:
        ValueError: if shapes, dtypes, devices or boundaries do not fit together, there are no tokens, or (only checked
            in eager mode) a gate is positive or NaN.
    """
    _check_tokens(q, k, v, g)
    _check_packing(q, cu_seqlens)
    _check_state(state, k, v, cu_seqlens)
    _check_gates(g)
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.shape[1] == 1 and cu_seqlens is None:
        return operators.step(q, k, v, g, state, scale)
    return operators.scan(q, k, v, g, state, cu_seqlens, scale, reverse)


def bidirectional_gated_linear_attention(
    q: Queries,
    k: Keys,
    v: Values,
    g_forward: Gates,
    g_backward: Gates,
    *,
    scale: float | None = None,
    cu_seqlens: Boundaries | None = None,
) -> Outputs:
    """Return the sum of the scans from both ends, each with its own gates. The current token is counted in both.

    Both gates are indexed by the token that they belong to. Arguments, results and errors are those of
    `gated_linear_attention`; the scans start from zero.
    """
    _check_tokens(q, k, v, g_forward, "g_forward")
    _check_tokens(q, k, v, g_backward, "g_backward")
    _check_packing(q, cu_seqlens)
    if g_forward.shape != g_backward.shape:
        raise ValueError(
            f"g_forward and g_backward must have one shape, not {_text(g_forward.shape)} and {_text(g_backward.shape)}"
        )
    _check_gates(g_forward, "g_forward")
    _check_gates(g_backward, "g_backward")
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    return operators.scan_both_ways(q, k, v, g_forward, g_backward, cu_seqlens, scale)


def gated_linear_attention_reference(
    q: Queries,
    k: Keys,
    v: Values,
    g: Gates,
    state: States | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Boundaries | None = None,
    reverse: bool = False,
) -> tuple[Outputs, States]:
    """Compute the recurrence, token by token, in the given dtype."""
    if cu_seqlens is not None:
        return _reference_of_packed(q, k, v, g, state, cu_seqlens.tolist(), scale, reverse)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q = q.unflatten(2, (k.shape[2], -1))
    state = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1]) if state is None else state
    outputs = [q.new_empty(())] * q.shape[1]
    for t in reversed(range(q.shape[1])) if reverse else range(q.shape[1]):
        state = g[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[t] = scale * (q[:, t] @ state)
    return torch.stack(outputs, dim=1).flatten(2, 3), state


def _reference_of_packed(
    q: Queries,
    k: Keys,
    v: Values,
    g: Gates,
    state: States | None,
    bounds: list[int],
    scale: float | None,
    reverse: bool,
) -> tuple[Outputs, States]:
    outputs, states = [], []
    for sequence, (begin, end) in enumerate(pairwise(bounds)):
        initial = k.new_zeros(1, *k.shape[2:], v.shape[-1]) if state is None else state[sequence : sequence + 1]
        if end > begin:
            own = [x[:, begin:end] for x in (q, k, v, g)]
            output, initial = gated_linear_attention_reference(
                own[0], own[1], own[2], own[3], initial, scale=scale, reverse=reverse
            )
            outputs.append(output)
        states.append(initial)
    return torch.cat(outputs, dim=1), torch.cat(states)


def bidirectional_gated_linear_attention_reference(
    q: Queries,
    k: Keys,
    v: Values,
    g_forward: Gates,
    g_backward: Gates,
    *,
    scale: float | None = None,
    cu_seqlens: Boundaries | None = None,
) -> Outputs:
    """Compute both recurrences, token by token, in the given dtype."""
    forward, _ = gated_linear_attention_reference(q, k, v, g_forward, scale=scale, cu_seqlens=cu_seqlens)
    backward, _ = gated_linear_attention_reference(
        q, k, v, g_backward, scale=scale, cu_seqlens=cu_seqlens, reverse=True
    )
    return forward + backward


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor, gates: str = "g") -> None:
    tensors = {"q": q, "k": k, "v": v, gates: g}
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, time, heads, width), not {_text(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, not {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, not on {tensor.device}")
        if tensor.shape[:2] != q.shape[:2]:
            found = _text(tensor.shape[:2])
            raise ValueError(f"{name} must have the batch and time of q, {_text(q.shape[:2])}, not {found}")
    if q.shape[1] == 0:
        raise ValueError("there must be at least one token, but the time of q is 0")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one width, not {q.shape[3]} and {k.shape[3]}")
    for name in ("v", gates):
        if tensors[name].shape[2] != k.shape[2]:
            raise ValueError(f"{name} must have the heads of k, {k.shape[2]}, not {tensors[name].shape[2]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the heads of q must be a multiple of those of k, but {q.shape[2]} is not a multiple of {k.shape[2]}"
        )
    if g.shape[3] not in (k.shape[3], 1):
        raise ValueError(f"{gates} must have the width of k, {k.shape[3]}, or 1, not {g.shape[3]}")


def _check_packing(q: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            "cu_seqlens must be a vector of at least two integers, "
            f"not {cu_seqlens.dtype} of shape {_text(cu_seqlens.shape)}"
        )
    if q.shape[0] != 1:
        raise ValueError(f"sequences are packed along the time of a batch of 1, not of {q.shape[0]}")
    if torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[1]:
        raise ValueError(f"cu_seqlens must run from 0 to the time, {q.shape[1]}, not from {bounds[0]} to {bounds[-1]}")
    if any(begin > end for begin, end in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must not decrease: {bounds}")


def _check_state(state: Tensor | None, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    if state is None:
        return
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = (sequences, *k.shape[2:], v.shape[-1])
    if tuple(state.shape) != expected:
        raise ValueError(
            f"the state must be (sequences, heads of k, key_dim, value_dim) = {_text(expected)}, "
            f"not {_text(state.shape)}"
        )
    if state.device != k.device:
        raise ValueError(f"the state must be on the device of k, {k.device}, not on {state.device}")
    if not state.is_floating_point():
        raise ValueError(f"the state must have a floating-point dtype, not {state.dtype}")


def _check_gates(g: Tensor, name: str = "g") -> None:
    """Check gates with a single reduction: the maximum of anything with NaN is NaN."""
    # There are no values to check while tracing or on the meta device.
    if torch.compiler.is_compiling() or g.device.type == "meta":
        return
    largest = g.detach().amax().item()
    if not largest <= 0:
        raise ValueError(f"log gates must be at most 0, but {name} reaches {largest}: pass the logarithm of the decay")


def _text(shape: tuple[int, ...] | torch.Size) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"
