"""Networks trained side by side for several seeds, and their test accuracies compared within seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from torch import nn

from gatewise.claims.lab.intervals import Interval, t_interval
from gatewise.claims.lab.plot import Bars
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Schedule, Task, build, train_side_by_side

Network = TypeVar("Network", bound=nn.Module, contravariant=True)


class TestedTask(Task[Network], Protocol[Network]):
    """A task with a test set."""

    def percent_right(self, model: Network) -> float:
        """Of all test samples."""
        ...


class Comparison:
    """Test accuracies in percent after equal training, one per seed for each network."""

    def __init__(self, accuracy: Mapping[str, list[float]]) -> None:
        self.accuracy = accuracy
        self.intervals = {name: t_interval(values) for name, values in accuracy.items()}

    def gap(self, better: str, worse: str) -> Interval:
        """How many points the first is ahead, taken within a seed."""
        return t_interval([a - b for a, b in zip(self.accuracy[better], self.accuracy[worse], strict=True)])

    def chart(self, title: str, label: str, x_range: tuple[float, float] | None = None) -> Bars:
        """A bar for each network, with its interval and its seeds."""
        bars = {name: (one.value, one.low, one.high) for name, one in self.intervals.items()}
        return Bars(title, label, bars, points=self.accuracy, x_range=x_range)


def compare_accuracy(
    run: Run, makes: Mapping[str, Callable[[], nn.Module]], task: TestedTask[nn.Module], schedule: Schedule, seeds: int
) -> Comparison:
    """Train a fresh network of each kind on the same batches, for each seed, and test it."""

    def once(seed: int) -> dict[str, float]:
        networks = {name: build(seed, make) for name, make in makes.items()}
        train_side_by_side(networks, task, schedule, seed=seed, run=run)
        return {name: task.percent_right(network) for name, network in networks.items()}

    found = run.repeat(seeds, once)
    return Comparison({name: [one[name] for one in found] for name in makes})
