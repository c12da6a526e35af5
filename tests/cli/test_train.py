from __future__ import annotations

import argparse

import pytest
import yaml

from gatewise.cli import main
from gatewise.tasks import parse_recipe
from tests.tasks.conftest import tiny_content


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    content = tiny_content({"trainer.epochs": 1, "trainer.limit_train_batches": 2}, tmp_path / "run")
    path.write_text(yaml.safe_dump(content))
    return path


def test_train_runs_a_recipe_and_says_what_came_of_it(recipe_file, tmp_path, capsys):
    assert main(["train", str(recipe_file), "--optim.lr", "2e-3", "--trainer.clip_grad=1"]) == 0
    printed = capsys.readouterr().out
    assert "top1" in printed
    assert "best.ckpt" in printed
    resolved = parse_recipe(yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()))
    assert (resolved.optim.lr, resolved.trainer.clip_grad) == (2e-3, 1.0)


def test_flags_are_taken_anywhere_after_the_recipe(recipe_file, capsys):
    assert main(["train", str(recipe_file)]) == 0
    assert main(["train", str(recipe_file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["train", str(recipe_file), "--overwrite", "--trainer.limit_train_batches", "1"]) == 0
    assert main(["train", str(recipe_file), "--trainer.limit_train_batches", "1", "--resume"]) == 0


def test_print_config_prints_the_whole_recipe_and_starts_nothing(recipe_file, tmp_path, capsys):
    assert main(["train", str(recipe_file), "--print-config", "--seed", "5"]) == 0
    resolved = parse_recipe(yaml.safe_load(capsys.readouterr().out))
    assert resolved.seed == 5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lrr", "1"], "did you mean 'lr'"),
        (["--trainer.epochs", "x"], "trainer.epochs must be int, not 'x'"),
        (["--model.name", "focalnet_tinny_srf"], "did you mean 'focalnet_tiny_srf'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(recipe_file, tmp_path, capsys, words, message):
    assert main(["train", str(recipe_file), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_of_a_recipe_lists_its_fields(recipe_file, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(recipe_file), "--help"])
    assert stopped.value.code == 0
    assert "--model.focal_windows" in capsys.readouterr().out


def test_an_interrupted_run_exits_with_130(recipe_file, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gatewise.tasks.training.train", interrupt)
    assert main(["train", str(recipe_file)]) == 130


def test_arguments_are_declared_without_heavy_imports():
    from gatewise.cli import train

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert parser.parse_args(["r.yaml", "--a.b", "1", "--resume"]).fields == ["--a.b", "1", "--resume"]
