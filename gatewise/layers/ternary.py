"""Linear layers with ternary weights: trained, corrected by a gated low-rank branch, and packed for inference."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.ops.fake_quantize import INT8_PER_TOKEN, TERNARY, fake_quantize, quantize
from gatewise.ops.ternary_matmul import pack_ternary, ternary_matmul, ternary_matmul_int8


class TernaryLinear(nn.Linear):
    """x W_q^T with W_q = s clamp(round(W / s), -1, 1), s = mean |W|: (..., in) -> (..., out).

    `weight` is the latent matrix that training updates; the matrix that multiplies x has three values. Gradients pass
    straight through. There is no bias.

    Source: Ma et al. 2024, arXiv:2402.17764 (BitNet b1.58), section 2.

    Args:
        activation_bits: 8 to round the inputs per token to 256 levels; None to leave them.
    """

    def __init__(self, in_features: int, out_features: int, activation_bits: int | None = None) -> None:
        super().__init__(in_features, out_features, bias=False)
        if activation_bits not in (None, 8):
            raise ValueError(f"activation_bits must be 8 or None, not {activation_bits}")
        self.activation_bits = activation_bits

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        inputs = fake_quantize(x, INT8_PER_TOKEN) if self.activation_bits else x
        return F.linear(inputs, fake_quantize(self.weight, TERNARY))

    @torch.no_grad()
    def packed(self) -> PackedTernaryLinear:
        """Return an equivalent layer for inference, with two bits per weight."""
        return PackedTernaryLinear(self.weight, self.activation_bits)

    @torch.no_grad()
    def zero_share(self) -> float:
        """Fraction of weights whose code is 0; 0.31 for a normal distribution."""
        return (quantize(self.weight, TERNARY)[0] == 0).float().mean().item()


class HybridGatedLinear(TernaryLinear):
    """A ternary layer plus a gated low-rank correction in full precision: (..., in) -> (..., out).

        y = x_q W_q^T + gamma (x A^T) B^T,   gamma = ramp * tanh(gate)

    B starts at zero, so training starts from the ternary layer, and at first only B has a gradient.

    Source: Trejo Pizzo 2026, arXiv:2602.05269. The initial values are ours, as the paper's code is not public.

    Args:
        rank: rank of the correction.
        gate_init: initial value of the raw gate.

    Attributes:
        ramp: factor on the gate from 0 to 1, set by a schedule.
        frozen: whether the raw gate no longer learns, set by a schedule.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        gate_init: float = 0.1,
        activation_bits: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, activation_bits)
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank must be 1 to {min(in_features, out_features)} (the smaller width), not {rank}")
        self.lora_a = nn.Parameter(torch.randn(rank, in_features) / math.sqrt(in_features))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank))
        self.gate = nn.Parameter(torch.tensor(gate_init))
        self.ramp = 1.0
        self.frozen = False

    @property
    def gamma(self) -> Float[Tensor, ""]:
        """Factor on the correction."""
        return self.ramp * torch.tanh(self.gate.detach() if self.frozen else self.gate)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return super().forward(x) + self.gamma * self.correction(x)

    def correction(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the low-rank branch before its gate. It reads the inputs before rounding."""
        return F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def packed(self) -> PackedTernaryLinear:
        """Return an equivalent inference layer: two bits per weight, float16 correction with the gate folded into B."""
        return PackedTernaryLinear(self.weight, self.activation_bits, self.lora_a, self.gamma * self.lora_b)

    def read_gates(self, x: Float[Tensor, "*batch in"]) -> dict[str, Tensor]:
        """Return the gate, and the size of the gated correction relative to the ternary layer per token."""
        base = TernaryLinear.forward(self, x).norm(dim=-1)
        corrected = (self.gamma * self.correction(x)).norm(dim=-1)
        return {"gamma": self.gamma, "correction over base": corrected / base.clamp_min(1e-12)}


class PackedTernaryLinear(nn.Module):
    """A ternary layer for inference with two bits per weight: (..., in) -> (..., out).

    Built by `packed()` of the layers above. Packing cannot be undone: the latent weights are gone.

    Args:
        weight: latent matrix (out, in).
        activation_bits: as in training.
        lora_a: first matrix of the low-rank correction, stored in float16.
        lora_b: second matrix of the correction, stored in float16 with the gate folded in.
    """

    codes: Tensor
    scale: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        activation_bits: int | None = None,
        lora_a: Float[Tensor, "rank in"] | None = None,
        lora_b: Float[Tensor, "out rank"] | None = None,
    ) -> None:
        super().__init__()
        codes, scale = quantize(weight.detach(), TERNARY)
        self.out_features, self.in_features = weight.shape
        self.activation_bits = activation_bits
        self.register_buffer("codes", pack_ternary(codes))
        self.register_buffer("scale", scale.reshape(()).float())
        self.register_buffer("lora_a", None if lora_a is None else lora_a.detach().half())
        self.register_buffer("lora_b", None if lora_b is None else lora_b.detach().half())
        super().train(False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.activation_bits:
            codes, x_scale = quantize(x, INT8_PER_TOKEN)
            y = ternary_matmul_int8(codes, x_scale, self.codes, self.scale, self.out_features).to(x.dtype)
        else:
            y = ternary_matmul(x, self.codes, self.scale, self.out_features)
        if self.lora_a is None or self.lora_b is None:
            return y
        return y + F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))

    def train(self, mode: bool = True) -> PackedTernaryLinear:
        """Stay in eval mode.

        Raises:
            ValueError: if `mode` is true.
        """
        if mode:
            raise ValueError(
                "packed ternary layers cannot be trained: their latent weights are gone; train the original"
            )
        return super().train(False)

    @property
    def nbytes(self) -> int:
        """Size of codes, scale and correction, in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
