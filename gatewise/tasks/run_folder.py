"""Folder of a run. One process at a time uses it, and nothing in it is overwritten unless the user asks.

When several processes train together, only the main one locks the folder and writes into it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from gatewise.catalog.checkpoint import read_checkpoint
from gatewise.errors import UserError
from gatewise.files import lock_folder, parse_yaml, read_text, remove_leftovers
from gatewise.tasks.logs import is_main_process
from gatewise.tasks.reading import load_recipe

_OWN_FILES = ("recipe.yaml", "best.ckpt", "last.ckpt", "metrics.csv", "summary.json", "samples.jsonl", "nan_batch.pt")
# Files that a restart would lose. The others are written again in the first minutes of a run.
_WORTH_KEEPING = ("best.ckpt", "last.ckpt", "summary.json", "nan_batch.pt")


class RunFolder:
    """Context manager that reserves the folder of a run for this process.

    Args:
        path: folder of the run; `prepare` creates it if necessary.
        resume: resume the run in the folder.
        overwrite: replace the run in the folder.

    Attributes:
        checkpoint: content of last.ckpt if the run is resumed; None if it starts from the beginning.

    Raises:
        UserError: if the path is a file, or the folder holds a run that is neither resumed nor replaced, or
            none to resume.
        FolderInUseError: if another process uses it.
        Failure: if it cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool, overwrite: bool) -> None:
        self.path = path
        self.checkpoint: dict[str, Any] | None = None
        self._resume = resume
        self._overwrite = overwrite
        self._held = ExitStack()
        self._locked = False

    def __enter__(self) -> RunFolder:
        with ExitStack() as held:
            if self.path.is_dir():
                self._lock(held)
            if is_main_process():
                self._require_free()
            last = self.path / "last.ckpt"
            if self._resume and last.exists():
                self.checkpoint = read_checkpoint(last)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def prepare(self) -> None:
        """Remove the files of an earlier run in the folder unless it is resumed, and nothing else."""
        if not is_main_process():
            return
        if not self._locked:
            # The folder did not exist on entry.
            self._lock(self._held)
            self._require_free()
        remove_leftovers(self.path)
        if self.checkpoint is None:
            for file in own_files(self.path):
                file.unlink(missing_ok=True)
            remove_if_empty(self.path / "tensorboard")

    def _lock(self, held: ExitStack) -> None:
        if is_main_process():
            held.enter_context(lock_folder(self.path, "run folder"))
            self._locked = True

    def _require_free(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file; name a folder")
        found = [name for name in _OWN_FILES if (self.path / name).exists()]
        stopped_early = bool(found) and not set(found) & set(_WORTH_KEEPING) and _is_resolved(self.path / "recipe.yaml")
        if self._resume and "last.ckpt" not in found:
            if not stopped_early:
                hint = f"; {_ways_out(found)}" if found else "; start the run without --resume"
                raise UserError(f"nothing to resume: there is no {self.path / 'last.ckpt'}{hint}")
            print(
                f"gatewise: {self.path} holds a run that was stopped before its first checkpoint; "
                "it starts from the beginning",
                file=sys.stderr,
            )
        elif found and not (self._resume or self._overwrite or stopped_early):
            raise UserError(f"{self.path} holds a run already ({', '.join(found)}): {_ways_out(found)}")


def own_files(folder: Path) -> Iterator[Path]:
    """Yield the existing files in a folder that a run writes."""
    for name in _OWN_FILES:
        if (folder / name).exists():
            yield folder / name
    yield from folder.glob("nan_batch_rank*.pt")
    events = folder / "tensorboard"
    yield from events.glob("events.out.tfevents.*")
    if (events / "hparams.yaml").exists():
        yield events / "hparams.yaml"


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _ways_out(found: list[str]) -> str:
    ways = ["--resume resumes it"] if "last.ckpt" in found else []
    return ", ".join([*ways, "--overwrite replaces it", "--output NAME starts another"])


def _is_resolved(path: Path) -> bool:
    """Return whether a run wrote the recipe, not a user: every field is filled in and there are no comments."""
    try:
        text = read_text(path, "recipe")
        content = parse_yaml(text, "recipe")
        return content == load_recipe(path).to_dict() and text == yaml.safe_dump(content, sort_keys=False)
    except UserError:
        return False
