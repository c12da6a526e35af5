"""Functions that turn a reference's digest record into one of our networks, one file per paper.

A file here is named after a paper's id and ends with `CASES`: the systems that digest records name, each with the
functions that read its records. Every file in this folder is found automatically.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from gatewise.fidelity.case import Case

_PAPERS = {"inceptionnext": "inception_next"}
"""Papers of the systems that are named differently from their paper."""


def find_case(record: Mapping[str, Any]) -> Case | None:
    """Return our module for a digest record, built but not yet filled; None if no paper reads the record."""
    system = str(record["system"])
    paper = _PAPERS.get(system, system.replace("-", "_"))
    if paper.startswith("_") or paper not in {module.name for module in iter_modules(__path__)}:
        return None
    readers = import_module(f"{__name__}.{paper}").CASES.get(system, ())
    return next((case for case in (read(record) for read in readers) if case is not None), None)
