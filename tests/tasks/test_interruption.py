"""Signals before, in and after training, and the exit status that follows. What is saved: test_training."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import yaml

from gatewise.cli import main
from gatewise.errors import Interrupted
from gatewise.tasks import training
from gatewise.tasks.interruption import Interruption
from tests.tasks.conftest import tiny_content

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_content({"trainer.epochs": 1}, tmp_path / "run")))
    return path


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_training_is_told_in_one_line(recipe_file, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(training, "build_data", lambda recipe: os.kill(os.getpid(), number))
    assert main(["train", str(recipe_file)]) == 128 + number
    assert capsys.readouterr().err == "gatewise: interrupted before training began; nothing was saved\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_training_is_an_exit_status_too(recipe_file, monkeypatch, capfd, number):
    step = training.task_class("classification").training_step

    def signaled(self, batch, batch_idx):
        os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(training.task_class("classification"), "training_step", signaled)
    assert main(["train", str(recipe_file)]) == 128 + number
    printed = capfd.readouterr().err
    assert "saved; resume with: gatewise train" in printed
    assert "nothing was saved" not in printed


@pytest.mark.parametrize("number", SIGNALS)
def test_handlers_are_given_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="too early"), Interruption("too early"):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_process_that_is_to_survive_a_hang_up_does():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_changes():
    found = []

    def look() -> None:
        with Interruption():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]
