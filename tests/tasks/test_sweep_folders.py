"""The folders of a sweep: their names, what may be removed, and what is read back from them."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path

import pytest
import yaml

from gatewise.errors import UserError
from gatewise.files import FolderInUseError, lock_folder
from gatewise.tasks import sweep as sweeps
from gatewise.tasks import train
from gatewise.tasks.sweep import grid, parse_axis, sweep
from gatewise.tasks.sweep_engines import CELL_FILE, Outcome, read_outcome, run_cell, write_outcome
from tests.tasks.conftest import recall_content

QUICK = {"trainer.epochs": 1, "trainer.limit_train_batches": 2}


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recall_content(QUICK, tmp_path / "unused")))
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells run without processes; the list of those that did."""
    ran = []

    def run(cells, jobs, log, report):
        for cell in cells:
            ran.append(cell.name)
            report(cell, run_cell(cell.content))

    monkeypatch.setattr(sweeps, "run_locally", run)
    return ran


def name_of(value) -> str:
    return sweeps._name({"data.root": value})


# Names


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (64, "data.root=64"),
        (1e-3, "data.root=0.001"),
        (None, "data.root=None"),
        (True, "data.root=True"),
        ("zoology_gla", "data.root=zoology_gla"),
        ([3, -1], "data.root=[3,_-1]"),
        ([[2, 8, 16], [3, 8, 4]], "data.root=[[2,_8,_16],_[3,_8,_4]]"),
    ],
)
def test_plain_values_are_in_the_name_as_they_are(value, name):
    assert name_of(value) == name


@pytest.mark.parametrize(
    "values",
    [
        ["d/a", "d_a", "d//a", "d a"],
        [1, "1", 1.0, "1.0", True, "True", None, "None", "null"],
        [[1, 2], "[1, 2]", (1, 2), ["1", "2"], "[1,_2]"],
        [["a", "b"], ["a, b"], ["a', 'b"]],
        [{"a": 1}, "{'a': 1}"],
        ["ä" * 200, "ä" * 201],
        ["", "_"],
    ],
)
def test_different_values_have_different_names_that_a_disk_takes(tmp_path, values):
    names = [name_of(value) for value in values]
    assert len(set(names)) == len(values)
    for name in names:
        (tmp_path / name).mkdir()


def test_two_axes_are_not_taken_for_each_other():
    left = {"a.x": "1,a.y=2", "a.y": 3}
    right = {"a.x": 1, "a.y": "2,a.y=3"}
    assert sweeps._name(left) != sweeps._name(right)


def test_a_grid_whose_names_collide_is_refused(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "_name", lambda values: "same=name")
    with pytest.raises(UserError, match="two points of the grid have the same name"):
        grid(recipe_file, {"seed": [0, 1]}, {}, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.depths=" + "[" * 100_000, "nested more than 50 levels"),
        ("model.depths=[1,2", "a value of the axis model.depths is not valid YAML"),
        ("seed=1,,2", "an axis is FIELD=VALUE,VALUE"),
    ],
)
def test_a_value_that_cannot_be_read_is_a_mistake_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_axis(text)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


# What is removed


def test_forgetting_a_sweep_removes_what_its_cells_wrote_and_nothing_else(recipe_file, tmp_path, in_this_process):
    folder = tmp_path / "project"
    axes = {"optim.lr": [1e-3, 1e-2]}
    sweep(recipe_file, axes, output=folder, say=str)
    cells = folder / "cells"
    kept = [
        cells / "whatever" / "thesis.txt",
        cells / "a=b" / "recipe.yaml",
        cells / "optim.lr=0.01" / "notes.txt",
        folder / "paper.tex",
    ]
    for file in kept:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    said = []
    sweep(recipe_file, {"optim.lr": [1e-4]}, output=folder, overwrite=True, say=said.append)
    assert [file.read_text() for file in kept] == ["mine"] * len(kept)
    assert not (cells / "optim.lr=0.001").exists()
    assert {path.name for path in (cells / "optim.lr=0.01").iterdir()} == {"notes.txt"}
    assert said[0].endswith("because the sweep did not write it: a=b, optim.lr=0.01, whatever")
    assert in_this_process == ["optim.lr=0.001", "optim.lr=0.01", "optim.lr=0.0001"]


def test_a_cell_that_was_killed_is_forgotten_too(recipe_file, tmp_path, in_this_process):
    folder = tmp_path / "s"
    [cell] = grid(recipe_file, {"seed": [0]}, {}, folder)
    train(cell.recipe)
    (cell.folder / CELL_FILE).write_text("{")
    sweep(recipe_file, {"seed": [1]}, output=folder, overwrite=True, say=str)
    assert not cell.folder.exists()


def test_one_process_at_a_time_runs_a_sweep(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "lock_folder", partial(lock_folder, patience_s=0.0))
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_folder(tmp_path / "s"):
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    try:
        with pytest.raises(FolderInUseError, match="the sweep folder .* is in use"):
            sweep(recipe_file, {"seed": [0]}, output=tmp_path / "s")
    finally:
        done.set()
        holder.join()


# What is read back


def test_an_outcome_is_read_back_with_numbers_that_are_not_finite(tmp_path):
    outcome = Outcome("finished", {"val/loss": float("inf"), "epoch": 0}, 10, None, 1, 2, 3.0)
    write_outcome(tmp_path, {"output": "x"}, outcome)
    assert read_outcome(tmp_path) == (outcome, {"output": "x"})


GOOD = {"outcome": {"status": "finished", "metrics": {"epoch": 0}}, "recipe": {}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        json.dumps(GOOD)[:-5],
        json.dumps(GOOD | {"recipe": None}),
        json.dumps(GOOD | {"outcome": None}),
        json.dumps(GOOD | {"outcome": {}}),
        json.dumps(GOOD | {"outcome": {"status": "great"}}),
        json.dumps(GOOD | {"outcome": {"status": "finished", "speed": 1}}),
        json.dumps(GOOD | {"outcome": {"status": "finished", "metrics": {"epoch": "first"}}}),
        json.dumps(GOOD | {"outcome": {"status": "finished", "metrics": []}}),
        json.dumps(GOOD | {"outcome": {"status": "finished", "seconds": "3"}}),
        json.dumps(GOOD | {"outcome": {"status": ["finished"]}}),
        "[" * 100_000,
    ],
)
def test_a_damaged_cell_is_a_mistake_in_one_line_that_names_it(tmp_path, text):
    (tmp_path / CELL_FILE).write_text(text)
    with pytest.raises(UserError, match=r"cell\.json") as caught:
        read_outcome(tmp_path)
    assert "\n" not in str(caught.value)
