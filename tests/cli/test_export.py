"""`gatewise export`: a checked file, or one clear line."""

from __future__ import annotations

import pytest
import torch

import gatewise
from gatewise.cli import main


@pytest.mark.untyped
def test_a_checkpoint_is_exported_with_its_weights(capsys, tmp_path):
    model = gatewise.create_model("mobilenetv2_035", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    path = tmp_path / "network.onnx"
    arguments = ["--checkpoint", str(tmp_path / "weights.pth"), "--num-classes", "10", "--image-size", "32", "32"]
    assert main(["export", "mobilenetv2_035", "--to", str(path), *arguments]) == 0
    text = capsys.readouterr().out
    assert f"wrote {path}" in text
    assert "input batch x 3 x 32 x 32, output batch x 10" in text
    assert "onnxruntime agrees" in text

    import onnxruntime

    x = torch.randn(3, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model.eval()(x).detach(), rtol=1e-3, atol=1e-5)


def test_mistakes_are_one_line(capsys, tmp_path):
    assert main(["export", "mobilenetv2_035", "--to", str(tmp_path / "missing" / "x.onnx")]) == 2
    assert "does not exist; create it first" in capsys.readouterr().err
    assert main(["export", "mobilenetv2_035", "--to", str(tmp_path / "x.onnx"), "--fixed-batch", "0"]) == 2
    assert "--fixed-batch must be 1 or more" in capsys.readouterr().err
    assert main(["export", "mobilenetv2_035"]) == 2
    assert "required: --to" in capsys.readouterr().err
