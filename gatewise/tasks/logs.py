"""Log of a run as one CSV file, which a resumed run continues."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from gatewise.errors import Failure, UserError
from gatewise.files import read_text, write_text

_LARGEST = 2**32
_FIRST_COLUMNS = ["step", "epoch"]


class CsvLog(Logger):
    """CSV log with one row per logging call: `step`, `epoch` and the logged values. Cells without a value are empty.

    A process that is killed at any moment leaves every row that it had logged. Only the last one may be unfinished.

    Args:
        path: path of the file.
        from_step: step to continue from. Earlier rows stay, later ones are dropped, since their steps run again.
    Raises:
        UserError: if the file exists and is not such a log.
    """

    def __init__(self, path: Path, from_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns = list(_FIRST_COLUMNS)
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
        self._append(row)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the recipe is already in the run folder."""

    def _append(self, row: Mapping[str, Any]) -> None:
        line = _as_text([row], self._columns).encode("utf-8")
        with _named_failure(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                before = os.fstat(descriptor).st_size
                written = os.write(descriptor, line)
                if written < len(line):
                    # A full disk accepts part of a line and reports the error only at the next attempt.
                    os.ftruncate(descriptor, before)
                    raise Failure(
                        f"cannot write {self.path}: it took {written} of {len(line)} bytes; is the disk full?"
                    )
            finally:
                os.close(descriptor)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        header = dict(zip(self._columns, self._columns, strict=True))
        write_text(self.path, _as_text([header, *rows], self._columns))


class TensorBoardLog(TensorBoardLogger):
    """Lightning's TensorBoard logger, with errors that name the folder."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with _named_failure(Path(self.log_dir)):
            super().log_metrics(metrics, step)

    def save(self) -> None:
        with _named_failure(Path(self.log_dir)):
            super().save()

    def finalize(self, status: str) -> None:
        with _named_failure(Path(self.log_dir)):
            super().finalize(status)


def is_main_process() -> bool:
    """Return whether this is the process that writes and prints, of several that train together."""
    return getattr(rank_zero_only, "rank", 0) == 0


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows of a run's `metrics.csv` without empty cells and without an unfinished last row.

    Raises:
        UserError: if the file cannot be read or is not such a log.
    """
    return [{name: float(text) for name, text in row.items() if text} for row in _read(path)[0]]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    text = read_text(path, "log", _LARGEST)
    # A killed run may leave its last line unfinished.
    finished = text[: text.rfind("\n") + 1]
    try:
        lines = [line for line in csv.reader(io.StringIO(finished, newline=""), strict=True) if line]
    except csv.Error as error:
        raise UserError(f"log {str(path)!r} is damaged: {error}") from error
    columns = lines[0] if lines else list(_FIRST_COLUMNS)
    if "step" not in columns or len(set(columns)) < len(columns):
        raise UserError(
            f"log {str(path)!r} is damaged: expected different columns with step, not {','.join(columns)!r}"
        )
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(columns):
            raise UserError(
                f"log {str(path)!r} is damaged in its row {number}: expected {len(columns)} cells, not {len(cells)}"
            )
        row = dict(zip(columns, cells, strict=True))
        _require_numbers(row, f"log {str(path)!r} is damaged in its row {number}")
        rows.append(row)
    return rows, columns


def _require_numbers(row: Mapping[str, str], what: str) -> None:
    if not (row["step"].isascii() and row["step"].isdigit() and len(row["step"]) < 20):
        raise UserError(f"{what}: step must be a whole number, not {row['step']!r}")
    for name, cell in row.items():
        try:
            float(cell or 0)
        except ValueError as error:
            raise UserError(f"{what}: {name} must be a number, not {cell!r}") from error


def _as_text(rows: list[Mapping[str, Any]], columns: list[str]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue()


@contextmanager
def _named_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        # Lightning turns every error of TensorBoard into a ValueError.
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        raise Failure(f"cannot write {path}: {reason.strerror or reason}") from error
