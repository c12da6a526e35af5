"""A run that is killed without warning, as by a power cut, and taken up again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from gatewise.tasks import parse_recipe, train
from tests.tasks.conftest import assert_same_checkpoint, tiny_content

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
