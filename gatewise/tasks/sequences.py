"""Base class of tasks on tokens: hidden states instead of logits, and speed in tokens per second."""

from __future__ import annotations

import time
from abc import ABC
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.data.text.sequences import IGNORED, SequenceData
from gatewise.ops.chunked_cross_entropy import CHUNK_ELEMENTS
from gatewise.tasks._base import Batch, Task


class SequenceTask(Task, ABC):
    """Task on tokens (B, T). Its outputs, also for loss terms, are the hidden states (B, T, D) before the head.

    Logits of a whole batch are never computed. Code that needs some multiplies hidden states by `model.head_weight`.
    """

    takes: type[SequenceData]

    def __init__(self, model: nn.Module, *shared: Any, **named: Any) -> None:
        super().__init__(model, *shared, **named)
        network: Any = model
        self._features = network.forward_features
        self._speed = Speed()

    def compile_network(self) -> None:
        self._features = torch.compile(self._features)

    def configure_model(self) -> None:
        super().configure_model()
        if self.recipe.trainer.strategy == "fsdp":
            from torch.distributed.fsdp import register_fsdp_forward_method

            # Without this, sharded weights are gathered only for `forward`.
            register_fsdp_forward_method(self.model, "forward_features")
            network: Any = self.model
            self._features = network.forward_features
            if self.recipe.trainer.compile:
                self.compile_network()

    def outputs(self, inputs: Tensor) -> Tensor:
        return hidden_states(self._features, inputs, self.data)

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss as for every task, plus the network's `auxiliary_loss` of its last forward pass, if any."""
        total, hidden = super().loss(inputs, targets)
        auxiliary = getattr(self.model, "auxiliary_loss", None)
        return (total if auxiliary is None else total + auxiliary()), hidden

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        rate = self._speed.tick(batch[0].numel() * self.trainer.world_size)
        if rate is not None:
            self.log("train/tokens_per_second", rate, prog_bar=True, batch_size=len(batch[0]))
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self) -> None:
        self._speed.pause()

    def on_validation_start(self) -> None:
        self._speed.pause()


class Speed:
    """Tokens per second, from one step to the next."""

    def __init__(self) -> None:
        self._before: tuple[float, int] | None = None

    def tick(self, tokens: int) -> float | None:
        """Mark the start of a step with `tokens` tokens, and return the rate of the step just before, if any."""
        now = time.perf_counter()
        before, self._before = self._before, (now, tokens)
        return None if before is None else before[1] / max(now - before[0], 1e-9)

    def pause(self) -> None:
        """Mark that something other than training comes next."""
        self._before = None


def hidden_states(features: Any, tokens: Tensor, data: SequenceData) -> Tensor:
    """Return hidden states (B, T, D) of tokens (B, T), with documents kept separate if the data asks for it.

    Args:
        features: `forward_features` method of the network.
    """
    boundaries = data.boundaries(tokens)
    if boundaries is None:
        return features(tokens)[0]
    hidden = features(tokens.reshape(1, -1), cu_seqlens=boundaries)[0]
    return hidden.reshape(*tokens.shape, -1)


def likeliest(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Return the most likely token (N,) after each hidden state (N, D), without holding all logits at once."""
    chunk = max(1, CHUNK_ELEMENTS // len(head_weight))
    return torch.cat([(part @ head_weight.T).argmax(dim=1) for part in hidden.split(chunk)])


def counted(targets: Tensor) -> int:
    """Return the number of targets that are not ignored."""
    return int((targets != IGNORED).sum())
