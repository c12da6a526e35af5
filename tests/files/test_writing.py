from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from gatewise.errors import Failure
from gatewise.files import atomic_folder, remove_leftovers, write_atomically, write_json, write_text

HALF_WRITER = """
import sys, time
from pathlib import Path
from gatewise.files import {function}
target = Path(sys.argv[1])
def write(file):
    file.write(b"half"); file.flush(); print("writing", flush=True); time.sleep(60)
{call}
"""
FILE = HALF_WRITER.format(function="write_atomically", call="write_atomically(target, write)")
FOLDER = HALF_WRITER.format(
    function="atomic_folder",
    call="""
with atomic_folder(target) as folder:
    with (folder / "part").open("wb") as file:
        write(file)
""",
)


@pytest.fixture
def writer(tmp_path):
    """Starts a process that is in the middle of a write to `tmp_path / "target"`."""
    started = []

    def start(program):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "target")], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_raises_keeps_the_previous_file(tmp_path):
    def write(file):
        file.write(b"half")
        raise RuntimeError("a bug")

    write_text(tmp_path / "a", "whole")
    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "whole"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match=r"cannot write .*file/inside"):
        write_text(tmp_path / "file" / "inside", "text")


@pytest.mark.parametrize("name", ["ä" * 120, "a b\n*", "x" * 250])
def test_any_legal_name_can_be_written(tmp_path, name):
    write_text(tmp_path / name, "text")
    assert os.listdir(tmp_path) == [name]


def test_json_does_not_hold_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("program", [FILE, FOLDER])
def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path, writer, program):
    process = writer(program)
    assert len(os.listdir(tmp_path)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(os.listdir(tmp_path)) == 1
    write_text(tmp_path / "target", "whole")
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("program", [FILE, FOLDER])
def test_the_temporary_file_of_a_living_process_is_left_alone(tmp_path, writer, program):
    writer(program)
    [before] = os.listdir(tmp_path)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [before]


def test_temporary_files_of_other_programs_are_left_alone(tmp_path):
    foreign = [".cache.tmp", ".last.ckpt.123.tmp", ".a.gatewise-12.tmp", "a.gatewise-0123456789abcdef.tmp"]
    for name in foreign:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(foreign)


def test_a_link_named_like_a_leftover_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("")
    (tmp_path / ".a.gatewise-0123456789abcdef.tmp").symlink_to(tmp_path / "precious")
    remove_leftovers(tmp_path)
    assert (tmp_path / "precious").exists()


def test_only_leftovers_of_the_same_target_are_removed_by_a_write(tmp_path, writer):
    process = writer(FILE)
    process.kill()
    process.wait()
    write_text(tmp_path / "other", "")
    assert len(os.listdir(tmp_path)) == 2


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "cache") as folder:
        (folder / "part").write_text("1")
        assert not (tmp_path / "cache").exists()
    assert (tmp_path / "cache" / "part").read_text() == "1"
    assert os.listdir(tmp_path) == ["cache"]


def test_a_folder_that_is_not_finished_does_not_appear(tmp_path):
    def make():
        with atomic_folder(tmp_path / "cache") as folder:
            (folder / "part").write_text("1")
            raise KeyError

    with pytest.raises(KeyError):
        make()
    assert os.listdir(tmp_path) == []


def test_of_two_processes_that_make_a_folder_the_first_counts(tmp_path):
    with atomic_folder(tmp_path / "cache") as slow:
        (slow / "part").write_text("slow")
        with atomic_folder(tmp_path / "cache") as fast:
            (fast / "part").write_text("fast")
    assert (tmp_path / "cache" / "part").read_text() == "fast"
    assert os.listdir(tmp_path) == ["cache"]


def test_writes_of_many_threads_to_one_path_all_succeed(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_text(tmp_path / "a", str(number) * 1000), range(64)))
    assert len(set((tmp_path / "a").read_text())) <= 2
    assert os.listdir(tmp_path) == ["a"]
