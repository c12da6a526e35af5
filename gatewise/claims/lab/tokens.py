"""Token tasks for language models that train in seconds: recall of pairs, registers that are reset, and text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gatewise.claims.lab.training import Batch
from gatewise.data.text.mqar import Rules, Segment, fast_examples
from gatewise.networks.sequence._base import LanguageModel

IGNORED = -100


class TokenTask:
    """Predict the target at every place that has one; subclasses draw `batch`: inputs and targets, (B, T) each."""

    vocab_size: int

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Tokens and targets, `IGNORED` where nothing is asked, drawn from the generator alone."""
        raise NotImplementedError

    def logits(self, model: LanguageModel, batch: Batch) -> Float[Tensor, "questions vocab"]:
        """At the places that ask; the vocabulary is projected to nowhere else."""
        tokens, targets = batch[:2]
        hidden, _ = model.forward_features(tokens)
        return model.logits(hidden[targets != IGNORED])

    def loss(self, model: LanguageModel, batch: Batch) -> Tensor:
        """Cross-entropy over all places that ask."""
        return F.cross_entropy(self.logits(model, batch), asked(batch))

    @torch.no_grad()
    def percent_right(self, model: LanguageModel, batch: Batch) -> float:
        """Of all questions."""
        return 100 * (self.logits(model, batch).argmax(-1) == asked(batch)).float().mean().item()


def asked(batch: Batch) -> Int[Tensor, " questions"]:
    """The targets of the places that ask."""
    return batch[1][batch[1] != IGNORED]


class Recall(TokenTask):
    """Multi-query associative recall of one difficulty, every batch drawn anew."""

    def __init__(self, pairs: int, length: int, vocab_size: int) -> None:
        self.pairs, self.length = pairs, length
        self.vocab_size = vocab_size

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        seed = int(torch.randint(2**31, (), generator=generator))
        found = fast_examples(Segment(self.pairs, self.length, size), Rules(self.vocab_size), seed)
        return tuple(torch.from_numpy(array) for array in found)


class ResetRegisters(TokenTask):
    """Registers are written, erased all at once, and asked for: what stands in one, or that it is empty.

    Token 0 erases. Token 1 + register * values + value writes. Token 1 + registers * values + register asks; its
    target is the value written to that register since the last erasure, the newest, or `values` for none.
    """

    registers, values = 4, 4

    def __init__(self, length: int = 32, erase: float = 0.1, ask: float = 1 / 3) -> None:
        self.length, self.erase, self.ask = length, erase, ask
        self.vocab_size = 1 + self.registers * self.values + self.registers

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        shape = (size, self.length)
        kind = torch.rand(shape, generator=generator)
        register = torch.randint(self.registers, shape, generator=generator)
        value = torch.randint(self.values, shape, generator=generator)
        erases, asks = kind < self.erase, kind > 1 - self.ask
        writes = ~erases & ~asks
        tokens = torch.where(asks, 1 + self.registers * self.values + register, 1 + register * self.values + value)
        tokens = tokens.masked_fill(erases, 0)
        targets = torch.full(shape, IGNORED)
        held = torch.full((size, self.registers), self.values)
        rows = torch.arange(size)
        for t in range(self.length):
            held[erases[:, t]] = self.values
            writing = rows[writes[:, t]]
            held[writing, register[writing, t]] = value[writing, t]
            asking = rows[asks[:, t]]
            targets[asking, t] = held[asking, register[asking, t]]
        return tokens, targets


class ByteText(TokenTask):
    """The next byte of Python's standard library; the last twentieth of every file's bytes is kept for validation."""

    vocab_size = 256

    def __init__(self, length: int, limit: int = 4_000_000) -> None:
        self.length = length
        self.train, self.unseen = corpus(limit)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        return self._windows(self.train, torch.randint(len(self.train) - self.length, (size,), generator=generator))

    def validation_batches(self, size: int, count: int) -> list[Batch]:
        """Windows of unseen text, evenly spread, always the same."""
        starts = torch.linspace(0, len(self.unseen) - self.length - 1, size * count, dtype=torch.float64).long()
        return [self._windows(self.unseen, part) for part in starts.split(size)]

    @torch.no_grad()
    def validation_loss(self, model: LanguageModel, size: int = 32, count: int = 16) -> float:
        """Mean cross-entropy in nats per byte."""
        losses = [self.loss(model, batch).item() for batch in self.validation_batches(size, count)]
        return sum(losses) / len(losses)

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        windows = text[starts[:, None] + torch.arange(self.length + 1)].long()
        return windows[:, :-1], windows[:, 1:]


@cache
def corpus(limit: int) -> tuple[Tensor, Tensor]:
    """Training and validation bytes of the standard library, `limit` bytes at most together."""
    from gatewise.data.text.corpus import standard_library, standard_library_files

    train, unseen, total = [], [], 0
    for path in standard_library_files(standard_library()):
        content = path.read_bytes()
        cut = len(content) - math.ceil(len(content) / 20)
        train.append(content[:cut])
        unseen.append(content[cut:])
        total += len(content)
        if total >= limit:
            break
    return tuple(_as_tensor(parts) for parts in (train, unseen))  # type: ignore[return-value]


def _as_tensor(parts: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
