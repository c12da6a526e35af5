"""The pre-norm decoder that most language models share; the models differ in the mixer and the MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.networks.sequence._base import LanguageModel, SequenceConfig, SequenceMixer, State


class DecoderBlock(nn.Module):
    """A mixer and an MLP, each in a residual branch after its own norm: (B, T, D) -> (B, T, D), with a state."""

    def __init__(self, dim: int, mixer: SequenceMixer, mlp: nn.Module, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.mlp = mlp

    def forward(
        self, x: Float[Tensor, "batch time dim"], state: State, cu_seqlens: Int[Tensor, " boundaries"] | None
    ) -> tuple[Float[Tensor, "batch time dim"], State]:
        y, state = self.mixer(self.mixer_norm(x), state, cu_seqlens)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class Decoder(LanguageModel):
    """Embedding, blocks, final norm, output projection without bias (the embedding itself if tied).

    Args:
        make_mixer: function that builds the mixer of a block from its index.
        make_mlp: function that builds the MLP of a block from its index.
    """

    def __init__(
        self,
        config: SequenceConfig,
        make_mixer: Callable[[int], SequenceMixer],
        make_mlp: Callable[[int], nn.Module],
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(config.dim, make_mixer(index), make_mlp(index), norm_eps) for index in range(config.depth)
        )
        self.norm = nn.RMSNorm(config.dim, eps=norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(init_weights)

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        return self.embedding.weight if self.head is None else self.head.weight

    def embed(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time dim"]:
        return self.embedding(tokens)

    def mix(
        self, x: Float[Tensor, "batch time dim"], states: Sequence[State], cu_seqlens: Tensor | None
    ) -> tuple[Float[Tensor, "batch time dim"], list[State]]:
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, new = self.run_block(block, x, state, cu_seqlens)
            after.append(new)
        return self.norm(x), after


def init_weights(module: nn.Module, std: float = 0.02) -> None:
    """Draw linear layers and embeddings from a normal distribution, with biases at 0. Norms already start at 1."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def split_heads(x: Float[Tensor, "batch time width"], heads: int) -> Float[Tensor, "batch time heads head_dim"]:
    """Split the channels into heads."""
    return torch.unflatten(x, -1, (heads, -1))
