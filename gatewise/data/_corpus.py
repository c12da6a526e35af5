"""Documents from files: a text file is one document, a row of a Parquet file another."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gatewise.data._module import optional_module
from gatewise.errors import UserError

PARQUET = ".parquet"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py")
"""What counts as text in a folder unless a pattern says what does."""

_ROWS = 1024
_NOT_THE_LIBRARY = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


def standard_library() -> Path:
    """The folder of Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(root: Path, patterns: Sequence[str] = (), skipped: Collection[str] = ()) -> list[Path]:
    """Files of a folder, in the order of their names; hidden ones are left out.

    Args:
        root: the folder; a file stands for itself.
        patterns: shell-style, for paths within the folder ("train/*.parquet"); every file with a known suffix if none
            is given. `*` goes across folders.
        skipped: names of folders that are not looked into.
    Raises:
        UserError: if there is no such folder, or no such file in it.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"no folder of text at {str(root)!r}")
    wanted = patterns or [f"*{suffix}" for suffix in (*TEXT_SUFFIXES, PARQUET)]
    found = []
    for folder, inner, names in os.walk(root):
        # What is taken out of the list is not walked into.
        inner[:] = [name for name in inner if not name.startswith(".") and name not in skipped]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if _is_like(path.relative_to(root).as_posix(), wanted) and path.is_file()]
    if not found:
        raise UserError(f"{root} holds no file like {' or '.join(wanted)}")
    return sorted(found)


def standard_library_files(root: Path) -> list[Path]:
    """The sources of the standard library, without its tests and what is installed beside it."""
    return find_files(root, ["*.py"], _NOT_THE_LIBRARY)


def documents(path: Path, text_column: str) -> Iterator[str]:
    """The documents of a file that are not empty.

    Raises:
        UserError: if it cannot be read, is no text, or has no column of texts.
    """
    texts = _rows(path, text_column) if path.suffix == PARQUET else iter([_whole(path)])
    return (text for text in texts if text and not text.isspace())


def _is_like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _whole(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it or leave it out") from error
    if "\0" in text:
        raise UserError(f"{path} is no text: it holds byte 0 (at {text.index(chr(0))}); leave it out")
    return text


def _rows(path: Path, text_column: str) -> Iterator[str]:
    parquet = optional_module("pyarrow.parquet")
    arrow = optional_module("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            _require_text(path, file.schema_arrow, text_column)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[text_column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (arrow.ArrowException, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"shard {path} cannot be read ({reason}); replace it or leave it out") from error


def _require_text(path: Path, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise UserError(f"shard {path} has no column {column!r}, only {', '.join(schema.names)}; set text_column")
    kind = str(schema.field(column).type)
    if kind not in ("string", "large_string", "string_view"):
        raise UserError(f"column {column!r} of shard {path} holds {kind}, not text; set text_column")
