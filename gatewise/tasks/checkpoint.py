"""Writing and reading checkpoints: whole or not at all, and never running what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from gatewise.catalog.checkpoint import read_checkpoint
from gatewise.errors import Failure


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that `path` holds either all of it or what it held before, also when the machine goes down.

    Args:
        path: the file; its folder is made if need be.
        write: is given the open temporary file, in the same folder.
    Raises:
        Failure: if it cannot be written (a full disk, no permission); names the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError whose cause is the operating system's word.
        reason = error if isinstance(error, OSError) else _os_error_behind(error)
        if reason is None:
            raise
        kept = "the file that was there before is unharmed" if path.exists() else "nothing was left behind"
        raise Failure(f"cannot write {path}: {reason.strerror or reason}; {kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of writes that were killed."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink()


class AtomicCheckpointIO(CheckpointIO):
    """How Lightning writes and reads checkpoints here: atomically, and with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


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
