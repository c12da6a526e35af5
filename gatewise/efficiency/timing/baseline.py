"""Store measurements, and judge later ones against them with regard to noise.

A machine is not equally fast on two days: it is shared, warm, or busy. So a fixed piece of work, a matrix product, is
interleaved with every network, and the comparison uses each network's time relative to that of the product in the same
round. The verdict comes from a bootstrap over the rounds of both days.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from gatewise.efficiency._fields import SMALLEST, read_fields
from gatewise.efficiency.timing.compare import Measured
from gatewise.efficiency.timing.hardware import processor_name
from gatewise.errors import UserError
from gatewise.files import read_json, write_json

FORMAT = 1
LEAST = 0.02
"""Changes below 2 % yield no verdict, however significant: a different memory layout alone causes as much."""

Verdict = Literal["faster", "slower", "no difference seen"]


@dataclass(frozen=True)
class Change:
    """A measurement against its baseline: the speedup, its 95 % confidence interval, and the verdict."""

    row: Measured
    ratio: float
    low: float
    high: float
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.low:.2f}-{self.high:.2f}): {self.verdict}"


def save_baseline(rows: Sequence[Measured], path: str | Path) -> None:
    """Write rows with their rounds, the machine and the versions as JSON."""
    # Bounds that were not measured are NaN, which JSON does not have.
    content = [{key: value for key, value in asdict(row).items() if value == value} for row in rows]
    record = {"format": FORMAT, "machine": _machine(), "rows": content}
    write_json(path, record)


def against_baseline(rows: Sequence[Measured], path: str | Path) -> list[Change | None]:
    """Compare each row with the baseline's row of the same network, form, batch size, threads and dtype, if any.

    Raises:
        UserError: if the file is not a baseline, is damaged, or comes from another machine, whose times cannot be
            compared.
    """
    record = _read(Path(path))
    if record["machine"] != _machine():
        raise UserError(f"{path} was measured on {record['machine']}, not on this machine, {_machine()}")
    names = {field.name for field in fields(Measured)}
    earlier = {}
    for position, content in enumerate(record["rows"]):
        what = f"row {position} of {path}"
        # Ignore fields from other versions.
        known = {key: value for key, value in content.items() if key in names} if isinstance(content, dict) else content
        row = read_fields(Measured, known, what, {"over_reference": (SMALLEST, 1e300)})
        if not row.over_reference:
            raise UserError(f"{what} holds no rounds to compare with")
        earlier[row.key] = row
    return [_change(row, earlier[row.key]) if row.key in earlier else None for row in rows]


def _change(now: Measured, then: Measured) -> Change:
    import numpy as np

    before, after = np.asarray(then.over_reference), np.asarray(now.over_reference)
    draw = np.random.default_rng(0)
    medians = [
        np.median(sample[draw.integers(len(sample), size=(2000, len(sample)))], axis=1) for sample in (before, after)
    ]
    low, high = (float(bound) for bound in np.quantile(medians[0] / medians[1], (0.025, 0.975)))
    ratio = statistics.median(then.over_reference) / statistics.median(now.over_reference)
    return Change(now, ratio, low, high, _verdict(low, high))


def _verdict(low: float, high: float) -> Verdict:
    if low > 1 + LEAST:
        return "faster"
    return "slower" if high < 1 - LEAST else "no difference seen"


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{processor_name()}, {torch.cuda.get_device_name()}"
    return processor_name()


def _read(path: Path) -> dict:
    if not path.exists():
        raise UserError(f"there is no baseline {path}: measure with --save-baseline first")
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{path} is not a baseline: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is not a baseline of format {FORMAT}")
    if not isinstance(record.get("rows"), list) or not isinstance(record.get("machine"), str):
        raise UserError(f"{path} is not a baseline: it must name the machine and list rows")
    return record
