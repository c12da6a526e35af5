"""Results of a benchmark with date, machine and versions: `benchmarks/results/NAME.json` and `NAME.md`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gatewise.efficiency.timing.hardware import processor_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "onnx", "gatewise")


@dataclass(frozen=True)
class Table:
    """A titled table of texts, as Markdown shows it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", _row(self.header), _row(["---"] * len(self.header))]
        return "\n".join([*lines, *(_row(row) for row in self.rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def environment() -> dict[str, Any]:
    """Date, processor, threads and versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def write_results(name: str, headline: str, tables: Sequence[Table], data: dict[str, Any]) -> None:
    """Write both files; `data` must be plain."""
    RESULTS.mkdir(exist_ok=True)
    where = environment()
    record = {"environment": where, **data}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    versions = ", ".join(f"{package} {number}" for package, number in where["versions"].items())
    text = [
        f"# {name}",
        "",
        f"{where['date']}; {where['processor']} ({where['instructions']}), {where['cores']} cores, "
        f"{where['threads']} threads, load average {where['load'][0]}; Python {where['python']}, {versions}.",
        "",
        headline,
        "",
        "\n\n".join(table.markdown() for table in tables),
        "",
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
