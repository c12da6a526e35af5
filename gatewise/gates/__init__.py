"""Gate inspection: gate values of a network, as numbers and as pictures."""

from __future__ import annotations

from gatewise.gates.attention import attention_diagnostics, attention_map, loss_by_position
from gatewise.gates.capture import Reading, capture
from gatewise.gates.draw import draw
from gatewise.gates.draw_attention import draw_attention_map, draw_context, draw_diagnostics

__all__ = [
    "Reading",
    "attention_diagnostics",
    "attention_map",
    "capture",
    "draw",
    "draw_attention_map",
    "draw_context",
    "draw_diagnostics",
    "loss_by_position",
]
