"""HER-Seg's CE-Encoder: one scale and linear attention, gated before and after, for high-resolution images.

After two convolutional blocks, every layer works on one token per 16x16 pixels. Attention uses kernel features with
rotary positions on the grid, so no cost grows with the square of the number of tokens. Values first pass a small gated
bottleneck, and the output of attention is multiplied by a gate computed from the same tokens ("dual gate").

Paper: "HER-Seg: Holistically Efficient Segmentation for High-Resolution Medical Images", 2025, arXiv:2504.06205. This
is its encoder as a backbone. Distilled weights come with the neck that maps it to the 256 channels of the teacher,
Segment Anything (`neck_dim`). A table of rotations ties the published weights to one image size. Here the table is
recomputed, so any height and width that are multiples of the patch size work.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, register
from gatewise.layers.conv import ConvNormAct
from gatewise.layers.depthwise_conv import DepthwiseConv2d
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.init_weights import init_linear
from gatewise.layers.linear_head import linear_head
from gatewise.layers.mlp import Mlp
from gatewise.layers.norm import LayerNorm2d
from gatewise.layers.rotary_2d import grid_rotation, rotate_pairs
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork
from gatewise.ops.kernel_attention import kernel_attention

Map = Float[Tensor, "batch height width dim"]


@dataclass(frozen=True)
class CEEncoderConfig(ImageConfig):
    """Sizes and options of a CE-Encoder.

    Args:
        num_classes: number of classes of a linear classifier on the mean token (ours; the published encoder has none).
        embed_dim: width throughout; a multiple of 4 and of every number of heads.
        depths: number of blocks of the convolutional stage and of the three attention stages.
        num_heads: number of heads of each attention stage.
        mlp_ratio: hidden width relative to outer width, in convolutional blocks and MLPs.
        neck_dim: channels of the neck after the encoder; None for none.
    """

    num_classes: int = 0
    drop_path_rate: float = 0.1
    patch_size: int = 16
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (6, 12, 24)
    mlp_ratio: float = 2.0
    neck_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be positive, not {self.patch_size}")
        if len(self.depths) != len(self.num_heads) + 1 or min(self.depths) < 1:
            raise ValueError(
                "depths has one positive entry for the convolutional stage and one per entry of num_heads, "
                f"not {self.depths} with {self.num_heads}"
            )
        for heads in self.num_heads:
            if heads < 1 or self.embed_dim % heads:
                raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of {heads} heads")
        if self.embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4 for positions on a grid, not {self.embed_dim}")


class ConvBlock(nn.Module):
    """gelu(x + project(spatial(expand(x)))) with norms: (B, C, H, W) -> (B, C, H, W). Starts as gelu(x)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.expand = ConvNormAct(dim, hidden_dim, act=nn.GELU)
        self.spatial = ConvNormAct(hidden_dim, hidden_dim, 3, groups=hidden_dim, act=nn.GELU)
        self.project = ConvNormAct(hidden_dim, dim, act=None)
        nn.init.zeros_(self.project.norm.get_parameter("weight"))

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return F.gelu(x + self.project(self.spatial(self.expand(x))))


class DualGatedAttention(nn.Module):
    """Kernel attention with values from a gated bottleneck, plus a local term: (B, H, W, C) -> (B, H, W, C).

        q, k = elu(W_qk x) + 1,   v = W_up silu(W_down x)
        y = kernel_attention(q, k, v, rotary positions in the numerator) + depthwise3x3(v)

    Source: arXiv:2504.06205; the mixer is that of Han et al. 2024, arXiv:2405.16605 (MLLA), with the bottleneck added.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim)
        self.value_down = nn.Linear(dim, dim // 4)
        self.value_up = nn.Linear(dim // 4, dim)
        self.local = DepthwiseConv2d(dim, 3)

    def forward(self, x: Map) -> Map:
        return self.attend(self.qk(x), self.value_down(x))

    def attend(
        self, qk: Float[Tensor, "batch height width both"], thin: Float[Tensor, "batch height width quarter"]
    ) -> Map:
        """Return the output of `forward` from queries and keys before their features and values before the gate."""
        q, k = (F.elu(qk) + 1).chunk(2, dim=-1)
        v = self.value_up(F.silu(thin))
        cos, sin = grid_rotation((v.shape[1], v.shape[2]), v.shape[3], device=v.device)
        turned = self._heads(rotate_pairs(q, cos, sin)), self._heads(rotate_pairs(k, cos, sin))
        y = kernel_attention(self._heads(q), self._heads(k), self._heads(v), turned=turned)
        return y.reshape(v.shape) + self.local(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1))


class TokenBlock(nn.Module):
    """x + W(attention(u) * silu(gate u)) with u = norm(x), then x + mlp(norm(x)): (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, dim)
        self.attention = DualGatedAttention(dim, num_heads)
        self.project = nn.Linear(dim, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Map) -> Map:
        u = self.norm1(x)
        x = x + self.drop_path(self.project(self.attention(u) * F.silu(self.gate(u))))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def read_gates(self, x: Map) -> dict[str, Tensor]:
        """Return the root mean square of the gate after attention at each position: (B, H, W)."""
        return {"after attention": F.silu(self.gate(self.norm1(x))).square().mean(dim=-1).sqrt()}

    def merged(self) -> nn.Module:
        """Return an equivalent block for eval mode, with one matrix for all four layers that read the normed tokens."""
        return MergedTokenBlock(self)


class MergedTokenBlock(nn.Module):
    """A `TokenBlock` for inference: gate, queries, keys and the values' bottleneck come from one linear layer."""

    def __init__(self, block: TokenBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = deepcopy(block.norm1), deepcopy(block.norm2)
        parts = (block.gate, block.attention.qk, block.attention.value_down)
        self.widths = [part.out_features for part in parts]
        self.entry = deepcopy(block.gate)
        self.entry.out_features = sum(self.widths)
        self.entry.weight = nn.Parameter(torch.cat([part.weight for part in parts]).detach())
        self.entry.bias = nn.Parameter(torch.cat([part.bias for part in parts]).detach())
        self.attention, self.project, self.mlp = (deepcopy(p) for p in (block.attention, block.project, block.mlp))
        self.attention.register_module("qk", None)
        self.attention.register_module("value_down", None)

    def forward(self, x: Map) -> Map:
        gate, qk, thin = self.entry(self.norm1(x)).split(self.widths, dim=-1)
        x = x + self.project(self.attention.attend(qk, thin) * F.silu(gate))
        return x + self.mlp(self.norm2(x))


class CEEncoder(ImageNetwork):
    """Patches, convolutional blocks, three stages of token blocks at one resolution, and an optional neck."""

    def __init__(self, config: CEEncoderConfig) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.min_size = config.patch_size
        self.stem = nn.Conv2d(config.in_chans, dim, config.patch_size, config.patch_size)
        rates = drop_path_rates(config.drop_path_rate, config.depths)[1:]
        convolutional = [ConvBlock(dim, int(dim * config.mlp_ratio)) for _ in range(config.depths[0])]
        self.stages = nn.ModuleList([nn.Sequential(*convolutional)])
        for heads, own in zip(config.num_heads, rates, strict=True):
            self.stages.append(nn.Sequential(*(TokenBlock(dim, heads, config.mlp_ratio, rate) for rate in own)))
        self.dim = dim if config.neck_dim is None else config.neck_dim
        self.neck = nn.Identity() if config.neck_dim is None else make_neck(dim, config.neck_dim)
        self.drop = nn.Dropout(config.drop_rate)
        self.apply(init_linear)
        self.head = self.make_head(config.num_classes)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.dim, self.config.patch_size)]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the tokens as a (height / patch_size) x (width / patch_size) map. Without a neck, no norm follows."""
        self.check_input(x)
        x = self.stem(x)
        x = self.run_blocks(self.stages[0].children(), x)
        x = x.permute(0, 2, 3, 1).contiguous()
        for stage in self.stages[1:]:
            x = self.run_blocks(stage.children(), x)
        return self.neck(x.permute(0, 3, 1, 2))

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.drop(super().pool_features(features))

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return a single level, the map of `forward_features`."""
        return [self.forward_features(x)]

    def check_input(self, x: Tensor, min_size: int | None = None) -> None:
        super().check_input(x, min_size)
        self.check_patches(x, self.config.patch_size)

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.dim, num_classes, init_linear)


def make_neck(dim: int, neck_dim: int) -> nn.Sequential:
    """Return a pointwise and a 3x3 convolution, each with a norm over channels: (B, C, H, W) -> (B, C', H, W)."""
    return nn.Sequential(
        nn.Conv2d(dim, neck_dim, 1, bias=False),
        LayerNorm2d(neck_dim),
        nn.Conv2d(neck_dim, neck_dim, 3, padding=1, bias=False),
        LayerNorm2d(neck_dim),
    )


ATTENTION: tuple[Rule, ...] = (("up_proj", "value_down"), ("down_proj", "value_up"), ("lepe", "local"))

_RULES: tuple[Rule, ...] = (
    ("^patch_embed.proj", "^stem"),
    ("^layers.{s}.blocks", "^stages.{s}"),
    ("attn", "attention"),
    *((f"attention.{theirs}", f"attention.{ours}") for theirs, ours in ATTENTION),
    ("act_proj", "gate"),
    ("out_proj", "project"),
    *(
        rule
        for number, part in enumerate(("expand", "spatial", "project"), start=1)
        for rule in ((f"conv{number}.c", f"{part}.conv"), (f"conv{number}.bn", f"{part}.norm"))
    ),
)
_ROTATIONS = r".*attn\.rope\.rotations"


def layouts(config: CEEncoderConfig) -> list[KeyLayout]:
    """Return the layouts of the encoder by itself and within published files.

    The decoder in published files is dropped, and so is their neck if this network has none. What the authors call "up"
    goes down to a quarter of the width here, and vice versa.
    """
    whole: tuple[Rule, ...] = (
        ("^image_encoder.patch_embed", "^patch_embed"),
        ("^image_encoder.layers", "^layers"),
        *_RULES,
    )
    others = r"(prompt_encoder|mask_decoder)\..*" + ("" if config.neck_dim is not None else r"|neck\..*")
    return [
        KeyLayout("encoder", _RULES, dropped=_ROTATIONS),
        KeyLayout("official", whole, dropped=f"{_ROTATIONS}|{others}"),
    ]


register(
    CEEncoder,
    paper="herseg",
    layouts=layouts,
    fresh_with_head=("head.",),
    variants={
        "herseg_encoder_24": Variant(CEEncoderConfig(embed_dim=24), (3, 1024, 1024)),
        "herseg_encoder_48": Variant(CEEncoderConfig(embed_dim=48), (3, 1024, 1024)),
        "herseg_encoder_96": Variant(CEEncoderConfig(embed_dim=96), (3, 1024, 1024)),
        "herseg_encoder_192": Variant(CEEncoderConfig(embed_dim=192), (3, 1024, 1024)),
        "herseg_encoder_384": Variant(CEEncoderConfig(embed_dim=384), (3, 1024, 1024)),
        # The form that the authors distill from Segment Anything: the encoder with its neck.
        "herseg_encoder_192_neck": Variant(CEEncoderConfig(embed_dim=192, neck_dim=256), (3, 1024, 1024)),
    },
)
