"""Operators: parameter-free functions on tensors, each with its definition as a `*_reference` function."""

from gatewise.ops.gated_linear_attention import (
    bidirectional_gated_linear_attention,
    bidirectional_gated_linear_attention_reference,
    gated_linear_attention,
    gated_linear_attention_reference,
)

__all__ = [
    "bidirectional_gated_linear_attention",
    "bidirectional_gated_linear_attention_reference",
    "gated_linear_attention",
    "gated_linear_attention_reference",
]
