"""Gated linear attention as one mixer of the suite.

Paper: Yang et al. 2023, arXiv:2312.06635.
"""

from __future__ import annotations

from gatewise.networks.sequence.gla import GatedLinearAttention
from gatewise.networks.sequence.mixers._base import FLOAT_BYTES


class GLA(GatedLinearAttention):
    """`GatedLinearAttention` that reports the size of its state."""

    def state_bytes(self, length: int) -> int:
        """Return the size of the state that generation keeps, in bytes of float32."""
        return FLOAT_BYTES * self.config.key_dim * self.config.value_dim // self.config.num_heads
