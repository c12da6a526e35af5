"""Linear maps with ternary weights: trained, corrected by a gated low-rank branch, and packed for inference."""

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

    `weight` is the latent matrix that training moves; what is multiplied with has three values. Gradients pass straight
    through. There is no bias.

    Source: Ma et al. 2024, arXiv:2402.17764 (BitNet b1.58), section 2.

    Args:
        activation_bits: 8 rounds the inputs per token to 256 levels; None leaves them.
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
        """The same map for inference, with two bits per weight."""
        return PackedTernaryLinear(self.weight, self.activation_bits)

    @torch.no_grad()
    def zero_share(self) -> float:
        """The share of weights whose code is 0; 0.31 for a normal distribution."""
        return (quantize(self.weight, TERNARY)[0] == 0).float().mean().item()


class HybridGatedLinear(TernaryLinear):
    """A ternary map plus a low-rank correction in full precision, let in by one gate: (..., in) -> (..., out).

        y = x_q W_q^T + gamma (x A^T) B^T,   gamma = ramp * tanh(gate)

    B starts at zero, so that training starts from the ternary map: at first B alone has a gradient.

    Source: Trejo Pizzo 2026, arXiv:2602.05269; the initial values are ours, the paper's code is not public.

    Args:
        rank: of the correction.
        gate_init: initial raw gate.

    Attributes:
        ramp: what a schedule multiplies the gate with, from 0 to 1.
        frozen: a schedule's word that the raw gate no longer learns.
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
        """What the correction is multiplied with."""
        return self.ramp * torch.tanh(self.gate.detach() if self.frozen else self.gate)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return super().forward(x) + self.gamma * self.correction(x)

    def correction(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The low-rank branch before its gate; it sees the inputs before they are rounded."""
        return F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def packed(self) -> PackedTernaryLinear:
        """The same map for inference: two bits per weight, the correction in float16 with its gate inside B."""
        return PackedTernaryLinear(self.weight, self.activation_bits, self.lora_a, self.gamma * self.lora_b)

    def read_gates(self, x: Float[Tensor, "*batch in"]) -> dict[str, Tensor]:
        """The gate, and how large the gated correction is beside the ternary map, token by token."""
        base = TernaryLinear.forward(self, x).norm(dim=-1)
        corrected = (self.gamma * self.correction(x)).norm(dim=-1)
        return {"gamma": self.gamma, "correction over base": corrected / base.clamp_min(1e-12)}


class PackedTernaryLinear(nn.Module):
    """A ternary map for inference, two bits per weight: (..., in) -> (..., out).

    Made by `packed()` of the layers above. Packing cannot be undone: the latent weights are gone.

    Args:
        weight: latent matrix (out, in).
        activation_bits: as in training.
        lora_a: first map of the low-rank correction; kept in float16, as the second.
        lora_b: its second map, the gate already inside.
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
        """Stays in eval mode.

        Raises:
            ValueError: if training is asked for.
        """
        if mode:
            raise ValueError(
                "packed ternary layers cannot be trained: their latent weights are gone; train the original"
            )
        return super().train(False)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale and correction."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
