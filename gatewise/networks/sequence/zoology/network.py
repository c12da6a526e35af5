"""Zoology: one small decoder in which sequence mixers are compared by how well they recall.

Attention, gated convolutions and recurrences take the same place, after the same norms, so a difference in accuracy is
a difference between mixers. `mixers` lists names that the layers take in turn: "base_conv,attention" is a hybrid.

Paper: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023, arXiv:2312.04927.
As in the published code, the second half of a block adds its norm to the residual even if it has no MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, register
from gatewise.layers.mlp import Mlp
from gatewise.layers.packing import positions_in_sequence
from gatewise.networks.sequence._base import LanguageModel, SequenceConfig, SequenceMixer, State
from gatewise.networks.sequence.gla import GLAConfig
from gatewise.networks.sequence.mixers.attention import Attention
from gatewise.networks.sequence.mixers.base_conv import BaseConv
from gatewise.networks.sequence.mixers.based import Based
from gatewise.networks.sequence.mixers.gla import GLA
from gatewise.networks.sequence.mixers.h3 import H3
from gatewise.networks.sequence.mixers.hyena import Hyena
from gatewise.networks.sequence.mixers.mamba import Mamba
from gatewise.networks.sequence.mixers.retention import Retention
from gatewise.networks.sequence.mixers.rwkv import RWKV
from gatewise.networks.sequence.mixers.sparse_attention import (
    LearnedSelectionAttention,
    ProgrammaticAttention,
    occurred_before,
)
from gatewise.networks.sequence.zoology.keys import reference_layout


@dataclass(frozen=True)
class ZoologyConfig(SequenceConfig):
    """Sizes and options of the decoder and of its mixers.

    Args:
        mixers: names from `MIXERS`, separated by commas; the layers take them in turn.
        max_length: maximum number of tokens for long convolutions and H3.
        max_positions: number of learned absolute positions; 0 for none.
        state_mixer: second half of a block: an MLP, a gated MLP, only the norm, or nothing at all.
        hidden_mult: hidden width of an MLP relative to `dim`.
        embed_dropout: dropout rate of the embeddings.
        resid_dropout: dropout rate of every other branch.
        num_heads: number of heads of every kind of softmax attention.
        attention_dropout: dropout rate of the attention weights.
        window: number of tokens before its own that a query of sliding attention sees.
        kernel_size: kernel size of BaseConv, one for all layers or one entry per layer; -1 for a long convolution.
        implicit_filter: whether an MLP computes BaseConv's long filters.
        use_act: whether to apply SiLU to both factors of BaseConv.
        filter_dim: width of the MLP that computes Hyena's filters.
        filter_layers: number of that MLP's linear layers between the first and the last.
        filter_positions: number of position features that the MLP reads.
        filter_frequency: initial frequency of the MLP's sines.
        short_width: kernel size of Hyena's short convolution.
        h3_state: state size of H3; None for `max_length`.
        h3_head_dim: channels per group of H3.
        feature_dim: width of Based's queries and keys before their expansion.
        linear_heads: number of heads of Based, RetNet and GLA.
        mamba_state: state size per channel of Mamba.
        selected: number of positions that learned selection keeps; None for the square root of the length.
        look_ahead: whether learned selection chooses from the whole sequence, as published.
    """

    vocab_size: int = 8192
    dim: int = 64
    depth: int = 2
    mixers: str = "attention"
    max_length: int = 64
    max_positions: int = 0
    state_mixer: Literal["identity", "mlp", "glu", "none"] = "identity"
    hidden_mult: float = 4.0
    embed_dropout: float = 0.1
    resid_dropout: float = 0.0
    num_heads: int = 1
    attention_dropout: float = 0.1
    window: int = 16
    kernel_size: int | tuple[int, ...] = 3
    implicit_filter: bool = True
    use_act: bool = False
    filter_dim: int = 64
    filter_layers: int = 2
    filter_positions: int = 3
    filter_frequency: float = 1.0
    short_width: int = 3
    h3_state: int | None = None
    h3_head_dim: int = 2
    feature_dim: int = 16
    linear_heads: int = 1
    mamba_state: int = 16
    selected: int | None = None
    look_ahead: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"max_length must be 2 or more, not {self.max_length}")
        if self.max_positions < 0:
            raise ValueError(f"max_positions must be 0 or more, not {self.max_positions}")
        if self.state_mixer not in STATE_MIXERS:
            raise ValueError(f"state_mixer must be one of {', '.join(STATE_MIXERS)}, not {self.state_mixer!r}")
        if unknown := sorted(set(self.pattern) - set(MIXERS)):
            raise ValueError(f"mixers must be names from {', '.join(MIXERS)}, not {', '.join(map(repr, unknown))}")
        if isinstance(self.kernel_size, tuple) and len(self.kernel_size) < self.depth:
            raise ValueError(f"kernel_size must have an entry for each of {self.depth} layers, not {self.kernel_size}")

    @property
    def pattern(self) -> list[str]:
        """Mixer names that repeat over the layers."""
        return [name.strip() for name in self.mixers.split(",")]

    @property
    def layer_mixers(self) -> list[str]:
        """Mixer name of each layer."""
        return list(islice(cycle(self.pattern), self.depth))

    def kernel_of(self, layer: int) -> int:
        """Return the kernel size of BaseConv in a layer."""
        return self.kernel_size if isinstance(self.kernel_size, int) else self.kernel_size[layer]


def _attention(config: ZoologyConfig, layer: int) -> SequenceMixer:
    return Attention(config.dim, config.num_heads, config.attention_dropout)


def _sliding(config: ZoologyConfig, layer: int) -> SequenceMixer:
    return Attention(config.dim, config.num_heads, config.attention_dropout, config.window)


def _base_conv(config: ZoologyConfig, layer: int) -> SequenceMixer:
    kernel = config.kernel_of(layer)
    return BaseConv(config.dim, kernel, config.max_length, config.implicit_filter, config.use_act)


def _hyena(config: ZoologyConfig, layer: int) -> SequenceMixer:
    return Hyena(
        config.dim,
        config.max_length,
        config.short_width,
        position_dim=config.filter_positions,
        hidden_dim=config.filter_dim,
        inner_layers=config.filter_layers,
        frequency=config.filter_frequency,
    )


def _h3(config: ZoologyConfig, layer: int) -> SequenceMixer:
    return H3(config.dim, config.max_length, config.h3_state or config.max_length, config.h3_head_dim)


def _gla(config: ZoologyConfig, layer: int) -> SequenceMixer:
    return GLA(GLAConfig(dim=config.dim, num_heads=config.linear_heads))


def _sparse_learned(config: ZoologyConfig, layer: int) -> SequenceMixer:
    return LearnedSelectionAttention(
        config.dim, config.num_heads, config.attention_dropout, config.selected, config.look_ahead
    )


MIXERS: dict[str, Callable[[ZoologyConfig, int], SequenceMixer]] = {
    "attention": _attention,
    "sliding": _sliding,
    "base_conv": _base_conv,
    "hyena": _hyena,
    "h3": _h3,
    "rwkv": lambda config, layer: RWKV(config.dim, layer, config.depth),
    "retnet": lambda config, layer: Retention(config.dim, config.linear_heads),
    "based": lambda config, layer: Based(config.dim, config.feature_dim, config.linear_heads),
    "mamba": lambda config, layer: Mamba(config.dim, config.mamba_state),
    "gla": _gla,
    "sparse_programmatic": lambda config, layer: ProgrammaticAttention(
        config.dim, config.num_heads, config.attention_dropout
    ),
    "sparse_learned": _sparse_learned,
}
"""Function that builds each mixer from the configuration and the layer index. Add an entry to add a mixer."""


class GatedMlp(nn.Module):
    """fc3(fc1(x) * gelu(fc2(x))): (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.fc3(self.fc1(x) * F.gelu(self.fc2(x)))


STATE_MIXERS: dict[str, Callable[[int, int], nn.Module] | None] = {
    "identity": lambda dim, hidden_dim: nn.Identity(),
    "mlp": Mlp,
    "glu": GatedMlp,
    "none": None,
}


class Block(nn.Module):
    """A mixer, then a state mixer, with a residual stream separate from their outputs.

        r = drop(h) + r,  h = mixer(norm(r));   r = drop(h) + r,  h = state_mixer(norm(r))

    The first block's residual is None. Without a state mixer the second half is left out.
    """

    def __init__(self, config: ZoologyConfig, layer: int) -> None:
        super().__init__()
        self.drop1 = nn.Dropout(config.resid_dropout if layer else config.embed_dropout)
        self.mixer_norm = nn.LayerNorm(config.dim)
        self.mixer = MIXERS[config.layer_mixers[layer]](config, layer)
        self.state_mixer: nn.Module | None = None
        make = STATE_MIXERS[config.state_mixer]
        if make is not None:
            self.drop2 = nn.Dropout(config.resid_dropout)
            self.state_norm = nn.LayerNorm(config.dim)
            self.state_mixer = make(config.dim, int(config.dim * config.hidden_mult))

    def forward(
        self,
        h: Float[Tensor, "batch time dim"],
        residual: Float[Tensor, "batch time dim"] | None,
        state: State,
        cu_seqlens: Int[Tensor, " boundaries"] | None,
        selected: Bool[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "batch time dim"], State]:
        """Return the output, the residual, and the mixer's state. Only mixers that require it receive `selected`."""
        h = self.drop1(h)
        residual = h if residual is None else h + residual
        extra = {"selected": selected} if isinstance(self.mixer, ProgrammaticAttention) else {}
        h, state = self.mixer(self.mixer_norm(residual), state, cu_seqlens, **extra)
        if self.state_mixer is not None:
            residual = self.drop2(h) + residual
            h = self.state_mixer(self.state_norm(residual))
        return h, residual, state


class Seen(NamedTuple):
    """State of the network itself: the number of tokens, and the tokens (B, T) if a mixer selects by them."""

    length: int
    tokens: Tensor | None


class ZoologyNet(LanguageModel):
    """Embedding, blocks, LayerNorm, and the embedding again as output projection."""

    config: ZoologyConfig

    def __init__(self, config: ZoologyConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim) if config.max_positions else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.looks_at_tokens = any(isinstance(block.mixer, ProgrammaticAttention) for block in self.blocks)
        self._init_weights()

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        return self.embedding.weight if self.head is None else self.head.weight

    def forward_features(
        self,
        tokens: Int[Tensor, "batch time"],
        state: list[State] | None = None,
        *,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], list[State]]:
        """Return hidden states and the state as in `LanguageModel`; the last entry of the state is a `Seen`.

        Raises:
            ValueError: also if a sequence is longer than the learned positions or the filters.
        """
        self.check_input(tokens, state, cu_seqlens)
        *states, seen = [*[None] * self.config.depth, Seen(0, None)] if state is None else state
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(self._positions_of(tokens, seen.length, cu_seqlens))
        past = tokens if seen.tokens is None else torch.cat([seen.tokens, tokens], dim=1)
        selected = occurred_before(past, cu_seqlens)[:, seen.length :] if self.looks_at_tokens else None
        h, states = self.mix(x, states, cu_seqlens, selected)
        return h, [*states, Seen(seen.length + tokens.shape[1], past if self.looks_at_tokens else None)]

    def embed(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time dim"]:
        return self.embedding(tokens)

    def mix(
        self,
        x: Float[Tensor, "batch time dim"],
        states: Sequence[State],
        cu_seqlens: Tensor | None,
        selected: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], list[State]]:
        """Run all blocks and the final norm. `selected` marks where programmatic attention attends (all by default)."""
        after, residual = [], None
        for block, state in zip(self.blocks, states, strict=True):
            x, residual, new = self.run_block(block, x, residual, state, cu_seqlens, selected)
            after.append(new)
        return self.norm(x + residual), after

    def auxiliary_loss(self) -> Float[Tensor, ""]:
        """Return the loss added by the last forward pass in training mode: penalties of learned selection, or 0."""
        penalties = [p for block in self.blocks if (p := getattr(block.mixer, "penalty", None)) is not None]
        return torch.stack(penalties).sum() if penalties else self.embedding.weight.new_zeros(())

    def state_bytes(self, length: int) -> int:
        """Return the size of the mixers' state for one sequence of `length` tokens, in bytes of float32."""
        return sum(block.mixer.state_bytes(length) for block in self.blocks)

    def _positions_of(self, tokens: Tensor, start: int, cu_seqlens: Tensor | None) -> Tensor:
        time, known = tokens.shape[1], self.config.max_positions
        if cu_seqlens is not None:
            positions = positions_in_sequence(cu_seqlens, time)
            longest = int(positions.max()) + 1
        else:
            positions, longest = torch.arange(start, start + time, device=tokens.device), start + time
        if longest > known:
            raise ValueError(f"there are positions for at most max_positions={known} tokens, not {longest}")
        return positions

    def _init_weights(self) -> None:
        """Draw with standard deviation 0.02. The last layer of each branch shrinks with the number of branches."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            last = name.rsplit(".", 1)[-1] in ("out_proj", "fc2")
            nn.init.normal_(module.weight, std=0.02 / (2 * self.config.depth) ** 0.5 if last else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def layouts(config: ZoologyConfig) -> list[KeyLayout]:
    """Return the layout of the published harness."""
    return [reference_layout(config)]


def _variant(mixers: str, **fields: Any) -> Variant:
    return Variant(ZoologyConfig(mixers=mixers, **fields), (64,))


register(
    ZoologyNet,
    paper="zoology",
    layouts=layouts,
    fresh_with_head=("head.", "embedding."),
    # Figure 2 at its shortest length and smallest width; set `dim`, `max_length` and `max_positions` for the others.
    variants={
        "zoology_attention": _variant("attention", max_positions=64),
        "zoology_sliding": _variant("base_conv,sliding"),
        "zoology_base_conv": _variant("base_conv", kernel_size=(3, -1, 3, -1)),
        "zoology_hyena": _variant("hyena"),
        "zoology_h3": _variant("h3"),
        "zoology_rwkv": _variant("rwkv"),
        "zoology_retnet": _variant("retnet", linear_heads=2),
        "zoology_based": _variant("base_conv,based"),
        "zoology_mamba": _variant("mamba", state_mixer="none"),
        "zoology_gla": _variant("gla", linear_heads=2),
        "zoology_base_conv_attention": _variant("base_conv,attention"),
        "zoology_base_conv_based": _variant("base_conv,based", feature_dim=8),
        "zoology_sparse_programmatic": _variant("base_conv,sparse_programmatic"),
        "zoology_sparse_learned": _variant("base_conv,sparse_learned"),
    },
)
