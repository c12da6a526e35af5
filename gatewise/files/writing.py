"""Atomic writes: a path holds either all of the new content or the old content.

A write goes to a temporary file in the same folder, is flushed to disk, and is renamed. The temporary file is locked
while its process lives. Leftovers of a killed process are removed by the next write to the same path, or by
`remove_leftovers`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from gatewise.errors import Failure

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows, where leftovers stay)
    fcntl = None  # type: ignore[assignment]

_MARK = "gatewise"
_TEMPORARY = re.compile(rf"\.(?P<target>.+)\.{_MARK}-[0-9a-f]{{16}}\.tmp", re.DOTALL)
_LONGEST_NAME = 255


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that `path` holds either all of the new content or the old one, even after a crash.

    Args:
        path: path of the file; its folder is created if necessary.
        write: function that writes to the open temporary file, which is seekable.
    Raises:
        Failure: if it cannot be written (full disk, no permission). The message names the path.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        temporary, descriptor = _locked_file(path)
        with os.fdopen(descriptor, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            # The file is locked while it is open, so that no process takes it for a leftover.
            os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except Failure:
        # From a nested write, which has named its own path.
        raise
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError caused by the OSError.
        reason = error if isinstance(error, OSError) else _os_error_behind(error)
        if reason is None:
            raise
        kept = "the file that was there before is unharmed" if path.exists() else "nothing was left behind"
        raise Failure(f"cannot write {path}: {reason.strerror or reason}; {kept}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON as `write_atomically` does.

    Raises:
        ValueError: if `content` contains NaN or infinity, which JSON does not support.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Provide a temporary folder beside `target`, and rename it to `target` when the block ends without an error.

    If another process was faster, the target stays that process's folder.

    Raises:
        Failure: if it cannot be written. The message names the target.
    """
    try:
        with temporary_folder(target) as folder:
            yield folder
            for file in folder.rglob("*"):
                if file.is_file():
                    _sync_file(file)
            try:
                os.rename(folder, target)
            except OSError:
                if not target.is_dir():
                    raise
            _sync_folder(target.parent)
    except OSError as error:
        raise Failure(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Provide a locked folder beside `target`, named after it and removed when the block ends if it still exists."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    folder, descriptor = _locked_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete leftovers of dead processes in a folder. Temporary files of other programs are kept.

    Args:
        folder: folder to clean, without its sub-folders.
        name: name of the file or folder whose leftovers to delete; None: all.
    """
    if fcntl is None or not folder.is_dir():
        return
    for entry in os.scandir(folder):
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None or (name is not None and found["target"] != _target_in_name(name)):
            continue
        _remove_if_dead(Path(entry.path))


def _remove_if_dead(temporary: Path) -> None:
    # Its own process may rename or remove it at any moment.
    with suppress(FileNotFoundError, PermissionError):
        if temporary.is_symlink() or not (temporary.is_file() or temporary.is_dir()):
            return
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            if _lock(descriptor) is not True:
                return
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink()
        finally:
            os.close(descriptor)


def _locked_file(target: Path) -> tuple[Path, int]:
    while True:
        temporary = _temporary_name(target)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        # Between opening and locking, another process may have taken the file for a leftover.
        if _lock(descriptor) is not False and temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    while True:
        folder = _temporary_name(target)
        folder.mkdir()
        if fcntl is None:
            return folder, None
        descriptor = os.open(folder, os.O_RDONLY)
        if _lock(descriptor) is not False and folder.exists():
            return folder, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Return whether this process now holds the lock, or None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{_target_in_name(target.name)}.{_MARK}-{secrets.token_hex(8)}.tmp")


def _target_in_name(name: str) -> str:
    """Shorten a long name to leave room for the rest."""
    room = _LONGEST_NAME - len(f"..{_MARK}-.tmp") - 16
    return os.fsdecode(os.fsencode(name)[:room])


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error_behind(error: BaseException) -> OSError | None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause
