"""What tasks on tokens share: hidden states in place of logits, and the speed in tokens."""

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
    """Tokens (B, T) in. The network's outputs, for loss terms too, are its hidden states (B, T, D) before the head.

    Logits of a whole batch are never made: whoever needs some multiplies what it needs with `model.head_weight`.
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

            # Sharded weights are gathered for the methods that are called from outside.
            register_fsdp_forward_method(self.model, "forward_features")
            network: Any = self.model
            self._features = network.forward_features
            if self.recipe.trainer.compile:
                self.compile_network()

    def outputs(self, inputs: Tensor) -> Tensor:
        return hidden_states(self._features, inputs, self.data)

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As for every task, and what the network itself adds: `auxiliary_loss`, of its last forward pass."""
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
        """A step with so many tokens begins; the rate of the one before, if there was one just before."""
        now = time.perf_counter()
        before, self._before = self._before, (now, tokens)
        return None if before is None else before[1] / max(now - before[0], 1e-9)

    def pause(self) -> None:
        """Something else than training comes next."""
        self._before = None


def hidden_states(features: Any, tokens: Tensor, data: SequenceData) -> Tensor:
    """Hidden states (B, T, D) of tokens (B, T), documents kept apart where the data says so.

    Args:
        features: `forward_features` of the network.
    """
    boundaries = data.boundaries(tokens)
    if boundaries is None:
        return features(tokens)[0]
    hidden = features(tokens.reshape(1, -1), cu_seqlens=boundaries)[0]
    return hidden.reshape(*tokens.shape, -1)


def likeliest(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """The most likely token (N,) after each of the hidden states (N, D), without all logits at once."""
    chunk = max(1, CHUNK_ELEMENTS // len(head_weight))
    return torch.cat([(part @ head_weight.T).argmax(dim=1) for part in hidden.split(chunk)])


def counted(targets: Tensor) -> int:
    """How many targets count."""
    return int((targets != IGNORED).sum())
