"""The contracts of sequence mixers and of the language models built from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatewise.networks.sequence._sampling import Sampling

State = Any
"""State of a mixer between calls: tensors, or tuples and lists of them; None before the first token."""


@dataclass(frozen=True)
class SequenceConfig:
    """Configuration shared by all language models.

    Args:
        vocab_size: number of tokens in the vocabulary.
        dim: width of the residual stream.
        depth: number of blocks.
        tie_embeddings: whether the output projection shares the weight of the embedding.
    """

    vocab_size: int = 32000
    dim: int = 1024
    depth: int = 24
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


class SequenceMixer(nn.Module):
    """Base of causal token mixers: (B, T, D) in, (B, T, D) and a state out. A mixer never looks ahead.

    Processing a sequence in pieces gives the same result as processing it whole: `forward(x)` equals
    `forward(x[:, :t])` followed by `forward(x[:, t:], state)`. With `cu_seqlens`, the batch is a single row of
    concatenated sequences. Each sequence then starts without a state, no state may be passed in, and None is returned
    as the state.
    """

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: State = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], State]:
        """Return the outputs and the state after the last token."""
        raise NotImplementedError


class LanguageModel(nn.Module):
    """Base of language models: tokens (B, T) in; logits, hidden states or new tokens out.

    A network defines `embed`, `mix` and `head_weight`, and runs its blocks through `run_block`.
    """

    config: Any
    variant: str | None = None
    takes_tokens = True

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False

    def embed(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time dim"]:
        """Return the embeddings of the tokens."""
        raise NotImplementedError

    def mix(
        self, x: Float[Tensor, "batch time dim"], states: Sequence[State], cu_seqlens: Tensor | None
    ) -> tuple[Float[Tensor, "batch time dim"], list[State]]:
        """Run all blocks and the final norm, with one state per block in and out."""
        raise NotImplementedError

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        """Weight of the output projection, which has no bias."""
        raise NotImplementedError

    def forward_features(
        self,
        tokens: Int[Tensor, "batch time"],
        state: list[State] | None = None,
        *,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], list[State]]:
        """Return the normalized hidden states of the last block and the state after the last token.

        Args:
            state: state returned by an earlier call, whose sequences the tokens continue.
            cu_seqlens: boundaries 0 = c_0 <= c_1 <= ... = T of the sequences concatenated in a single row.
        Raises:
            ValueError: if the tokens have the wrong shape or type or are outside the vocabulary, if the boundaries do
                not fit, or if a state is passed together with boundaries.
        """
        self.check_input(tokens, state, cu_seqlens)
        if state is None:
            state = [None] * self.config.depth
        return self.mix(self.embed(tokens), state, cu_seqlens)

    def forward(
        self, tokens: Int[Tensor, "batch time"], *, cu_seqlens: Int[Tensor, " boundaries"] | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        """Return logits of the token that follows each position. Arguments and errors as in `forward_features`."""
        return self.logits(self.forward_features(tokens, cu_seqlens=cu_seqlens)[0])

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Return logits for hidden states."""
        return nn.functional.linear(hidden, self.head_weight)

    @torch.no_grad()
    def stream(
        self,
        prompt: Int[Tensor, "batch time"],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Yield the new tokens of `generate` one step at a time, until every row has stopped."""
        sampling = Sampling(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, not {max_new_tokens}")
        stops = torch.tensor(list(stop_tokens), device=prompt.device, dtype=torch.long)
        stopped = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        hidden, state = self.forward_features(prompt)
        for remaining in range(max_new_tokens, 0, -1):
            token = sampling.draw(self.logits(hidden[:, -1]), generator)
            if len(stops):
                token = torch.where(stopped, stops[0], token)
                stopped |= torch.isin(token, stops)
            yield token
            if remaining == 1 or (len(stops) and bool(stopped.all())):
                return
            hidden, state = self.forward_features(token[:, None], state)

    def generate(
        self,
        prompt: Int[Tensor, "batch time"],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Return the prompt followed by up to `max_new_tokens` sampled tokens.

        Args:
            temperature: divisor of the logits; 0 always selects the most likely token.
            top_k: number of most likely tokens to sample from; None for all.
            top_p: cumulative probability of the smallest set of most likely tokens to sample from; None for all.
            stop_tokens: tokens that end a row; a finished row is padded with the first of them.
            generator: source of randomness.
        Raises:
            ValueError: if an option is out of range or a token is outside the vocabulary.
        """
        new = list(
            self.stream(
                prompt,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop_tokens=stop_tokens,
                generator=generator,
            )
        )
        return torch.cat([prompt, torch.stack(new, dim=1)], dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep only each block's input, recompute the rest in the backward pass."""
        self.grad_checkpointing = enable

    def run_block(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Return `block(*inputs)`, recomputed in the backward pass if gradient checkpointing is on."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def check_input(self, tokens: Tensor, state: list[State] | None, cu_seqlens: Tensor | None) -> None:
        """Raise a ValueError unless tokens, state and boundaries are valid and consistent."""
        self.check_tokens(tokens)
        check_boundaries(cu_seqlens, tokens.shape)
        if state is not None and cu_seqlens is not None:
            raise ValueError("packed sequences start from nothing: pass either a state or cu_seqlens")

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise a ValueError (TypeError for a non-tensor) saying what was expected unless `tokens` is a valid batch."""
        title = self.variant or type(self).__name__
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{title} expects a tensor of tokens, not {type(tokens).__name__}")
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(
                f"{title} expects integer tokens (batch, time), not {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if tokens.shape[0] < 1:
            raise ValueError(f"{title} expects at least one sequence, not a batch of shape {tuple(tokens.shape)}")
        if tokens.shape[1] < 1:
            raise ValueError(f"{title} expects at least one token per sequence, not shape {tuple(tokens.shape)}")
        # Reading the values would synchronize with an accelerator, and cannot be traced.
        if tokens.device.type != "cpu" or torch.compiler.is_compiling() or not tokens.numel():
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"tokens must be 0 to {self.config.vocab_size - 1} (the vocabulary), not {wrong}")


def check_boundaries(cu_seqlens: Tensor | None, shape: torch.Size) -> None:
    """Raise a ValueError unless `cu_seqlens` splits a single row of shape (batch, time) into sequences."""
    if cu_seqlens is None:
        return
    if shape[0] != 1:
        raise ValueError(f"packed sequences are one row: with cu_seqlens the batch must be 1, not {shape[0]}")
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be two or more integers, not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != shape[1] or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the length {shape[1]}, not {bounds}")
