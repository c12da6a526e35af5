"""Documents from files: each text file is a document, and each row of a Parquet file."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from gatewise.data.module import optional_module
from gatewise.errors import UserError
from gatewise.files import read_bytes, require_regular

PARQUET = ".parquet"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py")
"""Suffixes of text files in a folder if no pattern is given."""

LARGEST_DOCUMENT = 2**31
"""Largest accepted text file, which is one document, in bytes."""

_ROWS = 1024
_NOT_THE_LIBRARY = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


def standard_library() -> Path:
    """Return the folder of Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(root: Path, patterns: Sequence[str] = (), skipped: Collection[str] = ()) -> list[Path]:
    """Return the files in a folder, sorted by name, without hidden ones.

    Args:
        root: folder, or a single file.
        patterns: shell-style patterns of paths within the folder ("train/*.parquet"), where `*` also matches `/`;
            empty: every file with a known suffix.
        skipped: names of folders to skip.
    Raises:
        UserError: if there is no such folder, or no such file in it.
    """
    # Not the methods of `Path`, which raise if a name is too long.
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        raise UserError(f"no folder of text at {str(root)!r}")
    wanted = patterns or [f"*{suffix}" for suffix in (*TEXT_SUFFIXES, PARQUET)]
    found = []
    for folder, inner, names in os.walk(root, onerror=_unreadable_folder):
        # Folders that are removed from the list are not visited.
        inner[:] = [name for name in inner if not name.startswith(".") and name not in skipped]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [
            path for path in paths if _is_like(path.relative_to(root).as_posix(), wanted) and os.path.isfile(path)
        ]
    if not found:
        raise UserError(f"{root} holds no file like {' or '.join(wanted)}")
    return sorted(found)


def standard_library_files(root: Path) -> list[Path]:
    """Return the sources of the standard library, without its tests and installed packages."""
    return find_files(root, ["*.py"], _NOT_THE_LIBRARY)


def documents(path: Path, text_column: str) -> Iterator[str]:
    """Yield the non-empty documents of a file.

    Raises:
        UserError: if it cannot be read, is not text, or has no text column.
    """
    texts = _rows(path, text_column) if path.suffix == PARQUET else iter([_whole(path)])
    return (text for text in texts if text and not text.isspace())


def _unreadable_folder(error: OSError) -> NoReturn:
    # By default, an unreadable folder would be skipped silently.
    raise UserError(f"folder {error.filename} cannot be read: {error.strerror}") from error


def _is_like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _whole(path: Path) -> str:
    size = _size(path)
    if size > LARGEST_DOCUMENT:
        raise UserError(
            f"{path} is too large: {size:,} bytes in one document, and at most {LARGEST_DOCUMENT:,} are read; split it"
        )
    content = read_bytes(path, "text file", size)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it or leave it out") from error
    if "\0" in text:
        raise UserError(f"{path} is not text: it contains byte 0 (at {text.index(chr(0))}); leave it out")
    return text


def _size(path: Path) -> int:
    try:
        return require_regular(path, "text file").stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _rows(path: Path, text_column: str) -> Iterator[str]:
    parquet = optional_module("pyarrow.parquet")
    require_regular(path, "shard")
    with _reading(path):
        file = parquet.ParquetFile(path, page_checksum_verification=True)
    with closing(file):
        with _reading(path):
            schema = file.schema_arrow
            names = schema.names
        _require_text(path, schema, names, text_column)
        with _reading(path):
            batches = file.iter_batches(batch_size=_ROWS, columns=[text_column])
        while True:
            with _reading(path):
                batch = next(batches, None)
                texts = [] if batch is None else batch.column(0).to_pylist()
            if batch is None:
                return
            yield from (text for text in texts if text is not None)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    # Damage raises ArrowInvalid, OSError, UnicodeDecodeError, NotImplementedError, MemoryError and others. Only pyarrow
    # runs in this block.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"shard {path} cannot be read ({reason}); replace it or leave it out") from error


def _require_text(path: Path, schema: Any, names: Sequence[str], column: str) -> None:
    if names.count(column) > 1:
        raise UserError(f"shard {path} has several columns {column!r}; name another as text_column")
    if column not in names:
        raise UserError(f"shard {path} has no column {column!r}, only {', '.join(names)}; set text_column")
    kind = str(schema.field(column).type)
    if kind not in ("string", "large_string", "string_view"):
        raise UserError(f"column {column!r} of shard {path} holds {kind}, not text; set text_column")
