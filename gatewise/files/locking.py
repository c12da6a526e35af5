"""Locks on folders: one process at a time writes into a run, a sweep or a cache."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gatewise.errors import Failure, UserError

LOCK_NAME = ".gatewise.lock"
OWNER_NAME = ".gatewise.owner"

PATIENCE_S = 10.0
"""Seconds to wait for a lock. The data-loading processes of a killed run notice its death after 5 s."""


class FolderInUseError(UserError):
    """Another process uses the folder. The message names it."""


@contextmanager
def lock_folder(folder: Path, what: str = "folder", patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the folder's lock within the block. The operating system releases it when the process dies.

    Args:
        folder: folder to lock; it is created if necessary.
        what: the folder's role in error messages, such as "run folder".
        patience_s: seconds to wait for another process before giving up.
    Raises:
        FolderInUseError: if another process holds the lock.
        Failure: if the folder cannot be written.
    """
    lock = _acquire(folder, what, patience_s)
    owner = folder / OWNER_NAME
    try:
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _acquire(folder: Path, what: str, patience_s: float) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_NAME)
        deadline = time.monotonic() + patience_s
        told = False
        while True:
            try:
                lock.acquire(timeout=min(0.5, patience_s), poll_interval=0.05)
                return lock
            except Timeout:
                if time.monotonic() >= deadline:
                    raise FolderInUseError(
                        f"the {what} {folder} is in use by {_owner(folder)}; wait for it, or choose another folder"
                    ) from None
                if not told:
                    print(f"gatewise: waiting for {_owner(folder)}, which uses {folder}", file=sys.stderr)
                    told = True
    except FileExistsError as error:
        raise UserError(f"{folder} is a file, not a folder") from error
    except OSError as error:
        raise Failure(f"cannot write the {what} {folder}: {error.strerror or error}") from error


def _owner(folder: Path) -> str:
    # Only for the message, because the file may be gone or half written at this moment.
    try:
        about = json.loads((folder / OWNER_NAME).read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
