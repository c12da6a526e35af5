"""Results of a sweep: its cells, their outcomes and the best ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatewise.tasks.recipe import Recipe
from gatewise.tasks.sweep_engines import Outcome

LEARNING_RATE = "optim.lr"
SEED = "seed"


@dataclass(frozen=True)
class Cell:
    """One point of the grid: its value on each axis and the resulting recipe."""

    name: str
    values: Mapping[str, Any]
    recipe: Recipe = field(repr=False)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.recipe.output)

    @property
    def content(self) -> dict[str, Any]:
        """Recipe as plain data."""
        return self.recipe.to_dict()


@dataclass(frozen=True)
class Row:
    """Cell and its outcome."""

    cell: Cell
    outcome: Outcome


@dataclass(frozen=True)
class Best:
    """Best result over learning rates and seeds, for fixed values on all other axes.

    The maximum over a grid favors large grids, so the mean over seeds at the best learning rate is given too.

    Attributes:
        values: values on the axes other than learning rate and seed.
        best: best score of any cell.
        lr: learning rate with the best mean score over seeds; None if it is not an axis.
        mean: mean score over seeds at that learning rate.
        spread: standard deviation over seeds at that learning rate; None for one seed.
        seeds: number of seeds at that learning rate.
    """

    values: Mapping[str, Any]
    best: float
    lr: Any
    mean: float
    spread: float | None
    seeds: int
    parameters: int | None
    state_bytes: int | None


@dataclass(frozen=True)
class Sweep:
    """Completed sweep.

    Attributes:
        score: name of the metric by which cells are compared.
        lower_is_better: whether the lowest score is best.
    """

    folder: Path
    axes: Mapping[str, Sequence[Any]]
    rows: Sequence[Row]
    score: str
    lower_is_better: bool

    @property
    def failed(self) -> list[Row]:
        """Rows of the cells that failed."""
        return [row for row in self.rows if row.outcome.status == "failed"]

    def best(self) -> list[Best]:
        """Return the best result over rates and seeds for each point of the other axes with a finished cell."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        others = [axis for axis in self.axes if axis not in (LEARNING_RATE, SEED)]
        for row in self.rows:
            if self.score in row.outcome.metrics:
                groups.setdefault(tuple(repr(row.cell.values[axis]) for axis in others), []).append(row)
        return [self._best_of({axis: rows[0].cell.values[axis] for axis in others}, rows) for rows in groups.values()]

    def _best_of(self, values: Mapping[str, Any], rows: Sequence[Row]) -> Best:
        import statistics

        choose = min if self.lower_is_better else max
        scores: dict[Any, list[float]] = {}
        for row in rows:
            scores.setdefault(row.cell.values.get(LEARNING_RATE), []).append(row.outcome.metrics[self.score])
        lr = choose(scores, key=lambda rate: statistics.fmean(scores[rate]))
        return Best(
            values=values,
            best=choose(score for found in scores.values() for score in found),
            lr=lr,
            mean=statistics.fmean(scores[lr]),
            spread=statistics.stdev(scores[lr]) if len(scores[lr]) > 1 else None,
            seeds=len(scores[lr]),
            parameters=rows[0].outcome.parameters,
            state_bytes=rows[0].outcome.state_bytes,
        )
