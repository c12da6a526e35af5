"""Sweeps: the grid, what is run, and what is best. Whole sweeps in processes are tried by the command's tests."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from gatewise.errors import MissingExtraError, UserError
from gatewise.tasks import train
from gatewise.tasks.sweep import grid, parse_axis, sweep
from gatewise.tasks.sweep_engines import Outcome, read_outcome, run_cell, run_locally, run_with_ray
from gatewise.tasks.sweep_outcome import Cell, Row, Sweep
from gatewise.tasks.sweep_report import draw, flat_row, write_results
from tests.tasks.conftest import assert_same_checkpoint, recall_content
from tests.tasks.test_resume import Crash

QUICK = {"trainer.epochs": 1, "trainer.limit_train_batches": 2}


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    content = recall_content(QUICK, tmp_path / "unused")
    path.write_text(yaml.safe_dump(content))
    return path


# The grid


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("model.dim=64,128", "model.dim", [64, 128]),
        ("optim.lr=1e-4,4.64e-4", "optim.lr", [1e-4, 4.64e-4]),
        ("model.name=gla_tiny,gla_340m", "model.name", ["gla_tiny", "gla_340m"]),
        ("model.kernel_size=[3,-1],[3,3]", "model.kernel_size", [[3, -1], [3, 3]]),
        (
            "data.train_segments=[[2,8,16],[3,8,4]],[[2,8,9]]",
            "data.train_segments",
            [[[2, 8, 16], [3, 8, 4]], [[2, 8, 9]]],
        ),
        ("trainer.clip_grad=1,null", "trainer.clip_grad", [1, None]),
    ],
)
def test_an_axis_is_a_field_and_its_values(text, name, values):
    assert parse_axis(text) == (name, values)


@pytest.mark.parametrize("text", ["model.dim", "=3", "model.dim="])
def test_what_is_no_axis_is_refused(text):
    with pytest.raises(UserError, match="an axis is FIELD=VALUE,VALUE"):
        parse_axis(text)


def test_a_cell_is_a_recipe_for_every_point(recipe_file, tmp_path):
    cells = grid(recipe_file, {"model.dim": [8, 16], "optim.lr": [1e-3, 1e-2]}, {"seed": 3}, tmp_path / "s")
    assert [cell.name for cell in cells] == [f"model.dim={d},optim.lr={lr}" for d in (8, 16) for lr in (0.001, 0.01)]
    assert [cell.recipe.model.fields["dim"] for cell in cells] == [8, 8, 16, 16]
    assert cells[1].recipe.optim.lr == 1e-2
    assert {cell.recipe.seed for cell in cells} == {3}
    assert cells[0].folder == tmp_path / "s" / "cells" / cells[0].name


def test_names_of_folders_are_short_and_differ(recipe_file, tmp_path):
    segments = [[[1, 8, 8 + i]] * 20 for i in range(2)]
    cells = grid(recipe_file, {"data.train_segments": segments}, {}, tmp_path)
    assert len({cell.name for cell in cells}) == 2
    assert all(len(cell.name) < 200 and "/" not in cell.name for cell in cells)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "a sweep needs at least one axis"),
        ({"optim.lr": []}, "axis optim.lr must have different values"),
        ({"optim.lr": [1.0, 1.0]}, "axis optim.lr must have different values"),
        ({"optim.lrr": [1.0]}, "did you mean 'lr'"),
        ({"model.dim": [16, 0]}, "dim must be positive, not 0"),
        ({"data.vocab_size": [32, 16]}, "vocab_size must be larger than input_seq_len 16, not 16"),
        ({"output": ["a"]}, "output cannot be an axis"),
        ({"seed": [1]}, "seed cannot be an axis: it is set otherwise"),
    ],
)
def test_a_mistake_is_found_before_anything_is_started(recipe_file, tmp_path, axes, message):
    with pytest.raises(UserError, match=message):
        sweep(recipe_file, axes, fields={"seed": 0}, output=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_the_number_of_jobs_is_positive(recipe_file, tmp_path):
    with pytest.raises(UserError, match="jobs must be at least 1, not 0"):
        sweep(recipe_file, {"seed": [0]}, output=tmp_path, jobs=0)


# A cell


def one_cell(recipe_file, tmp_path, **fields) -> Cell:
    return grid(recipe_file, {"seed": [0]}, fields, tmp_path / "s")[0]


def test_a_cell_leaves_its_run_and_its_outcome(recipe_file, tmp_path):
    cell = one_cell(recipe_file, tmp_path)
    outcome = run_cell(cell.content)
    assert outcome.status == "finished"
    assert (outcome.steps, outcome.epochs) == (2, 1)
    assert "val/accuracy" in outcome.metrics
    assert outcome.parameters > 0
    assert read_outcome(cell.folder) == (outcome, cell.content)
    assert (cell.folder / "best.ckpt").exists()


def test_a_cell_that_fails_says_why_in_one_line_and_all_in_its_log(recipe_file, tmp_path):
    cell = one_cell(recipe_file, tmp_path, **{"optim.lr": 1e30})
    outcome = run_cell(cell.content)
    assert outcome.status == "failed"
    assert outcome.error
    assert "\n" not in outcome.error
    assert "Traceback" in (cell.folder / "log.txt").read_text()
    assert read_outcome(cell.folder)[0] == outcome


def test_a_cell_that_was_interrupted_is_gone_on_with(recipe_file, tmp_path):
    fields = {"trainer.epochs": 2, "trainer.checkpoint_every": 1}
    whole = one_cell(recipe_file, tmp_path / "whole", **fields)
    run_cell(whole.content)
    parts = one_cell(recipe_file, tmp_path / "parts", **fields)
    with pytest.raises(RuntimeError, match="power cut"):
        train(parts.recipe, callbacks=[Crash(3)])
    assert read_outcome(parts.folder) is None
    assert run_cell(parts.content).status == "finished"
    assert_same_checkpoint(parts.folder / "last.ckpt", whole.folder / "last.ckpt")


def test_finished_cells_are_skipped_and_new_points_added(recipe_file, tmp_path, monkeypatch):
    ran = []

    def in_this_process(cells, jobs, log, report):
        for cell in cells:
            ran.append(cell.name)
            report(cell, run_cell(cell.content))

    monkeypatch.setattr("gatewise.tasks.sweep.run_locally", in_this_process)
    said = []
    first = sweep(recipe_file, {"optim.lr": [1e-3, 1e30]}, output=tmp_path / "s", say=said.append)
    assert [row.cell.name for row in first.failed] == ["optim.lr=1e+30"]
    assert said[0].startswith("[1/2] optim.lr=0.001: accuracy 0.")
    assert said[1].startswith("[2/2] optim.lr=1e+30: failed: ")
    ran.clear()
    second = sweep(recipe_file, {"optim.lr": [1e-3, 1e-2]}, output=tmp_path / "s", say=said.append)
    assert ran == ["optim.lr=0.01"]
    assert "1 of 2 cells are finished already" in said
    assert second.failed == []
    ran.clear()
    sweep(recipe_file, {"optim.lr": [1e-3]}, output=tmp_path / "s", overwrite=True, say=said.append)
    assert ran == ["optim.lr=0.001"]


def test_cells_of_another_recipe_are_not_taken_for_these(recipe_file, tmp_path):
    axes = {"seed": [0]}
    cell = grid(recipe_file, axes, {}, tmp_path / "s")[0]
    run_cell(cell.content)
    with pytest.raises(UserError, match=r"another recipe: optim\.weight_decay was 0\.05 and is 0\.1.*--overwrite"):
        sweep(recipe_file, axes, fields={"optim.weight_decay": 0.1}, output=tmp_path / "s")
    # Where it runs is no other recipe.
    assert sweep(recipe_file, axes, fields={"trainer.accelerator": "auto"}, output=tmp_path / "s", say=str).failed == []


# Processes


def test_a_process_that_dies_fails_its_cell_and_is_replaced(recipe_file, tmp_path):
    cells = grid(recipe_file, {"seed": [0, 1]}, {}, tmp_path / "s")
    (tmp_path / "s").mkdir()

    def kill_first() -> None:
        me = psutil.Process()
        while not (found := [c for c in me.children() if "spawn_main" in " ".join(c.cmdline())]):
            time.sleep(0.01)
        found[0].kill()

    killer = threading.Thread(target=kill_first)
    killer.start()
    outcomes = {}
    run_locally(cells, 1, tmp_path / "s" / "log", lambda cell, outcome: outcomes.update({cell.name: outcome}))
    killer.join()
    assert outcomes["seed=0"] == Outcome("failed", error="its process died (killed by SIGKILL)")
    assert outcomes["seed=1"].status == "finished"
    assert read_outcome(cells[0].folder)[0].status == "failed"


def test_an_interruption_lets_cells_save_and_leaves_no_process(recipe_file, tmp_path):
    fields = {"trainer.epochs": 5000, "trainer.limit_train_batches": 5}
    cells = grid(recipe_file, {"seed": [0, 1]}, fields, tmp_path / "s")
    (tmp_path / "s").mkdir()

    def interrupt_when_training() -> None:
        while not (cells[0].folder / "last.ckpt").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt_when_training).start()
    with pytest.raises(KeyboardInterrupt):
        run_locally(cells, 1, tmp_path / "s" / "log", lambda cell, outcome: None)
    assert not [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]
    assert read_outcome(cells[0].folder) is None
    assert "saved; resume with" in (cells[0].folder / "log.txt").read_text()
    assert not cells[1].folder.exists()


def test_ray_runs_the_cells_too(recipe_file, tmp_path):
    pytest.importorskip("ray", reason="the extra `sweep` is not installed")
    found = sweep(recipe_file, {"optim.lr": [1e-3, 1e30]}, output=tmp_path / "s", engine="ray", jobs=1, say=str)
    assert [row.outcome.status for row in found.rows] == ["finished", "failed"]


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gatewise\[sweep\]'"):
        run_with_ray([], None, lambda cell, outcome: None)


# What is best


@pytest.fixture
def made_up(recipe_file, tmp_path):
    """A sweep whose scores are given: {(model.dim, optim.lr, seed): accuracy}."""

    def make(scores: dict, lower_is_better: bool = False) -> Sweep:
        axes = {
            name: list(dict.fromkeys(point[place] for point in scores))
            for place, name in enumerate(("model.dim", "optim.lr", "seed"))
        }
        rows = []
        for cell in grid(recipe_file, axes, {}, tmp_path / "s"):
            score = scores[tuple(cell.values.values())]
            metrics = {"val/accuracy": score, "epoch": 0}
            outcome = (
                Outcome("failed", error="no") if score is None else Outcome("finished", metrics, 10, 20, 1, 2, 3.0)
            )
            rows.append(Row(cell, outcome))
        return Sweep(tmp_path / "s", axes, rows, "val/accuracy", lower_is_better)

    return make


SCORES = {
    (8, 0.1, 0): 0.9,
    (8, 0.1, 1): 0.1,
    (8, 0.2, 0): 0.6,
    (8, 0.2, 1): 0.7,
    (16, 0.1, 0): 0.8,
    (16, 0.1, 1): 1.0,
    (16, 0.2, 0): None,
    (16, 0.2, 1): 0.2,
}


def test_the_best_is_the_highest_and_the_mean_is_over_seeds_at_the_rate_that_is_best_on_average(made_up):
    narrow, wide = made_up(SCORES).best()
    assert (narrow.values, narrow.best, narrow.lr) == ({"model.dim": 8}, 0.9, 0.2)
    assert narrow.mean == pytest.approx(0.65)
    assert narrow.spread == pytest.approx(0.0707, abs=1e-4)
    assert (wide.best, wide.lr, wide.seeds) == (1.0, 0.1, 2)
    assert wide.mean == pytest.approx(0.9)


def test_of_losses_the_lowest_is_best(made_up):
    narrow, wide = made_up(SCORES, lower_is_better=True).best()
    assert (narrow.best, narrow.lr, narrow.mean) == (0.1, 0.1, pytest.approx(0.5))
    assert (wide.lr, wide.seeds, wide.spread) == (0.2, 1, None)


def test_results_are_a_row_for_each_cell_and_what_is_best(made_up):
    found = made_up(SCORES)
    write_results(found)
    rows = list(csv.DictReader((found.folder / "results.csv").open()))
    assert len(rows) == 8
    assert rows[0] | {"folder": ""} == {
        "model.dim": "8",
        "optim.lr": "0.1",
        "seed": "0",
        "status": "finished",
        "best_epoch": "0",
        "accuracy": "0.9",
        "parameters": "10",
        "state_bytes": "20",
        "epochs": "1",
        "steps": "2",
        "seconds": "3.0",
        "folder": "",
        "error": "",
    }
    whole = json.loads((found.folder / "results.json").read_text())
    assert whole["cells"][6]["status"] == "failed"
    assert [best["lr"] for best in whole["best"]] == [0.2, 0.1]
    assert (found.folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_a_panel_for_the_data_and_a_line_for_each_network(recipe_file, tmp_path):
    axes = {"model.num_heads": [1, 2], "model.dim": [8, 16, 32], "data.power_a": [0.01, 1.0]}
    cells = grid(recipe_file, axes, {}, tmp_path)
    rows = [Row(cell, Outcome("finished", {"val/accuracy": 0.01 * cell.values["model.dim"]})) for cell in cells]
    figure = draw(Sweep(tmp_path, axes, rows, "val/accuracy", False))
    assert [panel.get_title() for panel in figure.axes] == ["power_a 0.01", "power_a 1.0"]
    for panel in figure.axes:
        assert panel.get_xlabel() == "model.dim"
        assert [text.get_text() for text in panel.get_legend().get_texts()] == ["num_heads 1", "num_heads 2"]
        assert panel.lines[0].get_xydata().tolist() == [[8, 0.08], [16, 0.16], [32, 0.32]]


def test_without_an_axis_of_numbers_there_is_no_figure(made_up):
    found = made_up({(8, 0.1, 0): 0.5, (8, 0.2, 0): 0.5})
    assert draw(found) is None
    write_results(found)
    assert not (found.folder / "figure.png").exists()
    assert flat_row(found.rows[0])["accuracy"] == 0.5
