"""Which reader a checkpoint gets, and what is told of the files and places that cannot be read."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gatewise.catalog.checkpoint import read_checkpoint
from gatewise.cli import main
from gatewise.errors import CheckpointError, Failure

STATE = {"w": torch.arange(3.0)}
WRITERS = {
    "torch": lambda path: torch.save(STATE, path),
    "legacy": lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: save_file(STATE, path),
    "numpy": lambda path: write_numpy(path),
}


def write_numpy(path):
    with path.open("wb") as file:
        np.savez(file, w=STATE["w"].numpy())


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", ["0123-download", "weights.bin", "weights.pth.tar"])
def test_the_content_decides_where_the_name_does_not(tmp_path, kind, name):
    WRITERS[kind](tmp_path / name)
    assert torch.equal(read_checkpoint(tmp_path / name)["w"], STATE["w"])


@pytest.mark.parametrize("kind", ["torch", "safetensors", "numpy"])
def test_no_flipped_bit_of_an_archive_changes_the_weights(tmp_path, kind):
    path = tmp_path / "w.bin"
    WRITERS[kind](path)
    content = path.read_bytes()
    generator = np.random.RandomState(0)
    # The data of safetensors have no checksum.
    end = content.index(STATE["w"].numpy().tobytes()) if kind == "safetensors" else len(content)
    told = []
    for place in generator.randint(0, end, 40):
        broken = bytearray(content)
        broken[place] ^= 1 << generator.randint(8)
        path.write_bytes(broken)
        try:
            found = read_checkpoint(path)
        except CheckpointError as error:
            told.append(str(error))
        else:
            assert torch.equal(next(iter(found.values())).view(-1), STATE["w"])
    assert len(told) >= 5
    assert all("w.bin" in message and "\n" not in message for message in told)


@pytest.mark.parametrize("source", ["x" * 300 + ".pth", "nul\0.pth", "~nobody-at-all/w.pth", "a--b/c..d"])
def test_names_that_no_file_can_have_are_told(source, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as told:
        read_checkpoint(source)
    assert "\n" not in str(told.value)


def test_a_pipe_is_not_a_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "w.pth")


def test_without_a_home_torch_home_is_asked_for(monkeypatch, tmp_path):
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no home folder .*set TORCH_HOME"):
        read_checkpoint("http://127.0.0.1:9/w.pth")
    assert os.listdir(tmp_path) == []


def test_a_cache_that_cannot_be_written_names_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(Failure, match="TORCH_HOME chooses another folder"):
        read_checkpoint("http://127.0.0.1:9/w.pth")


def test_a_malformed_url_is_told_by_the_command_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert main(["show", "mobilenetv2_035", "--checkpoint", "http://a b/x.pth"]) == 2
    error = capsys.readouterr().err
    assert "cannot download 'http://a b/x.pth'" in error
    assert error.count("\n") == 1
