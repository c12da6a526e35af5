"""Reading NumPy archives (.npz). The claims of each header are compared with its member before it is read."""

from __future__ import annotations

import ast
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatewise.errors import UserError
from gatewise.files.regular import require_regular, starts_with
from gatewise.files.zip import each_member

_NUMBERS = frozenset(
    ["bool", "float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
"""Accepted data types, which PyTorch has too. Objects, text and records are not weights."""
_LARGEST_HEADER = 4096
_MOST_AXES = 64


def read_npz(path: str | Path, what: str = "file") -> dict[str, NDArray[Any]]:
    """Return the numeric arrays in an archive by name.

    Raises:
        UserError: if it is damaged, claims wrong sizes, or contains anything but numbers.
    """
    file = require_regular(path, what)
    name = f"{what} {str(path)!r}"
    if starts_with(file, b"\x93NUMPY"):
        raise UserError(f"{name} is a single array (.npy); expected named ones, as numpy.savez writes them")
    arrays: dict[str, NDArray[Any]] = {}
    for member, content in each_member(file, what):
        if not member.endswith(".npy"):
            raise UserError(f"{name} is not an archive of arrays: it holds {member!r}")
        arrays[member.removesuffix(".npy")] = _parse(content, f"the array {member!r} of {name}")
    return arrays


def _parse(content: bytes, name: str) -> NDArray[Any]:
    """Return the array of a member, in the byte order of this machine."""
    header, start = _header(content, name)
    shape, order, kind = header.get("shape"), header.get("fortran_order"), header.get("descr")
    if not isinstance(shape, tuple) or not all(type(number) is int and number >= 0 for number in shape):
        raise UserError(f"{name} has no shape, but {shape!r}")
    if len(shape) > _MOST_AXES or not isinstance(order, bool):
        raise UserError(f"{name} has a header that is not understood")
    if not isinstance(kind, str):
        raise UserError(f"{name} holds records; only numbers are read")
    try:
        dtype = np.dtype(kind)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} has the data type {kind[:50]!r}, which NumPy does not know") from error
    if dtype.name not in _NUMBERS:
        held = {"O": "objects", "U": "text", "S": "text", "V": "records", "M": "dates", "m": "dates"}
        raise UserError(f"{name} holds {held.get(dtype.kind, f'numbers of type {dtype}')}; only numbers are read")
    claimed = prod(shape) * dtype.itemsize
    if claimed != len(content) - start:
        raise UserError(f"{name} claims {claimed:,} bytes of data, and has {len(content) - start:,}")
    stored = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if order else "C")
    return np.array(stored, dtype.newbyteorder("="), order="C")


def _header(content: bytes, name: str) -> tuple[dict[str, Any], int]:
    if content[:6] != b"\x93NUMPY" or len(content) < 12:
        raise UserError(f"{name} is damaged: it does not begin as an array does")
    short = content[6] == 1
    start = 10 if short else 12
    length = struct.unpack("<H" if short else "<I", content[8:start])[0]
    if length > min(_LARGEST_HEADER, len(content) - start):
        raise UserError(f"{name} is damaged: its header claims {length:,} bytes")
    try:
        header = ast.literal_eval(content[start : start + length].decode("latin1").strip())
    # Anything that is not a literal, or is nested too deeply.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(f"{name} is damaged: its header is not a dictionary") from error
    if not isinstance(header, dict):
        raise UserError(f"{name} is damaged: its header is not a dictionary")
    return header, start + length
