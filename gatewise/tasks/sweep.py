"""Sweeps: a recipe at every point of a grid.

    runs/sweep-mqar/
        cells/model.dim=64,optim.lr=0.001/     run folder of each cell, as from `gatewise train`, and its cell.json
        results.csv, results.json              a row per cell; the JSON also has the best results
        figure.png                             score over the first numeric axis, a line per kind of network

A sweep that is started again does what is missing: it skips finished cells, resumes interrupted ones and retries
failed ones.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

from gatewise.errors import UserError
from gatewise.files import lock_folder, parse_yaml, remove_leftovers
from gatewise.files.locking import LOCK_NAME
from gatewise.tasks.reading import load_recipe
from gatewise.tasks.run_folder import own_files, remove_if_empty
from gatewise.tasks.schema import task_class
from gatewise.tasks.sweep_engines import CELL_FILE, LOG_FILE, Outcome, read_outcome, run_locally, run_with_ray
from gatewise.tasks.sweep_outcome import Cell, Row, Sweep
from gatewise.tasks.sweep_report import write_results
from gatewise.tasks.training import build_data, flat

_LONGEST_NAME = 150
# Fields that change where and how a cell is run, not its result.
_FREE = {"output", "trainer.progress", "trainer.accelerator", "trainer.devices", "data.num_workers", "data.cache_dir"}


def sweep(
    recipe: str | Path,
    axes: Mapping[str, Sequence[Any]],
    *,
    fields: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    engine: Literal["local", "ray"] = "local",
    jobs: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], object] = print,
) -> Sweep:
    """Train a recipe at every point of a grid.

    Args:
        recipe: name or path of a recipe.
        axes: values by dotted field name, such as {"model.dim": [64, 128], "optim.lr": [1e-4, 1e-3]}.
        fields: other recipe fields to override, the same in all cells.
        output: folder of the sweep; None: runs/sweep-NAME for a recipe NAME.yaml.
        engine: processes on this machine, or Ray.
        jobs: number of cells to run at once; None: one per accelerator, or per core without one (Ray: as many
            as fit).
        overwrite: discard an earlier sweep in the same folder, removing only what its cells wrote.
        say: function that is called with a line of text for each finished cell.
    Returns:
        The results of all cells, including failed ones and those of earlier attempts.
    Raises:
        UserError: for a mistake in the recipe or an axis, before any cell starts, or if the folder holds cells of
            another recipe or a damaged cell.
        FolderInUseError: if another process runs this sweep.
        Interrupted: after a signal. The same call resumes the sweep.
    """
    folder = Path(output) if output is not None else Path("runs") / f"sweep-{Path(recipe).stem}"
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs must be at least 1, not {jobs}")
    cells = grid(recipe, axes, fields or {}, folder)
    task = task_class(cells[0].recipe.task.name)
    with lock_folder(folder, "sweep folder"):
        remove_leftovers(folder)
        if overwrite:
            _forget(folder / "cells", say)
        outcomes = {cell.name: outcome for cell in cells if (outcome := _finished(cell)) is not None}
        missing = [cell for cell in cells if cell.name not in outcomes]
        if outcomes:
            say(f"{len(outcomes)} of {len(cells)} cells are finished already")

        def report(cell: Cell, outcome: Outcome) -> None:
            outcomes[cell.name] = outcome
            say(f"[{len(outcomes)}/{len(cells)}] {cell.name}: {_in_words(outcome, task.monitor)}")

        if missing and engine == "ray":
            run_with_ray(missing, jobs, report)
        elif missing:
            run_locally(missing, jobs or _local_jobs(missing), folder / "processes.log", report)
        rows = [Row(cell, outcomes[cell.name]) for cell in cells]
        found = Sweep(folder, axes, rows, task.monitor, task.lower_is_better)
        write_results(found)
    return found


def grid(recipe: str | Path, axes: Mapping[str, Sequence[Any]], fields: Mapping[str, Any], folder: Path) -> list[Cell]:
    """Return the cells of a sweep, with their recipes checked.

    Raises:
        UserError: for an axis without values or with a repeated one, or a value that the recipe refuses.
    """
    if not axes:
        raise UserError("a sweep needs at least one axis, such as optim.lr=1e-4,1e-3")
    for axis, listed in axes.items():
        if not listed or len({repr(value) for value in listed}) < len(listed):
            raise UserError(f"axis {axis} must have different values, not {list(listed)}")
        if axis in ("output", *fields):
            raise UserError(f"{axis} cannot be an axis: it is set otherwise")
    cells = []
    for point in product(*axes.values()):
        values = dict(zip(axes, point, strict=True))
        name = _name(values)
        own = {"output": str(folder / "cells" / name), "trainer.progress": False}
        cell = Cell(name, values, load_recipe(recipe, {**fields, **values, **own}))
        # Building the data module checks its arguments without reading data.
        build_data(cell.recipe)
        cells.append(cell)
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError(f"two points of the grid have the same name; give {', '.join(axes)} values of other types")
    return cells


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Parse an axis from the command line, such as "model.dim=64,128". Values in brackets may contain commas.

    Raises:
        UserError: if the text is not of that form.
    """
    name, equals, listed = text.partition("=")
    values = _split(listed)
    if not equals or not name or not all(value.strip() for value in values):
        shown = text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
        raise UserError(f"an axis is FIELD=VALUE,VALUE,..., such as model.dim=64,128, not {shown!r}")
    return name, [parse_yaml(value, f"a value of the axis {name}") for value in values]


def _split(listed: str) -> list[str]:
    """Split at commas outside brackets."""
    parts = [""]
    depth = 0
    for piece in re.split(r"([,\[\]{}])", listed):
        depth += (piece in ("[", "{")) - (piece in ("]", "}"))
        if piece == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _name(values: Mapping[str, Any]) -> str:
    """Return a readable folder name that is unique to these values, with a digest where the text is ambiguous."""
    name = re.sub(r"[^\w.,=+\[\]-]+", "_", ",".join(f"{axis}={value}" for axis, value in values.items()))
    if all(_reads_as_itself(value) for value in values.values()) and len(os.fsencode(name)) <= _LONGEST_NAME:
        return name
    cut = os.fsencode(name)[:_LONGEST_NAME].decode("utf-8", errors="ignore")
    return f"{cut}-{hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]}"


def _reads_as_itself(value: Any) -> bool:
    """Return whether the value is unambiguous in a name. A path or the string "1" is not."""
    if isinstance(value, list):
        return all(_reads_as_itself(item) for item in value)
    if isinstance(value, str):
        return re.fullmatch(r"[\w.+-]+", value) is not None and not _is_scalar(value)
    return isinstance(value, bool | int | float | None)


def _is_scalar(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("None", "True", "False")
    return True


def _forget(cells: Path, say: Callable[[str], object]) -> None:
    """Remove what the cells of an earlier sweep wrote, and report what else is there."""
    left = []
    for folder in sorted(cells.iterdir()) if cells.is_dir() else ():
        if _is_cell(folder):
            with lock_folder(folder, "run folder"):
                remove_leftovers(folder)
                for file in [*own_files(folder), folder / CELL_FILE, folder / LOG_FILE]:
                    file.unlink(missing_ok=True)
            # No other process can hold it, because the whole sweep is locked.
            (folder / LOCK_NAME).unlink(missing_ok=True)
            remove_if_empty(folder / "tensorboard")
            remove_if_empty(folder)
        if folder.exists():
            left.append(folder.name)
    if left:
        say(f"kept in {cells}, because the sweep did not write it: {', '.join(left)}")


def _is_cell(folder: Path) -> bool:
    """Return whether a sweep made the folder: it holds a run or an outcome of the cell of the same name."""
    if not folder.is_dir() or folder.is_symlink() or "=" not in folder.name:
        return False
    return folder.name in (_output_of_run(folder), _output_of_outcome(folder))


def _output_of_run(folder: Path) -> str | None:
    try:
        return Path(load_recipe(folder / "recipe.yaml").output).name
    except UserError:
        return None


def _output_of_outcome(folder: Path) -> str | None:
    try:
        found = read_outcome(folder)
    except UserError:
        return None
    return None if found is None else Path(str(found[1].get("output"))).name


def _finished(cell: Cell) -> Outcome | None:
    """Return the outcome of a finished cell, or None if the cell has to run."""
    found = read_outcome(cell.folder)
    if found is None:
        return None
    outcome, content = found
    then, now = flat(content), flat(cell.content)
    changed = sorted(name for name in {*then, *now} - _FREE if then.get(name) != now.get(name))
    if changed:
        told = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise UserError(
            f"{cell.folder} holds a cell of another recipe: {told}. Restore it, name another --output, or discard the "
            "earlier sweep with --overwrite"
        )
    return outcome if outcome.status == "finished" else None


def _local_jobs(cells: Sequence[Cell]) -> int:
    import torch

    cores = os.cpu_count() or 1
    if all(cell.recipe.trainer.accelerator == "cpu" for cell in cells):
        return cores
    return torch.accelerator.device_count() or cores


def _in_words(outcome: Outcome, score: str) -> str:
    if outcome.status != "finished":
        return f"{outcome.status}: {outcome.error}" if outcome.error else outcome.status
    if score not in outcome.metrics:
        return f"nothing was validated ({outcome.seconds:.0f} s)"
    return f"{score.removeprefix('val/')} {outcome.metrics[score]:.4f} ({outcome.seconds:.0f} s)"
