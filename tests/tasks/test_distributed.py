"""Two processes on the CPU (gloo) against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gatewise.tasks import load_trained, parse_recipe, train
from gatewise.tasks.logs import read_log
from gatewise.tasks.training import _strategy
from tests.tasks.conftest import text_content, tiny_content
from tests.tasks.test_language_modeling import without_speed

FIELDS = {"trainer.clip_grad": 0.5, "optim.warmup_epochs": 0.5, "optim.warmup_lr": 1e-4, "optim.reference_batch": 32}


def _torchrun(*words: str) -> None:
    """Run a module in two processes, each with one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """A run of one process with the double batch."""
    folder = tmp_path_factory.mktemp("one")
    return train(parse_recipe(tiny_content({**FIELDS, "data.batch_size": 32}, folder))).folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_the_double_batch(one_process, tmp_path, strategy):
    folder = tmp_path / strategy
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_content({**FIELDS, "data.batch_size": 16}, folder)))
    _torchrun("gatewise", "train", str(recipe), "--trainer.strategy", strategy)
    one, two = read_log(one_process / "metrics.csv"), read_log(folder / "metrics.csv")
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for left, right in zip(one, two, strict=True):
        # Sums are taken in another order; the loss is about 2.3.
        assert left == pytest.approx(right, rel=1e-5, abs=1e-6)
    weights = [load_trained(path / "best.ckpt").model.state_dict() for path in (one_process, folder)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_a_language_model_as_one_with_the_double_batch(tmp_path, strategy):
    fields = {**FIELDS, "data.packing": "documents", "task.sample_every": 1, "task.sample_tokens": 5}
    one = train(parse_recipe(text_content({**fields, "data.batch_size": 4}, tmp_path / "one"))).folder
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(text_content({**fields, "data.batch_size": 2}, tmp_path / "two")))
    _torchrun("gatewise", "train", str(recipe), "--trainer.strategy", strategy)
    left, right = (without_speed(folder / "metrics.csv") for folder in (one, tmp_path / "two"))
    for row, other in zip(left, right, strict=True):
        # Sums are taken in another order; the loss is about 5.
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert (tmp_path / "two" / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()


def test_fsdp_shards_over_all_devices_of_all_machines_and_writes_whole_checkpoints():
    strategy = _strategy("fsdp", 4, 2)
    assert strategy._data_parallel_size == 8
    assert strategy._tensor_parallel_size == 1
    assert strategy._save_distributed_checkpoint is False
