"""Pictures of attention and gate diagnostics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatewise.errors import UserError
from gatewise.gates.attention import BINS, NEAR_ZERO, AttentionDiagnostics, LayerDiagnostics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_diagnostics(diagnostics: Mapping[str, AttentionDiagnostics]) -> Figure:
    """Draw models side by side.

    The upper row has curves over layers (attention on the first token, largest activation, outputs near zero) and a
    histogram of gate scores. Below, each model has its first-token attention by layer and head.

    Args:
        diagnostics: name -> result of `attention_diagnostics`.
    Raises:
        UserError: if there are no diagnostics.
    """
    from matplotlib.figure import Figure

    if not diagnostics:
        raise UserError("there is nothing to draw: no diagnostics")
    columns = max(4, len(diagnostics))
    figure = Figure(figsize=(3.4 * columns, 6.4), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for name, found in diagnostics.items():
        _draw_curves(axes[0], name, found)
    titles = ("attention on the first token", "largest |h|", f"outputs below {NEAR_ZERO[0]:g}", "gate scores")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("score" if title == "gate scores" else "layer", fontsize=8)
    axes[0][1].set_yscale("log")
    axes[0][0].legend(fontsize=7)
    heatmaps = [
        _draw_heads(axis, name, found)
        for axis, (name, found) in zip(axes[1], diagnostics.items(), strict=False)
        if any(layer.first_token is not None for layer in found.layers)
    ]
    if heatmaps:
        figure.colorbar(heatmaps[-1], ax=list(axes[1]), shrink=0.8)
    for axis in [*axes[0][4:], *axes[1][len(diagnostics) :]]:
        axis.set_axis_off()
    return figure


def draw_attention_map(weights: Float[Tensor, "batch heads time keys"], index: int = 0) -> Figure:
    """Draw one picture per head of the result of `attention_map`. Brightness is the square root of the probability.

    Args:
        index: index of the sequence in the batch.
    """
    from matplotlib.figure import Figure

    heads = weights.shape[1]
    columns = min(heads, 8)
    rows = math.ceil(heads / columns)
    figure = Figure(figsize=(1.9 * columns, 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for head, axis in enumerate(axes):
        if head >= heads:
            axis.set_axis_off()
            continue
        axis.imshow(weights[index, head].float().sqrt().cpu().numpy(), cmap="magma", vmin=0, vmax=1)
        axis.set_title(f"head {head}: {float(weights[index, head, 1:, 0].mean()):.2f} on first", fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def draw_context(losses: Mapping[str, Mapping[int, float]], trained_length: int | None = None) -> Figure:
    """Draw perplexity over the position in the context, one line per model.

    Args:
        losses: name -> result of `loss_by_position`.
        trained_length: trained context length, marked by a vertical line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, by_position in losses.items():
        axis.plot(list(by_position), [math.exp(loss) for loss in by_position.values()], marker="o", label=name)
    if trained_length is not None:
        axis.axvline(trained_length, color="gray", linestyle="--", label="trained length")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("position")
    axis.set_ylabel("perplexity up to it")
    axis.legend(fontsize=8)
    return figure


def _draw_curves(axes: Any, name: str, found: AttentionDiagnostics) -> None:
    seen = [layer for layer in found.layers if layer.first_token is not None]
    axes[0].plot([layer.layer for layer in seen], [_mean_of(layer) for layer in seen], marker=".", label=name)
    axes[0].set_ylim(0, 1)
    axes[1].plot([layer.layer for layer in found.layers], [layer.largest for layer in found.layers], marker=".")
    small = {layer.layer: layer.near_zero[NEAR_ZERO[0]] for layer in found.layers if layer.near_zero is not None}
    axes[2].plot(list(small), list(small.values()), marker=".")
    gates = [layer.gate for layer in found.layers if layer.gate is not None]
    # An empty histogram keeps each model's color the same in every panel.
    middles = torch.cat([(gate.edges[:-1] + gate.edges[1:]) / 2 for gate in gates]) if gates else torch.empty(0)
    shares = torch.cat([gate.histogram for gate in gates]) / len(gates) if gates else torch.empty(0)
    low, high = (min(float(g.edges[0]) for g in gates), max(float(g.edges[-1]) for g in gates)) if gates else (0, 1)
    axes[3].hist(middles.numpy(), bins=BINS, range=(low, high), weights=shares.numpy(), histtype="step")


def _mean_of(layer: LayerDiagnostics) -> float:
    return math.nan if layer.first_token is None else float(layer.first_token.mean())


def _draw_heads(axis: Any, name: str, found: AttentionDiagnostics) -> Any:
    seen = [layer for layer in found.layers if layer.first_token is not None]
    heads = max(len(layer.first_token) for layer in seen if layer.first_token is not None)
    picture = torch.full((len(seen), heads), math.nan)
    for row, layer in zip(picture, seen, strict=True):
        if layer.first_token is not None:
            row[: len(layer.first_token)] = layer.first_token
    axis.set_title(f"{name}: first token by head", fontsize=9)
    axis.set_xlabel("head", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    step = max(1, len(seen) // 8)
    axis.set_yticks(range(0, len(seen), step), [str(layer.layer) for layer in seen[::step]])
    return axis.imshow(picture.numpy(), cmap="magma", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
