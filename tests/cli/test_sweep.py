from __future__ import annotations

import json

import pytest
import yaml

from gatewise.cli import main
from tests.tasks.conftest import recall_content


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    fields = {"trainer.epochs": 1, "trainer.limit_train_batches": 2}
    path.write_text(yaml.safe_dump(recall_content(fields, tmp_path / "unused")))
    return path


def test_a_sweep_with_a_failing_member_finishes_the_others_names_it_and_exits_with_1(recipe_file, tmp_path, capsys):
    output = tmp_path / "sweep"
    words = ["sweep", str(recipe_file), "--axis", "model.dim=8,16", "--output", str(output), "--jobs", "1"]
    assert main([*words, "--axis", "optim.lr=1e30,1e-3", "--set", "trainer.log_every=2"]) == 1
    captured = capsys.readouterr()
    assert "[4/4]" in captured.out
    assert "model.dim" in captured.out
    assert "results.csv" in captured.out
    assert "failed: model.dim=8,optim.lr=1e+30: " in captured.err
    assert "2 of 4 cells failed" in captured.err
    cells = json.loads((output / "results.json").read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["failed", "finished"] * 2
    assert main([*words, "--axis", "optim.lr=1e-3", "--set", "trainer.log_every=2"]) == 0
    assert "2 of 2 cells are finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "at least one axis"),
        (["--axis", "optim.lrr=1"], "did you mean 'lr'"),
        (["--axis", "seed=1", "--axis", "seed=2"], "an axis is given twice"),
        (["--axis", "seed"], "an axis is FIELD=VALUE"),
        (["--axis", "seed=1", "--jobs", "0"], "jobs must be at least 1"),
        (["--axis", "seed=1", "--engine", "slurm"], "invalid choice"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(recipe_file, tmp_path, capsys, words, message):
    assert main(["sweep", str(recipe_file), "--output", str(tmp_path / "s"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()
