"""The demo, small: its steps run through, and its page holds what it promises."""

from __future__ import annotations

import re

import pytest
import yaml

from gatewise.cli import main
from gatewise.demo import run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    recipe = yaml.safe_load(run.RECIPE.read_text())
    recipe["model"] |= {"embed_dim": 8, "patch_size": 4}
    recipe["trainer"] |= {
        "epochs": 2,
        "limit_train_batches": 3,
        "limit_val_batches": 1,
        "log_every": 1,
        "progress": False,
    }
    recipe["optim"] |= {"warmup_epochs": 0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    patch = pytest.MonkeyPatch()
    # No plan is begun once the budget is spent: one is tried, none compiled.
    patch.setattr(run, "OPTIMIZE_BUDGET_S", {1: 1e-3, 16: 1e-3})
    try:
        arguments = ["demo", "--output", str(folder / "out"), "--recipe", str(folder / "recipe.yaml")]
        assert main(arguments) == 0
    finally:
        patch.undo()
    return (folder / "out" / "report.html").read_text()


def test_the_page_stands_alone(page):
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]+"', page)
    assert "<script" not in page
    assert "@import" not in page


@pytest.mark.parametrize(
    "heading",
    [
        "Training",
        "On held-out images",
        "Images and predictions",
        "Latency, before and after",
        "Cost by stage",
        "Gates",
        "Export",
        "Versions and machine",
    ],
)
def test_every_section_is_there(page, heading):
    assert f"<h2>{heading}</h2>" in page


def test_figures_and_pictures_are_embedded(page):
    assert page.count("data:image/svg+xml;base64,") == 5
    assert page.count("data:image/png;base64,") == run.PICTURES + 2


def test_figures_of_the_network_are_told(page):
    assert "2,000 test images" in page
    assert "ONNX opset" in page
    assert "Ankle boot" in page


def test_a_missing_recipe_is_a_users_mistake(tmp_path, capsys):
    assert main(["demo", "--recipe", str(tmp_path / "none.yaml"), "--output", str(tmp_path)]) == 2
    assert "no recipe at" in capsys.readouterr().err
