"""Blocks of ViG: gated linear attention over a map, blended with a convolution, and a gated MLP.

Paper: Liao et al. 2024, arXiv:2405.18425; the networks are in `plain.py` and `hierarchical.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import Rule
from gatewise.layers.depthwise_conv import DepthwiseConv2d
from gatewise.layers.drop_path import DropPath
from gatewise.layers.fold_norm import scale_outputs
from gatewise.networks.image._base import ImageConfig
from gatewise.ops.gated_linear_attention_2d import gated_linear_attention_2d
from gatewise.ops.gated_norm_blend import gated_norm_blend

GATE_RANK = 16
"""Width between the two linear layers that compute the logits of the decay."""

GATE_DIVISOR = 16.0
"""Divisor of the log decays, which makes the initial memory long."""

NORM_EPS = 1e-6

Map = Float[Tensor, "batch height width channels"]
Projected = tuple[Float[Tensor, "batch height width qkv"], Float[Tensor, "batch height width decays"], Map]


@dataclass(frozen=True)
class VigOptions(ImageConfig):
    """Options of the mixer, shared by both forms of the network.

    Args:
        expand_k: width of queries and keys relative to the block's.
        expand_v: width of values relative to the block's; it must be 1 because values are blended with the convolution.
        conv_bias: whether the depthwise convolution has a bias.
        conv_act: whether a SiLU follows the depthwise convolution.
        out_act: whether a SiLU precedes the last projection.
        layer_scale_init: initial scale of the residual branches; None disables layer scale.
    """

    expand_k: float = 0.5
    expand_v: float = 1.0
    conv_bias: bool = False
    conv_act: bool = False
    out_act: bool = False
    layer_scale_init: float | None = None

    def check_width(self, dim: int, num_heads: int) -> None:
        """Raise a ValueError unless the width fits the numbers of heads, keys and values."""
        if dim < 1 or num_heads < 1:
            raise ValueError(f"width and number of heads must be positive, not {dim} and {num_heads}")
        widths = {"keys": dim * self.expand_k, "values": dim * self.expand_v}
        if widths["values"] != dim:
            raise ValueError(
                f"values must be as wide as the block, {dim}, as they are blended with a convolution of it; "
                f"expand_v {self.expand_v} makes them {widths['values']:g} wide"
            )
        for name, width in widths.items():
            if width < 1 or width % num_heads:
                raise ValueError(
                    f"the width of {name} must be a positive multiple of the number of heads, not {width:g} "
                    f"with {num_heads} heads at width {dim}"
                )


class Projections(nn.Module):
    """Projections of every position: queries, keys and values, decay logits, and blend logits."""

    def __init__(self, dim: int, key_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 2 * key_dim + dim, bias=False)
        self.decay1 = nn.Linear(dim, GATE_RANK, bias=False)
        self.decay2 = nn.Linear(GATE_RANK, 2 * key_dim)
        self.blend = nn.Linear(dim, dim)

    def forward(self, x: Map) -> Projected:
        return self.qkv(x), self.decay2(self.decay1(x)), self.blend(x)

    def merged(self) -> JoinedProjections:
        """Return equivalent projections with one matrix product in place of the three that read x."""
        return JoinedProjections(self)


class JoinedProjections(nn.Module):
    """`Projections` for inference, with all first layers joined in one."""

    @torch.no_grad()
    def __init__(self, apart: Projections) -> None:
        super().__init__()
        parts = (apart.qkv, apart.blend, apart.decay1)
        self.widths = [part.out_features for part in parts]
        like = apart.qkv.weight
        self.first = nn.Linear(like.shape[1], sum(self.widths), device=like.device, dtype=like.dtype)
        rows = zip(self.first.weight.split(self.widths), self.first.bias.split(self.widths), parts, strict=True)
        for weight, bias, part in rows:
            weight.copy_(part.weight)
            bias.copy_(torch.zeros_like(bias) if part.bias is None else part.bias)
        self.decay2 = apart.decay2

    def forward(self, x: Map) -> Projected:
        qkv, blend, low = self.first(x).split(self.widths, dim=-1)
        return qkv, self.decay2(low), blend


class GatedLinearMixer(nn.Module):
    """Gated linear attention over the map, blended with a 3x3 depthwise convolution: (B, H, W, C) -> (B, H, W, C).

        l = depthwise(x),    q, k, v = l W_qkv,    f, r = logsigmoid(l W_1 W_2 + b) / 16
        o = gated_linear_attention_2d(q, k, v, f, r),    g = sigmoid(l W_g + b_g)
        y = (g * norm_o(o) + (1 - g) * norm_l(l)) W_o

    Norms act on single heads, with one weight shared by all heads.

    Args:
        eval_factor: factor on the attention in eval mode.
    Raises:
        ValueError: if the widths of keys and values are not divisible by the heads, or values are not as wide as the
            block.
    """

    def __init__(self, dim: int, num_heads: int, options: VigOptions, *, eval_factor: float = 1.0) -> None:
        super().__init__()
        options.check_width(dim, num_heads)
        self.num_heads = num_heads
        self.key_dim = int(dim * options.expand_k)
        self.eval_factor = eval_factor
        self.local = DepthwiseConv2d(dim, 3, bias=options.conv_bias)
        self.local_act = nn.SiLU() if options.conv_act else nn.Identity()
        self.project = Projections(dim, self.key_dim)
        self.attention_norm = nn.RMSNorm(dim // num_heads, eps=NORM_EPS)
        self.local_norm = nn.RMSNorm(dim // num_heads, eps=NORM_EPS)
        self.out_act = nn.SiLU() if options.out_act else nn.Identity()
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Map) -> Map:
        local = self.see_local(x)
        qkv, decay, blend = self.project(local)
        near, far = self._heads(local), self._attend(qkv, decay)
        weights = (self.attention_norm.weight, self.local_norm.weight)
        y = gated_norm_blend(far, near, self._heads(blend), *weights, NORM_EPS)
        return self.out(self.out_act(y.flatten(-2)))

    def see_local(self, x: Map) -> Map:
        """Return the output of the depthwise convolution."""
        return self.local_act(self.local(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)

    def _attend(self, qkv: Tensor, decay: Tensor) -> Tensor:
        key_dim = self.key_dim
        q, k, v = (self._heads(part) for part in qkv.split([key_dim, key_dim, qkv.shape[-1] - 2 * key_dim], dim=-1))
        forward, backward = (self._heads(part) for part in log_decays(decay).chunk(2, dim=-1))
        factor = 1.0 if self.training else self.eval_factor
        return gated_linear_attention_2d(q, k, v, forward, backward, scale=factor * q.shape[-1] ** -0.5)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def read_gates(self, x: Map) -> dict[str, Tensor]:
        """Return (B, H, W) maps, means over channels: the memory's weight in the blend, and its decays."""
        _, decay, blend = self.project(self.see_local(x))
        forward, backward = log_decays(decay).exp().chunk(2, dim=-1)
        return {
            "memory": blend.sigmoid().mean(dim=-1),
            "kept forwards": forward.mean(dim=-1),
            "kept backwards": backward.mean(dim=-1),
        }


def log_decays(logits: Map) -> Map:
    """Return log decays of the memory per step, at least in float32."""
    return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / GATE_DIVISOR


class GatedMlp(nn.Module):
    """W_2 (silu(gate) * value) with (gate, value) = W_1 x: (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "... channels"]) -> Float[Tensor, "... channels"]:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def hidden_dim(dim: int, mlp_ratio: float, multiple: int) -> int:
    """Return 2/3 of `dim * mlp_ratio`, as a gated MLP has three layers instead of two, rounded up to a multiple."""
    return multiple * -(-int(2 * dim * mlp_ratio / 3) // multiple)


class VigBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): (B, H, W, C) -> (B, H, W, C).

    Args:
        make_norm: function that builds a norm over channels from their number.
    """

    def __init__(
        self,
        mixer: GatedLinearMixer,
        mlp: GatedMlp,
        make_norm: Callable[[int], nn.Module],
        *,
        drop_path_rate: float = 0.0,
        layer_scale_init: float | None = None,
    ) -> None:
        super().__init__()
        dim = mixer.out.out_features
        self.norm1, self.norm2 = make_norm(dim), make_norm(dim)
        self.mixer, self.mlp = mixer, mlp
        self.drop_path = DropPath(drop_path_rate)
        self.scale1 = self.scale2 = None
        if layer_scale_init is not None:
            self.scale1 = nn.Parameter(torch.full((dim,), layer_scale_init))
            self.scale2 = nn.Parameter(torch.full((dim,), layer_scale_init))

    def forward(self, x: Map) -> Map:
        x = x + self.drop_path(_scaled(self.mixer(self.norm1(x)), self.scale1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.scale2))

    @torch.no_grad()
    def merged(self) -> VigBlock:
        """Return an equivalent block with layer scales and RMS norm weights folded into the neighboring layers."""
        new = deepcopy(self)
        if new.scale1 is not None and new.scale2 is not None:
            scale_outputs(new.mixer.out, new.scale1)
            scale_outputs(new.mlp.fc2, new.scale2)
            new.scale1 = new.scale2 = None
        if isinstance(new.norm1, nn.RMSNorm) and isinstance(new.norm2, nn.RMSNorm):
            # A factor per channel commutes with the depthwise convolution, and its zero padding stays zero.
            new.mixer.local.weight.mul_(new.norm1.weight[:, None, None, None])
            new.mlp.fc1.weight.mul_(new.norm2.weight)
            new.norm1, new.norm2 = (
                nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
                for norm in (new.norm1, new.norm2)
            )
        return new


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def start_mixer(module: nn.Module) -> None:
    """Initialize a mixer's weights with a strongly reduced Xavier initialization."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight, gain=2**-2.5)


MIXER_RULES: tuple[Rule, ...] = (
    ("mixer.in_proj.0", "mixer.local"),
    ("mixer.qkv_proj", "mixer.project.qkv"),
    ("mixer.gk_proj.0", "mixer.project.decay1"),
    ("mixer.gk_proj.1", "mixer.project.decay2"),
    ("mixer.g_proj", "mixer.project.blend"),
    ("mixer.g_norm", "mixer.attention_norm"),
    ("mixer.l_norm", "mixer.local_norm"),
    ("mixer.o_proj", "mixer.out"),
)
