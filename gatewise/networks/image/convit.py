"""ConViT: a vision transformer whose first layers start as soft convolutions, which each head may unlearn.

In most layers, a gate per head blends content-based attention with positional attention. At initialization, each head
looks at one tap of a small filter, values are passed on unchanged, and the gates favor position: a soft convolution.
The class token joins after these layers, before ordinary self-attention.

Paper: d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", 2021,
arXiv:2103.10697. Offsets count (columns, rows, square of the distance), as in the published weights. Those weights
require square images of one size; here any grid of whole patches works, because positions are resized.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.drop_path import drop_path_rates
from gatewise.layers.init_weights import init_linear
from gatewise.layers.positions import resize_positions, row_of_positions
from gatewise.layers.self_attention import SelfAttention, TransformerBlock, head_dim
from gatewise.networks.image.skeletons.class_token import ClassTokenConfig, ClassTokenNetwork
from gatewise.ops.gated_positional_attention import (
    gated_positional_attention,
    gated_positional_weights,
    offsets,
)

Map = Float[Tensor, "batch height width channels"]


@dataclass(frozen=True)
class ConvitConfig(ClassTokenConfig):
    """Sizes and options of a ConViT.

    Args:
        local_up_to_layer: number of blocks with gated positional attention; the class token joins after them.
        locality_strength: initial sharpness of a head's attention to its tap.
        use_pos_embed: whether learned positions are added to the patches.
        attn_drop_rate: dropout rate of attention weights. If positive, training materializes whole attention maps.
    """

    num_heads: int = 4
    qkv_bias: bool = False
    local_up_to_layer: int = 10
    locality_strength: float = 1.0
    use_pos_embed: bool = True
    attn_drop_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.local_up_to_layer < self.depth:
            raise ValueError(
                f"local_up_to_layer must be in 0..{self.depth - 1}, as the class token joins after that many of "
                f"{self.depth} blocks, not {self.local_up_to_layer}"
            )
        if not 0.0 <= self.attn_drop_rate < 1.0:
            raise ValueError(f"attn_drop_rate must be in [0, 1), not {self.attn_drop_rate}")


class GatedPositionalSelfAttention(nn.Module):
    """Content-based and positional attention, blended by a gate per head: (B, H, W, C) -> (B, H, W, C).

    Args:
        locality_strength: initial sharpness of the positional attention. Heads look at the offsets of a k x k filter,
            where k is the square root of their number, with weights proportional to exp(-strength distance^2). Heads
            beyond k^2 start at random, with a warning.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        locality_strength: float = 1.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim(dim, num_heads)
        self.locality_strength = locality_strength
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.attn_drop, self.drop = nn.Dropout(attn_drop_rate), nn.Dropout(drop_rate)
        self.start_local()

    @torch.no_grad()
    def start_local(self) -> None:
        """Make the layer a soft convolution: heads at the taps of a filter, values passed on, gates at sigmoid(1)."""
        side = math.isqrt(self.num_heads)
        if side**2 != self.num_heads:
            warnings.warn(
                f"{self.num_heads} heads do not form a square filter: the last {self.num_heads - side**2} "
                "start at random",
                stacklevel=2,
            )
        nn.init.eye_(self.v.weight)
        nn.init.ones_(self.gating_param)
        nn.init.zeros_(self.pos_proj.bias)
        center = (side - 1) / 2
        for head in range(side**2):
            row, column = head % side - center, head // side - center
            tap = torch.tensor([2 * column, 2 * row, -1.0])
            self.pos_proj.weight[head] = self.locality_strength * tap.to(self.pos_proj.weight)

    def forward(self, x: Map) -> Map:
        q, k, v = self._project(x)
        if self.training and self.attn_drop.p > 0:
            weights = self.attn_drop(gated_positional_weights(q, k, self.pos_proj.weight, self.gating_param))
            y = (weights @ v.flatten(1, 2).transpose(1, 2)).transpose(1, 2)
        else:
            position = self.pos_proj
            y = gated_positional_attention(q, k, v, position.weight, self.gating_param, bias=position.bias)
        return self.drop(self.proj(y.reshape(x.shape)))

    def attention(self, x: Map) -> Float[Tensor, "batch heads positions positions"]:
        """Return the blended attention weights."""
        q, k, _ = self._project(x)
        return gated_positional_weights(q, k, self.pos_proj.weight, self.gating_param)

    def read_gates(self, x: Map) -> dict[str, Tensor]:
        """Return the weight of positional attention in each head, the same for every image: (B, heads)."""
        return {"position": self.gating_param.sigmoid().expand(x.shape[0], -1)}

    def center_distance(self) -> Float[Tensor, " heads"]:
        """Return the distance, in patches, from a query to the center of its positional attention."""
        a, b, c = self.pos_proj.weight.unbind(1)
        return torch.hypot(a, b) / (2 * c.abs())

    def _project(self, x: Map) -> list[Tensor]:
        heads = (self.num_heads, self.head_dim)
        return [part.unflatten(-1, heads) for part in (*self.qk(x).chunk(2, dim=-1), self.v(x))]


def non_locality(attention: Float[Tensor, "batch heads n n"], grid: tuple[int, int]) -> Float[Tensor, " heads"]:
    """Return the attention-weighted mean distance from queries to keys, in patches, over positions and images."""
    distance = offsets(grid, attention.device)[..., 2].sqrt().to(attention.dtype)
    return (attention.mean(dim=0) * distance).sum(dim=-1).mean(dim=-1)


class Convit(ClassTokenNetwork):
    """Patches with positions, gated positional blocks, class token, self-attention blocks, norm, linear classifier."""

    def __init__(self, config: ConvitConfig) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.min_size = config.patch_size
        self.stem = nn.Conv2d(config.in_chans, dim, config.patch_size, config.patch_size)
        self.positions = nn.Parameter(torch.zeros(1, *config.grid, dim)) if config.use_pos_embed else None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.drop = nn.Dropout(config.drop_rate)
        (rates,) = drop_path_rates(config.drop_path_rate, (config.depth,))
        self.blocks = nn.ModuleList(self._block(index, rate) for index, rate in enumerate(rates))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self._init_weights()
        self.head = self.make_head(config.num_classes)

    def _block(self, index: int, drop_path_rate: float) -> TransformerBlock:
        config = self.config
        options = {
            "qkv_bias": config.qkv_bias,
            "drop_rate": config.drop_rate,
            "attn_drop_rate": config.attn_drop_rate,
        }
        mixer: nn.Module
        if index < config.local_up_to_layer:
            mixer = GatedPositionalSelfAttention(
                config.embed_dim, config.num_heads, locality_strength=config.locality_strength, **options
            )
        else:
            mixer = SelfAttention(config.embed_dim, config.num_heads, **options)
        return TransformerBlock(
            config.embed_dim,
            mixer,
            mlp_ratio=config.mlp_ratio,
            drop_rate=config.drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=config.norm_eps,
        )

    def _init_weights(self) -> None:
        for module in self.modules():
            init_linear(module)
        for table in (self.positions, self.cls_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        with warnings.catch_warnings():
            # The warning was already given when the layers were built.
            warnings.simplefilter("ignore")
            for module in self.modules():
                if isinstance(module, GatedPositionalSelfAttention):
                    module.start_local()

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self._embed(x)
        local, rest = self.blocks[: self.config.local_up_to_layer], self.blocks[self.config.local_up_to_layer :]
        x = self.run_blocks(local, x)
        grid = (x.shape[1], x.shape[2])
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x.flatten(1, 2)], dim=1)
        x = self.run_blocks(rest, x)
        return self.norm(x), grid

    def _embed(self, x: Tensor) -> Tensor:
        self.check_input(x)
        x = self.stem(x).permute(0, 2, 3, 1).contiguous()
        if self.positions is not None:
            x = x + resize_positions(self.positions, (x.shape[1], x.shape[2])).to(x.dtype)
        return self.drop(x)

    @torch.no_grad()
    def non_locality(
        self, x: Float[Tensor, "batch channels height width"], *, of_embedding: bool = False
    ) -> Float[Tensor, "layers heads"]:
        """Return the mean attention distance of each layer's heads, in patches, without the class token.

        Args:
            of_embedding: whether to feed every layer the embedded patches, as the published log does, instead of its
                own input.
        """
        own = self._embed(x)
        embedded, grid = own, (own.shape[1], own.shape[2])
        found = []
        for block in self.blocks:
            found.append(non_locality(_attention(block, embedded if of_embedding else own), grid))
            own = block(own)
        return torch.stack(found)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the positions and the class token."""
        return {"positions", "cls_token"}


def _attention(block: nn.Module, x: Tensor) -> Tensor:
    """Return the attention weights of a block's mixer on a map, (B, heads, N, N)."""
    mixer, x = block.get_submodule("mixer"), block.get_submodule("norm1")(x)
    if isinstance(mixer, GatedPositionalSelfAttention):
        return mixer.attention(x)
    if not isinstance(mixer, SelfAttention):
        raise TypeError(f"expected self-attention, not {type(mixer).__name__}")
    q, k, _ = (
        part.unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2) for part in mixer.qkv(x.flatten(1, 2)).chunk(3, -1)
    )
    return (q @ k.mT * mixer.head_dim**-0.5).softmax(dim=-1)


def layouts(config: ConvitConfig) -> list[KeyLayout]:
    """Return the official layout, which timm shares: positions are a sequence of tokens."""
    rules = (("^pos_embed", "positions"), ("^patch_embed.proj", "stem"), ("attn", "mixer"))

    to_ours, to_theirs = row_of_positions("pos_embed", config.grid)
    return [KeyLayout("official", rules, tensor_to_ours=to_ours, tensor_to_theirs=to_theirs)]


def _variant(num_heads: int, head_dim: int, score: str | None = None) -> Variant:
    config = ConvitConfig(embed_dim=num_heads * head_dim, num_heads=num_heads)
    size = {4: "tiny", 9: "small", 16: "base"}[num_heads]
    weights = Weights(f"timm/convit_{size}.fb_in1k", "Apache-2.0", score) if score is not None else None
    return Variant(config, weights=weights)


register(
    Convit,
    paper="convit",
    layouts=layouts,
    fresh_with_head=("head.",),
    variants={
        "convit_tiny": _variant(4, 48, "73.1 % top-1, ImageNet-1K at 224"),
        "convit_tiny_plus": _variant(4, 64),
        "convit_small": _variant(9, 48, "81.3 % top-1, ImageNet-1K at 224"),
        "convit_small_plus": _variant(9, 64),
        "convit_base": _variant(16, 48, "82.4 % top-1, ImageNet-1K at 224"),
        "convit_base_plus": _variant(16, 64),
    },
)
