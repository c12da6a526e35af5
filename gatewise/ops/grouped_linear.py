"""Many linear layers at once: rows in groups, with one matrix per group.

    y_i = x_i W_g^T   for every row i of group g;   groups follow one after the other, counts_g rows each

This is what a mixture of experts computes once its tokens are sorted by expert. The sizes of the groups are data, so
compilers see one opaque operator. Its gradient is the same operator with the matrices transposed, and a sum of outer
products per group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def grouped_linear(
    x: Float[Tensor, "rows in"], weight: Float[Tensor, "groups out in"], counts: Int[Tensor, " groups"]
) -> Float[Tensor, "rows out"]:
    """Multiply every row of `x` with the matrix of its group.

    Args:
        weight: one matrix per group.
        counts: number of rows in each group. Their sum is not compared with the rows of `x`, since reading it would
            make an accelerator wait.
    Raises:
        ValueError: if the shapes do not fit together.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or counts.shape != weight.shape[:1]:
        raise ValueError(
            "grouped_linear takes rows (rows, in), weights (groups, out, in) and counts (groups,), not "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(counts.shape)}"
        )
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        # Autocast only handles torch's own operators.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return torch.ops.gatewise.grouped_linear(x, weight, counts)


def grouped_linear_reference(
    x: Float[Tensor, "rows in"], weight: Float[Tensor, "groups out in"], counts: Int[Tensor, " groups"]
) -> Float[Tensor, "rows out"]:
    """Compute the definition, row by row."""
    groups = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return torch.einsum("ri,roi->ro", x, weight[groups])


@torch.library.custom_op(
    "gatewise::grouped_linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor counts) -> Tensor"
)
def _grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if _has_kernel(x, weight):
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for matrix, start, end in _groups(weight, counts):
        torch.mm(x[start:end], matrix.T, out=y[start:end])
    return y


@torch.library.custom_op(
    "gatewise::grouped_outer", mutates_args=(), schema="(Tensor dy, Tensor x, Tensor counts) -> Tensor"
)
def _grouped_outer(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Return dy^T x over the rows of each group: the gradient of the weights, (groups, out, in)."""
    if _has_kernel(x, dy):
        ends = counts.cumsum(0).to(torch.int32)
        products = F.grouped_mm(dy.transpose(0, 1), x, offs=ends)
        # The kernel leaves groups without rows undefined.
        return products.masked_fill_((counts == 0)[:, None, None], 0.0)
    products = x.new_zeros(counts.shape[0], dy.shape[1], x.shape[1])
    for product, start, end in _groups(products, counts):
        torch.mm(dy[start:end].T, x[start:end], out=product)
    return products


def _groups(stacked: Tensor, counts: Tensor) -> list[tuple[Tensor, int, int]]:
    """Return the matrix and the first and last row of every group that is not empty."""
    found, start = [], 0
    for matrix, rows in zip(stacked, counts.tolist(), strict=True):
        if rows:
            found.append((matrix, start, start + rows))
        start += rows
    return found


def _has_kernel(*tensors: Tensor) -> bool:
    """Return whether torch's fused kernel applies: bfloat16 on a GPU of compute capability 8.0 or up, aligned rows."""
    first = tensors[0]
    return (
        first.is_cuda
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(first.device) >= (8, 0)
        and all(t.dtype == torch.bfloat16 and t.is_contiguous() and t.shape[-1] % 8 == 0 for t in tensors)
        and all(t.shape[-2] % 8 == 0 for t in tensors if t.ndim == 3)
    )


@_grouped_linear.register_fake
def _grouped_linear_fake(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _grouped_outer_fake(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors  # type: ignore[attr-defined]
    dx = dw = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        dx = torch.ops.gatewise.grouped_linear(dy.contiguous(), weight.transpose(1, 2).contiguous(), counts)
    if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
        dw = torch.ops.gatewise.grouped_outer(dy.contiguous(), x, counts)
    return dx, dw, None


_grouped_linear.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.gatewise.grouped_linear)
def _grouped_linear_flops(x: tuple[int, ...], weight: tuple[int, ...], *_: object, **__: object) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.gatewise.grouped_outer)
def _grouped_outer_flops(dy: tuple[int, ...], x: tuple[int, ...], *_: object, **__: object) -> int:
    return 2 * dy[0] * dy[1] * x[1]
