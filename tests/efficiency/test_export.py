"""An exported file gives the network's answers for any batch, or is not written at all."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from torch import nn

from gatewise.efficiency import export_onnx
from gatewise.efficiency.acceleration import export
from gatewise.errors import Failure
from tests.conftest import small_model

pytestmark = pytest.mark.untyped


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_the_file_takes_any_batch_and_agrees_with_the_network(tmp_path, tiny):
    path = tmp_path / "tiny.onnx"
    report = export_onnx(tiny, path, torch.randn(1, 3, 16, 16))
    assert report.files == (path,)
    assert report.bytes == path.stat().st_size
    assert report.input_shape == ("batch", 3, 16, 16)
    assert report.output_shape == ("batch", 5)
    assert report.batch_sizes == (1, 2)
    assert report.error < 1e-5
    x = torch.randn(5, 3, 16, 16)
    (output,) = session(path).run(None, {"images": x.numpy()})
    np.testing.assert_allclose(output, tiny(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


def test_the_batch_can_be_fixed(tmp_path, tiny):
    report = export_onnx(tiny, tmp_path / "tiny.onnx", torch.randn(3, 3, 16, 16), dynamic_batch=False)
    assert report.input_shape == (3, 3, 16, 16)
    assert report.batch_sizes == (3,)


@pytest.mark.parametrize("name", ["focalnet_tiny_srf", "inception_next_atto"])
def test_networks_of_the_library_export(tmp_path, name):
    report = export_onnx(small_model(name), tmp_path / "network.onnx", torch.randn(1, 3, 32, 32))
    assert report.error < 1e-4


class Unexportable(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x).real


def test_an_operator_without_onnx_form_is_named_and_the_old_file_survives(tmp_path):
    path = tmp_path / "old.onnx"
    path.write_bytes(b"old")
    with pytest.raises(Failure, match="ONNX has no form of the operator aten.linalg_eig"):
        export_onnx(Unexportable().eval(), path, torch.randn(2, 3, 3))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_disagrees_is_not_written(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(
        "gatewise.efficiency.acceleration.export.onnx_session", lambda model, threads: lambda x: torch.zeros(len(x), 5)
    )
    with pytest.raises(Failure, match=r"differs from the original by 1.0e\+00 on 1 samples.*nothing was written"):
        export_onnx(tiny, tmp_path / "tiny.onnx", torch.randn(1, 3, 16, 16))
    assert not list(tmp_path.iterdir())


def test_large_weights_go_into_a_second_file(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("gatewise.efficiency.acceleration.export.LARGEST_FILE", 100)
    report = export_onnx(tiny, tmp_path / "tiny.onnx", torch.randn(1, 3, 16, 16))
    assert [file.name for file in report.files] == ["tiny.onnx", "tiny.onnx.data"]
    assert report.error < 1e-5
    assert session(report.files[0]).get_inputs()[0].name == "images"
    with pytest.raises(Failure, match="does not fit into one ONNX file in memory"):
        export.onnx_bytes(tiny, torch.randn(1, 3, 16, 16))


def test_mistakes_are_named(tmp_path, tiny, images):
    with pytest.raises(ValueError, match="does not exist; create it first"):
        export_onnx(tiny, tmp_path / "missing" / "tiny.onnx", images)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        export_onnx(tiny, tmp_path, images)
    with pytest.raises(ValueError, match="cannot run on an example"):
        export_onnx(tiny, tmp_path / "tiny.onnx", images[:, :2])
    with pytest.raises(ValueError, match="call .eval"):
        export_onnx(tiny.train(), tmp_path / "tiny.onnx", images)


def leftover_of(path):
    """A folder as a killed export leaves it."""
    folder = path.with_name(f".{path.name}.gatewise-0123456789abcdef.tmp")
    folder.mkdir()
    (folder / path.name).write_bytes(b"half")
    return folder


def test_what_a_killed_export_left_is_removed_by_the_next_to_the_same_path(tmp_path, tiny):
    own, other = leftover_of(tmp_path / "tiny.onnx"), leftover_of(tmp_path / "other.onnx")
    export_onnx(tiny, tmp_path / "tiny.onnx", torch.randn(1, 3, 16, 16))
    assert not own.exists()
    assert other.exists()


def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_one(tmp_path, tiny, monkeypatch):
    path = tmp_path / "tiny.onnx"
    path.write_bytes(b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gatewise.efficiency.acceleration.export._save", full)
    with pytest.raises(Failure, match=r"^cannot write .*tiny.onnx: No space left on device$"):
        export_onnx(tiny, path, torch.randn(1, 3, 16, 16))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
