"""Based: linear attention with the second-order Taylor expansion of softmax's exponential.

Paper: Arora et al. 2024, arXiv:2402.18668, section 4.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from gatewise.networks.sequence._decoder import split_heads
from gatewise.networks.sequence.mixers._base import FLOAT_BYTES, CausalMixer, check_heads
from gatewise.ops.taylor_linear_attention import taylor_linear_attention


class Based(CausalMixer):
    """Taylor linear attention over heads, then projected: (B, T, D) -> (B, T, D). No linear layer has a bias.

    Args:
        feature_dim: width of queries and keys per head, before the expansion.
        eps: constant added to the sum of weights.
    """

    def __init__(self, dim: int, feature_dim: int = 16, num_heads: int = 1, eps: float = 1e-12) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if feature_dim < 1:
            raise ValueError(f"feature_dim must be positive, not {feature_dim}")
        self.feature_dim, self.num_heads, self.head_dim, self.eps = feature_dim, num_heads, dim // num_heads, eps
        self.q_proj = nn.Linear(dim, feature_dim * num_heads, bias=False)
        self.k_proj = nn.Linear(dim, feature_dim * num_heads, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def run(
        self, x: Float[Tensor, "batch time dim"], state: Tensor | None
    ) -> tuple[Float[Tensor, "batch time dim"], Tensor]:
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y, state = taylor_linear_attention(q, k, v, state, eps=self.eps)
        return self.o_proj(y.flatten(2)), state

    def state_bytes(self, length: int) -> int:
        f = self.feature_dim
        return FLOAT_BYTES * self.num_heads * (self.head_dim + 1) * (f * (f + 1) // 2 + f + 1)
