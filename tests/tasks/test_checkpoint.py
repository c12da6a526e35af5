from __future__ import annotations

import errno
import os
import resource
import signal

import pytest
import torch

from gatewise.errors import CheckpointError, Failure
from gatewise.tasks import train
from gatewise.tasks.checkpoint import AtomicCheckpointIO
from tests.tasks.conftest import weights


@pytest.fixture
def small_disk():
    """Writes beyond 64 KiB fail as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_leaves_the_previous_checkpoint(tmp_path, small_disk):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"x": torch.ones(3)}, path)
    with pytest.raises(Failure, match=r"cannot write .*last\.ckpt: File too large; the file that was there before"):
        io.save_checkpoint({"x": torch.zeros(100_000)}, path)
    assert torch.equal(io.load_checkpoint(path)["x"], torch.ones(3))
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_first_write_that_fails_leaves_nothing(tmp_path, small_disk):
    with pytest.raises(Failure, match="nothing was left behind"):
        AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(100_000)}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == []


def test_a_run_whose_disk_fills_up_stops_and_keeps_its_last_checkpoint(tiny_recipe, monkeypatch):
    recipe = tiny_recipe({"trainer.checkpoint_every": 2})
    saved, save = [], torch.save

    def save_until_full(content, file):
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(content)
        save(content, file)

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(Failure, match="No space left on device"):
        train(recipe)
    monkeypatch.undo()
    last = f"{recipe.output}/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert train(recipe, resume=True).steps == 10


def test_checkpoints_hold_plain_data_only_and_all_that_a_resumed_run_needs(tiny_recipe):
    result = train(tiny_recipe({"trainer.epochs": 1, "trainer.ema": 0.9}))
    for path in (result.best, result.last):
        content = torch.load(path, weights_only=True)
        assert {"state_dict", "state_dict_ema", "optimizer_states", "lr_schedulers", "loops", "gatewise"} <= set(
            content
        )
        assert all(name.startswith("model.") for name in content["state_dict"])
    assert any("optimizer_states" in name for name in weights(result.last))


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": os.system}, path)
    with pytest.raises(CheckpointError, match="refused"):
        AtomicCheckpointIO().load_checkpoint(path)
