"""Language modeling: predict the next token of a text.

The loss is in nats per token. Perplexity is its exponential. Bits per byte, which is comparable across tokenizers, is
the loss divided by ln 2 and by the mean number of bytes per token of the validation text.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from gatewise.data.randomness import frozen_generator
from gatewise.data.text.sequences import IGNORED
from gatewise.data.text.text import Text
from gatewise.data.text.tokenizers import Tokenizer
from gatewise.errors import UserError
from gatewise.files import parse_json, read_text, write_text
from gatewise.ops.chunked_cross_entropy import chunked_cross_entropy
from gatewise.tasks._base import Batch
from gatewise.tasks.recipe import Recipe
from gatewise.tasks.sequences import SequenceTask, counted, hidden_states


@dataclass(frozen=True)
class LanguageModelingSettings:
    """The `task` section of a language-modeling recipe.

    Args:
        chunk_size: number of tokens whose logits are in memory at once; None: as many as make 2^24 logits.
        sample_every: epochs between two sample texts, written to samples.jsonl and TensorBoard; None: no samples.
        sample_prompt: prompt of the samples; empty: start of a document.
        sample_tokens: number of tokens to generate per sample.
        sample_temperature: sampling temperature; 0 picks the most likely token.
        sample_top_p: total probability of the smallest set of tokens to sample from; None: all tokens.
    """

    chunk_size: int | None = None
    sample_every: int | None = None
    sample_prompt: str = ""
    sample_tokens: int = 200
    sample_temperature: float = 0.8
    sample_top_p: float | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_size", "sample_every", "sample_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"task.{name} must be at least 1, not {value!r}")
        if self.sample_temperature < 0:
            raise UserError(f"task.sample_temperature must be at least 0, not {self.sample_temperature!r}")
        if self.sample_top_p is not None and not 0 < self.sample_top_p <= 1:
            raise UserError(f"task.sample_top_p must be above 0 and at most 1, not {self.sample_top_p!r}")


class LanguageModeling(SequenceTask):
    """Language modeling of text. Logs loss, perplexity, bits per byte and sample texts."""

    settings = LanguageModelingSettings
    takes = Text
    monitor = "val/loss"
    lower_is_better = True

    def __init__(
        self, model: nn.Module, recipe: Recipe, data: Text, settings: LanguageModelingSettings, **shared: Any
    ) -> None:
        super().__init__(model, recipe, data, **shared)
        self.asked = settings
        self.mean_loss = MeanMetric()
        self.perplexity = Perplexity()
        self.bits_per_byte = BitsPerByte(data.bytes_per_token("val"))

    def task_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        network: Any = self.model
        chunk = self.asked.chunk_size
        total = chunked_cross_entropy(outputs, network.head_weight, targets, chunk_size=chunk, reduction="sum")
        return total / _count_per_process(targets)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        tokens, targets = batch
        network: Any = self.evaluated()
        hidden = hidden_states(network.forward_features, tokens, self.data)
        loss = chunked_cross_entropy(hidden, network.head_weight, targets, chunk_size=self.asked.chunk_size)
        metrics = {"loss": self.mean_loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        for name, metric in metrics.items():
            metric.update(loss, weight=counted(targets))
            self.log(f"val/{name}", metric, prog_bar=name == "loss", batch_size=len(tokens))

    def on_validation_epoch_end(self) -> None:
        every = self.asked.sample_every
        if every is None or (self.current_epoch + 1) % every:
            return
        # On all processes, because the weights may be sharded over them.
        text = self.sample()
        if self.trainer.is_global_zero:
            self._keep(text)

    def sample(self) -> str:
        """Return a text by the network, prompt included. It is the same in every process and in a repeated epoch."""
        tokenizer: Tokenizer = self.data.tokenizer
        prompt = prompt_tokens(tokenizer, self.asked.sample_prompt).to(self.device)
        generator = torch.Generator(self.device)
        generator.manual_seed(int(frozen_generator("sample", self.recipe.seed, self.current_epoch).randint(2**31)))
        network: Any = self.evaluated()
        tokens = network.generate(
            prompt,
            self.asked.sample_tokens,
            temperature=self.asked.sample_temperature,
            top_p=self.asked.sample_top_p,
            generator=generator,
        )
        return tokenizer.decode(tokens[0].tolist())

    def _keep(self, text: str) -> None:
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                # Indented, so that TensorBoard shows it verbatim.
                logger.experiment.add_text("sample", "    " + text.replace("\n", "\n    "), self.updates)
        path = Path(self.trainer.default_root_dir) / "samples.jsonl"
        # An epoch that is repeated after an interruption writes the same text again.
        rows = [row for row in read_samples(path) if row["epoch"] < self.current_epoch]
        rows.append({"epoch": self.current_epoch, "step": self.updates, "text": text})
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the samples in a run's `samples.jsonl`, without an unfinished last line; empty if there is no file.

    Raises:
        UserError: if the file cannot be read or has another format.
    """
    if not path.exists():
        return []
    *lines, _ = read_text(path, "samples").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parse_json(line, f"line {number} of {path}")
        if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
            raise UserError(f"line {number} of {path} must be a sample with its epoch, not {line[:100]!r}")
        rows.append(row)
    return rows


class Perplexity(MeanMetric):
    """Exponential of the mean loss."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class BitsPerByte(MeanMetric):
    """Mean loss in bits per byte of text."""

    def __init__(self, bytes_per_token: float) -> None:
        super().__init__()
        self.nats_per_bit = math.log(2) * bytes_per_token

    def compute(self) -> Tensor:
        return super().compute() / self.nats_per_bit


def _count_per_process(targets: Tensor) -> Tensor:
    """Return the mean number of counted targets per process, so that losses average to the mean over all targets."""
    count = (targets != IGNORED).sum().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count


def prompt_tokens(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return a prompt as tokens (1, T). An empty prompt becomes the start of a document."""
    [tokens] = tokenizer.encode([text])
    return torch.tensor([tokens.tolist() or [tokenizer.end_of_text]])
