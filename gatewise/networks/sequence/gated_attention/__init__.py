"""Gated attention: a sigmoid gate after attention, in decoders that load published weights."""

from gatewise.networks.sequence.gated_attention.gate import Gate
from gatewise.networks.sequence.gated_attention.insertion import insert_gate
from gatewise.networks.sequence.gated_attention.keys import PackedQueries, translated
from gatewise.networks.sequence.gated_attention.network import (
    GatedAttention,
    GatedAttentionConfig,
    GatedAttentionDecoder,
    StackedGatedAttention,
    config_from_reference,
    layouts,
)

__all__ = [
    "Gate",
    "GatedAttention",
    "GatedAttentionConfig",
    "GatedAttentionDecoder",
    "PackedQueries",
    "StackedGatedAttention",
    "config_from_reference",
    "insert_gate",
    "layouts",
    "translated",
]
