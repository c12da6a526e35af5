"""Cross entropy of a linear layer's outputs, without ever holding all of them.

    z_n = W h_n,   loss_n = logsumexp(z_n) - z_n[y_n]             h: (tokens, dim), W: (vocab, dim)
    dloss_n / dz_n = softmax(z_n) - onehot(y_n)

With a vocabulary of 32,000, the logits of 16,384 tokens take 2 GiB in float32, and their gradient as much again: more
than everything else that a small model keeps. Here logits are computed for a few tokens at a time. The forward pass
keeps one number per token, log Z_n = logsumexp(z_n). The backward pass recomputes the logits, which takes a third more
matrix products in this layer (four instead of three).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from gatewise.ops.precision import without_autocast

CHUNK_ELEMENTS = 2**24
"""Number of logits held at a time unless a chunk size is given: 64 MiB in float32."""


def chunked_cross_entropy(
    hidden: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk_size: int | None = None,
) -> Float[Tensor, ...]:
    """Compute `F.cross_entropy(F.linear(hidden, weight), targets)` in float32 (float64 for float64 inputs).

    Under autocast the matrix products use its precision; everything else uses float32.

    Args:
        weight: output projection, without bias.
        targets: classes from 0 to vocab - 1, or `ignore_index`.
        reduction: mean over the targets that count (nan if there are none), sum, or one loss per target (0 where it is
            ignored).
        chunk_size: number of tokens whose logits are held at a time; None for 2^24 logits.
    Raises:
        ValueError: if shapes or types disagree, or a target is outside the vocabulary (checked in eager mode only).
    """
    _check(hidden, weight, targets, ignore_index, reduction, chunk_size)
    vocab, dim = weight.shape
    chunk = chunk_size if chunk_size is not None else max(1, CHUNK_ELEMENTS // vocab)
    if torch.is_autocast_enabled(hidden.device.type):
        precision = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(precision), weight.to(precision)
    flat = targets.reshape(-1)
    losses, _ = _token_losses(hidden.reshape(-1, dim), weight, flat, ignore_index, chunk)
    if reduction == "none":
        return losses.reshape(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (flat != ignore_index).sum()


def chunked_cross_entropy_reference(
    hidden: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, ...]:
    """Compute the definition, with all logits at once."""
    logits = F.linear(hidden, weight).reshape(-1, weight.shape[0])
    losses = F.cross_entropy(logits, targets.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    return losses.reshape(targets.shape) if reduction == "none" else losses


# Schemas are explicit, since annotations cannot be read from functions that are wrapped by run-time type checks.
@torch.library.custom_op(
    "gatewise::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, int chunk_size) -> (Tensor, Tensor)",
)
def _token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Return the loss (N,) and log Z (N,) of every token."""
    losses = hidden.new_empty(len(targets), dtype=_accurate(hidden.dtype))
    log_z = torch.empty_like(losses)
    with without_autocast(hidden):
        for chunk in _chunks(len(targets), chunk_size):
            logits = _logits(hidden[chunk], weight)
            counts = targets[chunk] != ignore_index
            at_target = logits.gather(1, torch.where(counts, targets[chunk], 0)[:, None])[:, 0]
            log_z[chunk] = logits.logsumexp(dim=1)
            losses[chunk] = torch.where(counts, log_z[chunk] - at_target, 0)
    return losses, log_z


@_token_losses.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(targets.shape, dtype=_accurate(hidden.dtype))
    return losses, torch.empty_like(losses)


@torch.library.custom_op(
    "gatewise::linear_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor log_z, int ignore_index, "
    "int chunk_size, bool[] wanted) -> (Tensor, Tensor)",
)
def _gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_z: Tensor,
    ignore_index: int,
    chunk_size: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return gradients of the hidden states and the weight from those of the losses; empty if not requested."""
    of_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    # In half precision, sums over many chunks would lose the last ones.
    of_weight = weight.new_zeros(weight.shape if wanted[1] else 0, dtype=_accurate(weight.dtype))
    with without_autocast(hidden):
        for chunk in _chunks(len(targets), chunk_size):
            counts = targets[chunk] != ignore_index
            of_logits = _logits(hidden[chunk], weight).sub_(log_z[chunk, None]).exp_()
            of_logits.scatter_add_(
                1, torch.where(counts, targets[chunk], 0)[:, None], -torch.ones_like(of_logits[:, :1])
            )
            of_logits.mul_(torch.where(counts, grad[chunk], 0)[:, None])
            of_logits = of_logits.to(hidden.dtype)
            if wanted[0]:
                of_hidden[chunk] = of_logits @ weight
            if wanted[1]:
                of_weight += of_logits.T @ hidden[chunk]
    return of_hidden, of_weight.to(weight.dtype)


@_gradients.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_z: Tensor,
    ignore_index: int,
    chunk_size: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape if wanted[1] else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, ctx.ignore_index, ctx.chunk_size = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1])


def _backward(ctx: Any, grad: Tensor, grad_of_log_z: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, log_z = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    both = _gradients(grad, hidden, weight, targets, log_z, ctx.ignore_index, ctx.chunk_size, wanted)
    return both[0] if wanted[0] else None, both[1] if wanted[1] else None, None, None, None


_token_losses.register_autograd(_backward, setup_context=_keep)


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).to(_accurate(hidden.dtype))


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str, chunk_size: int | None
) -> None:
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1] or hidden.shape[:-1] != targets.shape:
        raise ValueError(
            "expected hidden states (..., dim), a weight (vocab, dim) and targets (...), not "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if targets.dtype != torch.long:
        raise ValueError(f"targets must be int64, not {targets.dtype}")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"hidden states and weight must have one type, not {hidden.dtype} and {weight.dtype}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, not {chunk_size}")
    if torch.compiler.is_compiling() or targets.numel() == 0:
        return
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))
    if outside.any():
        raise ValueError(
            f"targets must be from 0 to {weight.shape[0] - 1} or {ignore_index}, not {targets[outside][0].item()}"
        )
