"""Convolution with a set of experts, of which one processes each image.

A weight stacks N experts: rows e Co .. (e + 1) Co - 1 belong to expert e. Scores choose one expert for each image,

    e_i = argmax_j scores_ij
    y_i = conv(x_i, W[e_i Co : (e_i + 1) Co])                           (B, Ci, H, W) -> (B, Co, H', W')
    dL/dscores_ij = sum over c, h, w of dL/dy_ichw y_ichw  for j = e_i,  0 elsewhere      (straight-through)

and the same choice holds for every layer of a network. So `route_to_experts` sorts the batch once, `to_experts` places
the images of one expert side by side, and each convolution runs once per expert that has images, on a contiguous part
of the batch and of the weight. This takes 1/N of the arithmetic of computing all experts and masking. If one expert has
all images (always at batch 1), nothing is sorted, split or joined.

While `torch.compile`, `torch.export` or an ONNX export trace, the number of images per expert is not known, so the
images stay in order. For a batch that is known to be one image, the expert's part of the weight is selected, at the
cost of one expert. For any other batch, all experts are computed and each image's is selected. That takes N times the
arithmetic, as in the published code, but gives a static graph for any number of images.

Source: Zhang et al. 2023, arXiv:2308.10110, section 3 (channel-wise experts, one router for all layers); the gradient
is that of the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


class ExpertRouting(NamedTuple):
    """Assignment of a batch's images to experts. Made by `route_to_experts`, passed to every layer.

    Attributes:
        num_experts: number of experts.
        chosen: (batch,) expert of each image, in the order of `to_experts`.
        score: (batch,) score of each image in that order, through which gradients reach the scores; None if they need
            none.
        counts: number of images per expert; None while a compiler traces.
        order: (batch,) images in the order of their experts; None if they keep their order.
        places: (batch,) new position of each image.
    """

    num_experts: int
    chosen: Tensor
    score: Tensor | None = None
    counts: tuple[int, ...] | None = None
    order: Tensor | None = None
    places: Tensor | None = None

    @property
    def visited(self) -> list[int]:
        """Experts that have images; all of them while a compiler traces."""
        if self.counts is None:
            return list(range(self.num_experts))
        return [expert for expert, images in enumerate(self.counts) if images]


def route_to_experts(scores: Float[Tensor, "batch experts"]) -> ExpertRouting:
    """Return the routing of a batch: each image's expert is the one with the highest score, the first of equal ones.

    On the meta device there are no scores to compare, so expert 0, which costs as much as any, gets all images.

    Raises:
        ValueError: if scores are not (batch, experts), or some are not finite. The latter is checked only in eager
            mode, where it needs no more than the one transfer that counts the images of each expert.
    """
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise ValueError(f"routing scores must be (batch, experts), not {tuple(scores.shape)}")
    num_experts = scores.shape[1]
    chosen = scores.detach().argmax(dim=1)
    score = scores.gather(1, chosen[:, None])[:, 0] if scores.requires_grad else None
    if torch.compiler.is_compiling():
        return ExpertRouting(num_experts, chosen, score)
    counts = _count(scores.detach(), chosen)
    if sum(images > 0 for images in counts) < 2:
        return ExpertRouting(num_experts, chosen, score, counts)
    order = chosen.argsort(stable=True)
    sorted_score = None if score is None else score[order]
    return ExpertRouting(num_experts, chosen[order], sorted_score, counts, order, order.argsort())


def _count(scores: Tensor, chosen: Tensor) -> tuple[int, ...]:
    """Count the images of each expert, in one transfer from the device."""
    batch, num_experts = scores.shape
    if scores.is_meta:
        return (batch, *[0] * (num_experts - 1))
    # Images whose scores are not finite are counted after the last expert.
    labels = chosen.where(scores.isfinite().all(dim=1), num_experts)
    *counts, bad = (labels[:, None] == torch.arange(num_experts + 1, device=scores.device)).sum(dim=0).tolist()
    if bad:
        raise ValueError(
            f"router produced non-finite scores for {bad} of {batch} images: every comparison with them fails, and one "
            "expert would silently serve all; look for a diverged router"
        )
    return tuple(counts)


def to_experts(
    x: Float[Tensor, "batch channels height width"], routing: ExpertRouting
) -> Float[Tensor, "batch channels height width"]:
    """Return the batch in the order of its experts. `to_images` is the inverse."""
    return x if routing.order is None else x[routing.order]


def to_images(
    x: Float[Tensor, "batch channels height width"], routing: ExpertRouting
) -> Float[Tensor, "batch channels height width"]:
    """Return a batch from the order of its experts to its own."""
    return x if routing.places is None else x[routing.places]


def split_by_expert(routing: ExpertRouting) -> list[tuple[slice, ExpertRouting]]:
    """Return, for each expert with images, their slice of the sorted batch and the routing of only these images.

    This is for inference, where images do not interact in batch norms: a network can run once per expert, without
    splitting and joining at every layer. While a compiler traces, the only part is the whole batch.
    """
    visited = routing.visited
    if routing.counts is None or len(visited) < 2:
        return [(slice(None), routing)]
    parts, start = [], 0
    for expert in visited:
        images = routing.counts[expert]
        own = slice(start, start + images)
        counts = tuple(images if other == expert else 0 for other in range(routing.num_experts))
        score = None if routing.score is None else routing.score[own]
        parts.append((own, ExpertRouting(routing.num_experts, routing.chosen[own], score, counts)))
        start += images
    return parts


def expert_conv2d(
    x: Float[Tensor, "batch in_dim height width"],
    weight: Float[Tensor, "rows group_dim kernel_h kernel_w"],
    routing: ExpertRouting,
    bias: Float[Tensor, " rows"] | None = None,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Float[Tensor, "batch dim h w"]:
    """Convolve each image with the weights of its expert.

    Args:
        x: images in the order of their experts (see `to_experts`).
        weight: stacked experts: rows = num_experts * dim.
        routing: routing of this batch.
        bias: one entry per row of the weight.
        groups: groups of the convolution within one expert.
    Raises:
        ValueError: if the weight's rows are not a multiple of the experts, or the routing is for another batch.
    """
    if weight.shape[0] % routing.num_experts:
        raise ValueError(
            f"the weight's {weight.shape[0]} rows must be a multiple of the number of experts, {routing.num_experts}"
        )
    if routing.counts is not None and x.shape[0] != sum(routing.counts):
        raise ValueError(f"the routing is of {sum(routing.counts)} images, the batch has {x.shape[0]}")
    conv = partial(F.conv2d, stride=stride, padding=padding, groups=groups)
    if routing.counts is not None:
        y = _run_by_expert(conv, x, weight, bias, routing)
    elif statically_known_true(x.shape[0] == 1):
        y = _pick_weight(conv, x, weight, bias, routing)
    else:
        y = _pick_output(conv, x, weight, bias, routing)
    return y if routing.score is None else _StraightThrough.apply(y, routing.score)


def _run_by_expert(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None, routing: ExpertRouting) -> Tensor:
    """Run one convolution per expert that has images, on contiguous parts of batch and weight."""
    # An empty batch visits no expert, and any expert gives the output's shape.
    visited, counts = routing.visited or [0], routing.counts or ()
    if len(visited) == 1:
        dim = weight.shape[0] // routing.num_experts
        first = visited[0] * dim
        return conv(x, weight.narrow(0, first, dim), None if bias is None else bias.narrow(0, first, dim))
    # Split as a whole, so that the parts' gradients are joined once instead of added up as full weights.
    weights, biases = _by_expert(weight, routing), _by_expert(bias, routing)
    parts = x.split([counts[expert] for expert in visited])
    return torch.cat([conv(part, weights[e], biases[e]) for part, e in zip(parts, visited, strict=True)])


def _by_expert(rows: Tensor | None, routing: ExpertRouting) -> Sequence[Tensor | None]:
    """Split a weight or bias into the experts' parts."""
    return [None] * routing.num_experts if rows is None else rows.chunk(routing.num_experts)


def _pick_weight(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None, routing: ExpertRouting) -> Tensor:
    """Convolve one image with the selected weight of its expert, at the cost of that expert."""
    own = [None if rows is None else rows.unflatten(0, (routing.num_experts, -1)) for rows in (weight, bias)]
    return conv(x, *(None if rows is None else rows.index_select(0, routing.chosen)[0] for rows in own))


def _pick_output(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None, routing: ExpertRouting) -> Tensor:
    """Compute all experts for all images, and select each image's own."""
    experts = routing.num_experts
    if conv.keywords["groups"] == 1:
        every = conv(x, weight, bias).unflatten(1, (experts, -1))
    else:
        pairs = zip(_by_expert(weight, routing), _by_expert(bias, routing), strict=True)
        every = torch.stack([conv(x, *pair) for pair in pairs], dim=1)
    return every[torch.arange(x.shape[0], device=x.device), routing.chosen]


class _StraightThrough(torch.autograd.Function):
    """Identity on outputs; an image's chosen score gets the sum of its output times the output's gradient."""

    @staticmethod
    def forward(y: Tensor, score: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        y, score = inputs
        ctx.save_for_backward(y)
        ctx.dtype = score.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (y,), (gradient,) = ctx.saved_tensors, gradients
        wide = torch.promote_types(y.dtype, torch.float32)
        return gradient, (gradient.to(wide) * y).flatten(1).sum(dim=1).to(ctx.dtype)


def expert_conv2d_reference(
    x: Float[Tensor, "batch in_dim height width"],
    scores: Float[Tensor, "batch experts"],
    weight: Float[Tensor, "rows group_dim kernel_h kernel_w"],
    bias: Float[Tensor, " rows"] | None = None,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Float[Tensor, "batch dim h w"]:
    """Compute the definition, in any dtype: run all experts, multiply by the mask of the choice, keep the chosen."""
    experts = scores.shape[1]
    chosen = scores.argmax(dim=1)
    # The mask's value is the choice, and its gradient is that of the scores.
    mask = F.one_hot(chosen, experts).to(scores.dtype) + (scores - scores.detach())
    biases = [None] * experts if bias is None else bias.chunk(experts)
    every = [
        F.conv2d(x, own, own_bias, stride, padding, groups=groups) * mask[:, expert, None, None, None].to(x.dtype)
        for expert, (own, own_bias) in enumerate(zip(weight.chunk(experts), biases, strict=True))
    ]
    return torch.stack([every[expert][image] for image, expert in enumerate(chosen.tolist())])
