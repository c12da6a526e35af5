"""The mixer of Gated-SwinRMT and RMT, with every part optional, and the block around it."""

from __future__ import annotations

from copy import deepcopy
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.depthwise_conv import DepthwiseConv2d
from gatewise.layers.drop_path import DropPath
from gatewise.layers.fold_norm import scale_outputs
from gatewise.ops.decayed_window_attention import (
    Activation,
    adaptive_window,
    balanced_slopes,
    decayed_window_attention,
    head_log_decay,
    manhattan_attention,
)
from gatewise.ops.window_attention import Window

DecayMode = Literal["additive", "multiplicative", "none"]
SlopeMode = Literal["none", "balanced"]
GateMode = Literal["none", "elementwise"]

LAYER_NORM_EPS = 1e-6

Map = Float[Tensor, "batch height width channels"]
Rotation = Float[Tensor, "height width half"]


class Mixer(nn.Module):
    """Attention that decays with distance, plus a depthwise convolution of the values: (B, H, W, C) -> (B, H, W, C).

        v = silu(value_gate(x)) * v(x)                                        or v(x) without value gate
        y = norm(attention(q(x), k(x), v)) + depthwise_5x5(v)                 or without norm
        project_out(y * sigmoid(out_gate(x)))                                 or without gate

    Retention form: softmax, additive decay, output gate. SWAT form: sigmoid, multiplicative decay, slopes, value gate,
    norm. RMT: softmax, additive decay and nothing else, in one window as large as the map.

    Args:
        decay_init, decay_range: parameters of the heads' log decays, see `head_log_decay`.
        window: side of the attention windows. Along an axis, maps shorter than two windows are one window. None always
            uses one window.
        is_shifted: whether windows are shifted by half a window.
        rope: whether to use rotary positions within the window.
        is_full: whether to attend over the whole map at once by Manhattan distance, instead of in two passes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        decay_init: float = 2.0,
        decay_range: float = 4.0,
        activation: Activation = "softmax",
        decay: DecayMode = "additive",
        slopes: SlopeMode = "none",
        value_gate: bool = False,
        out_norm: bool = False,
        out_gate: GateMode = "elementwise",
        window: int | None = 7,
        is_shifted: bool = False,
        rope: bool = True,
        is_full: bool = False,
    ) -> None:
        super().__init__()
        self.heads = (num_heads, dim // num_heads)
        self.decay_init, self.decay_range = decay_init, decay_range
        self.activation, self.decay, self.slopes = activation, decay, slopes
        self.window, self.is_shifted, self.rope, self.is_full = window, is_shifted, rope, is_full
        self.qkv = nn.Linear(dim, 3 * dim)
        self.value_gate = nn.Linear(dim, dim) if value_gate else None
        self.local = DepthwiseConv2d(dim, 5)
        self.out_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if out_norm else None
        self.out_gate = nn.Linear(dim, dim) if out_gate == "elementwise" else None
        self.project_out = nn.Linear(dim, dim)

    def forward(self, x: Map) -> Map:
        dim = x.shape[-1]
        qk, v = self.qkv(x).split([2 * dim, dim], dim=-1)
        if self.value_gate is not None:
            v = F.silu(self.value_gate(x)) * v
        y = self._attend(qk, v)
        if self.out_norm is not None:
            y = self.out_norm(y)
        y = y + self.local(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.out_gate is not None:
            y = y * self.out_gate(x).sigmoid()
        return self.project_out(y)

    def read_gates(self, x: Map) -> dict[str, Tensor]:
        """Return the gates' means over channels, (B, H, W): "value" is around 0, "output" between 0 and 1."""
        maps = {}
        if self.value_gate is not None:
            maps["value"] = F.silu(self.value_gate(x)).mean(dim=-1)
        if self.out_gate is not None:
            maps["output"] = self.out_gate(x).sigmoid().mean(dim=-1)
        return maps

    def place(self, height: int, width: int) -> tuple[Window, Window]:
        """Return window and shift, each as (rows, columns), on a map of this size."""
        rows, columns = (adaptive_window(length, self.window) for length in (height, width))
        if not self.is_shifted:
            return (rows, columns), (0, 0)
        return (rows, columns), (rows // 2 if height > rows else 0, columns // 2 if width > columns else 0)

    def _attend(self, qk: Tensor, v: Tensor) -> Tensor:
        """Return attention of queries and keys (B, H, W, 2C) and values (B, H, W, C)."""
        window, shift = self.place(*v.shape[1:3])
        qk, v = qk.unflatten(-1, (2 * self.heads[0], self.heads[1])), v.unflatten(-1, self.heads)
        if self.rope:
            qk = rotate_pairs(qk, *window_rotation((v.shape[1], v.shape[2]), window, shift, self.heads[1], v.device))
        q, k = qk.chunk(2, dim=3)
        log_decay = None
        if self.decay != "none":
            log_decay = head_log_decay(self.heads[0], self.decay_init, self.decay_range, v.device)
        if self.is_full:
            return manhattan_attention(q, k, v, log_decay).flatten(3)
        y = decayed_window_attention(
            q,
            k,
            v,
            log_decay,
            balanced_slopes(self.heads[0], v.device) if self.slopes == "balanced" else None,
            activation=self.activation,
            decay="multiplicative" if self.decay == "multiplicative" else "additive",
            window=window,
            shift=shift,
        )
        return y.flatten(3)


def rotate_pairs(
    x: Float[Tensor, "batch height width heads dim"], cos: Rotation, sin: Rotation
) -> Float[Tensor, "batch height width heads dim"]:
    """Return `x` with channels 2i and 2i + 1 of every head rotated by the angles at its position."""
    cos, sin = cos.to(x.dtype)[:, :, None], sin.to(x.dtype)[:, :, None]
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


def window_rotation(
    size: Window, window: Window, shift: Window, head_dim: int, device: torch.device | None = None
) -> tuple[Rotation, Rotation]:
    """Return cosine and sine of n theta_i on a map, in float32: n = row * columns + column within the window.

    theta_i runs from 1 to 1 / 10000 in head_dim / 2 steps, as in the published RMT code. Indices restart in every
    window, and `shift` is where the first whole window starts.
    """
    frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 2, device=device)
    places = torch.arange(window[0] * window[1], dtype=torch.float32, device=device)
    angles = (places[:, None] * frequencies).unflatten(0, window)
    if window != size:
        rows, columns = (
            (torch.arange(length, device=device) - start) % extent
            for length, extent, start in zip(size, window, shift, strict=True)
        )
        angles = angles[rows][:, columns]
    return angles.cos(), angles.sin()


class ResidualDepthwise(nn.Module):
    """x + depthwise_3x3(x): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = DepthwiseConv2d(dim, 3)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return x + self.conv(x)

    def merged(self) -> nn.Conv2d:
        """Return an equivalent single convolution."""
        conv = deepcopy(self.conv)
        with torch.no_grad():
            conv.weight[:, :, 1, 1] += 1
        return conv


class FeedForward(nn.Module):
    """MLP with a depthwise convolution added to the hidden map: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.depthwise = ResidualDepthwise(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Map) -> Map:
        hidden = F.gelu(self.fc1(x)).permute(0, 3, 1, 2)
        return self.fc2(self.depthwise(hidden).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Conditional position encoding, mixer and MLP, each as a residual: (B, C, H, W) -> (B, C, H, W).

    Args:
        layer_scale_init: initial value of the scales of mixer and MLP; None for no scales.
    """

    def __init__(
        self, dim: int, mixer: Mixer, mlp_ratio: float, layer_scale_init: float | None, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.position = ResidualDepthwise(dim)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = FeedForward(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path_rate)
        self.scale1 = self.scale2 = None
        if layer_scale_init is not None:
            self.scale1 = nn.Parameter(torch.full((1, 1, 1, dim), layer_scale_init))
            self.scale2 = nn.Parameter(torch.full((1, 1, 1, dim), layer_scale_init))

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        y = self.position(x).permute(0, 2, 3, 1)
        y = y + self.drop_path(_scaled(self.mixer(self.norm1(y)), self.scale1))
        y = y + self.drop_path(_scaled(self.mlp(self.norm2(y)), self.scale2))
        return y.permute(0, 3, 1, 2)

    def merged(self) -> Block:
        """Return the same block with each scale folded into its branch's last layer. Other parts merge themselves."""
        new = deepcopy(self)
        if self.scale1 is not None and self.scale2 is not None:
            scale_outputs(new.mixer.project_out, self.scale1.flatten())
            scale_outputs(new.mlp.fc2, self.scale2.flatten())
            new.scale1 = new.scale2 = None
        return new


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale
