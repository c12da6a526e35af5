"""`gatewise gates`: pictures of images' gates and of texts' attention."""

from __future__ import annotations

import pytest

from gatewise.cli import main
from gatewise.tasks import parse_recipe, train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "corpus.txt").write_text("to be or not to be, that is the question\n" * 200)
    recipe = {
        "task": {"name": "language_modeling"},
        "model": {"name": "gated_attention_tiny_elementwise", "dim": 32, "depth": 2, "hidden_dim": 32},
        "data": {"name": "text", "root": str(folder / "corpus.txt"), "context": 32, "cache_dir": str(folder / "cache")},
        "trainer": {"steps": 2, "progress": False, "accelerator": "cpu", "limit_val_batches": 1},
        "output": str(folder / "run"),
    }
    return train(parse_recipe(recipe)).last


def test_attention_of_a_text_is_drawn(checkpoint, tmp_path, capsys):
    target = tmp_path / "sub" / "gates.png"
    assert main(["gates", "--checkpoint", str(checkpoint), "--prompt", "to be or not", "--to", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert str(target) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "either an image file or --prompt TEXT"), (["photo.jpg"], "was trained on text: give --prompt TEXT")],
)
def test_the_wrong_input_is_told(checkpoint, capsys, arguments, message):
    assert main(["gates", "--checkpoint", str(checkpoint), *arguments]) == 2
    assert message in capsys.readouterr().err
