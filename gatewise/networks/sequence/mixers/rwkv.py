"""The time mixing of RWKV-4: a weighted average that decays channel by channel, under a receptance gate.

Paper: Peng et al. 2023, arXiv:2305.13048, section 3.1 and appendices; initial values follow appendix E.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.networks.sequence.mixers._base import FLOAT_BYTES, CausalMixer
from gatewise.ops.weighted_key_value import weighted_key_value


class RWKVState(NamedTuple):
    """State of RWKV: the last input (B, 1, D) and the sums of the weighted average (B, 3, D)."""

    last: Tensor
    sums: Tensor


class RWKV(CausalMixer):
    """W_o(sigmoid(r) * wkv(k, v)), with k, v and r from a blend of a token and the one before: (B, T, D) -> (B, T, D).

    Args:
        layer: index of the block; initial decays and blends depend on it and on `depth`.
        depth: number of blocks.
    """

    def __init__(self, dim: int, layer: int = 0, depth: int = 1) -> None:
        super().__init__()
        self.dim = dim
        rising = layer / max(depth - 1, 1)
        falling = 1 - layer / depth
        channel = torch.arange(dim) / dim
        self.time_mix_k = nn.Parameter((channel**falling).view(1, 1, dim))
        self.time_mix_v = nn.Parameter((channel**falling + 0.3 * rising).view(1, 1, dim))
        self.time_mix_r = nn.Parameter((channel ** (0.5 * falling)).view(1, 1, dim))
        self.time_decay = nn.Parameter(-5 + 8 * (torch.arange(dim) / max(dim - 1, 1)) ** (0.7 + 1.3 * rising))
        zigzag = ((torch.arange(dim) + 1) % 3 - 1) * 0.5
        self.time_first = nn.Parameter(math.log(0.3) + zigzag)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def run(
        self, x: Float[Tensor, "batch time dim"], state: RWKVState | None
    ) -> tuple[Float[Tensor, "batch time dim"], RWKVState]:
        last, sums = (None, None) if state is None else state
        shifted = F.pad(x[:, :-1], (0, 0, 1, 0)) if last is None else torch.cat([last, x[:, :-1]], dim=1)
        k = self.key(torch.lerp(shifted, x, self.time_mix_k))
        v = self.value(torch.lerp(shifted, x, self.time_mix_v))
        r = self.receptance(torch.lerp(shifted, x, self.time_mix_r))
        wkv, sums = weighted_key_value(k, v, -self.time_decay.exp(), self.time_first, sums)
        return self.output(r.sigmoid() * wkv), RWKVState(x[:, -1:], sums)

    def state_bytes(self, length: int) -> int:
        return FLOAT_BYTES * 4 * self.dim
