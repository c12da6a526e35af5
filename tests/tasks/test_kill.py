"""A run that is killed without warning, as by a power cut, and taken up again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from gatewise.tasks import parse_recipe, train
from gatewise.tasks.logs import read_log
from gatewise.tasks.sweep_engines import read_outcome
from tests.tasks.conftest import assert_same_checkpoint, recall_content, tiny_content

STEPS_PER_EPOCH = 20
FIELDS = {
    "model.drop_path_rate": 0.3,
    "task.mixing": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "data.augment": {"auto_augment": "rand-m5-mstd0.5-inc1", "random_erasing": 0.5},
    "optim.warmup_epochs": 1,
    "trainer.ema": 0.9,
    "trainer.checkpoint_every": 3,
    "trainer.limit_train_batches": STEPS_PER_EPOCH,
}


def _command(recipe: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "gatewise", "train", str(recipe), *flags]


def test_a_run_killed_in_mid_epoch_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path):
    # As many threads as here: sums are taken in the same order.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    whole = train(parse_recipe(tiny_content(FIELDS, tmp_path / "whole")))
    killed = tmp_path / "killed.yaml"
    killed.write_text(yaml.safe_dump(tiny_content(FIELDS, tmp_path / "killed")))
    killed_last = tmp_path / "killed" / "last.ckpt"
    with subprocess.Popen(_command(killed), env=environment, stdout=subprocess.DEVNULL) as process:
        while not killed_last.exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -9
    step = torch.load(killed_last, weights_only=True)["global_step"]
    assert 0 < step < STEPS_PER_EPOCH

    subprocess.run(_command(killed, "--resume"), env=environment, check=True, capture_output=True)
    assert_same_checkpoint(whole.last, killed_last)
    assert_same_checkpoint(whole.best, killed_last.with_name("best.ckpt"))


KILLED_IN_REWRITE = """
import csv, os, signal, sys
from pathlib import Path
from gatewise.tasks.logs import CsvLog

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

owner, name = {"rows": (csv.DictWriter, "writerows"), "sync": (os, "fsync"), "place": (os, "replace")}[sys.argv[2]]
setattr(owner, name, die)
CsvLog(Path(sys.argv[1]), from_step=2)
"""


@pytest.mark.parametrize("moment", ["rows", "sync", "place"])
def test_a_kill_while_a_resumed_run_rewrites_its_log_keeps_all_rows(tmp_path, moment):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss\n0,0,3.0\n1,0,2.0\n2,0,1.0\n")
    words = [sys.executable, "-c", KILLED_IN_REWRITE, str(path), moment]
    assert subprocess.run(words, check=False, timeout=120).returncode == -9
    assert [row["train/loss"] for row in read_log(path)] == [3.0, 2.0, 1.0]


def test_a_sweep_whose_main_process_is_killed_leaves_none_behind_and_is_taken_up_again(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    fields = {"trainer.epochs": 60, "trainer.limit_train_batches": 2, "trainer.checkpoint_every": 1}
    recipe.write_text(yaml.safe_dump(recall_content(fields, tmp_path / "unused")))
    folder = tmp_path / "sweep"
    words = [sys.executable, "-m", "gatewise", "sweep", str(recipe), "--axis", "seed=0,1", "--jobs", "2"]
    words += ["--output", str(folder)]
    cells = [folder / "cells" / f"seed={seed}" for seed in (0, 1)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while not all((cell / "last.ckpt").exists() for cell in cells):
            assert process.poll() is None
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    assert [read_outcome(cell) for cell in cells] == [None, None]

    subprocess.run(words, check=True, capture_output=True, timeout=200)
    for cell in cells:
        assert read_outcome(cell)[0].steps == 120
        steps = [row["step"] for row in read_log(cell / "metrics.csv") if "train/loss" in row]
        assert steps == list(range(120))
