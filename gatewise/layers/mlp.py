"""Two-layer MLP at the end of most blocks."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Float[Tensor, "... channels"]) -> Float[Tensor, "... channels"]:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
