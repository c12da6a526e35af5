"""Functions shared by the kernels of gated linear attention, and the kernels of the forward pass.

A batch is read as packed sequences: tokens are (tokens, heads, width), a chunk is up to CHUNK tokens of one sequence.
Boundaries are between the chunks of a sequence and at its ends; states and their gradients are stored there. Sums of
gates run within a chunk: forward up to and including the row, or for the scan from the end starting with the row.

As in `decay`, scores are products of decayed queries and decayed keys on log2(CHUNK) levels. On each level, pairs of
neighboring parts of `half` rows, one with the queries and one with the keys, decay to and from the row at their border,
so that no exponent is positive. A level is one full matrix product on the tensor cores, masked to its pairs. With one
gate per head (WIDTH 1), a matrix of decays does the same.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
HARDEST_GATE = tl.constexpr(-110.0)  # exp of it is 0 in float32


@triton.jit
def locate(chunk, table, time, per_sequence, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """Return first token, number of tokens and sequence of a chunk; unused chunks have no tokens."""
    if PACKED:
        begin = tl.load(table + 3 * chunk)
        length = tl.load(table + 3 * chunk + 1)
        sequence = tl.load(table + 3 * chunk + 2)
    else:
        sequence = chunk // per_sequence
        first = (chunk % per_sequence) * CHUNK
        begin = (sequence * time + first).to(tl.int64)
        length = tl.minimum(time - first, CHUNK)
        sequence = sequence.to(tl.int64)
    return begin, length, sequence


@triton.jit
def load_tile(base, rows, columns, stride, length, width):
    """Load rows of tokens in their own dtype, 0 outside."""
    mask = (rows[:, None] < length) & (columns[None, :] < width)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, tile, rows, columns, stride, length, width):
    mask = (rows[:, None] < length) & (columns[None, :] < width)
    tl.store(base + rows[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_state(base, keys, values, key_dim, value_dim):
    """Load (keys, values) of a state, in its dtype."""
    mask = (keys[:, None] < key_dim) & (values[None, :] < value_dim)
    return tl.load(base + keys[:, None] * value_dim + values[None, :], mask=mask, other=0.0)


@triton.jit
def store_state(base, state, keys, values, key_dim, value_dim):
    mask = (keys[:, None] < key_dim) & (values[None, :] < value_dim)
    tl.store(base + keys[:, None] * value_dim + values[None, :], state.to(base.dtype.element_ty), mask=mask)


@triton.jit
def gate_channels(keys, WIDTH: tl.constexpr):
    """Map channels of the keys to channels of the gates."""
    return tl.arange(0, 1) if WIDTH == 1 else keys


@triton.jit
def entry_decay(base, rows, channels, kv_heads, length, WIDTH: tl.constexpr):
    """Return the decay from the chunk's entry to each row."""
    return tl.exp(load_tile(base, rows, channels, kv_heads * WIDTH, length, WIDTH))


@triton.jit
def border_decay(
    base, rows, channels, kv_heads, length,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, FROM_ENTRY: tl.constexpr,
):  # fmt: skip
    """Return the decay from the chunk's entry to each row, or from it to the exit, and the chunk's total log decay."""
    last = length - 1
    if REVERSE:
        last = 0
    total = tl.load(base + last * kv_heads * WIDTH + channels, mask=channels < WIDTH, other=0.0)
    sums = load_tile(base, rows, channels, kv_heads * WIDTH, length, WIDTH)
    # Positive only after the last token, where keys are 0.
    exponents = sums if FROM_ENTRY else tl.minimum(total[None, :] - sums, 0.0)
    return tl.exp(exponents), total


@triton.jit
def multiply(left, right, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply matrices with operands in OPERAND, accumulated in float32."""
    left, right = left.to(OPERAND), right.to(OPERAND)
    if INTERPRETED:
        # The interpreter's product treats the bits of bfloat16 as integers.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def level_decay(sums, base, rows, columns, stride, length, width, HALF: tl.constexpr, REVERSE: tl.constexpr):
    """Return the decay of each row to the border of its pair of parts, and which rows are queries."""
    late = (rows // HALF) % 2 == 1
    middle = rows // (2 * HALF) * (2 * HALF) + HALF
    if REVERSE:
        queries = late == 0
        border = load_tile(base, middle - 1, columns, stride, length, width)
    else:
        queries = late
        border = load_tile(base, middle, columns, stride, length, width)
    # Positive only if the border is after the last token; then one side of the pair is empty.
    exponents = tl.minimum(tl.where(queries[:, None], sums - border, border - sums), 0.0)
    return tl.exp(exponents), queries


@triton.jit
def level_mask(rows, HALF: tl.constexpr, REVERSE: tl.constexpr):
    """Return the mask of queries by keys of the same pair."""
    late = (rows // HALF) % 2 == 1
    pair = rows // (2 * HALF)
    queries = late == 0 if REVERSE else late
    return (pair[:, None] == pair[None, :]) & queries[:, None] & (queries[None, :] == 0)


@triton.jit
def channel_scores(
    q, k, base, rows, columns, stride, length, width,
    LEVELS: tl.constexpr, REVERSE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return scores of one block of key channels, without the diagonal."""
    sums = load_tile(base, rows, columns, stride, length, width)
    scores = tl.zeros([rows.shape[0], rows.shape[0]], dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        decay, queries = level_decay(sums, base, rows, columns, stride, length, width, 1 << level, REVERSE)
        late = tl.where(queries[:, None], q * decay, 0.0)
        early = tl.where(queries[:, None], 0.0, k * decay)
        products = multiply(late, tl.trans(early), OPERAND, PRECISION)
        scores += tl.where(level_mask(rows, 1 << level, REVERSE), products, 0.0)
    return scores


@triton.jit
def head_decay(base, rows, stride, length, REVERSE: tl.constexpr):
    """Return the matrix of decays between the tokens of a chunk with one gate per head; 1 on the diagonal."""
    sums = tl.load(base + rows * stride, mask=rows < length, other=0.0)
    exponents = tl.minimum(sums[:, None] - sums[None, :], 0.0)
    seen = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
    return tl.where(seen, tl.exp(exponents), 0.0)


@triton.jit
def chunk_scores(
    q_base, k_base, forward_base, backward_base, scale, rows, length, heads, kv_heads, key_dim,
    WIDTH: tl.constexpr, LEVELS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, BK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return scores of a chunk for one head of q, summed over both directions."""
    scores = tl.zeros([rows.shape[0], rows.shape[0]], dtype=tl.float32)
    for start in range(0, key_dim, BK):
        columns = start + tl.arange(0, BK)
        q = load_tile(q_base, rows, columns, heads * key_dim, length, key_dim).to(tl.float32) * scale
        k = load_tile(k_base, rows, columns, kv_heads * key_dim, length, key_dim).to(tl.float32)
        scores += block_scores(
            q, k, forward_base, backward_base, rows, columns, length, kv_heads, key_dim,
            WIDTH, LEVELS, FORWARD, BACKWARD, OPERAND, PRECISION,
        )  # fmt: skip
    return decayed_scores(scores, forward_base, backward_base, rows, length, kv_heads, WIDTH, FORWARD, BACKWARD)


@triton.jit
def block_scores(
    q, k, forward_base, backward_base, rows, columns, length, kv_heads, key_dim,
    WIDTH: tl.constexpr, LEVELS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return one key block's contribution to the scores or, with one gate per head, to the undecayed products."""
    if WIDTH == 1:
        scores = multiply(q, tl.trans(k), OPERAND, PRECISION)
    else:
        own = tl.sum(q * k, axis=1)
        if FORWARD and BACKWARD:
            own = 2 * own
        scores = tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
        stride = kv_heads * key_dim
        if FORWARD:
            scores += channel_scores(
                q, k, forward_base, rows, columns, stride, length, key_dim, LEVELS, False, OPERAND, PRECISION
            )
        if BACKWARD:
            scores += channel_scores(
                q, k, backward_base, rows, columns, stride, length, key_dim, LEVELS, True, OPERAND, PRECISION
            )
    return scores


@triton.jit
def decayed_scores(
    scores, forward_base, backward_base, rows, length, kv_heads,
    WIDTH: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Turn the sum of products into scores if there is one gate per head; otherwise the scores are complete."""
    if WIDTH == 1:
        decay = tl.zeros_like(scores)
        if FORWARD:
            decay += head_decay(forward_base, rows, kv_heads, length, False)
        if BACKWARD:
            decay += head_decay(backward_base, rows, kv_heads, length, True)
        scores *= decay
    return scores


@triton.jit
def sum_gates_kernel(
    g, sums, table, time, per_sequence, kv_heads, width,
    PACKED: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Sum gates within chunks. Grid: chunks, blocks of channels, heads of k."""
    begin, length, _ = locate(tl.program_id(0), table, time, per_sequence, PACKED, CHUNK)
    offset = (begin * kv_heads + tl.program_id(2)) * width
    rows, columns = tl.arange(0, CHUNK), tl.program_id(1) * BW + tl.arange(0, BW)
    gates = load_tile(g + offset, rows, columns, kv_heads * width, length, width).to(tl.float32)
    totals = tl.cumsum(tl.maximum(gates, HARDEST_GATE), axis=0, reverse=REVERSE)
    store_tile(sums + offset, totals, rows, columns, kv_heads * width, length, width)


@triton.jit
def states_kernel(
    x, y, sums, initial, boundaries, final, table, firsts, time, per_sequence, scale, kv_heads, key_dim, value_dim,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
    GRADIENT: tl.constexpr, HAS_INITIAL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute states on all boundaries: S' = diag(total) S + scale * sum over groups of (x * decay)^T y.

    With x = k, y = v and the decay to the chunk's exit these are the states of a sequence, in scan order. As GRADIENT,
    with x = q, y = do and the decay from the chunk's entry, they are the gradients in the opposite order. Grid: blocks
    of key times blocks of value channels, heads of k, sequences.
    """
    blocks = tl.cdiv(value_dim, BV)
    keys = tl.program_id(0) // blocks * BK + tl.arange(0, BK)
    values = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    gate_columns = gate_channels(keys, WIDTH)
    if PACKED:
        first = tl.load(firsts + sequence)
        count = tl.load(firsts + sequence + 1) - first
    else:
        first, count = sequence * per_sequence, per_sequence
    state_size = key_dim * value_dim
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_INITIAL:
        offset = (sequence * kv_heads + head) * state_size
        state += load_state(initial + offset, keys, values, key_dim, value_dim)
    for step in range(count):
        # The reverse scan runs downwards, and gradients run against the scan.
        index = step
        if REVERSE != GRADIENT:
            index = count - 1 - step
        begin, length, _ = locate(first + index, table, time, per_sequence, PACKED, CHUNK)
        boundary = first + sequence + index
        if REVERSE != GRADIENT:
            boundary += 1
        offset = (boundary * kv_heads + head) * state_size
        store_state(boundaries + offset, state, keys, values, key_dim, value_dim)
        sums_base = sums + (begin * kv_heads + head) * WIDTH
        decay, total = border_decay(sums_base, rows, gate_columns, kv_heads, length, WIDTH, REVERSE, GRADIENT)
        state *= tl.exp(total)[:, None]
        y_stride = kv_heads * GROUPS * value_dim
        for group in tl.static_range(GROUPS):
            query_head = begin * kv_heads * GROUPS + head * GROUPS + group
            x_tile = load_tile(x + query_head * key_dim, rows, keys, kv_heads * GROUPS * key_dim, length, key_dim)
            y_tile = load_tile(y + query_head * value_dim, rows, values, y_stride, length, value_dim)
            update = multiply(tl.trans(x_tile.to(tl.float32) * decay), y_tile, OPERAND, PRECISION)
            state += update * scale
    last = first + sequence
    if REVERSE == GRADIENT:
        last += count
    store_state(boundaries + (last * kv_heads + head) * state_size, state, keys, values, key_dim, value_dim)
    store_state(final + (sequence * kv_heads + head) * state_size, state, keys, values, key_dim, value_dim)


@triton.jit
def outputs_kernel(
    q, k, v, o, forward_sums, forward_states, backward_sums, backward_states, table, time, per_sequence, scale,
    kv_heads, key_dim, value_dim,
    WIDTH: tl.constexpr, LEVELS: tl.constexpr, GROUPS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute outputs of one or both directions from one read of q, k and v. Grid: value blocks, chunks, q heads."""
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    begin, length, sequence = locate(tl.program_id(1), table, time, per_sequence, PACKED, CHUNK)
    if length <= 0:
        return
    head, kv_head = tl.program_id(2), tl.program_id(2) // GROUPS
    rows = tl.arange(0, CHUNK)
    heads = kv_heads * GROUPS
    q_base, k_base = q + (begin * heads + head) * key_dim, k + (begin * kv_heads + kv_head) * key_dim
    gate_offset = (begin * kv_heads + kv_head) * WIDTH
    forward_base, backward_base = forward_sums + gate_offset, backward_sums + gate_offset
    boundary = tl.program_id(1) + sequence
    state_size = key_dim * value_dim
    forward_entry = forward_states + (boundary * kv_heads + kv_head) * state_size
    backward_entry = backward_states + ((boundary + 1) * kv_heads + kv_head) * state_size
    scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    outputs = tl.zeros([CHUNK, BV], dtype=tl.float32)
    for start in range(0, key_dim, BK):
        keys = start + tl.arange(0, BK)
        q_tile = load_tile(q_base, rows, keys, heads * key_dim, length, key_dim).to(tl.float32) * scale
        k_tile = load_tile(k_base, rows, keys, kv_heads * key_dim, length, key_dim).to(tl.float32)
        scores += block_scores(
            q_tile, k_tile, forward_base, backward_base, rows, keys, length, kv_heads, key_dim,
            WIDTH, LEVELS, FORWARD, BACKWARD, OPERAND, PRECISION,
        )  # fmt: skip
        if FORWARD:
            decay = entry_decay(forward_base, rows, gate_channels(keys, WIDTH), kv_heads, length, WIDTH)
            state = load_state(forward_entry, keys, values, key_dim, value_dim)
            outputs += multiply(q_tile * decay, state, OPERAND, PRECISION)
        if BACKWARD:
            decay = entry_decay(backward_base, rows, gate_channels(keys, WIDTH), kv_heads, length, WIDTH)
            state = load_state(backward_entry, keys, values, key_dim, value_dim)
            outputs += multiply(q_tile * decay, state, OPERAND, PRECISION)
    scores = decayed_scores(scores, forward_base, backward_base, rows, length, kv_heads, WIDTH, FORWARD, BACKWARD)
    v_base = v + (begin * kv_heads + kv_head) * value_dim
    v_tile = load_tile(v_base, rows, values, kv_heads * value_dim, length, value_dim)
    outputs += multiply(scores, v_tile, OPERAND, PRECISION)
    store_tile(o + (begin * heads + head) * value_dim, outputs, rows, values, heads * value_dim, length, value_dim)


@triton.jit
def step_kernel(
    q, k, v, g, state, o, new_state, scale, kv_heads, key_dim, value_dim,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, HAS_STATE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Process one token: read and write the state once. Grid: value blocks, batch times heads of k. BK spans K."""
    row = tl.program_id(1).to(tl.int64)
    keys, values = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    key_mask, value_mask = keys < key_dim, values < value_dim
    key = tl.load(k + row * key_dim + keys, mask=key_mask, other=0.0).to(tl.float32)
    value = tl.load(v + row * value_dim + values, mask=value_mask, other=0.0).to(tl.float32)
    offset = row * key_dim * value_dim
    new = key[:, None] * value[None, :]
    if HAS_STATE:
        channels = gate_channels(keys, WIDTH)
        gate = tl.load(g + row * WIDTH + channels, mask=channels < WIDTH, other=0.0).to(tl.float32)
        new += tl.exp(gate)[:, None] * load_state(state + offset, keys, values, key_dim, value_dim)
    store_state(new_state + offset, new, keys, values, key_dim, value_dim)
    for group in tl.static_range(GROUPS):
        query_row = row * GROUPS + group
        query = tl.load(q + query_row * key_dim + keys, mask=key_mask, other=0.0).to(tl.float32) * scale
        output = tl.sum(query[:, None] * new, axis=0)
        tl.store(o + query_row * value_dim + values, output.to(o.dtype.element_ty), mask=value_mask)
