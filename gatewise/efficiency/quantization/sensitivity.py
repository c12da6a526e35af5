"""The cost of quantizing each layer, and the choice of layers to keep float.

Each layer is quantized with all others float, which shows how much damage it does. It is also left float with all
others quantized, which shows how much is recovered. The damage is the loss in `evaluate`'s score or in accuracy. If
there is neither, it is the power of the output's error over that of the output. Errors of different layers are nearly
independent, so the powers add up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.efficiency.quantization.prepare import (
    Batches,
    Options,
    Prepared,
    Written,
    images_of,
    onnxruntime_runner,
    pairs_of,
)
from gatewise.ops.quantize import signal_to_noise

Network = Callable[[Tensor], Tensor]
Evaluate = Callable[[Network], float]
"""Function from a network to a score; higher is better."""


@dataclass(frozen=True)
class LayerSensitivity:
    """Sensitivity of one layer.

    Attributes:
        alone_db, alone_loss: output signal-to-noise ratio in dB, and lost score (None if there is no score), with only
            this layer quantized.
        without_db, without_loss: the same with every layer except this one quantized.
    """

    name: str
    alone_db: float
    without_db: float
    alone_loss: float | None = None
    without_loss: float | None = None

    @property
    def damage(self) -> float:
        """Score lost by quantizing only this layer, or else noise power over signal power."""
        return noise_power(self.alone_db) if self.alone_loss is None else self.alone_loss


@dataclass(frozen=True)
class SensitivityReport:
    """All layers, most damaging first, and the network with all of them quantized."""

    layers: tuple[LayerSensitivity, ...]
    all_db: float
    all_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        scored = self.all_loss is not None
        header = ["layer", "alone dB", "all but it dB", *(["lost alone", "lost all but it"] if scored else [])]
        rows = [header]
        for layer in self.layers:
            scores = [f"{layer.alone_loss:.4f}", f"{layer.without_loss:.4f}"] if scored else []
            rows.append([layer.name, f"{layer.alone_db:.1f}", f"{layer.without_db:.1f}", *scores])
        rows.append(["all quantized", f"{self.all_db:.1f}", "", *([f"{self.all_loss:.4f}", ""] if scored else [])])
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join(lines)


class Judge:
    """Measures how far a quantized network's outputs are from the float one's, and what that costs."""

    def __init__(self, batches: Batches, evaluate: Evaluate | None = None) -> None:
        """Store batches, read once per judged network. With labels, accuracy is used unless `evaluate` is given."""
        self._pairs = list(pairs_of(batches))
        labeled = bool(self._pairs) and all(isinstance(labels, Tensor) for _, labels in self._pairs)
        self._evaluate = evaluate if evaluate is not None else (self._accuracy if labeled else None)
        self._expected: Tensor | None = None
        self._score = 0.0

    def set_reference(self, network: Network) -> None:
        """Set the network to compare with."""
        self._expected = self._outputs(network)
        self._score = self._evaluate(network) if self._evaluate is not None else 0.0

    def noise_db(self, network: Network) -> float:
        """Return the signal-to-noise ratio of the outputs in dB."""
        if self._expected is None:
            raise RuntimeError("a judge needs a reference first")
        return signal_to_noise(self._expected, self._outputs(network))

    def score_lost(self, network: Network) -> float | None:
        """Return by how much this network's score is below the reference's; None if there is no score."""
        return None if self._evaluate is None else self._score - self._evaluate(network)

    def loss(self, network: Network) -> float:
        """Return the score lost, or else noise power over signal power."""
        lost = self.score_lost(network)
        return noise_power(self.noise_db(network)) if lost is None else lost

    def _outputs(self, network: Network) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(images) for images, _ in self._pairs])

    def _accuracy(self, network: Network) -> float:
        hits = total = 0
        for images, labels in self._pairs:
            assert labels is not None
            hits += int((network(images).argmax(dim=1) == labels).sum())
            total += len(labels)
        return hits / total


def noise_power(decibels: float) -> float:
    """Convert a signal-to-noise ratio in dB to noise power over signal power."""
    return 10 ** (-decibels / 10)


def sensitivity(
    model: nn.Module, calibration: Batches, evaluate: Evaluate | None = None, **options: Any
) -> SensitivityReport:
    """Return the cost of quantizing each layer. This builds and runs two networks per layer.

    Args:
        calibration: a batch, or batches; if they have labels, accuracy is measured.
        evaluate: function that scores a network (a function of batches), instead of accuracy; higher is better.
        options: fields of `gatewise.efficiency.quantization.prepare.Options`.
    Raises:
        TypeError, ValueError, Failure: as for `gatewise.efficiency.quantize`.
    """
    chosen = Options(**options)
    pairs = [pair for _, pair in zip(range(chosen.max_batches), pairs_of(calibration), strict=False)]
    prepared = Prepared.of(model, images_of(pairs, chosen.max_batches), chosen)
    judge = Judge(pairs, evaluate)
    judge.set_reference(onnxruntime_runner(prepared.float_onnx))
    return examine(prepared, judge)


def examine(prepared: Prepared, judge: Judge, skip: Collection[str] = ()) -> SensitivityReport:
    """Return the report on a prepared network. `judge` must have a reference; layers in `skip` always stay float."""
    layers = [name for name in prepared.layers if name not in skip]
    rows = []
    for name in layers:
        alone = _runner(prepared, prepared.write(skip, only=[name]))
        without = _runner(prepared, prepared.write([*skip, name]))
        rows.append(
            LayerSensitivity(
                name, judge.noise_db(alone), judge.noise_db(without), judge.score_lost(alone), judge.score_lost(without)
            )
        )
    together = _runner(prepared, prepared.write(skip))
    ordered = sorted(rows, key=lambda row: (row.damage, -row.alone_db), reverse=True)
    return SensitivityReport(tuple(ordered), judge.noise_db(together), judge.score_lost(together))


def mixed_precision(report: SensitivityReport, budget: float) -> list[str]:
    """Return the layers to keep float (`skip` of `quantize`) so that the others' total damage is within `budget`.

    The most damaging layers stay float. A sum of damages is an estimate; `quantize(..., max_loss=)` measures.

    Raises:
        ValueError: if the budget is negative.
    """
    if not budget >= 0:
        raise ValueError(f"the budget must be 0 or more, not {budget}")
    skip: list[str] = []
    rest = sum(max(layer.damage, 0.0) for layer in report.layers)
    for layer in report.layers:
        if rest <= budget:
            break
        rest -= max(layer.damage, 0.0)
        skip.append(layer.name)
    return skip


def keep_worst_float(
    prepared: Prepared, judge: Judge, max_loss: float, skip: Iterable[str] = ()
) -> tuple[Written, float]:
    """Return the network with as few float layers as keep the loss within `max_loss`, and its loss.

    The most damaging layers stay float first. Their number is doubled until the loss is met, and then bisected. This
    measures about 2 log2(layers) networks, besides the two per layer that rank the layers.
    """
    judge.set_reference(onnxruntime_runner(prepared.float_onnx))
    start = list(skip)
    written = prepared.write(start)
    loss = judge.loss(_runner(prepared, written))
    if loss <= max_loss:
        return written, loss
    worst = [layer.name for layer in examine(prepared, judge, start).layers]

    def attempt(count: int) -> tuple[Written, float]:
        written = prepared.write([*start, *worst[:count]])
        return written, judge.loss(_runner(prepared, written))

    failing, count = 0, 1
    best = attempt(count)
    while best[1] > max_loss and count < len(worst):
        failing, count = count, min(2 * count, len(worst))
        best = attempt(count)
    while count - failing > 1:
        middle = (failing + count) // 2
        found = attempt(middle)
        if found[1] <= max_loss:
            count, best = middle, found
        else:
            failing = middle
    return best


def _runner(prepared: Prepared, written: Written) -> Network:
    return onnxruntime_runner(written.runnable(prepared.options.weights_only))
