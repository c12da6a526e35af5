"""Who may use a run's folder, and what is never lost in it."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from gatewise.errors import UserError
from gatewise.files import FolderInUseError, lock_folder
from gatewise.files.locking import OWNER_NAME
from gatewise.tasks import run_folder, train
from gatewise.tasks.run_folder import RunFolder
from tests.tasks.test_resume import Crash

ONE_EPOCH = {"trainer.epochs": 1, "trainer.limit_train_batches": 3}
LEFTOVER = ".last.ckpt.gatewise-0123456789abcdef.tmp"
HOLDER = """
import sys, time
from pathlib import Path
from gatewise.files import lock_folder
with lock_folder(Path(sys.argv[1]), "run folder", patience_s=0):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def in_use(tmp_path, monkeypatch):
    """Another process uses the folder `tmp_path / "run"`, and nobody waits for it."""
    monkeypatch.setattr(run_folder, "lock_folder", partial(lock_folder, patience_s=0.0))
    (tmp_path / "run").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield
    process.kill()
    process.wait(timeout=10)
    process.stdout.close()


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_one_process_at_a_time_uses_a_folder(tiny_recipe, in_use, how):
    with pytest.raises(FolderInUseError, match="the run folder .* is in use by process"):
        train(tiny_recipe(), **how)


def test_a_finished_run_holds_its_folder_no_longer(tiny_recipe):
    result = train(tiny_recipe(ONE_EPOCH))
    assert not (result.folder / OWNER_NAME).exists()
    with lock_folder(result.folder, patience_s=0):
        pass


def test_what_others_put_into_the_folder_stays(tiny_recipe):
    recipe = tiny_recipe(ONE_EPOCH)
    theirs = [Path(recipe.output, name) for name in (".notes.tmp", "tensorboard/mine.txt", "data/last.ckpt")]
    for file in theirs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    train(recipe)
    train(recipe, overwrite=True)
    assert [file.read_text() for file in theirs] == ["mine"] * 3
    assert len(list(Path(recipe.output, "tensorboard").glob("events.out.tfevents.*"))) == 1


def test_what_a_killed_run_was_writing_is_removed_by_its_resumption(tiny_recipe):
    recipe = tiny_recipe({"trainer.checkpoint_every": 2})
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, callbacks=[Crash(3)])
    leftover = Path(recipe.output, LEFTOVER)
    leftover.write_bytes(b"half")
    train(recipe, resume=True)
    assert not leftover.exists()


@pytest.mark.parametrize("how", [{}, {"resume": True}])
def test_a_run_stopped_before_its_first_checkpoint_starts_from_the_beginning(tiny_recipe, capfd, how):
    recipe = tiny_recipe()
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, callbacks=[Crash(2)])
    assert not Path(recipe.output, "last.ckpt").exists()
    assert train(recipe, **how).steps == 10
    told = "stopped before its first checkpoint; it starts from the beginning" in capfd.readouterr().err
    assert told == ("resume" in how)


def test_a_recipe_of_somebodys_own_is_no_run_that_was_stopped(tiny_recipe):
    recipe = tiny_recipe(ONE_EPOCH)
    theirs = Path(recipe.output, "recipe.yaml")
    theirs.parent.mkdir()
    theirs.write_text("# mine\n" + recipe.to_yaml())
    with pytest.raises(UserError, match=r"holds a run already \(recipe\.yaml\): --overwrite replaces it"):
        train(recipe)
    with pytest.raises(UserError, match=r"nothing to resume: .*last\.ckpt; --overwrite replaces it"):
        train(recipe, resume=True)
    assert theirs.read_text().startswith("# mine")


def test_resuming_is_not_advised_where_there_is_nothing_to_resume(tiny_recipe):
    first = train(tiny_recipe(ONE_EPOCH))
    first.last.unlink()
    for how in ({}, {"resume": True}):
        with pytest.raises(UserError, match="--overwrite replaces it, --output NAME starts another") as caught:
            train(tiny_recipe(ONE_EPOCH), **how)
        assert "--resume" not in str(caught.value)


def test_a_folder_is_made_only_once_everything_is_ready(tmp_path):
    with RunFolder(tmp_path / "new", resume=False, overwrite=False) as run:
        assert not (tmp_path / "new").exists()
        run.prepare()
        assert (tmp_path / "new").is_dir()
