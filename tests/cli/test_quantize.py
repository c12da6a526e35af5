"""`gatewise quantize`: a small file with its score, or one clear line."""

from __future__ import annotations

import json

import pytest
import torch

from gatewise.cli import main
from gatewise.efficiency.quantization.quantize import load_quantized
from gatewise.tasks import parse_recipe, train
from tests.tasks.conftest import text_content, tiny_content


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    fields = {"trainer.epochs": 1, "trainer.limit_train_batches": 2}
    return train(parse_recipe(tiny_content(fields, tmp_path_factory.mktemp("run")))).best


@pytest.mark.untyped
def test_a_checkpoint_is_calibrated_and_scored_on_its_own_data(checkpoint, tmp_path, capsys):
    path, report = tmp_path / "small.onnx", tmp_path / "report.json"
    arguments = [str(checkpoint), "--output", str(path), "--calibration", "2", "--json", str(report)]
    assert main(["quantize", *arguments, "--sensitivity"]) == 0
    printed = capsys.readouterr().out
    assert "all quantized" in printed
    assert "2 batches; integer arithmetic" in printed
    assert "top-1 on 359 images (test):" in printed
    written = json.loads(report.read_text(encoding="utf-8"))
    assert written["images"] == 359
    # 8 bits move a score of a few hundred images by a few of them at most.
    assert abs(written["top1_before"] - written["top1_after"]) < 0.05
    network = load_quantized(path)
    assert network.report.batches == 2
    assert network(torch.zeros(2, *network.report.input_shape)).shape == (2, 10)


@pytest.mark.untyped
def test_a_name_without_data_is_calibrated_on_noise(tmp_path, capsys):
    path = tmp_path / "speed.onnx"
    arguments = ["--image-size", "32", "32", "--calibration", "1", "--weight-bits", "4"]
    assert main(["quantize", "mobilenetv2_035", "--output", str(path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "weights int4" in printed
    assert "calibrated on noise" in printed
    assert load_quantized(path).report.input_shape == (3, 32, 32)


def test_mistakes_are_one_line(capsys, tmp_path, checkpoint):
    target = ["--output", str(tmp_path / "x.onnx")]
    cases = {
        "required: --output": ["mobilenetv2_035"],
        "does not exist; create it first": ["mobilenetv2_035", "--output", str(tmp_path / "missing" / "x.onnx")],
        "--calibration must be 1 or more": ["mobilenetv2_035", *target, "--calibration", "0"],
        "bits must be in 2..8, not 9": ["mobilenetv2_035", *target, "--bits", "9", "--image-size", "32", "32"],
        "give calibration data": ["mobilenetv2_035", *target, "--pretrained"],
        "come from the data": [str(checkpoint), *target, "--image-size", "8", "8"],
        "invalid choice: 'median'": ["mobilenetv2_035", *target, "--activations", "median"],
    }
    for message, arguments in cases.items():
        assert main(["quantize", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_language_models_are_refused(capsys, tmp_path):
    recipe = parse_recipe(text_content({"trainer.epochs": 1, "trainer.limit_train_batches": 2}, tmp_path / "run"))
    checkpoint = str(train(recipe).best)
    assert main(["quantize", checkpoint, "--output", str(tmp_path / "x.onnx")]) == 2
    assert "quantize is for image networks" in capsys.readouterr().err
