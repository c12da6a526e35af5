"""Attention and gate diagnostics of decoders: attention sinks, massive activations, closed gates.

A softmax must put its weight somewhere. Heads that have nothing to contribute put it on the first token (a sink), whose
hidden state then grows to hundreds of times the others (a massive activation). These functions measure both, and what
the gates do about it, in any decoder whose mixers can return their attention. They work layer by layer, so only one
(B, H, T, T) map exists at a time.

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
        """Return the probabilities (B, H, T, keys) for the input of `forward`; each row sums to 1."""


@runtime_checkable
class ShowsGate(Protocol):
    """A mixer that gates its attention."""

    def gate_scores(self, x: Tensor) -> Tensor | None:
        """Return the gate's scores, (B, T, ...), for the input of `forward`, or None if there is no gate."""

    def attention_output(self, x: Tensor, state: Any = None) -> Tensor:
        """Return the input of the output projection, (B, T, ...), after the gate."""


@dataclass(frozen=True)
class GateStatistics:
    """Statistics of a gate over all tokens and channels.

    Attributes:
        mean: mean of the scores.
        histogram: fractions of the scores between `edges`, which sum to 1.
        edges: bin edges, one more than fractions; from 0 to 1 unless scores are outside that range.
    """

    mean: float
    histogram: Float[Tensor, " bins"]
    edges: Float[Tensor, " bounds"]


@dataclass(frozen=True)
class LayerDiagnostics:
    """Diagnostics of one layer. Fields that do not apply (no attention, no gate, no second query) are None.

    Attributes:
        first_token: probability of the first key per head, mean over the batch and all queries but the first, which can
            only attend to itself.
        first_token_all: the same, including the first query.
        entropy: entropy of the attention per head in nats, mean over the batch and all queries.
        largest: largest |h| in the layer's output.
        largest_at: position and channel of `largest`.
        gate: statistics of the gate scores.
        near_zero: threshold -> fraction of the output projection's inputs with a smaller magnitude.
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
    """Diagnostics of all layers, and the paper's summary (Table 4) as means over layers."""

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
        """M-Act: mean over layers of the largest |h|."""
        return sum(layer.largest for layer in self.layers) / len(self.layers)

    @property
    def gate_score(self) -> float:
        """Mean score of all gates; NaN without gates."""
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
        ValueError: if the model rejects the tokens.
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
    """Return the attention probabilities of one layer, on the CPU. Negative indices count from the last layer.

    Raises:
        UserError: as in `attention_diagnostics`, and if the model has no such layer or the layer has no attention.
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
    """Return the mean cross-entropy, in nats, of the tokens between consecutive bounds, keyed by upper bound.

    Within the trained context, it falls with the position. Beyond that, it shows whether the context extends (through
    YaRN or a larger rotary base) or breaks.

    Args:
        tokens: sequences at least as long as the last bound.
        bounds: increasing positions; averages are over the tokens at 1 .. b_1 - 1, b_1 .. b_2 - 1 and so on.
    Raises:
        UserError: if bounds do not increase from at least 2 to at most the length.
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
    # The loss at index i is for the token at position i + 1.
    loss = torch.cat(losses, dim=1)
    return {end: float(loss[:, start - 1 : end - 1].mean()) for start, end in zip(edges, bounds, strict=False)}


def _attention(mixer: Any, x: Tensor) -> dict[str, Any]:
    if not isinstance(mixer, ShowsAttention):
        return {}
    weights = mixer.attention_weights(x)
    first = weights[..., 0].float().clone()
    # -p log p overwrites the map, so that only one map exists.
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
    """Hold the model in eval mode with the hooks in place, and undo both afterwards."""
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
