from __future__ import annotations

import io
import json

import pytest
import torch
from PIL import Image

from gatewise.cli import main
from gatewise.tasks import parse_recipe, train
from tests.tasks.conftest import text_content, tiny_content


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    fields = {"trainer.epochs": 1, "trainer.limit_train_batches": 2}
    return train(parse_recipe(tiny_content(fields, tmp_path_factory.mktemp("run")))).best


def test_predict_names_classes_most_likely_first(checkpoint, tmp_path, capsys):
    path = tmp_path / "a.png"
    Image.new("L", (30, 40), 128).save(path)
    assert main(["predict", str(path), "--checkpoint", str(checkpoint), "--json", "--top", "3"]) == 0
    prediction = json.loads(capsys.readouterr().out)
    scores = [score for _, score in prediction["classes"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert main(["predict", str(path), "--checkpoint", str(checkpoint)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: {prediction['classes'][0][0]} ")


def test_predict_does_the_rest_when_a_file_cannot_be_read_and_exits_with_1(checkpoint, tmp_path, capsys):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (30, 40)).save(good)
    bad.write_bytes(good.read_bytes()[:20])
    assert main(["predict", str(bad), str(good), "--checkpoint", str(checkpoint)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{good}: ")
    assert "bad.png" in captured.err
    assert "1 of 2 files could not be read" in captured.err


def test_predict_with_a_file_that_is_no_checkpoint_is_a_users_mistake(tmp_path, capsys):
    image, wrong = tmp_path / "a.png", tmp_path / "wrong.ckpt"
    Image.new("RGB", (3, 4)).save(image)
    wrong.write_text("nothing")
    assert main(["predict", str(image), "--checkpoint", str(wrong)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_predict_needs_at_least_one_class_to_show(checkpoint, tmp_path, capsys):
    assert main(["predict", "a.png", "--checkpoint", str(checkpoint), "--top", "0"]) == 2
    assert "--top must be at least 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    fields = {"trainer.epochs": 1, "trainer.limit_train_batches": 2}
    return train(parse_recipe(text_content(fields, tmp_path_factory.mktemp("writer") / "run"))).best


def test_predict_goes_on_with_a_text(writer, capsys):
    words = ["predict", "--checkpoint", str(writer), "--max-tokens", "20", "--device", "cpu", "--seed", "3"]
    assert main([*words, "--prompt", "3 times"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("3 times")
    assert len(printed) > len("3 times\n")
    assert main([*words, "--prompt", "3 times", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] + record["text"] + "\n" == printed


def test_predict_reads_a_prompt_from_standard_input(writer, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert main(["predict", "--checkpoint", str(writer), "--prompt", "-", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("from a pipe")


def test_predict_wants_what_the_network_takes(checkpoint, writer, capsys):
    for words, message in (
        (["--checkpoint", str(writer), "a.png"], "not for images"),
        (["--checkpoint", str(checkpoint), "--prompt", "x"], "not for text"),
        (["--checkpoint", str(writer)], "or give --prompt TEXT"),
        (["--checkpoint", str(writer), "--prompt", "x", "a.png"], "or give --prompt TEXT"),
        (["--checkpoint", str(writer), "--prompt", "x", "--top-p", "2"], "top_p must be above 0 and at most 1"),
        (["--checkpoint", str(writer), "--prompt", "x", "--max-tokens", "0"], "max_new_tokens must be positive"),
    ):
        assert main(["predict", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_predict_names_an_image_whose_probabilities_are_not_finite(checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    # Finite weights, and a product beyond the range of float32.
    content["state_dict"]["model.head.weight"].fill_(3e38)
    content["state_dict"]["model.head.bias"].fill_(3e38)
    torch.save(content, tmp_path / "huge.ckpt")
    image = tmp_path / "a.png"
    Image.new("L", (30, 40), 128).save(image)
    assert main(["predict", str(image), "--checkpoint", str(tmp_path / "huge.ckpt"), "--json"]) == 1
    captured = capsys.readouterr()
    record = json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["classes"] == []
    assert f"{image}: the network's outputs for it are not finite" in captured.err


@pytest.mark.parametrize("temperature", ["nan", "inf", "-1"])
def test_predict_refuses_a_temperature_that_is_no_number(writer, capsys, temperature):
    words = ["predict", "--checkpoint", str(writer), "--prompt", "x", f"--temperature={temperature}"]
    assert main(words) == 2
    assert "temperature must be" in capsys.readouterr().err
