"""Softmax attention, over all earlier tokens or over a sliding window.

Paper: Vaswani et al. 2017, arXiv:1706.03762, eq. (1), as Arora et al. 2023, arXiv:2312.04927, compare it.
"""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.causal_attention import KeyValueCache, causal_attention, extend_cache
from gatewise.networks.sequence._base import State
from gatewise.networks.sequence.mixers._base import FLOAT_BYTES, CausalMixer, check_heads


class Attention(CausalMixer):
    """softmax(q k^T / sqrt(head_dim)) v over heads, then projected: (B, T, D) -> (B, T, D). Keeps all keys and values.

    Args:
        dropout: probability of dropping an attention weight in training.
        window: number of tokens before its own that a query sees; None for all.
    """

    def __init__(self, dim: int, num_heads: int = 1, dropout: float = 0.1, window: int | None = None) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if window is not None and window < 1:
            raise ValueError(f"the window must be positive, not {window}")
        self.dim, self.num_heads, self.dropout, self.window = dim, num_heads, dropout, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def run(self, x: Float[Tensor, "batch time dim"], state: State) -> tuple[Float[Tensor, "batch time dim"], State]:
        q, k, v = self.project(x)
        cache = extend_cache(state, k, v)
        dropout = self.dropout if self.training else 0.0
        y = causal_attention(q, cache.keys, cache.values, window=self.window, dropout=dropout)
        return self.out_proj(y.flatten(2)), self._reachable(cache)

    def project(self, x: Float[Tensor, "batch time dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values: (B, T, heads, head_dim) each."""
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b t h d", three=3, h=self.num_heads)
        return q, k, v

    def state_bytes(self, length: int) -> int:
        kept = length if self.window is None else self.window
        return FLOAT_BYTES * 2 * self.dim * kept

    def _reachable(self, cache: KeyValueCache) -> KeyValueCache:
        """Return the part of the cache that later queries can still see."""
        if self.window is None or cache.length <= self.window:
            return cache
        return KeyValueCache(cache.keys[:, -self.window :], cache.values[:, -self.window :])
