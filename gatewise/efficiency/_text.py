"""Tables, times and records as text."""

from __future__ import annotations

from collections.abc import Sequence

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def duration(seconds: float) -> str:
    """Format a duration with a suitable unit."""
    unit = next((unit for unit, size in UNITS.items() if seconds >= size), "us")
    return f"{seconds / UNITS[unit]:.3g} {unit}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Format a table with the first column aligned left and the others aligned right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
