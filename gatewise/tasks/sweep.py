"""Sweeps: a recipe at every point of a grid.

    runs/sweep-mqar/
        cells/model.dim=64,optim.lr=0.001/     a run of each cell, as `gatewise train` leaves it, and its cell.json
        results.csv, results.json              a row per cell, and what is best
        figure.png                             score against the first axis of numbers, a line per kind of network

A sweep that is started again does what is missing: finished cells are skipped, interrupted ones are gone on with, and
failed ones are tried anew.
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
# Fields that say where and how a cell is run, not what is computed.
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
    """Train by a recipe at every point of a grid.

    Args:
        recipe: path of a recipe.
        axes: values by the dotted name of a field: {"model.dim": [64, 128], "optim.lr": [1e-4, 1e-3]}.
        fields: other fields to replace, the same in all cells.
        output: the sweep's folder; runs/sweep-NAME for a recipe NAME.yaml if not given.
        engine: processes on this machine, or Ray.
        jobs: cells at once; None: one per accelerator, or per core without one (Ray: as many as there is room for).
        overwrite: forget an earlier sweep in the same folder: remove what its cells wrote, and nothing else.
        say: is told of every cell that is done.
    Returns:
        The results of all cells, those of earlier attempts too; failed cells are among them.
    Raises:
        UserError: for a mistake in the recipe or an axis, before anything is started, or if the folder holds cells of
            another recipe, or a damaged one.
        FolderInUseError: if another process runs this sweep.
        Interrupted: after a signal; the same call goes on.
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
    """The cells of a sweep, their recipes checked.

    Raises:
        UserError: for an axis without values or with one twice, or a value that the recipe refuses.
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
        # The data module checks its arguments when it is built; nothing is read yet.
        build_data(cell.recipe)
        cells.append(cell)
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError(f"two points of the grid have the same name; give {', '.join(axes)} values of other types")
    return cells


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """An axis from the command line: "model.dim=64,128"; values in brackets may hold commas themselves.

    Raises:
        UserError: if it is not of that form.
    """
    name, equals, listed = text.partition("=")
    values = _split(listed)
    if not equals or not name or not all(value.strip() for value in values):
        shown = text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
        raise UserError(f"an axis is FIELD=VALUE,VALUE,..., such as model.dim=64,128, not {shown!r}")
    return name, [parse_yaml(value, f"a value of the axis {name}") for value in values]


def _split(listed: str) -> list[str]:
    """The parts between commas that stand outside brackets."""
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
    """A name for a folder that differs for different values: readable, with a digest where reading cannot tell."""
    name = re.sub(r"[^\w.,=+\[\]-]+", "_", ",".join(f"{axis}={value}" for axis, value in values.items()))
    if all(_reads_as_itself(value) for value in values.values()) and len(os.fsencode(name)) <= _LONGEST_NAME:
        return name
    cut = os.fsencode(name)[:_LONGEST_NAME].decode("utf-8", errors="ignore")
    return f"{cut}-{hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]}"


def _reads_as_itself(value: Any) -> bool:
    """Whether no other value looks like this one in a name: of a path or of "1" there are several readings."""
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
    """Remove what the cells of an earlier sweep wrote, and tell of what else is there."""
    left = []
    for folder in sorted(cells.iterdir()) if cells.is_dir() else ():
        if _is_cell(folder):
            with lock_folder(folder, "run folder"):
                remove_leftovers(folder)
                for file in [*own_files(folder), folder / CELL_FILE, folder / LOG_FILE]:
                    file.unlink(missing_ok=True)
            # No other process can want it: the whole sweep is locked.
            (folder / LOCK_NAME).unlink(missing_ok=True)
            remove_if_empty(folder / "tensorboard")
            remove_if_empty(folder)
        if folder.exists():
            left.append(folder.name)
    if left:
        say(f"left alone in {cells}, for the sweep did not write it: {', '.join(left)}")


def _is_cell(folder: Path) -> bool:
    """Whether a sweep made the folder: it holds a run or an outcome of the cell of its own name."""
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
    """The outcome of a cell that need not be run again."""
    found = read_outcome(cell.folder)
    if found is None:
        return None
    outcome, content = found
    then, now = flat(content), flat(cell.content)
    changed = sorted(name for name in {*then, *now} - _FREE if then.get(name) != now.get(name))
    if changed:
        told = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise UserError(
            f"{cell.folder} holds a cell of another recipe: {told}. Restore it, name another --output, or forget the "
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
