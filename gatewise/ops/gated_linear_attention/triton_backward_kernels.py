"""Backward kernels of gated linear attention. States and their gradients come from `states_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl

from gatewise.ops.gated_linear_attention.triton_kernels import (
    border_decay,
    chunk_scores,
    entry_decay,
    gate_channels,
    head_decay,
    level_decay,
    level_mask,
    load_state,
    load_tile,
    locate,
    multiply,
    store_tile,
)


@triton.jit
def value_gradients_kernel(
    q, k, do, dv, forward_sums, forward_gradients, backward_sums, backward_gradients, table, time, per_sequence, scale,
    kv_heads, key_dim, value_dim,
    WIDTH: tl.constexpr, LEVELS: tl.constexpr, GROUPS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute dv = A^T do + (k * to_end) D. Grid: blocks of values, chunks, heads of k."""
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    begin, length, sequence = locate(tl.program_id(1), table, time, per_sequence, PACKED, CHUNK)
    if length <= 0:
        return
    head = tl.program_id(2)
    rows = tl.arange(0, CHUNK)
    heads = kv_heads * GROUPS
    k_base = k + (begin * kv_heads + head) * key_dim
    gate_offset = (begin * kv_heads + head) * WIDTH
    forward_base, backward_base = forward_sums + gate_offset, backward_sums + gate_offset
    boundary = tl.program_id(1) + sequence
    state_size = key_dim * value_dim
    forward_exit = forward_gradients + ((boundary + 1) * kv_heads + head) * state_size
    backward_exit = backward_gradients + (boundary * kv_heads + head) * state_size
    gradient = tl.zeros([CHUNK, BV], dtype=tl.float32)
    for start in range(0, key_dim, BK):
        keys = start + tl.arange(0, BK)
        channels = gate_channels(keys, WIDTH)
        k_tile = load_tile(k_base, rows, keys, kv_heads * key_dim, length, key_dim).to(tl.float32)
        if FORWARD:
            decay, _ = border_decay(forward_base, rows, channels, kv_heads, length, WIDTH, False, False)
            state = load_state(forward_exit, keys, values, key_dim, value_dim)
            gradient += multiply(k_tile * decay, state, OPERAND, PRECISION)
        if BACKWARD:
            decay, _ = border_decay(backward_base, rows, channels, kv_heads, length, WIDTH, True, False)
            state = load_state(backward_exit, keys, values, key_dim, value_dim)
            gradient += multiply(k_tile * decay, state, OPERAND, PRECISION)
    for group in range(GROUPS):
        query_head = begin * heads + head * GROUPS + group
        scores = chunk_scores(
            q + query_head * key_dim, k_base, forward_base, backward_base, scale, rows, length,
            heads, kv_heads, key_dim, WIDTH, LEVELS, FORWARD, BACKWARD, BK, OPERAND, PRECISION,
        )  # fmt: skip
        outputs = load_tile(do + query_head * value_dim, rows, values, heads * value_dim, length, value_dim)
        gradient += multiply(tl.trans(scores), outputs, OPERAND, PRECISION)
    dv_base = dv + (begin * kv_heads + head) * value_dim
    store_tile(dv_base, gradient, rows, values, kv_heads * value_dim, length, value_dim)


@triton.jit
def exit_gradients(
    v_base, state_exit, gradient_exit, rows, keys, length, kv_heads, key_dim, value_dim,
    CHUNK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Return v D^T of a chunk, and the sum over values of the exit state times its gradient."""
    products = tl.zeros([CHUNK, BK], dtype=tl.float32)
    behind = tl.zeros([BK], dtype=tl.float32)
    for start in range(0, value_dim, BV):
        values = start + tl.arange(0, BV)
        gradient = load_state(gradient_exit, keys, values, key_dim, value_dim)
        state = load_state(state_exit, keys, values, key_dim, value_dim)
        behind += tl.sum(state.to(tl.float32) * gradient.to(tl.float32), axis=1)
        v_tile = load_tile(v_base, rows, values, kv_heads * value_dim, length, value_dim)
        products += multiply(v_tile, tl.trans(gradient), OPERAND, PRECISION)
    return products, behind


@triton.jit
def score_gradients(
    do_base, v_base, rows, length, heads, kv_heads, value_dim,
    CHUNK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Return do v^T of a chunk."""
    products = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for start in range(0, value_dim, BV):
        values = start + tl.arange(0, BV)
        outputs = load_tile(do_base, rows, values, heads * value_dim, length, value_dim)
        v_tile = load_tile(v_base, rows, values, kv_heads * value_dim, length, value_dim)
        products += multiply(outputs, tl.trans(v_tile), OPERAND, PRECISION)
    return products


@triton.jit
def entry_gradient(
    do_base, state_entry, rows, keys, length, heads, key_dim, value_dim,
    CHUNK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Return do S^T of a chunk."""
    products = tl.zeros([CHUNK, BK], dtype=tl.float32)
    for start in range(0, value_dim, BV):
        values = start + tl.arange(0, BV)
        outputs = load_tile(do_base, rows, values, heads * value_dim, length, value_dim)
        state = load_state(state_entry, keys, values, key_dim, value_dim)
        products += multiply(outputs, tl.trans(state), OPERAND, PRECISION)
    return products


@triton.jit
def inner_gradients(
    q, k, dscores, sums_base, rows, keys, length, kv_heads, key_dim,
    WIDTH: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return gradients of a block of q and of k through the off-diagonal scores."""
    if WIDTH == 1:
        decay = head_decay(sums_base, rows, kv_heads, length, REVERSE)
        products = tl.where(rows[:, None] == rows[None, :], 0.0, dscores * decay)
        dq = multiply(products, k, OPERAND, PRECISION)
        dk = multiply(tl.trans(products), q, OPERAND, PRECISION)
    else:
        dq = tl.zeros([CHUNK, BK], dtype=tl.float32)
        dk = tl.zeros([CHUNK, BK], dtype=tl.float32)
        stride = kv_heads * key_dim
        sums = load_tile(sums_base, rows, keys, stride, length, key_dim)
        for level in tl.static_range(LEVELS):
            decay, queries = level_decay(sums, sums_base, rows, keys, stride, length, key_dim, 1 << level, REVERSE)
            late = tl.where(queries[:, None], q * decay, 0.0)
            early = tl.where(queries[:, None], 0.0, k * decay)
            block = tl.where(level_mask(rows, 1 << level, REVERSE), dscores, 0.0)
            dq += multiply(block, early, OPERAND, PRECISION) * decay
            dk += multiply(tl.trans(block), late, OPERAND, PRECISION) * decay
    return dq, dk


@triton.jit
def store_gate_gradient(
    dg_base, each, behind, rows, keys, length, kv_heads, key_dim, WIDTH: tl.constexpr, REVERSE: tl.constexpr
):
    """Store dg from q dq - k dk and from what follows the chunk. For WIDTH 1 these are partial sums over keys."""
    gradient = tl.cumsum(each, axis=0, reverse=not REVERSE) + behind[None, :]
    if WIDTH == 1:
        gradient = tl.sum(tl.where(keys[None, :] < key_dim, gradient, 0.0), axis=1)
        tl.store(dg_base + rows * kv_heads, gradient, mask=rows < length)
    else:
        store_tile(dg_base, gradient, rows, keys, kv_heads * key_dim, length, key_dim)


@triton.jit
def query_key_gradients_kernel(
    q, k, v, do, dq, dk, forward_dg, backward_dg, forward_sums, forward_states, forward_gradients,
    backward_sums, backward_states, backward_gradients, table, time, per_sequence, tokens, scale,
    kv_heads, key_dim, value_dim,
    WIDTH: tl.constexpr, LEVELS: tl.constexpr, GROUPS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk and the gradients of the gates. Grid: blocks of keys, chunks, heads of k."""
    keys = tl.program_id(0) * BK + tl.arange(0, BK)
    begin, length, sequence = locate(tl.program_id(1), table, time, per_sequence, PACKED, CHUNK)
    if length <= 0:
        return
    head = tl.program_id(2)
    rows = tl.arange(0, CHUNK)
    heads = kv_heads * GROUPS
    own = rows[:, None] == rows[None, :]
    key_offset = (begin * kv_heads + head) * key_dim
    v_base = v + (begin * kv_heads + head) * value_dim
    gate_offset = (begin * kv_heads + head) * WIDTH
    forward_base, backward_base = forward_sums + gate_offset, backward_sums + gate_offset
    channels = gate_channels(keys, WIDTH)
    state_size = key_dim * value_dim
    left = ((tl.program_id(1) + sequence) * kv_heads + head) * state_size
    right = left + kv_heads * state_size
    k_tile = load_tile(k + key_offset, rows, keys, kv_heads * key_dim, length, key_dim).to(tl.float32)
    zero = tl.zeros([CHUNK, BK], dtype=tl.float32)
    forward_dk, backward_dk, diagonal_dk, forward_each, backward_each = zero, zero, zero, zero, zero
    if FORWARD:
        products, forward_behind = exit_gradients(
            v_base, forward_states + right, forward_gradients + right, rows, keys, length, kv_heads, key_dim, value_dim,
            CHUNK, OPERAND, PRECISION, BK, BV,
        )  # fmt: skip
        decay, _ = border_decay(forward_base, rows, channels, kv_heads, length, WIDTH, False, False)
        forward_dk += products * decay
    if BACKWARD:
        products, backward_behind = exit_gradients(
            v_base, backward_states + left, backward_gradients + left, rows, keys, length, kv_heads, key_dim, value_dim,
            CHUNK, OPERAND, PRECISION, BK, BV,
        )  # fmt: skip
        decay, _ = border_decay(backward_base, rows, channels, kv_heads, length, WIDTH, True, False)
        backward_dk += products * decay
    for group in range(GROUPS):
        query_head = begin * heads + head * GROUPS + group
        do_base = do + query_head * value_dim
        q_tile = (
            load_tile(q + query_head * key_dim, rows, keys, heads * key_dim, length, key_dim).to(tl.float32) * scale
        )
        dscores = score_gradients(
            do_base, v_base, rows, length, heads, kv_heads, value_dim, CHUNK, OPERAND, PRECISION, BV
        )
        diagonal = tl.sum(tl.where(own, dscores, 0.0), axis=1)[:, None]
        if FORWARD and BACKWARD:
            diagonal = 2 * diagonal
        # The diagonal is added after q dq and k dk are formed, where it would cancel up to rounding.
        query_gradient = diagonal * k_tile
        diagonal_dk += diagonal * q_tile
        if FORWARD:
            inner_dq, inner_dk = inner_gradients(
                q_tile, k_tile, dscores, forward_base, rows, keys, length, kv_heads, key_dim,
                WIDTH, LEVELS, CHUNK, False, OPERAND, PRECISION, BK,
            )  # fmt: skip
            products = entry_gradient(
                do_base, forward_states + left, rows, keys, length, heads, key_dim, value_dim,
                CHUNK, OPERAND, PRECISION, BK, BV,
            )  # fmt: skip
            inner_dq += products * entry_decay(forward_base, rows, channels, kv_heads, length, WIDTH)
            forward_dk += inner_dk
            forward_each += q_tile * inner_dq
            query_gradient += inner_dq
        if BACKWARD:
            inner_dq, inner_dk = inner_gradients(
                q_tile, k_tile, dscores, backward_base, rows, keys, length, kv_heads, key_dim,
                WIDTH, LEVELS, CHUNK, True, OPERAND, PRECISION, BK,
            )  # fmt: skip
            products = entry_gradient(
                do_base, backward_states + right, rows, keys, length, heads, key_dim, value_dim,
                CHUNK, OPERAND, PRECISION, BK, BV,
            )  # fmt: skip
            inner_dq += products * entry_decay(backward_base, rows, channels, kv_heads, length, WIDTH)
            backward_dk += inner_dk
            backward_each += q_tile * inner_dq
            query_gradient += inner_dq
        store_tile(dq + query_head * key_dim, query_gradient * scale, rows, keys, heads * key_dim, length, key_dim)
    dg_offset = gate_offset
    if WIDTH == 1:
        dg_offset += tl.program_id(0) * tokens * kv_heads
    if FORWARD:
        store_gate_gradient(
            forward_dg + dg_offset, forward_each - k_tile * forward_dk, forward_behind,
            rows, keys, length, kv_heads, key_dim, WIDTH, False,
        )  # fmt: skip
    if BACKWARD:
        store_gate_gradient(
            backward_dg + dg_offset, backward_each - k_tile * backward_dk, backward_behind,
            rows, keys, length, kv_heads, key_dim, WIDTH, True,
        )  # fmt: skip
    total_dk = forward_dk + backward_dk + diagonal_dk
    store_tile(dk + key_offset, total_dk, rows, keys, kv_heads * key_dim, length, key_dim)
