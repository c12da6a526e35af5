"""Parts of quantization-aware training: tracking of activation ranges, and batch norm on quantized weights.

sigma_B and mu_B are the statistics of the batch, sigma and mu the long-term ones. sigma = sqrt(variance + eps), and Q
rounds to a grid. The weights of a convolution are rounded as in the integer network: folded with the batch norm's
long-term standard deviation, so that they do not jitter between batches. A correction compensates for the batch:

    c = sigma_B / sigma
    before the freeze   y = conv(x, Q(gamma W / sigma)) / c + beta - gamma mu_B / sigma_B
    after the freeze    y = conv(x, Q(gamma W / sigma))     + beta - gamma mu   / sigma

Without Q the first line is batch norm in training mode, and the second batch norm in eval mode.

Source: Krishnamoorthi 2018, arXiv:1806.08342, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.ops.quantize import Grid, affine_grid

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
LinearMap = Callable[[Tensor], Tensor]
"""Function from a weight to the output of a convolution or linear layer without bias: (B, C, ...)."""


class BatchStatistics(NamedTuple):
    """Mean and biased variance of a batch's channels, (C,) each, and the number of values per channel."""

    mean: Tensor
    variance: Tensor
    values: int


def new_range() -> Float[Tensor, 2]:
    """Return an empty range: smallest and largest value, both 0."""
    return torch.zeros(2)


def is_set(span: Float[Tensor, 2]) -> bool:
    """Whether a range has seen anything but zeros."""
    return bool(span.any())


@torch.no_grad()
def follow_range(span: Float[Tensor, 2], x: Float[Tensor, "*shape"], decay: float, name: str) -> None:
    """Move `span` toward the smallest and largest value of `x`: span = decay * span + (1 - decay) * seen.

    The first values seen are used directly. With several processes, values are combined over all of them.

    Args:
        name: name of the tensor, for error messages.
    Raises:
        ValueError: if `x` has a value that is not finite; the range is then unchanged.
    """
    low, high = x.detach().aminmax()
    # The largest value is negated so that one reduction serves both.
    seen = torch.stack([low, -high]).to(span.dtype)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(seen, dist.ReduceOp.MIN)
    if not seen.isfinite().all():
        what = "NaN" if seen.isnan().any() else "an infinite value"
        raise ValueError(f"{name} holds {what}; quantization needs finite values")
    seen = seen * seen.new_tensor([1.0, -1.0])
    span.copy_(seen if not is_set(span) else torch.lerp(seen, span, decay))


def grid_of(spans: Sequence[Float[Tensor, 2]], bits: int, name: str) -> Grid | None:
    """Return the affine grid over all these ranges, or None if all of them are empty."""
    ends = torch.stack([span.to(torch.promote_types(span.dtype, torch.float32)) for span in spans])
    # While tracing, ranges are assumed not to be empty.
    if not torch.compiler.is_compiling() and not ends.any():
        return None
    return affine_grid(ends[:, 0].amin(), ends[:, 1].amax(), bits, name=name)


def fake_quantize_bias(bias: Float[Tensor, " dim"], input_grid: Grid, weight_grid: Grid) -> Float[Tensor, " dim"]:
    """Round a bias to the scale of code products, where integer kernels add it. Its gradient passes unchanged."""
    step = (input_grid.scale * weight_grid.scale).detach()
    return bias + ((bias / step).round() * step - bias).detach()


def deviation(norm: BatchNorm) -> Float[Tensor, " dim"]:
    """Return the long-term standard deviation sqrt(running_var + eps), at least in float32.

    Raises:
        ValueError: if the norm keeps no running statistics.
    """
    if norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    return (norm.running_var.to(wide) + norm.eps).sqrt()


def folded_weight(weight: Float[Tensor, "dim ..."], norm: BatchNorm) -> Float[Tensor, "dim ..."]:
    """Return gamma W / sigma, with the long-term standard deviation, at least in float32."""
    scale = _gamma(norm) / deviation(norm)
    return weight * scale.view(-1, *[1] * (weight.ndim - 1))


def folded_bias(bias: Float[Tensor, " dim"] | None, norm: BatchNorm) -> Float[Tensor, " dim"]:
    """Return beta - gamma (mu - bias) / sigma, with long-term statistics and the preceding layer's `bias`."""
    mean = norm.running_mean if bias is None else norm.running_mean - bias
    shift = -_gamma(norm) * mean / deviation(norm)
    return shift if norm.bias is None else shift + norm.bias


def norm_with_batch_statistics(
    apply: LinearMap,
    weight: Float[Tensor, "dim ..."],
    bias: Float[Tensor, " dim"] | None,
    norm: BatchNorm,
    rounded: Float[Tensor, "dim ..."],
) -> tuple[Float[Tensor, "batch dim ..."], BatchStatistics]:
    """Apply a layer and its batch norm before the freeze, with gradients through both; also return the statistics.

    The statistics take a pass with the float weight, in addition to the pass with the rounded one.

    Args:
        weight: weight of the layer, in float.
        bias: bias of the layer; it only shifts the batch's mean.
        rounded: gamma W / sigma, rounded to a grid.
    Raises:
        ValueError: if a channel has only one value, whose variance is meaningless.
    """
    z = apply(weight)
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    if wide[:, 0].numel() < 2:
        raise ValueError(f"batch norm needs more than one value per channel in training, not shape {tuple(z.shape)}")
    dims = [0, *range(2, wide.ndim)]
    variance, mean = torch.var_mean(wide, dims, correction=0)
    sigma_batch = (variance + norm.eps).sqrt()
    correction = sigma_batch / deviation(norm)
    seen = mean if bias is None else mean + bias
    # The bias cancels out. Its gradient exists and is 0, as in batch norm.
    shift = -_gamma(norm) * (seen if bias is None else seen - bias) / sigma_batch
    if norm.bias is not None:
        shift = shift + norm.bias
    y = apply(rounded) / _channels(correction, wide) + _channels(shift, wide)
    return y.to(z.dtype), BatchStatistics(seen.detach(), variance.detach(), wide[:, 0].numel())


def norm_with_long_term_statistics(
    apply: LinearMap, rounded: Float[Tensor, "dim ..."], shift: Float[Tensor, " dim"]
) -> Float[Tensor, "batch dim ..."]:
    """Apply a layer and its batch norm after the freeze, as the integer network does: rounded weight, folded bias."""
    z = apply(rounded)
    return (z + _channels(shift, z)).to(z.dtype)


@torch.no_grad()
def update_statistics(norm: BatchNorm, seen: BatchStatistics, momentum: float) -> None:
    """Move the running mean and (unbiased) variance toward the batch's, as PyTorch's batch norms do."""
    if norm.running_mean is None or norm.running_var is None:
        return
    unbiased = seen.variance * (seen.values / (seen.values - 1))
    norm.running_mean.lerp_(seen.mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


def _gamma(norm: BatchNorm) -> Tensor:
    return deviation(norm).new_ones(norm.num_features) if norm.weight is None else norm.weight


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Return values per channel in a shape that broadcasts against (B, C, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
