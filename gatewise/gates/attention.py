"""Where a decoder's attention goes and what its gates let through: sinks, massive activations, closed gates.

A softmax must put its weight somewhere; heads with nothing to say put it on the first token (a sink), whose hidden
state then grows to hundreds of times the others (a massive activation). These functions measure both, with what the
gates do about it, in any decoder whose mixers can show their attention. They go layer by layer: one map (B, H, T, T) is
alive at a time.

Source: Qiu et al. 2025, arXiv:2505.06708, sections 4.2 and 4.3; sinks: Xiao et al. 2023, arXiv:2309.17453; massive
activations: Sun et al. 2024, arXiv:2402.17762.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.errors import UserError
from gatewise.networks.sequence._base import LanguageModel

BINS = 50
NEAR_ZERO = (1e-2, 1e-3)
POSITIONS_AT_A_TIME = 512


@runtime_checkable
class ShowsAttention(Protocol):
    """A mixer whose attention probabilities can be read."""

    def attention_weights(self, x: Tensor, state: Any = None) -> Tensor:
        """Probabilities (B, H, T, keys) for the input of its `forward`, each row adding up to 1."""


@runtime_checkable
class ShowsGate(Protocol):
    """A mixer that gates its attention."""

    def gate_scores(self, x: Tensor) -> Tensor | None:
        """The gate's scores, (B, T, ...), for the input of its `forward`; None where it has no gate."""

    def attention_output(self, x: Tensor, state: Any = None) -> Tensor:
        """What it hands to its output projection, (B, T, ...), behind the gate."""


@dataclass(frozen=True)
class GateStatistics:
    """What a gate does over all tokens and channels.

    Attributes:
        mean: of the scores.
        histogram: shares of the scores between `edges`, which add up to 1.
        edges: one more than there are shares; from 0 to 1 unless scores lie outside.
    """

    mean: float
    histogram: Float[Tensor, " bins"]
    edges: Float[Tensor, " bounds"]


@dataclass(frozen=True)
class LayerDiagnostics:
    """One layer. What a layer does not have (attention, a gate, a second query) is None.

    Attributes:
        first_token: probability of the first key per head, mean over the batch and all queries but the first, which
            can look nowhere else.
        first_token_all: the same with the first query.
        entropy: of the attention per head in nats, mean over the batch and all queries.
        largest: the largest |h| in the layer's output.
        largest_at: the position and channel where it stands.
        gate: of the scores.
        near_zero: threshold -> share of what goes into the output projection that is smaller.
    """

    layer: int
    largest: float
    largest_at: tuple[int, int]
    first_token: Float[Tensor, " heads"] | None = None
    first_token_all: Float[Tensor, " heads"] | None = None
    entropy: Float[Tensor, " heads"] | None = None
    gate: GateStatistics | None = None
    near_zero: dict[float, float] | None = None


@dataclass(frozen=True)
class AttentionDiagnostics:
    """All layers of a decoder, and the paper's summary (Table 4) as means over layers."""

    layers: tuple[LayerDiagnostics, ...]

    @property
    def first_token_attention(self) -> float:
        """F-Attn without the first query; NaN for sequences of one token."""
        return _mean(layer.first_token for layer in self.layers)

    @property
    def first_token_attention_all(self) -> float:
        """F-Attn with the first query."""
        return _mean(layer.first_token_all for layer in self.layers)

    @property
    def largest_activation(self) -> float:
        """M-Act: the mean over layers of the largest |h|."""
        return sum(layer.largest for layer in self.layers) / len(self.layers)

    @property
    def gate_score(self) -> float:
        """The mean score of all gates; NaN without."""
        return _mean(torch.tensor(layer.gate.mean) for layer in self.layers if layer.gate is not None)

    def __str__(self) -> str:
        lines = [f"{'layer':>5} {'first token':>11} {'entropy':>8} {'largest |h|':>11} {'gate':>6} {'< 0.01':>7}"]
        for layer in self.layers:
            first, entropy = (_number(value) for value in (layer.first_token, layer.entropy))
            gate = f"{layer.gate.mean:.3f}" if layer.gate is not None else "-"
            small = f"{layer.near_zero[NEAR_ZERO[0]]:.1%}" if layer.near_zero is not None else "-"
            lines.append(f"{layer.layer:5} {first:>11} {entropy:>8} {layer.largest:11.1f} {gate:>6} {small:>7}")
        summary = f"first token {self.first_token_attention:.3f} (the first query left out)"
        return "\n".join([*lines, f"{summary}, largest activation {self.largest_activation:.1f}"])


@torch.no_grad()
def attention_diagnostics(model: LanguageModel, tokens: Int[Tensor, "batch time"]) -> AttentionDiagnostics:
    """Run `model` once in eval mode and measure each of its layers.

    Raises:
        UserError: if the model has no blocks with mixers, or no mixer can show its attention.
        ValueError: for tokens that the model refuses.
    """
    blocks = _blocks(model)
    attention: dict[int, dict[str, Any]] = {}
    activation: dict[int, dict[str, Any]] = {}

    def look(layer: int) -> Callable[..., None]:
        def before(mixer: Any, inputs: tuple[Any, ...]) -> None:
            attention[layer] = {**_attention(mixer, inputs[0]), **_gate(mixer, inputs[0])}

        return before

    def measure(layer: int) -> Callable[..., None]:
        def after(block: nn.Module, inputs: Any, output: Any) -> None:
            activation[layer] = _largest(output[0] if isinstance(output, tuple) else output)

        return after

    handles = [block.mixer.register_forward_pre_hook(look(layer)) for layer, block in enumerate(blocks)]
    handles += [block.register_forward_hook(measure(layer)) for layer, block in enumerate(blocks)]
    with _watching(model, handles):
        model.forward_features(tokens)
    return AttentionDiagnostics(
        tuple(LayerDiagnostics(layer, **activation[layer], **attention[layer]) for layer in range(len(blocks)))
    )


@torch.no_grad()
def attention_map(
    model: LanguageModel, tokens: Int[Tensor, "batch time"], layer: int
) -> Float[Tensor, "batch heads time keys"]:
    """The attention probabilities of one layer, on the CPU. Negative numbers count from the last layer.

    Raises:
        UserError: as `attention_diagnostics`, and if this layer is none of the model's or shows no attention.
    """
    blocks = _blocks(model)
    if not -len(blocks) <= layer < len(blocks):
        raise UserError(f"the model has layers 0 to {len(blocks) - 1}, not {layer}")
    mixer = blocks[layer].mixer
    if not isinstance(blocks[layer].mixer, ShowsAttention):
        raise UserError(f"layer {layer} is a {type(mixer).__name__}, which has no attention to show")
    seen: list[Tensor] = []
    handle = mixer.register_forward_pre_hook(
        lambda mixer, inputs: seen.append(mixer.attention_weights(inputs[0]).float().cpu())
    )
    with _watching(model, [handle]):
        model.forward_features(tokens)
    return seen[0]


@torch.no_grad()
def loss_by_position(
    model: LanguageModel, tokens: Int[Tensor, "batch time"], bounds: Sequence[int]
) -> dict[int, float]:
    """Mean cross-entropy in nats of the tokens between each bound and the one before it, by bound.

    Within the trained context it falls with the position. What comes behind shows whether the context extends (by
    YaRN or a larger rotary base) or breaks.

    Args:
        tokens: sequences of at least the last bound.
        bounds: rising positions: the tokens at 1 .. b_1 - 1, b_1 .. b_2 - 1 and so on are averaged.
    Raises:
        UserError: for bounds that do not rise from 2 to the length at most.
    """
    edges = [1, *bounds]
    if len(edges) < 2 or any(b <= a for a, b in zip(edges, bounds, strict=False)) or edges[-1] > tokens.shape[1]:
        raise UserError(f"bounds must rise from 2 to the length {tokens.shape[1]} at most, not {list(bounds)}")
    with _watching(model, []):
        hidden = model.forward_features(tokens[:, : edges[-1]])[0]
        losses = [
            F.cross_entropy(model.logits(part).flatten(0, 1).float(), target.flatten(), reduction="none").view_as(
                target
            )
            for part, target in zip(
                hidden[:, :-1].split(POSITIONS_AT_A_TIME, dim=1),
                tokens[:, 1 : edges[-1]].split(POSITIONS_AT_A_TIME, dim=1),
                strict=True,
            )
        ]
    # The loss at index i is that of the token at position i + 1.
    loss = torch.cat(losses, dim=1)
    return {end: float(loss[:, start - 1 : end - 1].mean()) for start, end in zip(edges, bounds, strict=False)}


def _attention(mixer: Any, x: Tensor) -> dict[str, Any]:
    if not isinstance(mixer, ShowsAttention):
        return {}
    weights = mixer.attention_weights(x)
    first = weights[..., 0].float().clone()
    # -p log p takes the place of the map, so that there is no second one.
    entropy = torch.special.entr(weights, out=weights).sum(dim=-1).float()
    return {
        "first_token": first[..., 1:].mean(dim=(0, 2)).cpu() if first.shape[-1] > 1 else None,
        "first_token_all": first.mean(dim=(0, 2)).cpu(),
        "entropy": entropy.mean(dim=(0, 2)).cpu(),
    }


def _gate(mixer: Any, x: Tensor) -> dict[str, Any]:
    if not isinstance(mixer, ShowsGate):
        return {}
    magnitude = mixer.attention_output(x).abs()
    near_zero = {bound: float((magnitude < bound).float().mean()) for bound in NEAR_ZERO}
    scores = mixer.gate_scores(x)
    return {"near_zero": near_zero, "gate": None if scores is None else _statistics(scores.float())}


def _statistics(scores: Tensor) -> GateStatistics:
    low, high = min(0.0, float(scores.min())), max(1.0, float(scores.max()))
    counts = torch.histc(scores, BINS, low, high).cpu()
    return GateStatistics(float(scores.mean()), counts / counts.sum(), torch.linspace(low, high, BINS + 1))


def _largest(hidden: Tensor) -> dict[str, Any]:
    magnitude = hidden.abs().amax(dim=0)
    at = int(magnitude.argmax())
    position, channel = divmod(at, magnitude.shape[1])
    return {"largest": float(magnitude[position, channel]), "largest_at": (position, channel)}


def _blocks(model: Any) -> list[Any]:
    blocks = [block for block in getattr(model, "blocks", []) if hasattr(block, "mixer")]
    if not any(isinstance(block.mixer, ShowsAttention) for block in blocks):
        raise UserError(f"{type(model).__name__} has no mixer that shows its attention")
    return blocks


@contextmanager
def _watching(model: nn.Module, handles: list[Any]) -> Iterator[None]:
    """Eval mode while the hooks are in place; both are undone afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def _mean(values: Iterator[Any]) -> float:
    known = [float(value.mean()) for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _number(value: Tensor | None) -> str:
    return "-" if value is None else f"{float(value.mean()):.3f}"
