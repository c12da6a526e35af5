"""Reading safetensors files: a JSON header, then the bytes of the tensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gatewise.errors import UserError
from gatewise.files.json import parse_json
from gatewise.files.regular import require_regular

_LARGEST_HEADER = 100 * 2**20


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins with a header of a plausible size."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length + 8 <= path.stat().st_size


def read_safetensors(path: str | Path, what: str = "file") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, on the CPU.

    Raises:
        UserError: if it is damaged, or a tensor has no name or the name of another.
    """
    file = require_regular(path, what)
    name = f"{what} {str(path)!r}"
    try:
        _require_distinct_names(file, name)
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{name} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"{name} cannot be opened: {error.strerror or error}") from error
    # A data type that is unknown to this version.
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} cannot be loaded by safetensors: {type(error).__name__}: {error}") from error
    if "" in tensors:
        raise UserError(f"{name} is damaged: one of its tensors has no name")
    return tensors


def _require_distinct_names(file: Path, name: str) -> None:
    """Reject a header with a repeated name, because safetensors would keep only one of the tensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(_LARGEST_HEADER, file.stat().st_size):
            raise UserError(f"{name} is damaged: its header claims {length:,} bytes")
        header = opened.read(length)
    parse_json(header, f"the header of {name}", distinct_names=True)
