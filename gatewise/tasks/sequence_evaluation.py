"""Evaluation of language models on held-out sequences."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.data.text.mqar import MQAR
from gatewise.data.text.sequences import SequenceData
from gatewise.data.text.text import Text
from gatewise.errors import Failure, UserError
from gatewise.ops.chunked_cross_entropy import chunked_cross_entropy
from gatewise.tasks.associative_recall import RecallAccuracy, answers
from gatewise.tasks.sequences import counted, hidden_states

_LARGEST_LOSS = 700.0
"""Loss in nats beyond which the perplexity overflows a float."""


@dataclass(frozen=True)
class LanguageEvaluation:
    """Scores of a language model on text.

    Attributes:
        loss: loss in nats per token.
        tokens: number of predicted tokens.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class RecallEvaluation:
    """Scores of a language model on associative recall.

    Attributes:
        accuracy: fraction of an example's questions that are answered correctly, averaged over examples.
        loss: loss in nats per question.
        slices: accuracy by number of pairs, length and distance; see `RecallAccuracy`.
    """

    accuracy: float
    loss: float
    examples: int
    slices: dict[str, float]
    seconds: float


@torch.inference_mode()
def evaluate_language_model(
    model: nn.Module, data: Text, loader: Iterable[tuple[Tensor, Tensor]], split: str, device: torch.device
) -> LanguageEvaluation:
    """Score a language model that is already on `device` on the loader's sequences.

    Raises:
        UserError: if its vocabulary is smaller than that of the data.
        Failure: if the loss is not finite.
    """
    network = _with_room(model, data)
    started = time.perf_counter()
    total, count = 0.0, 0
    for batch in loader:
        tokens, targets = (tensor.to(device) for tensor in batch)
        hidden = hidden_states(network.forward_features, tokens, data)
        total += chunked_cross_entropy(hidden, network.head_weight, targets, reduction="sum").item()
        count += counted(targets)
    seconds = time.perf_counter() - started
    if count == 0:
        raise UserError(f"the data has no tokens to predict in its {split} part")
    loss = _finite(total / count)
    return LanguageEvaluation(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss / math.log(2) / data.bytes_per_token(split),
        tokens=count,
        tokens_per_second=count / seconds,
        seconds=seconds,
    )


@torch.inference_mode()
def evaluate_recall(
    model: nn.Module, data: MQAR, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> RecallEvaluation:
    """Score a language model that is already on `device` on the loader's examples.

    Raises:
        UserError: if its vocabulary is smaller than that of the data.
        Failure: if the loss is not finite.
    """
    network = _with_room(model, data)
    started = time.perf_counter()
    accuracy = RecallAccuracy(data.val_segments).to(device)
    total, questions, examples = 0.0, 0, 0
    for batch in loader:
        inputs, targets = (tensor.to(device) for tensor in batch)
        loss, correct = answers(network, inputs, targets, data)
        accuracy.update(correct, inputs, targets)
        total += loss.item() * len(correct)
        questions += len(correct)
        examples += len(inputs)
    slices = {name: value.item() for name, value in accuracy.compute().items()}
    return RecallEvaluation(
        accuracy=slices.pop("accuracy"),
        loss=_finite(total / questions),
        examples=examples,
        slices=slices,
        seconds=time.perf_counter() - started,
    )


def _finite(loss: float) -> float:
    """Return the loss if it and its perplexity are finite, else raise."""
    if not loss < _LARGEST_LOSS:
        raise Failure(f"the network's loss is {loss:g} nats, too large for a perplexity: its outputs are out of range")
    return loss


def _with_room(model: Any, data: SequenceData) -> Any:
    if model.config.vocab_size < data.vocab_size:
        raise UserError(
            f"the network has a vocabulary of {model.config.vocab_size} tokens, too small for the {data.vocab_size} of "
            "the data"
        )
    return model
