"""Multi-query associative recall: given a key, predict the value that followed it earlier.

Accuracy is the fraction of an example's questions for which the most likely token of the whole vocabulary is correct,
averaged over examples. Source: Arora et al. 2023, arXiv:2312.04927, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from gatewise.data.text.mqar import MQAR, Segment
from gatewise.data.text.sequences import IGNORED
from gatewise.ops.chunked_cross_entropy import chunked_cross_entropy
from gatewise.tasks._base import Batch
from gatewise.tasks.recipe import Recipe
from gatewise.tasks.sequences import SequenceTask, hidden_states, likeliest


@dataclass(frozen=True)
class AssociativeRecallSettings:
    """The `task` section of a recipe for associative recall; there is nothing to set."""


class AssociativeRecall(SequenceTask):
    """MQAR task. Logs accuracy over all examples, and by number of pairs, length and distance."""

    settings = AssociativeRecallSettings
    takes = MQAR
    monitor = "val/accuracy"

    def __init__(
        self, model: nn.Module, recipe: Recipe, data: MQAR, settings: AssociativeRecallSettings, **shared: Any
    ) -> None:
        super().__init__(model, recipe, data, **shared)
        self.mean_loss = MeanMetric()
        self.accuracy = RecallAccuracy(data.val_segments)

    def task_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        network: Any = self.model
        # Only a few percent of the positions are questions. Logits are not computed for the others.
        asked = targets != IGNORED
        return chunked_cross_entropy(outputs[asked], network.head_weight, targets[asked])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, targets = batch
        network: Any = self.evaluated()
        loss, correct = answers(network, inputs, targets, self.data)
        self.accuracy.update(correct, inputs, targets)
        self.mean_loss.update(loss, weight=len(correct))
        self.log("val/loss", self.mean_loss, batch_size=len(inputs))

    def on_validation_epoch_end(self) -> None:
        for name, value in self.accuracy.compute().items():
            self.log(f"val/{name}", value, prog_bar=name == "accuracy", sync_dist=True)
        self.accuracy.reset()


def answers(network: Any, inputs: Tensor, targets: Tensor, data: MQAR) -> tuple[Tensor, Tensor]:
    """Return the mean loss (a scalar) over the questions of a batch, and whether each is answered correctly (N,)."""
    asked = targets != IGNORED
    hidden = hidden_states(network.forward_features, inputs, data)[asked]
    loss = chunked_cross_entropy(hidden, network.head_weight, targets[asked])
    return loss, likeliest(hidden, network.head_weight) == targets[asked]


class RecallAccuracy(Metric):
    """Accuracies by name.

    "accuracy" is over all examples, "accuracy_pairs_8" and "accuracy_length_64" over those with 8 pairs or 64 tokens,
    and "accuracy_distance_17_32" over questions 17 to 32 tokens after their pair. Slices without examples are left out.

    Args:
        segments: segments that the examples come from.
    """

    full_state_update = False
    example_sums: Tensor
    example_counts: Tensor
    question_sums: Tensor
    question_counts: Tensor

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__()
        self._pairs = sorted({segment.num_kv_pairs for segment in segments})
        self._lengths = sorted({segment.input_seq_len for segment in segments})
        self._bounds = distance_bounds(max(self._lengths))
        slices = 1 + len(self._pairs) + len(self._lengths)
        for name, size in (("example", slices), ("question", len(self._bounds))):
            self.add_state(f"{name}_sums", torch.zeros(size), dist_reduce_fx="sum")
            self.add_state(f"{name}_counts", torch.zeros(size), dist_reduce_fx="sum")

    def update(self, correct: Tensor, inputs: Tensor, targets: Tensor) -> None:
        """Add a batch. `correct` (N,) has one entry per question, row by row."""
        asked = targets != IGNORED
        hits = torch.zeros(targets.shape, device=targets.device).masked_scatter(asked, correct.float())
        questions = asked.sum(dim=1)
        shares = hits.sum(dim=1) / questions
        members = torch.stack(
            [torch.ones_like(questions, dtype=torch.bool)]
            + [questions == pairs for pairs in self._pairs]
            + [torch.full_like(questions, targets.shape[1] == length, dtype=torch.bool) for length in self._lengths]
        )
        self.example_sums += (members * shares).sum(dim=1)
        self.example_counts += members.sum(dim=1)
        bucket = torch.bucketize(distances(inputs, targets), torch.tensor(self._bounds, device=targets.device))
        self.question_sums.index_add_(0, bucket, correct.float())
        self.question_counts.index_add_(0, bucket, torch.ones_like(correct, dtype=torch.float))

    def compute(self) -> dict[str, Tensor]:
        names = ["accuracy"]
        names += [f"accuracy_pairs_{pairs}" for pairs in self._pairs]
        names += [f"accuracy_length_{length}" for length in self._lengths]
        lows = [1, *(bound + 1 for bound in self._bounds)]
        names += [f"accuracy_distance_{low}_{high}" for low, high in zip(lows, self._bounds, strict=False)]
        sums = torch.cat([self.example_sums, self.question_sums])
        counts = torch.cat([self.example_counts, self.question_counts])
        return {name: sums[i] / counts[i] for i, name in enumerate(names) if counts[i] > 0}


def distance_bounds(longest: int) -> list[int]:
    """Return the largest distance of each bucket, doubling from 4 until sequences of length `longest` fit."""
    bounds = [4]
    while bounds[-1] < longest:
        bounds.append(2 * bounds[-1])
    return bounds


def distances(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the distance in tokens from each question, row by row, back to its key-value pair: int64 (N,).

    The nearest such pair counts. Without any, the distance is the length of the sequence.
    """
    rows, places = (targets != IGNORED).nonzero(as_tuple=True)
    sequences = inputs[rows]
    key, value = inputs[rows, places, None], targets[rows, places, None]
    earlier = torch.arange(inputs.shape[1] - 1, device=inputs.device)
    pairs = (sequences[:, :-1] == key) & (sequences[:, 1:] == value) & (earlier < places[:, None])
    nearest = torch.where(pairs, earlier, places[:, None] - inputs.shape[1]).amax(dim=1)
    return places - nearest
