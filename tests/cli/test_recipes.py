from __future__ import annotations

import subprocess
import sys

import yaml

from gatewise.cli import main
from gatewise.recipes import list_recipes


def test_recipes_are_listed_with_the_first_line_of_their_comment(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_recipes()
    assert all("  " in line and not line.endswith(" ") for line in lines)


def test_recipes_take_a_pattern(capsys):
    assert main(["recipes", "gla/*"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "gla/laptop",
        "gla/slimpajama_1_3b",
        "gla/slimpajama_340m",
    ]


def test_a_pattern_without_a_match_suggests_the_closest(capsys):
    assert main(["recipes", "focalnet/dem"]) == 2
    assert "did you mean 'focalnet/demo'" in capsys.readouterr().err


def test_listing_recipes_imports_no_torch():
    code = "import sys; from gatewise.cli import main; main(['recipes']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60).returncode == 0


def test_a_recipe_is_found_by_its_name_from_anywhere(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "focalnet/demo", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["name"] == "fashion"
