"""Read digest records from files, and check them field by field before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from gatewise.errors import UserError
from gatewise.fidelity.fingerprint import SAMPLES
from gatewise.files import read_json


class RecordError(UserError):
    """A digest record that cannot be used; the message names the file and the field."""


LARGEST = 2 * 2**30
"""Most bytes that a record's parameters, or its inputs, may take."""
_MOST_AXES = 16
_KINDS = ("normal", "uniform", "int")


def read_record(path: str | Path) -> dict[str, Any]:
    """Return a digest record.

    Raises:
        UserError: if the file is missing, or is not a JSON object with a text field `system`.
    """
    record = read_json(path, "digest record", allow_nonfinite=True)
    if not isinstance(record, dict) or not isinstance(record.get("system"), str):
        raise UserError(f"{path} is not a digest record: expected an object with a text field 'system'")
    for name, kind in {"variant": str, "mode": str, "config": dict, "params": int, "grads_of": str}.items():
        if name in record and type(record[name]) is not kind:
            raise _wrong(path, name, {str: "a text", dict: "an object", int: "an integer"}[kind], record[name])
    return record


def check_run(path: str, record: Mapping[str, Any]) -> None:
    """Reject the record of a run whose parameters or inputs are malformed or too large.

    Raises:
        UserError: if so. The message names the file and the field.
    """
    claimed = 0
    for key, shape in _object(path, record, "keys").items():
        claimed += 4 * _elements(path, f"keys.{key}", shape)
    _require_small(path, "keys", claimed)
    claimed = 0
    for name, spec in _object(path, record, "inputs").items():
        where = f"inputs.{name}"
        if not isinstance(spec, dict) or not set(spec) <= {"name", "shape", "kind", "high", "then"}:
            raise _wrong(path, where, "an object with name, shape and kind", spec)
        if not isinstance(spec.get("name"), str):
            raise _wrong(path, f"{where}.name", "a text", spec.get("name"))
        if spec.get("kind", "normal") not in _KINDS:
            raise _wrong(path, f"{where}.kind", " or ".join(map(repr, _KINDS)), spec["kind"])
        high = spec.get("high", 0)
        if type(high) is not int or high < (spec.get("kind") == "int"):
            raise _wrong(path, f"{where}.high", "a positive integer", high)
        # NumPy draws 64-bit numbers.
        claimed += 8 * _elements(path, f"{where}.shape", spec.get("shape"))
    _require_small(path, "inputs", claimed)


def check_digests(path: str, record: Mapping[str, Any]) -> None:
    """Reject a record whose outputs, taps or gradients are not digests.

    Raises:
        UserError: if so. The message names the file and the field.
    """
    for section in ("outputs", "taps", "grads"):
        for name, digest in _object(path, record, section).items():
            # Gradients that the reference does not have are described in words.
            if section == "grads" and not isinstance(digest, dict):
                continue
            _check_digest(path, f"{section}.{name}", digest)


def _check_digest(path: str, where: str, digest: Any) -> None:
    if not isinstance(digest, dict):
        raise _wrong(path, where, "an object with shape, mean, std and sample", digest)
    elements = _elements(path, f"{where}.shape", digest.get("shape"))
    for name in ("mean", "std"):
        if not _is_number(digest.get(name)):
            raise _wrong(path, f"{where}.{name}", "a number", digest.get(name))
    sample, expected = digest.get("sample"), min(SAMPLES, elements)
    if not isinstance(sample, list) or len(sample) != expected or not all(map(_is_number, sample)):
        raise _wrong(path, f"{where}.sample", f"{expected} numbers", sample)


def _object(path: str, record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name, {})
    if not isinstance(value, dict):
        raise _wrong(path, name, "an object", value)
    return value


def _elements(path: str, where: str, shape: Any) -> int:
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_AXES
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise _wrong(path, where, "a list of sizes", shape)
    return prod(shape)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _require_small(path: str, name: str, claimed: int) -> None:
    if claimed > LARGEST:
        raise RecordError(
            f"{path} is refused: its {name} would take {claimed:,} bytes; at most {LARGEST:,} are accepted"
        )


def _wrong(path: str | Path, where: str, expected: str, came: Any) -> RecordError:
    shown = f"{len(came)} values" if isinstance(came, list | dict) else repr(came)[:80]
    return RecordError(f"{path} is refused: its {where} must be {expected}, not {shown}")
