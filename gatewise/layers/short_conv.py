"""Short causal convolution that precedes a recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.layers.packing import positions_in_sequence


class ShortConvolution(nn.Conv1d):
    """Causal depthwise convolution over time: (B, T, C) -> (B, T, C), with the last inputs as state.

    Args:
        dim: number of channels.
        width: kernel size; the state holds the `width - 1` inputs before the next token, (B, width - 1, C).
    """

    def __init__(self, dim: int, width: int = 4, *, bias: bool = False) -> None:
        if width < 1:
            raise ValueError(f"the width of a short convolution must be positive, not {width}")
        super().__init__(dim, dim, width, groups=dim, bias=bias)

    def forward(  # type: ignore[override]  # a sequence mixer, not a convolution of images
        self,
        x: Float[Tensor, "batch time dim"],
        state: Float[Tensor, "batch taps dim"] | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "batch taps dim"] | None]:
        """Return the outputs, and the inputs that the next tokens need (None for packed sequences)."""
        if cu_seqlens is not None:
            return self._packed(x, positions_in_sequence(cu_seqlens, x.shape[1])), None
        before = self.kernel_size[0] - 1
        if state is None:
            state = x.new_zeros(x.shape[0], before, x.shape[2])
        padded = torch.cat([state.to(x.dtype), x], dim=1)
        y = F.conv1d(padded.transpose(1, 2), self.weight, self.bias, groups=self.groups).transpose(1, 2)
        return y, padded[:, padded.shape[1] - before :]

    def _packed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return the sum over taps, each of which stops at the start of its sequence."""
        width = self.kernel_size[0]
        y = x * self.weight[:, 0, width - 1]
        for back in range(1, min(width, x.shape[1])):
            shifted = F.pad(x[:, :-back], (0, 0, back, 0))
            y = y + shifted * (positions >= back)[:, None] * self.weight[:, 0, width - 1 - back]
        return y if self.bias is None else y + self.bias
