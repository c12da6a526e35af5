"""Insertion of a gate into a trained decoder that has none.

The gate starts with zero weights, so that the decoder computes the same as before. Either the gate starts open, or the
projection before it is rescaled to compensate for the gate's resting score. Training continues from there. Such a gate
is cheap to try, but does not remove an attention sink on the first token that the weights have already learned.

Source: Qiu et al. 2025, arXiv:2505.06708, which reports that late gates leave sinks in place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from gatewise.networks.sequence.gated_attention.gate import Gate
from gatewise.networks.sequence.gated_attention.network import GatedAttentionDecoder

OPEN_BIAS = 4.0
"""sigmoid(4) = 0.982."""

_FED_BY = {"G1": "o_proj", "G2": "v_proj", "G3": "k_proj", "G4": "q_proj", "G5": "o_proj"}
"""Projection that can absorb a constant factor at each position."""


def insert_gate(
    model: GatedAttentionDecoder, gate: Gate | None = None, *, start: Literal["rescaled", "open"] = "rescaled"
) -> GatedAttentionDecoder:
    """Return a copy of an ungated decoder with a gate in every layer.

    Args:
        gate: gate to insert, with zero weights; None for the paper's elementwise G1.
        start: how the decoder's function is preserved. "rescaled" divides a projection by the gate's resting score (one
            half for a sigmoid), so that the decoder computes the same up to rounding. "open" leaves the weights and
            opens a sigmoid to 0.98 with a bias (4, unless the gate specifies one).
    Raises:
        ValueError: if the decoder already has a gate, or this gate cannot start without changing the output.
    """
    if model.config.gate is not None:
        raise ValueError(f"the decoder has a gate already, at {model.config.gate.position}")
    gate = replace(gate or Gate(), init="zeros")
    if start == "open" and gate.bias_init is None and gate.combine == "multiply":
        gate = replace(gate, bias_init=OPEN_BIAS)
    _check_start(gate, start)
    gated = _with_gate(model, gate)
    if start == "rescaled" and gate.combine == "multiply":
        for block in gated.blocks:
            _rescale(block.mixer, gate)
    return gated


def _check_start(gate: Gate, start: str) -> None:
    score = gate.resting_score
    if start not in ("rescaled", "open"):
        raise ValueError(f"start must be rescaled or open, not {start!r}")
    if (start == "open" or gate.combine == "add") and not gate.starts_neutral:
        raise ValueError(
            f"this gate cannot start without effect: its score at rest is {score:.3g}, where "
            f"{'1' if gate.combine == 'multiply' else '0'} is needed"
        )
    if score == 0.0 and gate.combine == "multiply":
        raise ValueError("a gate that is closed at rest cannot be made up for by rescaling: its score is 0")


def _with_gate(model: GatedAttentionDecoder, gate: Gate) -> GatedAttentionDecoder:
    like = next(model.parameters())
    fresh = GatedAttentionDecoder(replace(model.config, gate=gate)).to(like.device, like.dtype)
    weights: dict[str, Any] = fresh.state_dict() | model.state_dict()
    fresh.load_state_dict(weights)
    fresh.variant = model.variant
    fresh.set_grad_checkpointing(model.grad_checkpointing)
    return fresh.train(model.training)


@torch.no_grad()
def _rescale(mixer: Any, gate: Gate) -> None:
    projection = getattr(mixer, _FED_BY[gate.position])
    projection.weight /= gate.resting_score
    # A gate at G1 acts before the output projection, so it does not affect that projection's bias.
    if projection.bias is not None and gate.position != "G1":
        projection.bias /= gate.resting_score
