from __future__ import annotations

import subprocess
import sys

import pytest

from gatewise.errors import UserError
from gatewise.files import FolderInUseError, lock_folder

HOLDER = """
import sys, time
from pathlib import Path
from gatewise.files import lock_folder
with lock_folder(Path(sys.argv[1]), patience_s=0):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_in_use_is_refused_and_its_user_named(tmp_path, holder):
    told = rf"the run folder .* is in use by process {holder.pid} on"
    with pytest.raises(FolderInUseError, match=told), lock_folder(tmp_path, "run folder", patience_s=0):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path, patience_s=0):
        pass


def test_a_lock_is_waited_for(tmp_path, holder, capsys):
    import threading

    threading.Timer(1.0, holder.kill).start()
    with lock_folder(tmp_path, patience_s=30):
        pass
    assert f"waiting for process {holder.pid}" in capsys.readouterr().err


def test_a_lock_can_be_taken_again_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), lock_folder(tmp_path, patience_s=0):
            raise KeyError


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"), lock_folder(tmp_path / "file"):
        pass
