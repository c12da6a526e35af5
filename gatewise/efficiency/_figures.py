"""Write figures and tables to files that are either complete or absent."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.files import write_atomically, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format given by the file's suffix, or as png if there is none.

    Raises:
        ValueError: if matplotlib does not know the format.
        Failure: if the file cannot be written.
    """
    path = Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150))


def save_table(rows: Iterable[Sequence[Any]], path: str | Path) -> None:
    """Write rows as CSV.

    Raises:
        Failure: if the file cannot be written.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())
