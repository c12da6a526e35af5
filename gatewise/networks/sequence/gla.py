"""GLA: a linear-attention decoder whose memory decays through data-dependent gates.

Each head keeps one matrix as its memory. Every token first decays it, channel by channel, by gates computed from the
token, then adds the outer product of its key and value, and reads with its query. Training processes chunks with matrix
products. Generation needs only the matrix, whatever the length of the text.

Paper: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, arXiv:2312.06635.
Where paper and published weights differ, we follow the weights of flash-linear-attention: an RMS norm with a weight
per head instead of a layer norm, and an output gate without bias. The first published model (`gla_1b_first`) has a
layer norm without a weight, a biased output gate and a second scaling of the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.short_conv import ShortConvolution
from gatewise.layers.swiglu import SwiGLU, rounded_hidden_dim
from gatewise.networks.sequence._base import SequenceConfig, SequenceMixer
from gatewise.networks.sequence._decoder import Decoder, split_heads
from gatewise.ops import gated_linear_attention

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda x: x, "relu": F.relu}


@dataclass(frozen=True)
class GLAConfig(SequenceConfig):
    """Sizes and options of a GLA decoder.

    Args:
        num_heads: number of query heads.
        num_kv_heads: number of heads for keys, values and decay gates; None for `num_heads`.
        expand_k: total width of the keys relative to `dim`.
        expand_v: total width of the values relative to `dim`.
        hidden_dim: hidden width of the MLP; None for 8 / 3 of `dim`, rounded up to a multiple of 256.
        conv_width: kernel size of a short convolution with SiLU on queries, keys and values; None for no convolution.
        feature_map: feature map of queries and keys.
        gate_rank: width between the two linear layers that compute the log gates.
        gate_divisor: divisor of the log gates, which makes them start near 0.
        clamp_min: smallest log gate; None for no bound.
        output_gate: whether to multiply the normalized output by SiLU of a projection of the input.
        gate_bias: whether that projection has a bias.
        head_norm: norm of each head's output: an RMS norm with a weight, or a layer norm without one.
        scale_keys: whether to multiply the keys by (dim / num_heads)^-0.5, in addition to the operator's own scaling of
            the queries.
        fixed_decay: whether to use one constant log gate per head, log(1 - 2^(-5 - head)), instead of the
            data-dependent ones.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    hidden_dim: int | None = None
    conv_width: int | None = None
    feature_map: Literal["identity", "relu"] = "identity"
    clamp_min: float | None = None
    gate_rank: int = 16
    gate_divisor: float = 16.0
    output_gate: bool = True
    gate_bias: bool = False
    head_norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    scale_keys: bool = False
    fixed_decay: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be positive, not {self.num_heads}")
        for what, width in (("key", self.key_dim), ("value", self.value_dim)):
            if width < 1 or width % self.num_heads:
                raise ValueError(f"{what} width {width} is not divisible by {self.num_heads} heads")
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, not {self.num_heads} and {self.kv_heads}")
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, not {self.feature_map!r}")
        if self.head_norm not in ("rms_norm", "layer_norm"):
            raise ValueError(f"head_norm must be rms_norm or layer_norm, not {self.head_norm!r}")
        if self.clamp_min is not None and self.clamp_min > 0:
            raise ValueError(f"clamp_min bounds log gates, which are at most 0; it cannot be {self.clamp_min}")

    @property
    def key_dim(self) -> int:
        """Total width of all query heads."""
        return int(self.dim * self.expand_k)

    @property
    def value_dim(self) -> int:
        """Total width of all output heads."""
        return int(self.dim * self.expand_v)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class GLAState(NamedTuple):
    """State of a GLA mixer: the matrix (B, kv_heads or heads, K, V), and the inputs of its short convolutions."""

    matrix: Tensor
    convolutions: tuple[Tensor | None, Tensor | None, Tensor | None]


class GatedLinearAttention(SequenceMixer):
    """Multi-head gated linear attention with a normalized, gated output: (B, T, D) -> (B, T, D).

    With log gates g = logsigmoid(W2 W1 x + b) / 16, one per key channel:

        S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t,   o_t = K^-0.5 q_t S_t,   y = W_o(norm(o) * silu(W_r x))

    Source: arXiv:2312.06635, section 4.4.
    """

    def __init__(self, config: GLAConfig) -> None:
        super().__init__()
        self.config = config
        groups = config.num_heads // config.kv_heads
        key_dim, value_dim = config.key_dim // groups, config.value_dim // groups
        head_value_dim = config.value_dim // config.num_heads
        self.q_proj = nn.Linear(config.dim, config.key_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, key_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, value_dim, bias=False)
        self.q_conv = self.k_conv = self.v_conv = None
        if config.conv_width is not None:
            self.q_conv = ShortConvolution(config.key_dim, config.conv_width)
            self.k_conv = ShortConvolution(key_dim, config.conv_width)
            self.v_conv = ShortConvolution(value_dim, config.conv_width)
        self.decay: nn.Module | None = None
        if not config.fixed_decay:
            self.decay = nn.Sequential(
                nn.Linear(config.dim, config.gate_rank, bias=False), nn.Linear(config.gate_rank, key_dim)
            )
        self.gate_proj = nn.Linear(config.dim, config.value_dim, config.gate_bias) if config.output_gate else None
        if config.head_norm == "rms_norm":
            self.norm: nn.Module = nn.RMSNorm(head_value_dim, eps=config.norm_eps)
        else:
            self.norm = nn.LayerNorm(head_value_dim, eps=config.norm_eps, elementwise_affine=False)
        self.o_proj = nn.Linear(config.value_dim, config.dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: GLAState | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], GLAState | None]:
        config = self.config
        before = state.convolutions if state is not None else (None, None, None)
        q, q_tail = _convolved(self.q_proj(x), self.q_conv, before[0], cu_seqlens)
        k, k_tail = _convolved(self.k_proj(x), self.k_conv, before[1], cu_seqlens)
        v, v_tail = _convolved(self.v_proj(x), self.v_conv, before[2], cu_seqlens)
        feature_map = FEATURE_MAPS[config.feature_map]
        q, k = feature_map(q), feature_map(k)
        if config.scale_keys:
            k = k * (config.dim // config.num_heads) ** -0.5
        o, matrix = gated_linear_attention(
            split_heads(q, config.num_heads),
            split_heads(k, config.kv_heads),
            split_heads(v, config.kv_heads),
            self.log_gates(x),
            state.matrix if state is not None else None,
            cu_seqlens=cu_seqlens,
        )
        o = self.norm(o).flatten(2)
        if self.gate_proj is not None:
            o = o * F.silu(self.gate_proj(x))
        kept = None if cu_seqlens is not None else GLAState(matrix, (q_tail, k_tail, v_tail))
        return self.o_proj(o), kept

    def log_gates(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time kv_heads width"]:
        """Return the natural logarithm of the decay per key channel (per head if the decay is fixed)."""
        if self.decay is None:
            gates = fixed_log_decay(self.config.kv_heads, x.device).to(x.dtype)
            return gates[None, None, :, None].expand(*x.shape[:2], -1, 1)
        gates = F.logsigmoid(self.decay(x)) / self.config.gate_divisor
        if self.config.clamp_min is not None:
            gates = gates.clamp(min=self.config.clamp_min)
        return split_heads(gates, self.config.kv_heads)

    def read_gates(self, x: Float[Tensor, "batch time dim"]) -> dict[str, Tensor]:
        """Return the mean decay per token for this input, one (B, T) map per head."""
        decay = self.log_gates(x).exp().mean(dim=-1)
        return {f"decay of head {head}": decay[..., head] for head in range(decay.shape[-1])}


def fixed_log_decay(heads: int, device: torch.device | None = None) -> Float[Tensor, " heads"]:
    """Return log(1 - 2^(-5 - h)) per head h in float32. Source: Sun et al. 2023, arXiv:2307.08621 (RetNet), eq. (8)."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, device=device, dtype=torch.float32))))


def _convolved(
    x: Tensor, convolution: ShortConvolution | None, before: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if convolution is None:
        return x, None
    y, tail = convolution(x, before, cu_seqlens)
    return F.silu(y), tail


class GLA(Decoder):
    """A pre-norm decoder of gated linear attention and SwiGLU."""

    def __init__(self, config: GLAConfig) -> None:
        hidden_dim = config.hidden_dim or rounded_hidden_dim(config.dim)
        super().__init__(
            config,
            make_mixer=lambda _: GatedLinearAttention(config),
            make_mlp=lambda _: SwiGLU(config.dim, hidden_dim),
            norm_eps=config.norm_eps,
        )


def _split_perceptron(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split the gate and value of the MLP, which older checkpoints store as one tensor, gate first."""
    split = dict(state)
    for key, tensor in state.items():
        up = key.replace("mlp.gate_proj", "mlp.up_proj")
        if up != key and up not in state:
            split[key], split[up] = tensor.chunk(2)
    return split


def layouts(config: GLAConfig) -> list[KeyLayout]:
    """Return the layout of flash-linear-attention and that of the first published model."""
    # Both names of the norm are read; the last one is written.
    norms = ["mixer.g_norm", "mixer.g_norm_swish_gate"]
    if not config.output_gate:
        norms.reverse()
    fla = KeyLayout(
        "official",
        (
            # A wrapper's prefix "model." may have been stripped; the long form is written.
            ("^embeddings", "embedding"),
            ("^layers.{i}", "blocks.{i}"),
            ("^model.embeddings", "embedding"),
            ("^model.layers.{i}", "blocks.{i}"),
            ("^model.norm", "^norm"),
            ("^lm_head", "head"),
            ("attn_norm", "mixer_norm"),
            ("attn", "mixer"),
            ("mixer.gk_proj", "mixer.decay"),
            *((norm, "mixer.norm") for norm in norms),
            ("mixer.g_proj", "mixer.gate_proj"),
            ("mixer.q_conv1d", "mixer.q_conv"),
            ("mixer.k_conv1d", "mixer.k_conv"),
            ("mixer.v_conv1d", "mixer.v_conv"),
        ),
        unpack=_split_perceptron,
    )
    first = KeyLayout(
        "first",
        (
            ("^transformer.wte", "embedding"),
            ("^transformer.h.{i}", "blocks.{i}"),
            ("^transformer.ln_f", "^norm"),
            ("^lm_head", "head"),
            ("ln_1", "mixer_norm"),
            ("ln_2", "mlp_norm"),
            ("attn", "mixer"),
            ("mixer.k_gate", "mixer.decay"),
            ("mixer.out_proj", "mixer.o_proj"),
            ("mixer.g_proj", "mixer.gate_proj"),
            ("w1", "mlp.gate_proj"),
            ("w3", "mlp.up_proj"),
            ("w2", "mlp.down_proj"),
        ),
    )
    return [fla, first]


_WIDE = GLAConfig(dim=2048, hidden_dim=5632, tie_embeddings=False)


def _published(name: str) -> Weights:
    return Weights(f"fla-hub/{name}", "MIT", "language model, SlimPajama")


register(
    GLA,
    paper="gla",
    layouts=layouts,
    fresh_with_head=("head.", "embedding."),
    variants={
        "gla_340m": Variant(GLAConfig(), (2048,), _published("gla-340M-15B")),
        "gla_1_3b": Variant(_WIDE, (2048,), _published("gla-1.3B-100B")),
        # Sizes that give the published parameter count with the head widths of the 1.3B model.
        "gla_2_7b": Variant(
            replace(_WIDE, dim=2560, depth=32, num_heads=5, hidden_dim=6912), (2048,), _published("gla-2.7B-100B")
        ),
        "gla_7b": Variant(
            GLAConfig(
                dim=4096,
                depth=32,
                num_heads=32,
                num_kv_heads=8,
                expand_k=1.0,
                hidden_dim=14336,
                feature_map="relu",
                output_gate=False,
                tie_embeddings=False,
                norm_eps=1e-5,
            ),
            (2048,),
        ),
        # Head count and vocabulary are the defaults of the first published code.
        "gla_1_3b_first": Variant(
            replace(
                _WIDE,
                vocab_size=50432,
                num_heads=8,
                head_norm="layer_norm",
                gate_bias=True,
                scale_keys=True,
                norm_eps=1e-5,
            ),
            (2048,),
            Weights("bailin28/gla-1B-100B", "MIT", "language model, SlimPajama"),
        ),
        "gla_tiny": Variant(GLAConfig(vocab_size=256, dim=128, depth=4, num_heads=2), (256,)),
    },
)
