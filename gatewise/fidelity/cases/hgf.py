"""Digest records of the HGF reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatewise.fidelity.case import Case, Cases


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return None: no reference network exists, and the digests are worked examples of single layers."""
    return None


CASES: Cases = {"hgf": (reference_case,)}
