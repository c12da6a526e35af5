"""Launch the kernels of gated linear attention.

Forward: sums of the gates within chunks, states at the borders of all chunks, then one kernel for the outputs, of one
direction or of both from one read of q, k and v. Backward: the same sums and states again, the gradients of the states,
and one kernel each for dv and for dq, dk and dg. Only the inputs are kept between forward and backward.

float32 inputs are multiplied as three TF32 products, which is close to float32. float16 is multiplied as TF32, since
states and gradients leave the range of float16. bfloat16 is multiplied as such. Sums are always float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gatewise.ops.gated_linear_attention import triton_backward_kernels as backward_kernels
from gatewise.ops.gated_linear_attention import triton_kernels as kernels

_KEY = ["key_dim", "value_dim", "WIDTH", "GROUPS", "CHUNK", "PACKED", "OPERAND"]


def _tuned(kernel: Any, blocks: list[tuple[int, int, int, int]], *key: str) -> Any:
    """Autotune the kernel over these blocks: key channels, value channels, warps and stages.

    The interpreter cannot measure. It uses small blocks, so that small shapes have several.
    """
    if kernels.INTERPRETED.value:
        blocks = [(16, 32, 4, 1)]
    configs = [
        triton.Config({"BK": keys, "BV": values}, num_warps=warps, num_stages=stages)
        for keys, values, warps, stages in blocks
    ]
    return triton.autotune(configs, key=[*_KEY, *key], prune_configs_by={"early_config_prune": _worth_trying})(kernel)


def _worth_trying(configs: list[triton.Config], arguments: dict[str, Any], **options: Any) -> list[triton.Config]:
    """Drop blocks that are far wider than the widths, and large ones of float32.

    Large float32 blocks spill, and take a minute each to compile, since a float32 product is three on tensor cores.
    """
    given = arguments | options
    widths = {"BK": given["key_dim"], "BV": given["value_dim"]}
    fitting = [
        config
        for config in configs
        if all(config.kwargs[name] < 2 * triton.next_power_of_2(width) for name, width in widths.items())
    ]
    if given["OPERAND"] == tl.float32:
        fitting = [config for config in fitting if config.kwargs["BK"] * config.kwargs["BV"] <= 32 * 64]
    return fitting or configs[:1]


# With four warps, the tiles of the three kernels below the first do not fit into the registers of an H100. More than
# one stage would also keep the borders of all levels in shared memory, which only small blocks allow.
_states = _tuned(
    kernels.states_kernel,
    [(32, 32, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3), (64, 128, 8, 3)],
    "REVERSE",
    "GRADIENT",
)
_SCORE_BLOCKS = [(32, 64, 8, 1), (32, 64, 8, 2), (64, 64, 8, 1), (32, 128, 8, 2), (64, 128, 8, 1), (64, 256, 8, 1)]
_outputs = _tuned(kernels.outputs_kernel, _SCORE_BLOCKS, "FORWARD", "BACKWARD")
_value_gradients = _tuned(backward_kernels.value_gradients_kernel, _SCORE_BLOCKS, "FORWARD", "BACKWARD")
_query_key_gradients = _tuned(
    backward_kernels.query_key_gradients_kernel,
    [(32, 64, 8, 1), (32, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 1)],
    "FORWARD",
    "BACKWARD",
)


@dataclass(frozen=True)
class _Plan:
    """Sizes of a call, its division of tokens into chunks, and the precision of products."""

    batch: int
    time: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    width: int
    chunk: int
    sequences: int
    chunks: int
    packed: bool
    table: Tensor
    firsts: Tensor
    operand: tl.dtype
    precision: str

    @property
    def per_sequence(self) -> int:
        """Chunks per sequence, if all sequences have one length."""
        return self.chunks // self.sequences

    @property
    def places(self) -> dict[str, Any]:
        return {"table": self.table, "time": self.time, "per_sequence": self.per_sequence}

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "kv_heads": self.kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "WIDTH": self.width,
            "GROUPS": self.heads // self.kv_heads,
            "PACKED": self.packed,
            "CHUNK": self.chunk,
            "OPERAND": self.operand,
            "PRECISION": self.precision,
        }

    def boundaries(self, like: Tensor) -> Tensor:
        """Allocate states between chunks and at the ends of sequences, in the dtype that they are multiplied in."""
        dtype = torch.bfloat16 if self.operand == tl.bfloat16 else torch.float32
        count = self.chunks + self.sequences
        return like.new_empty(count, self.kv_heads, self.key_dim, self.value_dim, dtype=dtype)

    def states(self, like: Tensor) -> Tensor:
        shape = self.sequences, self.kv_heads, self.key_dim, self.value_dim
        return like.new_empty(shape, dtype=torch.float32)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_gates: Tensor | None,
    backward_gates: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return outputs, summed over the directions with gates, and the final states of the last of these directions."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    gates = forward_gates, backward_gates
    plan = _plan(q, k, v, gates, cu_seqlens)
    o = q.new_empty(*q.shape[:-1], plan.value_dim)
    with _device(q):
        sums = [_sum_gates(g, plan, reverse) for reverse, g in enumerate(gates)]
        states, final = _all_states(k, v, sums, state, plan)
        _outputs[lambda meta: (triton.cdiv(plan.value_dim, meta["BV"]), plan.chunks, plan.heads)](
            q,
            k,
            v,
            o,
            *_interleave(q, sums, states),
            **plan.places,
            scale=scale,
            **plan.sizes,
            **_directions(gates, plan),
        )
    return o, final


def backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_gates: Tensor | None,
    backward_gates: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None], Tensor]:
    """Return dq, dk, dv, gate gradients per direction, and gradients of the last direction's initial states."""
    do, q, k, v = do.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    gates = forward_gates, backward_gates
    plan = _plan(q, k, v, gates, cu_seqlens)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with _device(q):
        sums = [_sum_gates(g, plan, reverse) for reverse, g in enumerate(gates)]
        states, _ = _all_states(k, v, sums, state, plan)
        gradients, dstate = _all_states(q, do, sums, dfinal, plan, scale)
        _value_gradients[lambda meta: (triton.cdiv(plan.value_dim, meta["BV"]), plan.chunks, plan.kv_heads)](
            q, k, do, dv, *_interleave(q, sums, gradients), **plan.places, scale=scale,
            **plan.sizes, **_directions(gates, plan),
        )  # fmt: skip
        partial = [_partial_gate_gradients(g, plan) for g in gates]
        _query_key_gradients[lambda meta: (triton.cdiv(plan.key_dim, meta["BK"]), plan.chunks, plan.kv_heads)](
            q, k, v, do, dq, dk, *(q if dg is None else dg for dg in partial),
            *_interleave(q, sums, states, gradients), **plan.places, tokens=plan.batch * plan.time, scale=scale,
            **plan.sizes, **_directions(gates, plan),
        )  # fmt: skip
    dgates = [_whole(dg, g) for dg, g in zip(partial, gates, strict=True)]
    return dq, dk, dv, dgates, dstate


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Process one token: decay, rank-one update and read in one kernel."""
    q, k, v, g = q.contiguous(), k.contiguous(), v.contiguous(), g.contiguous()
    batch, _, kv_heads, key_dim = k.shape
    value_dim = v.shape[-1]
    o = q.new_empty(*q.shape[:-1], value_dim)
    new = q.new_empty(batch, kv_heads, key_dim, value_dim, dtype=torch.float32)
    old = new if state is None else state.float().contiguous()
    block = max(16, min(64, triton.next_power_of_2(value_dim), 8192 // triton.next_power_of_2(key_dim)))
    with _device(q):
        kernels.step_kernel[(triton.cdiv(value_dim, block), batch * kv_heads)](
            q, k, v, g, old, o, new, scale, kv_heads, key_dim, value_dim,
            WIDTH=g.shape[-1], GROUPS=q.shape[2] // kv_heads, HAS_STATE=state is not None,
            BK=triton.next_power_of_2(key_dim), BV=block,
        )  # fmt: skip
    return o, new


def _plan(
    q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor | None, Tensor | None], cu_seqlens: Tensor | None
) -> _Plan:
    batch, time, heads, key_dim = q.shape
    width = next(g.shape[-1] for g in gates if g is not None)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk = _chunk(time if cu_seqlens is None else -(-time // sequences))
    if cu_seqlens is None:
        chunks, table, firsts = sequences * triton.cdiv(time, chunk), q, q
    else:
        chunks = time // chunk + sequences
        table, firsts = _places(cu_seqlens.to(q.device, torch.int64), chunk, chunks)
    operand = tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float32
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    return _Plan(
        batch, time, heads, k.shape[2], key_dim, v.shape[-1], width, chunk, sequences, chunks,
        cu_seqlens is not None, table, firsts, operand, precision,
    )  # fmt: skip


def _chunk(mean_length: int) -> int:
    """Return tokens per chunk: tensor cores need at least 16, and 64 keep them busy."""
    return 16 if mean_length <= 16 else 32 if mean_length <= 32 else 64


def _places(bounds: Tensor, chunk: int, chunks: int) -> tuple[Tensor, Tensor]:
    """Return first token, length and sequence of each chunk, and the first chunk of each sequence, without a sync.

    There are as many chunks as these sequences can have at most; unused ones have no tokens.
    """
    counts = (bounds.diff() + chunk - 1) // chunk
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    index = torch.arange(chunks, device=bounds.device)
    sequence = torch.searchsorted(firsts[1:], index, right=True).clamp_(max=counts.shape[0] - 1)
    begin = bounds[sequence] + (index - firsts[sequence]) * chunk
    length = (bounds[sequence + 1] - begin).clamp(0, chunk)
    return torch.stack([torch.where(length > 0, begin, 0), length, sequence], dim=1).contiguous(), firsts


def _sum_gates(g: Tensor | None, plan: _Plan, reverse: int) -> Tensor | None:
    if g is None:
        return None
    g = g.contiguous()
    sums = torch.empty_like(g, dtype=torch.float32)
    block = min(64, triton.next_power_of_2(plan.width))
    kernels.sum_gates_kernel[(plan.chunks, triton.cdiv(plan.width, block), plan.kv_heads)](
        g, sums, **plan.places, kv_heads=plan.kv_heads, width=plan.width,
        PACKED=plan.packed, CHUNK=plan.chunk, REVERSE=bool(reverse), BW=block,
    )  # fmt: skip
    return sums


def _all_states(
    x: Tensor, y: Tensor, sums: list[Tensor | None], initial: Tensor | None, plan: _Plan, scale: float | None = None
) -> tuple[list[Tensor | None], Tensor]:
    """Return states of each direction on all boundaries (gradients if a scale is given), and the last one's final."""
    gradient = scale is not None
    sizes = plan.sizes if gradient else plan.sizes | {"GROUPS": 1}
    boundaries: list[Tensor | None] = []
    final = plan.states(x)
    for reverse, gate_sums in enumerate(sums):
        boundaries.append(None if gate_sums is None else plan.boundaries(x))
        if gate_sums is None:
            continue
        _states[_state_grid(plan)](
            x, y, gate_sums, x if initial is None else initial.float().contiguous(), boundaries[-1], final,
            firsts=plan.firsts, **plan.places, scale=scale if gradient else 1.0, **sizes,
            REVERSE=bool(reverse), GRADIENT=gradient, HAS_INITIAL=initial is not None,
        )  # fmt: skip
    return boundaries, final


def _state_grid(plan: _Plan) -> Callable[[dict[str, int]], tuple[int, int, int]]:
    return lambda meta: (
        triton.cdiv(plan.key_dim, meta["BK"]) * triton.cdiv(plan.value_dim, meta["BV"]),
        plan.kv_heads,
        plan.sequences,
    )


def _partial_gate_gradients(g: Tensor | None, plan: _Plan) -> Tensor | None:
    """Allocate (blocks of keys, batch, time, heads, width); with one gate per head each block has its own sum."""
    if g is None:
        return None
    blocks = triton.cdiv(plan.key_dim, 16) if plan.width == 1 else 1
    return g.new_zeros(blocks, *g.shape, dtype=torch.float32)


def _whole(dg: Tensor | None, g: Tensor | None) -> Tensor | None:
    return None if dg is None or g is None else dg.sum(0).to(g.dtype)


def _interleave(placeholder: Tensor, *each: list[Tensor | None]) -> list[Tensor]:
    """Interleave: first directions of all, then second directions of all. Kernels do not read the placeholder."""
    return [placeholder if tensor is None else tensor for one in zip(*each, strict=True) for tensor in one]


def _directions(gates: tuple[Tensor | None, Tensor | None], plan: _Plan) -> dict[str, Any]:
    forward_gates, backward_gates = gates
    return {
        "FORWARD": forward_gates is not None,
        "BACKWARD": backward_gates is not None,
        "LEVELS": plan.chunk.bit_length() - 1,
    }


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device_of(tensor)
