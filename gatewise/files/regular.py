"""Opening files that must be regular and not larger than expected.

Opening a FIFO or a device may block, and reading it may never end.
"""

from __future__ import annotations

import stat
from pathlib import Path

from gatewise.errors import UserError

LARGEST_TEXT = 64 * 2**20
"""Largest accepted text file (JSON, YAML, CSV) in bytes."""


def require_regular(path: str | Path, what: str = "file") -> Path:
    """Return the path if it leads to a regular file.

    Args:
        path: path of the file; `~` is the home folder.
        what: role of the file in error messages, such as "recipe".
    Raises:
        UserError: if there is no such file, or it is a folder, a FIFO or a device.
    """
    try:
        path = Path(path).expanduser()
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(f"no {what} at {str(path)!r}") from error
    # A name with byte 0, a name that is too long, a missing home, a folder without permission.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{what} {str(path)!r} cannot be opened: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UserError(f"{what} {str(path)!r} cannot be read: it is {kind}")
    return path


def starts_with(path: str | Path, start: bytes, what: str = "file") -> bool:
    """Return whether a regular file begins with these bytes.

    Raises:
        UserError: if it cannot be opened.
    """
    path = require_regular(path, what)
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError as error:
        raise UserError(f"{what} {str(path)!r} cannot be opened: {error.strerror or error}") from error


def read_bytes(path: str | Path, what: str = "file", largest: int = LARGEST_TEXT) -> bytes:
    """Return the content of a regular file.

    Args:
        path: path of the file.
        what: role of the file in error messages.
        largest: largest accepted size in bytes.
    Raises:
        UserError: if it cannot be read or is larger than `largest`.
    """
    path = require_regular(path, what)
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise UserError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from error
    if len(content) > largest:
        raise UserError(f"{what} {str(path)!r} is too large: more than {largest:,} bytes")
    return content


def read_text(path: str | Path, what: str = "file", largest: int = LARGEST_TEXT) -> str:
    """Return the text of a regular UTF-8 file.

    Raises:
        UserError: if it cannot be read, is larger than `largest` bytes, or is not UTF-8.
    """
    content = read_bytes(path, what, largest)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {str(path)!r} is not UTF-8 text (byte {error.start})") from error
