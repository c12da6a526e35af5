"""The run's log as one CSV file that goes on where it stopped when the run is resumed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class CsvLog(Logger):
    """One row per logging call: `step`, `epoch`, and what was logged; empty where a call did not log a column.

    Args:
        path: the file.
        from_step: rows of earlier steps stay, later ones are dropped (they are run again); 0 starts anew.
    """

    def __init__(self, path: Path, from_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns = ["step", "epoch"]
        if path.exists() and is_main_process():
            rows, self._columns = _read(path)
            self._write([row for row in rows if int(row["step"]) < from_step])

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": 0 if step is None else step}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        new = [name for name in row if name not in self._columns]
        if new or not self.path.exists():
            rows = _read(self.path)[0] if self.path.exists() else []
            self._columns += new
            self._write([*rows, row])
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The recipe is in the run's folder already."""

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)


def is_main_process() -> bool:
    """Whether this is the process, of several that train together, that writes and prints."""
    return getattr(rank_zero_only, "rank", 0) == 0


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.csv`, each with the columns that it filled."""
    return [{name: float(text) for name, text in row.items() if text} for row in _read(path)[0]]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        # A killed run may leave its last line unfinished.
        rows = [row for row in reader if None not in row.values()]
        return rows, list(reader.fieldnames or ["step", "epoch"])
